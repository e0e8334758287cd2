package images

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	upstream "k8s.io/kubernetes/test/utils/image"
	"sigs.k8s.io/yaml"
)

// Images of the add-ons that upstream's tests expect in a cluster.
const (
	CoreDNS   = "coredns:test"
	KubeProxy = "kube-proxy:test"
)

// publicRegistry is what the names of upstream's images start with.
const publicRegistry = "registry.k8s.io/"

// name is an image's name here: upstream's without the registry. The tags
// follow the Kubernetes version that this program is built with.
func name(id upstream.ImageID) (string, error) {
	full := upstream.GetE2EImage(id)
	short, ok := strings.CutPrefix(full, publicRegistry)
	if !ok {
		return "", fmt.Errorf("image %s is not of %s: unset KUBE_TEST_REPO_LIST and KUBE_TEST_REPO", full, publicRegistry)
	}
	return short, nil
}

// RepoList is the content of a KUBE_TEST_REPO_LIST file that sends upstream's
// tests to a registry. The registry that must not exist stays as it is, and so
// does the one that wants credentials of Google's.
func RepoList(registry string) ([]byte, error) {
	return yaml.Marshal(map[string]string{
		"promoterE2eRegistry":      registry + "/e2e-test-images",
		"buildImageRegistry":       registry + "/build-image",
		"gcEtcdRegistry":           registry,
		"gcRegistry":               registry,
		"sigStorageRegistry":       registry + "/sig-storage",
		"dockerLibraryRegistry":    registry + "/library",
		"cloudProviderGcpRegistry": registry + "/cloud-provider-gcp",
	})
}

// BuildUpstream makes sure that dir/layout also holds the images of upstream's
// tests. kubernetes is the source tree whose version the tests are of: some
// images hold files of it.
func BuildUpstream(ctx context.Context, bin, dir, kubernetes string, progress io.Writer) error {
	return with(&builder{bin: bin, dir: dir, progress: progress}, func(b *builder) error {
		u := &upstreamBuilder{b, kubernetes}
		for _, build := range []func(context.Context) error{
			u.agnhost, u.plain, u.nonewprivs, u.nginx, u.programs, u.etcd, u.kubeProxy,
		} {
			if err := build(ctx); err != nil {
				return err
			}
		}
		return nil
	})
}

type upstreamBuilder struct {
	*builder
	kubernetes string
}

// publish builds an image under its upstream name.
func (b *upstreamBuilder) publish(id upstream.ImageID, config v1.Config, parts ...*layer) error {
	n, err := name(id)
	if err != nil {
		return err
	}
	return b.image(n, config, parts...)
}

// files is a layer with files of the Kubernetes source tree, by their names in
// the image.
func (b *upstreamBuilder) files(sources map[string]string) (*layer, error) {
	t, key := newTree(), sha256.New()
	names := make([]string, 0, len(sources))
	for to := range sources {
		names = append(names, to)
	}
	slices.Sort(names)
	for _, to := range names {
		content, err := os.ReadFile(filepath.Join(b.kubernetes, sources[to]))
		if err != nil {
			return nil, fmt.Errorf("file for an image: %w", err)
		}
		t.file(to, 0o644, content)
		fmt.Fprintf(key, "%s %x\n", to, sha256.Sum256(content))
	}
	return b.layers.get(fmt.Sprintf("%s files %x", recipe, key.Sum(nil)), gzipped, func() (*tree, error) { return t, nil })
}

// agnhost builds both tags of agnhost and the two pets, which are agnhost with
// another web page.
func (b *upstreamBuilder) agnhost(ctx context.Context) error {
	parts, err := b.agnhostLayers(ctx)
	if err != nil {
		return err
	}
	certificate, err := b.files(map[string]string{
		"localhost.crt": "test/images/agnhost/porter/localhost.crt", "localhost.key": "test/images/agnhost/porter/localhost.key",
	})
	if err != nil {
		return err
	}
	users, err := b.users(ctx)
	if err != nil {
		return err
	}
	pulls, err := b.fakeRegistry(ctx)
	if err != nil {
		return err
	}
	parts = append(parts, certificate, users, pulls)
	if err := b.publish(upstream.Agnhost, agnhostConfig(), parts...); err != nil {
		return err
	}
	// Tests that change a Pod's image need a digest of its own for the older tag.
	previous := agnhostConfig()
	previous.Labels = map[string]string{"org.opencontainers.image.version": "previous"}
	if err := b.publish(upstream.AgnhostPrev, previous, parts...); err != nil {
		return err
	}
	for id, pet := range map[upstream.ImageID]string{upstream.Kitten: "kitten", upstream.Nautilus: "nautilus"} {
		page, err := b.files(map[string]string{
			pet + ".jpg": "test/images/" + pet + "/html/" + pet + ".jpg", "data.json": "test/images/" + pet + "/html/data.json",
		})
		if err != nil {
			return err
		}
		config := agnhostConfig()
		config.Cmd = []string{"test-webserver"}
		if err := b.publish(id, config, append(slices.Clone(parts), page)...); err != nil {
			return err
		}
	}
	return nil
}

