package images

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/match"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// recipe is part of every layer's key: raise it when a recipe changes.
const recipe = "3"

// The three ways a layer can be packed; all of them occur in the images.
const (
	gzipped      = types.OCILayer
	zstandard    = types.OCILayerZStd
	uncompressed = types.OCIUncompressedLayer
)

type builder struct {
	bin, dir string
	progress io.Writer
	layout   layout.Path
	layers   *layers
	apt      *debian
}

// Build makes sure that dir/layout holds the images for development and for the
// project's own tests. bin has the programs that go into them. What was built
// before is kept.
func Build(ctx context.Context, bin, dir string, progress io.Writer) error {
	return with(&builder{bin: bin, dir: dir, progress: progress}, func(b *builder) error { return b.all(ctx) })
}

// with runs work on a builder whose directory is locked and opened.
func with(b *builder, work func(*builder) error) error {
	dir := b.dir
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	layoutDir := filepath.Join(dir, "layout")
	if b.layout, err = layout.FromPath(layoutDir); errors.Is(err, fs.ErrNotExist) {
		b.layout, err = layout.Write(layoutDir, empty.Index)
	}
	if err != nil {
		return err
	}
	if b.layers, err = openLayers(layoutDir, filepath.Join(dir, "layers.json")); err != nil {
		return err
	}
	return work(b)
}

func (b *builder) say(format string, args ...any) {
	fmt.Fprintf(b.progress, "images: "+format+"\n", args...)
}

// debian is set up once, and only if a layer really has to be built.
func (b *builder) debian(ctx context.Context) (*debian, error) {
	if b.apt != nil {
		return b.apt, nil
	}
	var err error
	b.apt, err = newDebian(ctx, filepath.Join(b.dir, "apt"))
	return b.apt, err
}

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// image puts layers together under a name, unless it is there already.
func (b *builder) image(name string, config v1.Config, parts ...*layer) error {
	image, err := assemble(name, config, parts...)
	if err != nil {
		return err
	}
	digest, err := image.Digest()
	if err != nil {
		return err
	}
	if there, err := b.has(name, digest); err != nil || there {
		return err
	}
	b.say("%s", name)
	return b.layout.ReplaceImage(image, match.Annotation(refName, name), layout.WithAnnotations(map[string]string{refName: name}))
}

// assemble makes an image of layers and a configuration.
func assemble(name string, config v1.Config, parts ...*layer) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	var additions []mutate.Addendum
	for _, part := range parts {
		additions = append(additions, mutate.Addendum{Layer: part, MediaType: part.Media, History: v1.History{CreatedBy: "gantry e2e images"}})
	}
	image, err := mutate.Append(image, additions...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.Architecture, file.OS, file.Created = runtime.GOARCH, "linux", v1.Time{Time: time.Unix(0, 0).UTC()}
	config.Env = append([]string{searchPath}, config.Env...)
	file.Config = config
	if image, err = mutate.ConfigFile(image, file); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return image, nil
}

func (b *builder) has(name string, digest v1.Hash) (bool, error) {
	index, err := b.layout.ImageIndex()
	if err != nil {
		return false, err
	}
	list, err := index.IndexManifest()
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(list.Manifests, func(d v1.Descriptor) bool {
		return d.Annotations[refName] == name && d.Digest == digest
	}), nil
}

// program is a layer with one of the built programs, in the root directory.
func (b *builder) program(name string, media types.MediaType, more func(*tree)) (*layer, error) {
	return b.programAt(name, name, 0o755, media, more)
}

// programAt is a layer with one of the built programs.
func (b *builder) programAt(name, path string, mode int64, media types.MediaType, more func(*tree)) (*layer, error) {
	content, err := os.ReadFile(filepath.Join(b.bin, name))
	if err != nil {
		return nil, fmt.Errorf("program for an image: %w", err)
	}
	return b.layers.get(fmt.Sprintf("%s program %s %o %x", recipe, path, mode, sha256.Sum256(content)), media, func() (*tree, error) {
		t := newTree()
		t.file(path, mode, content)
		if more != nil {
			more(t)
		}
		return t, nil
	})
}
