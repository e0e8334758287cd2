package images

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

const busyboxVersion = "1.37.0"

// busybox is the static program, built from the unpatched source. Debian's own
// build has a shell that drops environment variables whose names are no
// identifiers (`data-1`), which ConfigMaps have.
func (b *builder) busybox(ctx context.Context) (string, error) {
	program := filepath.Join(b.dir, "busybox-"+busyboxVersion)
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	b.say("busybox %s: fetching and compiling", busyboxVersion)
	d, err := b.debian(ctx)
	if err != nil {
		return "", err
	}
	tarball, err := d.source(ctx, "busybox", busyboxVersion)
	if err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(b.dir, "busybox-build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	if _, err := run(ctx, work, nil, "tar", "--extract", "--strip-components=1", "--file="+tarball); err != nil {
		return "", err
	}
	if _, err := run(ctx, work, nil, "make", "defconfig"); err != nil {
		return "", err
	}
	config, err := os.ReadFile(filepath.Join(work, ".config"))
	if err != nil {
		return "", err
	}
	edited := strings.NewReplacer(
		"# CONFIG_STATIC is not set", "CONFIG_STATIC=y",
		// tc uses kernel structures that newer headers no longer have.
		"CONFIG_TC=y", "# CONFIG_TC is not set",
	).Replace(string(config))
	if err := os.WriteFile(filepath.Join(work, ".config"), []byte(edited), 0o644); err != nil {
		return "", err
	}
	// Options that depend on the changed ones take their defaults.
	if _, err := run(ctx, work, strings.NewReader(strings.Repeat("\n", 1000)), "make", "oldconfig"); err != nil {
		return "", err
	}
	if _, err := run(ctx, work, nil, "nice", "-n", "10", "make", fmt.Sprintf("-j%d", runtime.NumCPU()), "busybox"); err != nil {
		return "", err
	}
	return program, os.Rename(filepath.Join(work, "busybox"), program)
}

const (
	busyboxPasswd = `root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
operator:x:37:37:Operator:/var:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
`
	busyboxGroup = `root:x:0:
daemon:x:1:
bin:x:2:
adm:x:4:
tty:x:5:
disk:x:6:
wheel:x:10:root
www-data:x:33:
operator:x:37:
users:x:100:
nogroup:x:65534:
`
)

func (b *builder) busyboxTree(ctx context.Context) (*tree, error) {
	program, err := b.busybox(ctx)
	if err != nil {
		return nil, err
	}
	list, err := run(ctx, "", nil, program, "--list")
	if err != nil {
		return nil, err
	}
	t := newTree()
	for _, dir := range []string{"bin", "dev", "etc", "home", "usr", "usr/bin", "usr/sbin", "var", "var/spool", "var/www"} {
		t.dir(dir, 0o755)
	}
	t.dir("root", 0o700)
	t.dir("tmp", 0o1777)
	content, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	t.file("bin/busybox", 0o755, content)
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" && applet != "linuxrc" {
			t.symlink("bin/"+applet, "busybox")
		}
	}
	t.symlink("usr/bin/env", "../../bin/env")
	t.file("etc/passwd", 0o644, []byte(busyboxPasswd))
	t.file("etc/group", 0o644, []byte(busyboxGroup))
	t.file("etc/shadow", 0o600, []byte("root:*:19000:0:99999:7:::\n"))
	return t, nil
}