// users is the layer with the user and the group that the specs about
// supplemental groups of the image look for.
func (b *upstreamBuilder) users(ctx context.Context) (*layer, error) {
	return b.layers.get(recipe+" agnhost users "+debianSuite, gzipped, func() (*tree, error) {
		d, err := b.debian(ctx)
		if err != nil {
			return nil, err
		}
		debs, err := d.download(ctx, "base-passwd")
		if err != nil {
			return nil, err
		}
		base := newTree()
		if err := unpack(ctx, base, debs); err != nil {
			return nil, err
		}
		t := newTree()
		for file, more := range map[string]string{
			"passwd": "user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n",
			"group":  "user-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n",
		} {
			master := base.entries["usr/share/base-passwd/"+file+".master"]
			if master == nil {
				return nil, fmt.Errorf("base-passwd has no %s.master", file)
			}
			t.file("etc/"+file, 0o644, append(slices.Clone(master.data), more...))
		}
		t.owned("home/user-defined-in-image", 0o755, 1000)
		return t, nil
	})
}

// fakeRegistry is the layer that `agnhost fake-registry-server` serves: the
// pause image with the tag "testing", each object in a file that is named by
// its digest. A tag is a file that holds a digest.
func (b *upstreamBuilder) fakeRegistry(ctx context.Context) (*layer, error) {
	image, part, err := b.pause(ctx)
	if err != nil {
		return nil, err
	}
	index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), mutate.IndexAddendum{
		Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{Architecture: runtime.GOARCH, OS: "linux"}},
	})
	indexDigest, err := index.Digest()
	if err != nil {
		return nil, err
	}
	return b.layers.get(recipe+" fake registry "+indexDigest.String(), gzipped, func() (*tree, error) {
		t := newTree()
		file := func(kind string, digest v1.Hash, content []byte, err error) error {
			t.file(fmt.Sprintf("var/registry/pause/%s/%s/%s/%s/data", kind, digest.Algorithm, digest.Hex[:2], digest.Hex), 0o644, content)
			return err
		}
		indexRaw, err1 := index.RawManifest()
		digest, err2 := image.Digest()
		manifest, err3 := image.RawManifest()
		configDigest, err4 := image.ConfigName()
		config, err5 := image.RawConfigFile()
		content, err6 := os.ReadFile(part.file)
		t.file("var/registry/pause/manifests/testing", 0o644, []byte(indexDigest.String()+"\n"))
		return t, errors.Join(err2, err4,
			file("manifests", indexDigest, indexRaw, err1),
			file("manifests", digest, manifest, err3),
			file("blobs", configDigest, config, err5),
			file("blobs", part.DigestHash, content, err6))
	})
}

// pause is the image whose program waits for a signal.
func (b *upstreamBuilder) pause(ctx context.Context) (v1.Image, *layer, error) {
	n, err := name(upstream.Pause)
	if err != nil {
		return nil, nil, err
	}
	source := filepath.Join(b.kubernetes, "build/pause/linux/pause.c")
	code, err := os.ReadFile(source)
	if err != nil {
		return nil, nil, err
	}
	_, version, _ := strings.Cut(n, ":")
	part, err := b.layers.get(fmt.Sprintf("%s pause %s %x", recipe, version, sha256.Sum256(code)), gzipped, func() (*tree, error) {
		program := filepath.Join(b.dir, "pause")
		if _, err := run(ctx, "", nil, "gcc", "-Os", "-static", "-s", "-DVERSION="+version, "-o", program, source); err != nil {
			return nil, err
		}
		defer os.Remove(program)
		content, err := os.ReadFile(program)
		if err != nil {
			return nil, err
		}
		t := newTree()
		t.file("pause", 0o755, content)
		return t, nil
	})
	if err != nil {
		return nil, nil, err
	}
	config := v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}
	if err := b.image(n, config, part); err != nil {
		return nil, nil, err
	}
	image, err := assemble(n, config, part)
	return image, part, err
}

