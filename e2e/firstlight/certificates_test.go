package firstlight

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"strconv"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/test/utils/hermeticpodcertificatesigner"
	"k8s.io/utils/clock"

	"gantry.local/e2e/internal/kit"
)

// signer runs a signer of its own name until the test ends.
func signer(t *testing.T, e *kit.Env) string {
	t.Helper()
	name := "e2e.example.org/" + e.Namespace
	keys, certs, err := hermeticpodcertificatesigner.GenerateCAHierarchy(1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		hermeticpodcertificatesigner.New(clock.RealClock{}, name, "cluster.local", keys, certs, e.Client).Run(ctx)
	}()
	t.Cleanup(func() { stop(); <-done })
	return name
}

// A Pod has keys of every kind with certificates of a signer, and the signer's
// roots: they belong together, follow the API, and outlive the agent.
func TestPodCertificates(t *testing.T) {
	t.Parallel()
	own(t, victimName)
	e := kit.New(t)
	signer := signer(t, e)
	kinds := []string{"ED25519", "ECDSAP256", "ECDSAP384", "ECDSAP521", "RSA3072", "RSA4096"}
	everything := metav1.LabelSelector{}
	sources := []corev1.VolumeProjection{{ClusterTrustBundle: &corev1.ClusterTrustBundleProjection{
		SignerName: &signer, LabelSelector: &everything, Path: "roots.pem",
	}}}
	for _, kind := range kinds {
		sources = append(sources, corev1.VolumeProjection{PodCertificate: &corev1.PodCertificateProjection{
			SignerName: signer, KeyType: kind, CredentialBundlePath: kind + ".pem",
		}})
	}
	pod := e.Pod("certified", "busybox:1.37", nil, kit.On(victimName), countedStarts)
	mounted(pod, "tls", "/tls", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: sources}})
	e.Create(pod)
	e.WaitReady(2*time.Minute, "certified")
	read := func(name string) string {
		t.Helper()
		return e.Exec("certified", "main", "cat", "/tls/"+name+".pem")
	}

	// all are valid, and of the roots in the same volume
	check := func() map[string]string {
		t.Helper()
		have, roots := map[string]string{}, x509.NewCertPool()
		if !roots.AppendCertsFromPEM([]byte(read("roots"))) {
			t.Fatal("no roots")
		}
		for _, kind := range kinds {
			have[kind] = read(kind)
			pair, err := tls.X509KeyPair([]byte(have[kind]), []byte(have[kind]))
			if err != nil {
				t.Fatalf("%s: %v", kind, err)
			}
			intermediates := x509.NewCertPool()
			for _, der := range pair.Certificate[1:] {
				if cert, err := x509.ParseCertificate(der); err == nil {
					intermediates.AddCert(cert)
				}
			}
			options := x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
			if _, err := pair.Leaf.Verify(options); err != nil {
				t.Errorf("%s: %v", kind, err)
			}
		}
		return have
	}
	old := check()

	// Another bundle of the signer appears in the running Pod, and goes.
	_, more, err := hermeticpodcertificatesigner.GenerateCAHierarchy(1)
	if err != nil {
		t.Fatal(err)
	}
	root := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: more[0]}))
	roots := func() int { return strings.Count(read("roots"), "BEGIN CERTIFICATE") }
	second := strings.Replace(signer, "/", ":", 1) + ":second"
	bundles := e.Client.CertificatesV1().ClusterTrustBundles()
	if _, err := bundles.Create(e.Ctx, &certificatesv1.ClusterTrustBundle{
		ObjectMeta: metav1.ObjectMeta{Name: second},
		Spec:       certificatesv1.ClusterTrustBundleSpec{SignerName: signer, TrustBundle: "a comment\n" + root},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = bundles.Delete(context.Background(), second, metav1.DeleteOptions{}) })
	e.Eventually(20*time.Second, "the second root", func() (bool, string) { n := roots(); return n == 2, strconv.Itoa(n) })
	if err := bundles.Delete(e.Ctx, second, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	e.Eventually(20*time.Second, "the first root alone", func() (bool, string) { n := roots(); return n == 1, strconv.Itoa(n) })

	// The agent's death takes nothing away; the next one gets certificates of its own.
	node := strconv.Itoa(victim)
	t.Cleanup(func() { e.Command(t, "start-agent", "--node", node) }) // if a step failed in between
	e.Command(t, "kill-agent", "--node", node)
	e.Command(t, "start-agent", "--node", node)
	e.Eventually(60*time.Second, "renewed certificates", func() (bool, string) {
		for _, kind := range kinds {
			now, problem, err := e.Kubectl(e.Ctx, "exec", "-n", e.Namespace, "certified", "-c", "main", "--", "cat", "/tls/"+kind+".pem")
			switch {
			case err != nil && strings.Contains(problem, "No such file"):
				t.Fatalf("%s is gone: %s", kind, problem)
			case err != nil: // the agent does not answer yet
				return false, problem
			case now == old[kind]:
				return false, kind + " is the old one"
			}
		}
		return true, ""
	})
	check()
	checkStartedOnce(t, e, "certified")
}
