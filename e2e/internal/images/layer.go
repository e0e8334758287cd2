package images

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// tree is the content of one layer.
type tree struct{ entries map[string]*entry }

type entry struct {
	header *tar.Header
	data   []byte
}

func newTree() *tree { return &tree{entries: map[string]*entry{}} }

// merged is the place of a path on a system with merged /usr, where /bin, /lib,
// /lib64 and /sbin are links.
func (t *tree) merged(name string) string {
	first, rest, ok := strings.Cut(name, "/")
	switch first {
	case "bin", "sbin", "lib", "lib64":
		if top := t.entries[first]; ok && top != nil && top.header.Typeflag == tar.TypeSymlink {
			return path.Join(top.header.Linkname, rest)
		}
	}
	return name
}

func (t *tree) add(name string, header *tar.Header, data []byte) {
	name = t.merged(name)
	old := t.entries[name]
	if old != nil && header.Typeflag == tar.TypeDir && (old.header.Typeflag == tar.TypeSymlink || old.header.Typeflag == tar.TypeDir) {
		return // a directory of two packages, or one behind a link
	}
	t.entries[name] = &entry{&tar.Header{
		Name: name, Typeflag: header.Typeflag, Linkname: header.Linkname, Size: int64(len(data)),
		Mode: header.Mode, Uid: header.Uid, Gid: header.Gid,
		Devmajor: header.Devmajor, Devminor: header.Devminor, Format: tar.FormatPAX,
	}, data}
}

func (t *tree) dir(name string, mode int64) { t.owned(name, mode, 0) }

// owned adds a directory of a user and the group of the same number.
func (t *tree) owned(name string, mode int64, user int) {
	t.add(name, &tar.Header{Typeflag: tar.TypeDir, Mode: mode, Uid: user, Gid: user}, nil)
}

// file adds a file; it replaces one of that name.
func (t *tree) file(name string, mode int64, data []byte) {
	t.add(name, &tar.Header{Typeflag: tar.TypeReg, Mode: mode}, data)
}

func (t *tree) symlink(name, target string) {
	t.add(name, &tar.Header{Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: target}, nil)
}

// write writes the tree as a tar, always in the same order: parents before
// children, hard links after what they link to.
func (t *tree) write(w io.Writer) error {
	names := make([]string, 0, len(t.entries))
	for name := range t.entries {
		names = append(names, name)
	}
	sort.Slice(names, func(i, j int) bool {
		a, b := t.entries[names[i]].header.Typeflag == tar.TypeLink, t.entries[names[j]].header.Typeflag == tar.TypeLink
		if a != b {
			return b
		}
		return names[i] < names[j]
	})
	out := tar.NewWriter(w)
	for _, name := range names {
		e := t.entries[name]
		header := *e.header
		if header.Typeflag == tar.TypeDir {
			header.Name += "/"
		}
		if err := out.WriteHeader(&header); err != nil {
			return fmt.Errorf("tar %s: %w", name, err)
		}
		if _, err := out.Write(e.data); err != nil {
			return fmt.Errorf("tar %s: %w", name, err)
		}
	}
	return out.Close()
}

// layer is a layer whose blob lies in the OCI layout.
type layer struct {
	DigestHash v1.Hash         `json:"digest"`
	DiffHash   v1.Hash         `json:"diffID"`
	Bytes      int64           `json:"size"`
	Media      types.MediaType `json:"mediaType"`
	file       string
}

// The methods of v1.Layer.

func (l *layer) Digest() (v1.Hash, error)             { return l.DigestHash, nil }
func (l *layer) DiffID() (v1.Hash, error)             { return l.DiffHash, nil }
func (l *layer) Size() (int64, error)                 { return l.Bytes, nil }
func (l *layer) MediaType() (types.MediaType, error)  { return l.Media, nil }
func (l *layer) Compressed() (io.ReadCloser, error)   { return os.Open(l.file) }
func (l *layer) Uncompressed() (io.ReadCloser, error) { return nil, errors.ErrUnsupported }

var _ v1.Layer = (*layer)(nil)

// layers keeps what was built, by a key of all that went in.
type layers struct {
	dir   string // of the OCI layout
	file  string // of the cache
	known map[string]*layer
}

func openLayers(layoutDir, file string) (*layers, error) {
	l := &layers{dir: layoutDir, file: file, known: map[string]*layer{}}
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	} else if err != nil {
		return nil, err
	}
	return l, json.Unmarshal(raw, &l.known)
}

// get returns the layer for a key, and builds it if it is not there.
func (l *layers) get(key string, media types.MediaType, build func() (*tree, error)) (*layer, error) {
	sum := sha256.Sum256([]byte(key))
	id := hex.EncodeToString(sum[:8]) + "." + string(media)
	if known := l.known[id]; known != nil {
		known.file = filepath.Join(l.dir, "blobs", known.DigestHash.Algorithm, known.DigestHash.Hex)
		if info, err := os.Stat(known.file); err == nil && info.Size() == known.Bytes {
			return known, nil
		}
	}
	content, err := build()
	if err != nil {
		return nil, err
	}
	built, err := l.store(content, media)
	if err != nil {
		return nil, err
	}
	l.known[id] = built
	raw, err := json.MarshalIndent(l.known, "", "  ")
	if err != nil {
		return nil, err
	}
	return built, os.WriteFile(l.file, raw, 0o644)
}

// store packs a tree as its media type says and puts it into the layout.
func (l *layers) store(content *tree, media types.MediaType) (*layer, error) {
	dir := filepath.Join(l.dir, "blobs", "sha256")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(l.file), "layer-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	blob := &digester{w: f, hash: sha256.New()}
	var packer io.WriteCloser
	switch media {
	case types.OCILayer:
		packer = gzip.NewWriter(blob)
	case types.OCILayerZStd:
		if packer, err = zstd.NewWriter(blob); err != nil {
			return nil, err
		}
	case types.OCIUncompressedLayer:
		packer = nopCloser{blob}
	default:
		return nil, fmt.Errorf("layers of type %s are not built here", media)
	}
	plain := &digester{w: packer, hash: sha256.New()}
	if err := content.write(plain); err != nil {
		return nil, err
	}
	if err := packer.Close(); err != nil {
		return nil, err
	}
	built := &layer{DigestHash: blob.sum(), DiffHash: plain.sum(), Bytes: blob.size, Media: media}
	built.file = filepath.Join(dir, built.DigestHash.Hex)
	if err := f.Chmod(0o644); err != nil {
		return nil, err
	}
	return built, os.Rename(f.Name(), built.file)
}

type digester struct {
	w    io.Writer
	hash hash.Hash
	size int64
}

func (d *digester) Write(p []byte) (int, error) {
	n, err := d.w.Write(p)
	d.hash.Write(p[:n])
	d.size += int64(n)
	return n, err
}

func (d *digester) sum() v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(d.hash.Sum(nil))}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