// plain builds the images that are no more than a base system.
func (b *upstreamBuilder) plain(ctx context.Context) error {
	busybox, err := b.busyboxLayer(ctx, gzipped)
	if err != nil {
		return err
	}
	if err := b.publish(upstream.BusyBox, v1.Config{Cmd: []string{"sh"}}, busybox); err != nil {
		return err
	}
	debian, err := b.debianTools(ctx)
	if err != nil {
		return err
	}
	for id, config := range map[upstream.ImageID]v1.Config{
		// The user is a number on purpose: it must not be looked up.
		upstream.NonRoot:         {Cmd: []string{"bash"}, User: "1234"},
		upstream.GlibcDnsTesting: {Cmd: []string{"bash"}},
		upstream.IpcUtils:        {Cmd: []string{"sh"}},
		upstream.Perl:            {Cmd: []string{"perl"}},
	} {
		if err := b.publish(id, config, debian...); err != nil {
			return err
		}
	}
	return nil
}

// nonewprivs has a set-user-id program that prints its effective user.
func (b *upstreamBuilder) nonewprivs(ctx context.Context) error {
	busybox, err := b.busyboxLayer(ctx, gzipped)
	if err != nil {
		return err
	}
	program, err := b.programAt("nnp", "usr/local/bin/nnp", 0o6755, gzipped, nil)
	if err != nil {
		return err
	}
	return b.publish(upstream.Nonewprivs, v1.Config{Cmd: []string{"nnp"}}, busybox, program)
}

func (b *upstreamBuilder) nginx(ctx context.Context) error {
	parts, err := b.nginxLayers(ctx)
	if err != nil {
		return err
	}
	for _, id := range []upstream.ImageID{upstream.Nginx, upstream.NginxNew} {
		n, err := name(id)
		if err != nil {
			return err
		}
		_, version, _ := strings.Cut(n, ":")
		config := nginxConfig()
		// A digest for each tag: specs tell them apart.
		config.Labels["org.opencontainers.image.version"] = version
		if err := b.image(n, config, parts...); err != nil {
			return err
		}
	}
	return nil
}

// programs builds the images that hold one static program.
func (b *upstreamBuilder) programs(context.Context) error {
	apiServer, err := name(upstream.APIServer)
	if err != nil {
		return err
	}
	devicePlugin, err := name(upstream.SampleDevicePlugin)
	if err != nil {
		return err
	}
	for _, image := range []struct {
		name, program, path string
		args                []string
	}{
		{apiServer, "sample-apiserver", "sample-apiserver", nil},
		{devicePlugin, "sample-device-plugin", "sampledeviceplugin", []string{"-alsologtostderr"}},
		{CoreDNS, "coredns", "coredns", nil},
	} {
		part, err := b.programAt(image.program, image.path, 0o755, gzipped, nil)
		if err != nil {
			return err
		}
		if err := b.image(image.name, v1.Config{Entrypoint: append([]string{"/" + image.path}, image.args...)}, part); err != nil {
			return err
		}
	}
	return nil
}

// etcd is run by its path, by the spec about aggregated API servers.
func (b *upstreamBuilder) etcd(context.Context) error {
	part, err := b.programAt("etcd", "usr/local/bin/etcd", 0o755, gzipped, func(t *tree) { t.dir("var/lib/etcd", 0o700) })
	if err != nil {
		return err
	}
	return b.publish(upstream.Etcd, v1.Config{Cmd: []string{"etcd"}}, part)
}

// kubeProxy needs the program nft.
func (b *upstreamBuilder) kubeProxy(ctx context.Context) error {
	base, err := b.debianLayer(ctx, zstandard, basePackages, nil, debianBase)
	if err != nil {
		return err
	}
	nftables, err := b.debianLayer(ctx, zstandard, []string{"nftables"}, basePackages, func(*tree) error { return nil })
	if err != nil {
		return err
	}
	program, err := b.programAt("kube-proxy", "usr/local/bin/kube-proxy", 0o755, gzipped, nil)
	if err != nil {
		return err
	}
	return b.image(KubeProxy, v1.Config{Entrypoint: []string{"kube-proxy"}}, base, nftables, program)
}

// Missing lists the images of upstream's tests that are not in a layout, with
// their upstream names.
func Missing(layoutDir string) ([]string, error) {
	have := map[string]bool{}
	found, err := (Registry{Layout: layoutDir}).load()
	if err != nil {
		return nil, err
	}
	for _, m := range found {
		have[m.repository+":"+m.tag] = true
	}
	var missing []string
	for _, config := range upstream.GetImageConfigs() {
		full := config.GetE2EImage()
		if short, ours := strings.CutPrefix(full, publicRegistry); !ours || !have[short] {
			missing = append(missing, full)
		}
	}
	slices.Sort(missing)
	return missing, nil
}
