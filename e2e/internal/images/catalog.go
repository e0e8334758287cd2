package images

import (
	"context"
	"fmt"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Packages of the Debian layers. apt does not add what is merely Essential, so
// that is named.
var (
	basePackages = []string{
		"base-files", "base-passwd", "bash", "coreutils", "dash", "debianutils", "diffutils", "findutils", "grep", "gzip",
		"hostname", "libc-bin", "mawk", "sed", "tar", "util-linux", "mount", "login", "ncurses-base", "procps", "perl-base",
	}
	toolPackages = []string{
		"curl", "netcat-openbsd", "iproute2", "iputils-ping", "iperf", "socat", "bind9-dnsutils", "bind9-host",
	}
	nginxPackages = []string{"nginx"}
)

// all builds every image.
func (b *builder) all(ctx context.Context) error {
	for _, build := range []func(context.Context) error{b.busyboxImage, b.appImages, b.agnhostImage, b.nginxImage} {
		if err := build(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) busyboxLayer(ctx context.Context, media types.MediaType) (*layer, error) {
	return b.layers.get(recipe+" busybox "+busyboxVersion, media, func() (*tree, error) { return b.busyboxTree(ctx) })
}

func (b *builder) busyboxImage(ctx context.Context) error {
	l, err := b.busyboxLayer(ctx, gzipped)
	if err != nil {
		return err
	}
	return b.image("busybox:1.37", v1.Config{Cmd: []string{"sh"}}, l)
}

// appImages are the tutorial's applications: one packed with gzip, one with
// zstd, on busybox so that there is a shell to exec into.
func (b *builder) appImages(ctx context.Context) error {
	for _, app := range []struct {
		name, port string
		media      types.MediaType
	}{{"app-a", "3000", gzipped}, {"app-b", "4000", zstandard}} {
		base, err := b.busyboxLayer(ctx, app.media)
		if err != nil {
			return err
		}
		program, err := b.program(app.name, app.media, nil)
		if err != nil {
			return err
		}
		if err := b.image(app.name+":1", v1.Config{
			Entrypoint: []string{"/" + app.name}, ExposedPorts: map[string]struct{}{app.port + "/tcp": {}},
		}, base, program); err != nil {
			return err
		}
	}
	return nil
}

// debianLayer holds packages, without those that the layers below it hold.
func (b *builder) debianLayer(ctx context.Context, media types.MediaType, packages, under []string, finish func(*tree) error) (*layer, error) {
	key := fmt.Sprintf("%s debian %s %s over %s", recipe, debianSuite, strings.Join(packages, " "), strings.Join(under, " "))
	return b.layers.get(key, media, func() (*tree, error) {
		b.say("Debian %s: %s (%s)", debianSuite, strings.Join(packages, " "), media)
		d, err := b.debian(ctx)
		if err != nil {
			return nil, err
		}
		debs, err := d.download(ctx, slices.Concat(under, packages)...)
		if err != nil {
			return nil, err
		}
		t := newTree()
		if len(under) > 0 {
			below, err := d.download(ctx, under...)
			if err != nil {
				return nil, err
			}
			debs = slices.DeleteFunc(debs, func(deb string) bool { return slices.Contains(below, deb) })
			// Unpacking must know the links that the layer below has.
			for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
				t.symlink(dir, "usr/"+dir)
			}
		}
		if err := unpack(ctx, t, debs); err != nil {
			return nil, err
		}
		return t, finish(t)
	})
}

// debianBase does what the maintainer scripts of the base packages would do.
func debianBase(t *tree) error {
	for _, name := range []string{"passwd", "group"} {
		master := t.entries["usr/share/base-passwd/"+name+".master"]
		if master == nil {
			return fmt.Errorf("base-passwd has no %s.master", name)
		}
		t.file("etc/"+name, 0o644, master.data)
	}
	t.file("etc/nsswitch.conf", 0o644, []byte("passwd: files\ngroup: files\nhosts: files dns\n"))
	t.symlink("usr/bin/awk", "mawk")
	t.symlink("usr/bin/sh", "dash")
	t.dir("tmp", 0o1777)
	t.dir("var/tmp", 0o1777)
	t.dir("run", 0o755)
	t.symlink("var/run", "/run")
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		if t.entries[dir] == nil {
			t.symlink(dir, "usr/"+dir)
		}
	}
	return nil
}

// agnhostImage is the end-to-end tests' Swiss army knife.
func (b *builder) agnhostImage(ctx context.Context) error {
	base, err := b.debianLayer(ctx, zstandard, basePackages, nil, debianBase)
	if err != nil {
		return err
	}
	tools, err := b.debianLayer(ctx, zstandard, toolPackages, basePackages, func(t *tree) error {
		t.symlink("usr/bin/nc", "nc.openbsd")
		return nil
	})
	if err != nil {
		return err
	}
	program, err := b.program("agnhost", gzipped, func(t *tree) {
		t.symlink("agnhost-2", "agnhost")
		t.dir("uploads", 0o755)
	})
	if err != nil {
		return err
	}
	ports := map[string]struct{}{}
	for _, port := range []string{"80", "8080", "8081", "9376", "5000"} {
		ports[port+"/tcp"] = struct{}{}
	}
	return b.image("agnhost:2.66.1", v1.Config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}, ExposedPorts: ports}, base, tools, program)
}

const nginxConf = `user www-data;
worker_processes 1;
pid /run/nginx.pid;
error_log stderr;
events { worker_connections 256; }
http {
  default_type text/html;
  access_log /dev/stdout;
  server {
    listen 80;
    location / { root /usr/share/nginx/html; index index.html; }
  }
}
`

// nginxImage has three uncompressed layers; the last one replaces a file and
// removes a directory of the one before. The program is the one of the Debian
// release, which is older than the tag that the tests' manifests ask for.
func (b *builder) nginxImage(ctx context.Context) error {
	base, err := b.debianLayer(ctx, uncompressed, basePackages, nil, debianBase)
	if err != nil {
		return err
	}
	nginx, err := b.debianLayer(ctx, uncompressed, nginxPackages, basePackages, func(t *tree) error {
		t.owned("var/log/nginx", 0o755, 0)
		t.owned("var/lib/nginx", 0o755, 33)
		return nil
	})
	if err != nil {
		return err
	}
	site, err := b.layers.get(recipe+" nginx site "+nginxConf, uncompressed, func() (*tree, error) {
		t := newTree()
		t.dir("etc/nginx", 0o755)
		t.file("etc/nginx/nginx.conf", 0o644, []byte(nginxConf))
		t.file("etc/nginx/.wh.sites-available", 0, nil)
		t.dir("usr/share/nginx/html", 0o755)
		t.file("usr/share/nginx/html/index.html", 0o644,
			[]byte("<!DOCTYPE html>\n<html><head><title>Welcome to nginx!</title></head><body><h1>Welcome to nginx!</h1></body></html>\n"))
		return t, nil
	})
	if err != nil {
		return err
	}
	return b.image("nginx:1.28", v1.Config{
		Cmd: []string{"nginx", "-g", "daemon off;"}, ExposedPorts: map[string]struct{}{"80/tcp": {}}, StopSignal: "SIGQUIT",
		Labels: map[string]string{"org.opencontainers.image.base.name": "debian:" + debianSuite},
	}, base, nginx, site)
}
