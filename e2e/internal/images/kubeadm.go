package images

import (
	"context"
	"fmt"
	"io"
	"path"
	"strings"

	ref "github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// What kube-proxy runs, in each of its modes.
var proxyPackages = []string{"iptables", "nftables", "kmod"}

// WriteKubeadm writes an archive, in the form of docker save, with images that
// have the given names: those that `kubeadm config images list` prints, and those
// in hack/kind's manifests. The pause image is left out: Gantry's Pods need none.
func WriteKubeadm(ctx context.Context, bin, dir string, names []string, archive, progress io.Writer) error {
	return with(&builder{bin: bin, dir: dir, progress: progress}, func(b *builder) error {
		images := map[ref.Reference]v1.Image{}
		for _, full := range names {
			reference, err := ref.ParseReference(full)
			if err != nil {
				return err
			}
			image, err := b.kubeadmImage(ctx, full)
			if err != nil {
				return fmt.Errorf("image %s: %w", full, err)
			}
			if image != nil {
				images[reference] = image
			}
		}
		return tarball.MultiRefWrite(images, archive)
	})
}

// kubeadmImage makes an image of the built program that its name promises.
func (b *builder) kubeadmImage(ctx context.Context, full string) (v1.Image, error) {
	repository, _, _ := strings.Cut(full[strings.LastIndexByte(full, '/')+1:], ":")
	local := func(program string) (v1.Image, error) {
		part, err := b.programAt(program, path.Join("usr/local/bin", program), 0o755, zstandard, nil)
		if err != nil {
			return nil, err
		}
		return assemble(full, v1.Config{Entrypoint: []string{program}}, part)
	}
	switch repository {
	case "pause":
		return nil, nil
	case "kube-apiserver", "kube-controller-manager", "kube-scheduler", "etcd":
		return local(repository)
	case "gantry-node-routes":
		return local("node-routes")
	case "coredns":
		part, err := b.program("coredns", zstandard, nil)
		if err != nil {
			return nil, err
		}
		return assemble(full, v1.Config{Entrypoint: []string{"/coredns"}}, part)
	case "kube-proxy":
		base, err := b.debianLayer(ctx, zstandard, basePackages, nil, debianBase)
		if err != nil {
			return nil, err
		}
		tools, err := b.debianLayer(ctx, zstandard, proxyPackages, basePackages, alternatives)
		if err != nil {
			return nil, err
		}
		program, err := b.programAt("kube-proxy", "usr/local/bin/kube-proxy", 0o755, zstandard, nil)
		if err != nil {
			return nil, err
		}
		return assemble(full, v1.Config{Entrypoint: []string{"kube-proxy"}}, base, tools, program)
	}
	return nil, fmt.Errorf("there is no recipe for %s: add one to e2e/internal/images", repository)
}

// alternatives makes the links that the maintainer script of iptables would make.
func alternatives(t *tree) error {
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, suffix := range []string{"", "-save", "-restore"} {
			t.symlink("usr/sbin/"+family+suffix, family+"-nft"+suffix)
		}
	}
	return nil
}
