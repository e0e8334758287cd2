// Package images builds the images of the test cluster and serves them.
package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
)

// refName is the annotation of an OCI layout that holds an image's name.
const refName = "org.opencontainers.image.ref.name"

// Registry serves an OCI layout, and what is pushed to it, over plain HTTP.
//
// Blobs of repositories below slow/ are served with SlowRate, so that a test
// can do something in the middle of a pull.
type Registry struct {
	// Layout is the directory of built images; it is only read.
	Layout string
	// Pushes is the directory for pushed blobs.
	Pushes string
}

// SlowRate is the speed of repositories below slow/, in bytes per second.
const SlowRate = 256 << 10

// Handler loads the manifests of the layout and returns the registry.
func (r Registry) Handler() (http.Handler, error) {
	if err := os.MkdirAll(r.Pushes, 0o755); err != nil {
		return nil, err
	}
	inner := registry.New(registry.WithBlobHandler(blobs{r}), registry.Logger(log.New(io.Discard, "", 0)))
	images, err := r.load()
	if err != nil {
		return nil, err
	}
	for _, image := range images {
		for _, prefix := range []string{"", "slow/"} {
			request := httptest.NewRequest(http.MethodPut, fmt.Sprintf("/v2/%s%s/manifests/%s", prefix, image.repository, image.tag), bytes.NewReader(image.manifest))
			request.Header.Set("Content-Type", image.mediaType)
			answer := httptest.NewRecorder()
			inner.ServeHTTP(answer, request)
			if answer.Code != http.StatusCreated {
				return nil, fmt.Errorf("load %s:%s: %d %s", image.repository, image.tag, answer.Code, answer.Body)
			}
		}
	}
	return logged(throttled(inner)), nil
}

type manifest struct {
	repository, tag, mediaType string
	manifest                   []byte
}

func (r Registry) load() ([]manifest, error) {
	path, err := layout.FromPath(r.Layout)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("image layout %s: %w", r.Layout, err)
	}
	index, err := path.ImageIndex()
	if err != nil {
		return nil, err
	}
	list, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	var found []manifest
	for _, entry := range list.Manifests {
		repository, tag, ok := strings.Cut(entry.Annotations[refName], ":")
		if !ok {
			continue
		}
		raw, err := path.Bytes(entry.Digest)
		if err != nil {
			return nil, err
		}
		found = append(found, manifest{repository, tag, string(entry.MediaType), raw})
	}
	return found, nil
}

// blobs finds blobs in the layout, then among the pushed ones.
type blobs struct{ r Registry }

func (b blobs) files(h v1.Hash) []string {
	return []string{filepath.Join(b.r.Layout, "blobs", h.Algorithm, h.Hex), filepath.Join(b.r.Pushes, h.Algorithm, h.Hex)}
}

func (b blobs) open(h v1.Hash) (*os.File, error) {
	for _, file := range b.files(h) {
		f, err := os.Open(file)
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
	return nil, registry.ErrNotFound
}

// Get implements registry.BlobHandler.
func (b blobs) Get(_ context.Context, _ string, h v1.Hash) (io.ReadCloser, error) {
	f, err := b.open(h)
	if err != nil {
		return nil, err // not f: a nil *os.File is no nil interface
	}
	return f, nil
}

// Stat implements registry.BlobStatHandler.
func (b blobs) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	f, err := b.open(h)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// Put implements registry.BlobPutHandler; the caller's reader checks the digest.
func (b blobs) Put(_ context.Context, _ string, h v1.Hash, rc io.ReadCloser) error {
	defer rc.Close()
	dir := filepath.Join(b.r.Pushes, h.Algorithm)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".push-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := io.Copy(f, rc); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), filepath.Join(dir, h.Hex))
}

func throttled(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/v2/slow/") && strings.Contains(r.URL.Path, "/blobs/") {
			w = slowWriter{w, r.Context()}
		}
		next.ServeHTTP(w, r)
	})
}

type slowWriter struct {
	http.ResponseWriter
	ctx context.Context
}

func (s slowWriter) Write(data []byte) (int, error) {
	const step = 50 * time.Millisecond
	const size = SlowRate * int(step) / int(time.Second)
	written := 0
	for written < len(data) {
		n, err := s.ResponseWriter.Write(data[written:min(written+size, len(data))])
		written += n
		if err != nil {
			return written, err
		}
		http.NewResponseController(s.ResponseWriter).Flush()
		select {
		case <-s.ctx.Done():
			return written, s.ctx.Err()
		case <-time.After(step):
		}
	}
	return written, nil
}

// logged writes one line for each request, which is how a test can tell what
// was pulled how often.
func logged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen := &statusWriter{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(seen, r)
		log.Printf("registry: %s %s %s %d", r.RemoteAddr, r.Method, r.URL.RequestURI(), seen.status)
	})
}

type statusWriter struct {
	http.ResponseWriter
	status int
}

func (s *statusWriter) WriteHeader(status int) {
	s.status = status
	s.ResponseWriter.WriteHeader(status)
}

// Unwrap lets http.ResponseController find Flush.
func (s *statusWriter) Unwrap() http.ResponseWriter { return s.ResponseWriter }
