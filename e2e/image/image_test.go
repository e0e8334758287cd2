// Package image tests the container image that hack/image has built from the
// Dockerfile: what is in it, and that its list of components is true.
//
//	GANTRY_IMAGE=$PWD/build/image/gantry-amd64.tar env -C e2e go test ./image
package image

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"debug/elf"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"gantry.local/e2e/internal/kit"
)

// machines by the names of images: what the program has to be.
var machines = map[string]struct {
	elf    elf.Machine
	target string
}{
	"amd64": {elf.EM_X86_64, "x86_64-unknown-linux-gnu"},
	"arm64": {elf.EM_AARCH64, "aarch64-unknown-linux-gnu"},
}

type file struct {
	mode    int64
	content []byte
}

// open reads the image: its configuration and its regular files by path.
func open(t *testing.T) (*v1.ConfigFile, map[string]file) {
	t.Helper()
	path := os.Getenv("GANTRY_IMAGE")
	if path == "" {
		t.Fatal("GANTRY_IMAGE names no image: hack/image builds build/image/gantry-amd64.tar")
	}
	image := kit.Archive(t, path)
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	content := mutate.Extract(image)
	defer content.Close()
	files := map[string]file{}
	for reader := tar.NewReader(content); ; {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return config, files
		} else if err != nil {
			t.Fatal(err)
		}
		if header.Typeflag == tar.TypeDir {
			continue
		}
		content, err := io.ReadAll(reader)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Clean("/"+header.Name)] = file{header.Mode, content}
	}
}

const (
	program     = "/usr/bin/gantry"
	authorities = "/etc/ssl/certs/ca-certificates.crt"
	components  = "/usr/share/sbom/gantry.cdx.json"
)

func TestContent(t *testing.T) {
	config, files := open(t)
	want := []string{authorities, program, "/usr/share/doc/gantry/LICENSE", components}
	var paths []string
	for path := range files {
		paths = append(paths, path)
	}
	if slices.Sort(paths); !slices.Equal(paths, want) {
		t.Errorf("files: %v", paths)
	}
	if config.OS != "linux" || !slices.Equal(config.Config.Entrypoint, []string{program}) || !slices.Equal(config.Config.Cmd, []string{"agent"}) {
		t.Errorf("configuration: %s %+v", config.OS, config.Config)
	}
	machine, known := machines[config.Architecture]
	if !known {
		t.Fatalf("architecture %q", config.Architecture)
	}
	if mode := files[program].mode; mode&0o7777 != 0o755 {
		t.Errorf("mode of the program: %o", mode)
	}
	binary, err := elf.NewFile(bytes.NewReader(files[program].content))
	if err != nil {
		t.Fatal(err)
	}
	if binary.Machine != machine.elf || binary.Type != elf.ET_EXEC {
		t.Errorf("the program is for %v, of type %v", binary.Machine, binary.Type)
	}
	for _, segment := range binary.Progs {
		if segment.Type == elf.PT_INTERP || segment.Type == elf.PT_DYNAMIC {
			t.Errorf("the program is not static: %v", segment.Type)
		}
	}
	if !x509.NewCertPool().AppendCertsFromPEM(files[authorities].content) {
		t.Error("no certificate authority")
	}
}

type component struct {
	Ref     string `json:"bom-ref"`
	Type    string `json:"type"`
	Name    string `json:"name"`
	Version string `json:"version"`
	Scope   string `json:"scope"`
	Purl    string `json:"purl"`
}

// linked has the crates that are linked into the program, as cargo's own tree has them.
func linked(t *testing.T, target string) map[string]bool {
	t.Helper()
	cmd := exec.Command("cargo", "tree", "--locked", "--offline", "--target="+target, "--edges=normal,no-proc-macro", "--prefix=none", "--no-dedupe", "--format={p}")
	cmd.Dir, cmd.Stderr = kit.Repository(), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		if fields := strings.Fields(line); len(fields) > 1 {
			found[fields[0]+" "+strings.TrimPrefix(fields[1], "v")] = true
		}
	}
	return found
}

