package conformance

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"os/exec"
	"path/filepath"
	"text/template"
	"time"

	"gantry.local/e2e/internal/cluster"
	"gantry.local/e2e/internal/images"
)

//go:embed addons.yaml
var addonsText string

var addonsTemplate = template.Must(template.New("addons.yaml").Option("missingkey=error").Parse(addonsText))

// Addons installs kube-proxy and CoreDNS and returns when they are ready.
func Addons(ctx context.Context, c *cluster.Cluster, patience time.Duration) error {
	host, port := c.APIServer()
	var manifest bytes.Buffer
	if err := addonsTemplate.Execute(&manifest, map[string]any{
		"Registry": c.Registry(), "KubeProxy": images.KubeProxy, "CoreDNS": images.CoreDNS,
		"APIHost": host, "APIPort": port, "PodCIDR": cluster.PodCIDR, "ServiceDNS": cluster.ServiceDNS,
	}); err != nil {
		return err
	}
	kubectl := func(stdin *bytes.Buffer, args ...string) error {
		cmd := exec.CommandContext(ctx, filepath.Join(c.Home.Bin, "kubectl"), append([]string{"--kubeconfig=" + c.Kubeconfig()}, args...)...)
		if stdin != nil {
			cmd.Stdin = stdin
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("kubectl %v: %w\n%s", args, err, out)
		}
		return nil
	}
	if err := kubectl(&manifest, "apply", "--server-side", "-f", "-"); err != nil {
		return err
	}
	for _, workload := range []string{"daemonset/kube-proxy", "deployment/coredns"} {
		if err := kubectl(nil, "--namespace=kube-system", "rollout", "status", workload, "--timeout="+patience.String()); err != nil {
			return fmt.Errorf("add-on %s does not get ready: %w", workload, err)
		}
	}
	return nil
}
