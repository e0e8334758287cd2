package images

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
)

const (
	debianSuite   = "trixie"
	debianMirror  = "http://deb.debian.org/debian"
	debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
)

// debian fetches packages with the machine's apt but with sources, lists,
// package database and cache of its own, so nothing of the machine's changes.
type debian struct{ dir string }

func newDebian(ctx context.Context, dir string) (*debian, error) {
	d := &debian{dir: dir}
	if _, err := os.Stat(debianKeyring); err != nil {
		return nil, fmt.Errorf("images are built from Debian packages; this needs apt and the package debian-archive-keyring: %w", err)
	}
	for _, sub := range []string{"lists/partial", "archives/partial", "sources"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	mirror := os.Getenv("GANTRY_DEBIAN_MIRROR")
	if mirror == "" {
		mirror = debianMirror
	}
	var sources strings.Builder
	for _, kind := range []string{"deb", "deb-src"} {
		fmt.Fprintf(&sources, "%s [signed-by=%s] %s %s main\n", kind, debianKeyring, mirror, debianSuite)
	}
	if err := os.WriteFile(filepath.Join(dir, "sources.list"), []byte(sources.String()), 0o644); err != nil {
		return nil, err
	}
	// An empty package database: every dependency is "not installed yet".
	if err := os.WriteFile(filepath.Join(dir, "status"), nil, 0o644); err != nil {
		return nil, err
	}
	_, err := d.apt(ctx, dir, "update")
	return d, err
}

func (d *debian) apt(ctx context.Context, workDir string, args ...string) ([]byte, error) {
	options := map[string]string{
		"Dir::Etc::SourceList": d.dir + "/sources.list", "Dir::Etc::SourceParts": "-",
		"Dir::State": d.dir, "Dir::State::lists": d.dir + "/lists", "Dir::State::status": d.dir + "/status",
		"Dir::Cache": d.dir, "Dir::Cache::archives": d.dir + "/archives",
		"Acquire::Languages": "none", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
		// Whatever others dpkg was told of.
		"APT::Architectures":      runtime.GOARCH,
		"APT::Install-Recommends": "false", "APT::Sandbox::User": "root", "Acquire::Retries": "3",
	}
	command := []string{"-qq", "-y"}
	for name, value := range options {
		command = append(command, "-o", name+"="+value)
	}
	return run(ctx, workDir, nil, "apt-get", append(command, args...)...)
}

func run(ctx context.Context, dir string, stdin io.Reader, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errOut bytes.Buffer
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = dir, stdin, &out, &errOut
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	if err := cmd.Run(); err != nil {
		report := append(out.Bytes(), errOut.Bytes()...)
		if len(report) > 2000 {
			report = report[len(report)-2000:]
		}
		return nil, fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, report)
	}
	return out.Bytes(), nil
}

// download fetches packages with all they depend on; it returns the .deb files.
func (d *debian) download(ctx context.Context, packages ...string) ([]string, error) {
	if _, err := d.apt(ctx, d.dir, append([]string{"--download-only", "install"}, packages...)...); err != nil {
		return nil, err
	}
	plan, err := d.apt(ctx, d.dir, append([]string{"--simulate", "install"}, packages...)...)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, line := range strings.Split(string(plan), "\n") {
		// Inst bash (5.2.37-2+b10 Debian:13.2/stable [amd64]) []
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[0] != "Inst" {
			continue
		}
		name, _, _ := strings.Cut(fields[1], ":")
		version := strings.ReplaceAll(strings.TrimPrefix(fields[2], "("), ":", "%3a")
		found, err := filepath.Glob(filepath.Join(d.dir, "archives", name+"_"+version+"_*.deb"))
		if err != nil {
			return nil, err
		}
		if len(found) != 1 {
			return nil, fmt.Errorf("package %s %s: %d files in the archive", name, version, len(found))
		}
		files = append(files, found[0])
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("apt-get plans to install nothing for %v", packages)
	}
	return files, nil
}

// source fetches the upstream tarball of a source package.
func (d *debian) source(ctx context.Context, name, version string) (string, error) {
	dir := filepath.Join(d.dir, "sources")
	// What an interrupted build has fetched is not fetched again.
	if _, err := d.apt(ctx, dir, "--download-only", "source", name); err != nil {
		return "", err
	}
	tarballs, err := filepath.Glob(filepath.Join(dir, name+"_*.orig.tar.*"))
	if err != nil {
		return "", err
	}
	for _, file := range tarballs {
		if strings.HasPrefix(filepath.Base(file), name+"_"+version+".orig.") && !strings.HasSuffix(file, ".asc") {
			return file, nil
		}
	}
	return "", fmt.Errorf("debian %s has another %s than %s: %v", debianSuite, name, version, tarballs)
}

// What a container never reads.
var unwanted = []string{
	"usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian",
	"usr/share/bash-completion", "usr/share/common-licenses", "usr/share/bug", "usr/lib/x86_64-linux-gnu/gconv",
	"usr/share/menu", "usr/share/zsh", "usr/lib/systemd/system",
}

// unpack adds the files of packages to a tree, with owners, modes (set-user-id
// included) and links as packaged. No maintainer script runs.
func unpack(ctx context.Context, t *tree, debs []string) error {
	for _, deb := range debs {
		content, err := run(ctx, "", nil, "dpkg-deb", "--fsys-tarfile", deb)
		if err != nil {
			return err
		}
		reader := tar.NewReader(bytes.NewReader(content))
		for {
			header, err := reader.Next()
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return fmt.Errorf("%s: %w", deb, err)
			}
			name := strings.TrimPrefix(path.Clean(header.Name), "/")
			if name == "." || below(name, unwanted) {
				continue
			}
			data, err := io.ReadAll(reader)
			if err != nil {
				return fmt.Errorf("%s: %w", deb, err)
			}
			if header.Typeflag == tar.TypeLink {
				header.Linkname = t.merged(strings.TrimPrefix(path.Clean(header.Linkname), "/"))
			}
			t.add(name, header, data)
		}
	}
	return nil
}

func below(name string, dirs []string) bool {
	for _, dir := range dirs {
		if name == dir || strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	return false
}