// locked has the crates of Cargo.lock.
func locked(t *testing.T) map[string]bool {
	t.Helper()
	file, err := os.ReadFile(filepath.Join(kit.Repository(), "Cargo.lock"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, crate := range regexp.MustCompile(`(?m)^name = "(.*)"\nversion = "(.*)"$`).FindAllStringSubmatch(string(file), -1) {
		found[crate[1]+" "+crate[2]] = true
	}
	return found
}

func TestComponents(t *testing.T) {
	config, files := open(t)
	var document struct {
		Format   string `json:"bomFormat"`
		Spec     string `json:"specVersion"`
		Serial   string `json:"serialNumber"`
		Version  int    `json:"version"`
		Metadata struct {
			Timestamp string    `json:"timestamp"`
			Component component `json:"component"`
		} `json:"metadata"`
		Components   []component `json:"components"`
		Dependencies []struct {
			Ref       string   `json:"ref"`
			DependsOn []string `json:"dependsOn"`
		} `json:"dependencies"`
	}
	if err := json.Unmarshal(files[components].content, &document); err != nil {
		t.Fatal(err)
	}
	// What CycloneDX 1.5 requires.
	if document.Format != "CycloneDX" || document.Spec != "1.5" || document.Version < 1 ||
		!regexp.MustCompile(`^urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`).MatchString(document.Serial) {
		t.Errorf("%q %q, version %d, serial number %q", document.Format, document.Spec, document.Version, document.Serial)
	}
	root := document.Metadata.Component
	if root.Name != "gantry" || root.Version == "" || root.Ref == "" {
		t.Errorf("it is about %+v", root)
	}
	refs := map[string]bool{root.Ref: true}
	listed, packages := map[string]bool{}, map[string]string{}
	for _, c := range document.Components {
		if c.Ref == "" || refs[c.Ref] {
			t.Errorf("%s %s: its reference %q is not its own", c.Name, c.Version, c.Ref)
		}
		refs[c.Ref] = true
		if c.Type != "library" || c.Name == "" || c.Version == "" || c.Scope != "required" {
			t.Errorf("component %+v", c)
		}
		switch {
		case strings.HasPrefix(c.Purl, "pkg:cargo/"+c.Name+"@"+c.Version):
			listed[c.Name+" "+c.Version] = true
		case strings.HasPrefix(c.Purl, "pkg:deb/debian/"+c.Name+"@"):
			packages[c.Name] = c.Version
		case c.Purl == "pkg:generic/rust@"+c.Version:
			packages[c.Name] = c.Version
		default:
			t.Errorf("%s %s is not a component of %q", c.Name, c.Version, c.Purl)
		}
	}
	edges := map[string][]string{}
	for _, dependency := range document.Dependencies {
		for _, ref := range append([]string{dependency.Ref}, dependency.DependsOn...) {
			if !refs[ref] {
				t.Errorf("%q is no component", ref)
			}
		}
		edges[dependency.Ref] = dependency.DependsOn
	}
	for _, c := range document.Components {
		if _, there := edges[c.Ref]; !there {
			t.Errorf("%s %s has no entry among the dependencies", c.Name, c.Version)
		}
	}

	crates := linked(t, machines[config.Architecture].target)
	if len(crates) < 100 {
		t.Fatalf("cargo tree knows only %d crates", len(crates))
	}
	delete(crates, root.Name+" "+root.Version)
	for name := range crates {
		if !listed[name] {
			t.Errorf("%s is linked and not listed", name)
		}
	}
	// It has a few more: those that run in the compiler, and those that only
	// features need which are off here.
	lock := locked(t)
	for name := range listed {
		if !lock[name] {
			t.Errorf("%s is listed and not in Cargo.lock", name)
		}
	}
	for _, name := range []string{"rust", "libseccomp-dev", "libelf-dev", "zlib1g-dev"} {
		if packages[name] == "" {
			t.Errorf("%s is not among the packages %v", name, packages)
		}
	}
	for _, start := range []string{"libc6-dev", "libgcc-"} {
		found := false
		for name := range packages {
			found = found || strings.HasPrefix(name, start)
		}
		if !found {
			t.Errorf("%s… is not among the packages %v", start, packages)
		}
	}
	t.Logf("%d crates, packages %v", len(listed), packages)
}
