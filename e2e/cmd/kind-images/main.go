// Command kind-images writes the images of a node image for kind to standard
// output, as an archive. hack/kind/node-image runs it.
//
//	kind-images BIN DIR NAME...
//
// BIN has the programs that go into the images, DIR keeps layers from one run to
// the next, and the names are those of `kubeadm config images list` and
// of the manifests in hack/kind.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "kind-images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) < 3 {
		return fmt.Errorf("%d arguments: name the directory of programs, a directory for layers, and images", len(args))
	}
	out := bufio.NewWriterSize(os.Stdout, 1<<20)
	if err := images.WriteKubeadm(ctx, args[0], args[1], args[2:], out, os.Stderr); err != nil {
		return err
	}
	return out.Flush()
}
