package kit

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// SlowImage pushes busybox with a layer of random bytes that no node has seen
// to a repository that the registry serves slowly (256 KiB a second), so that a
// pull takes about the given time. It returns the image's name for Pod.
func (e *Env) SlowImage(repository string, pull time.Duration) string {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.Ctx, time.Minute)
	defer cancel()
	parse := func(image string) name.Reference {
		ref, err := name.ParseReference(e.Image(image), name.Insecure)
		if err != nil {
			e.t.Fatal(err)
		}
		return ref
	}
	base, err := remote.Image(parse("busybox:1.37"), remote.WithContext(ctx))
	if err != nil {
		e.t.Fatalf("pull busybox: %v", err)
	}
	ballast := make([]byte, int(pull.Seconds()*(256<<10)))
	if _, err := rand.Read(ballast); err != nil {
		e.t.Fatal(err)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "ballast", Mode: 0o644, Size: int64(len(ballast))}); err != nil {
		e.t.Fatal(err)
	}
	if _, err := w.Write(ballast); err != nil {
		e.t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		e.t.Fatal(err)
	}
	image, err := mutate.AppendLayers(base, static.NewLayer(layer.Bytes(), types.OCIUncompressedLayer))
	if err != nil {
		e.t.Fatal(err)
	}
	pushed := "slow/" + repository + ":" + e.Namespace
	if err := remote.Write(parse(pushed), image, remote.WithContext(ctx)); err != nil {
		e.t.Fatalf("push %s: %v", pushed, err)
	}
	return pushed
}
