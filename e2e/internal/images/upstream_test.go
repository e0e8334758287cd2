package images

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	upstream "k8s.io/kubernetes/test/utils/image"
)

// Upstream's own code reads the list here, so a key that it does not know, or
// one that is missing, is found.
func TestRepoListSendsUpstreamToTheRegistry(t *testing.T) {
	const registry = "192.0.2.1:5000"
	raw, err := RepoList(registry)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "repositories.yaml")
	if err := os.WriteFile(file, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	want := map[upstream.ImageID]string{}
	for id, config := range upstream.GetImageConfigs() {
		if id > upstream.SampleDevicePlugin {
			continue // images of CSI drivers, which are rewritten when a driver is deployed
		}
		if short, public := strings.CutPrefix(config.GetE2EImage(), publicRegistry); public {
			want[id] = registry + "/" + short
		} else {
			want[id] = config.GetE2EImage() // the one that must not exist, and a private one
		}
	}
	upstream.Init(file)
	defer upstream.Init("")
	for id, image := range want {
		if got := upstream.GetE2EImage(id); got != image {
			t.Errorf("image %d is %s, want %s", id, got, image)
		}
	}
}

// The spec about no_new_privs needs the set-user-id and set-group-id bits.
func TestProgramKeepsItsMode(t *testing.T) {
	bin, dir := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "nnp"), []byte("program"), 0o755); err != nil {
		t.Fatal(err)
	}
	err := with(&builder{bin: bin, dir: dir, progress: &bytes.Buffer{}}, func(b *builder) error {
		part, err := b.programAt("nnp", "usr/local/bin/nnp", 0o6755, uncompressed, nil)
		if err != nil {
			return err
		}
		f, err := os.Open(part.file)
		if err != nil {
			return err
		}
		defer f.Close()
		header, err := tar.NewReader(f).Next()
		if err != nil {
			return err
		}
		if header.Name != "usr/local/bin/nnp" || header.Mode != 0o6755 {
			t.Errorf("%s has mode %o", header.Name, header.Mode)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
