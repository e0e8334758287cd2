package images

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Images for measurements. Each has busybox as its lowest layer.
const (
	// BigGzip and BigZstd have six layers of 200 MB together, compressed.
	BigGzip = "bench/big-gzip:1"
	BigZstd = "bench/big-zstd:1"
	// LogWriter runs cmd/logwriter.
	LogWriter = "bench/logwriter:1"
)

// Parts are images of about 43 MB that share nothing but busybox.
var Parts = []string{"bench/part-1:1", "bench/part-2:1", "bench/part-3:1", "bench/part-4:1", "bench/part-5:1"}

// BuildBench makes sure that dir/layout also holds the images for measurements,
// and what Pods of a stock node are held by. kubernetes is the source tree that
// has the latter.
func BuildBench(ctx context.Context, bin, dir, kubernetes string, progress io.Writer) error {
	return with(&builder{bin: bin, dir: dir, progress: progress}, func(b *builder) error {
		if _, _, err := (&upstreamBuilder{b, kubernetes}).pause(ctx); err != nil {
			return err
		}
		program, err := b.program("logwriter", gzipped, nil)
		if err != nil {
			return err
		}
		if err := b.onBusybox(ctx, LogWriter, gzipped, program); err != nil {
			return err
		}
		if err := b.filled(ctx, BigGzip, gzipped, 1000, 5, 77<<20); err != nil {
			return err
		}
		// Other files: nodes know a layer by what is in it, however it is packed.
		if err := b.filled(ctx, BigZstd, zstandard, 1500, 5, 84<<20); err != nil {
			return err
		}
		for i, name := range Parts {
			if err := b.filled(ctx, name, gzipped, uint64(2000+10*i), 2, 40<<20); err != nil {
				return err
			}
		}
		return nil
	})
}

// onBusybox puts layers on busybox, packed the same way.
func (b *builder) onBusybox(ctx context.Context, name string, media types.MediaType, parts ...*layer) error {
	base, err := b.busyboxLayer(ctx, media)
	if err != nil {
		return err
	}
	return b.image(name, v1.Config{Cmd: []string{"sh"}}, append([]*layer{base}, parts...)...)
}

// filled is an image with layers of generated files, each of size bytes before compression.
func (b *builder) filled(ctx context.Context, name string, media types.MediaType, seed uint64, count, size int) error {
	var parts []*layer
	for i := range count {
		seed := seed + uint64(i)
		part, err := b.layers.get(fmt.Sprintf("%s filled %d %d", recipe, seed, size), media, func() (*tree, error) {
			b.say("%s: layer %d of %d", name, i+1, count)
			return filledTree(seed, size), nil
		})
		if err != nil {
			return err
		}
		parts = append(parts, part)
	}
	return b.onBusybox(ctx, name, media, parts...)
}

// filledTree is a directory with files whose sizes spread as those of a Linux
// distribution do, from a quarter of a KiB to half a MiB, most of them small.
// A quarter of every block is noise and the rest is words, so that it shrinks
// to about a half. The same seed gives the same bytes.
func filledTree(seed uint64, size int) *tree {
	random := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	numbers := rand.New(random)
	words := make([][]byte, 256)
	for i := range words {
		word := make([]byte, 3+numbers.IntN(8))
		for j := range word {
			word[j] = byte('a' + numbers.IntN(26))
		}
		words[i] = append(word, ' ')
	}
	t := newTree()
	top := fmt.Sprintf("data-%d", seed)
	t.dir(top, 0o755)
	for i, filled := 0, 0; filled < size; i++ {
		if i%64 == 0 {
			t.dir(fmt.Sprintf("%s/%d", top, i/64), 0o755)
		}
		length := 256 << numbers.IntN(11)
		content := make([]byte, length+numbers.IntN(length))
		for at := 0; at < len(content); {
			noise := content[at:min(at+1024, len(content))]
			random.Read(noise)
			at += len(noise)
			for end := min(at+3072, len(content)); at < end; {
				at += copy(content[at:end], words[numbers.IntN(len(words))])
			}
		}
		t.file(fmt.Sprintf("%s/%d/%d", top, i/64, i), 0o644, content)
		filled += len(content)
	}
	return t
}
