package firstlight

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"gantry.local/e2e/internal/kit"
)

func pointer[T any](value T) *T { return &value }

// What a container may do: users, capabilities, seccomp, read-only roots, and
// all of it when privileged.
func TestSecurityContext(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	contexts := map[string]*corev1.SecurityContext{
		"plain": nil,
		"locked": {
			RunAsUser: pointer[int64](1234), RunAsGroup: pointer[int64](2345), RunAsNonRoot: pointer(true),
			ReadOnlyRootFilesystem: pointer(true), AllowPrivilegeEscalation: pointer(false),
			Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
		"extended":   {Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"NET_ADMIN"}, Drop: []corev1.Capability{"CHOWN"}}},
		"privileged": {Privileged: pointer(true)},
	}
	pod := e.Pod("security", "busybox:1.37", nil, kit.On(node), func(p *corev1.Pod) {
		p.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: pointer[int64](3456), SupplementalGroups: []int64{4567}}
		p.Spec.Containers = nil
		for name, context := range contexts {
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{
				Name: name, Image: e.Image("busybox:1.37"), Command: kit.Forever, SecurityContext: context,
			})
		}
		mounted(p, "data", "/data", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}})
	})
	e.Create(pod)
	e.WaitReady(60*time.Second, "security")
	// status is a field of /proc/1/status, of the container's own process.
	status := func(container, field string) string {
		t.Helper()
		return strings.TrimSpace(e.Exec("security", container, "sed", "-n", "s/^"+field+":[ \t]*//p", "/proc/1/status"))
	}
	try := func(container, script string) (string, error) {
		out, errOut, err := e.Kubectl(e.Ctx, "exec", "-n", e.Namespace, "security", "-c", container, "--", "sh", "-c", script)
		return out + errOut, err
	}

	if got := e.Exec("security", "locked", "id"); got != "uid=1234 gid=2345 groups=2345,3456,4567\n" {
		t.Errorf("locked runs as %s", got)
	}
	if got := e.Exec("security", "plain", "id", "-u"); got != "0\n" {
		t.Errorf("plain runs as %s", got)
	}
	for container, want := range map[string]string{"plain": "0", "locked": "2", "privileged": "0"} {
		if got := status(container, "Seccomp"); got != want {
			t.Errorf("%s: seccomp mode %s, want %s", container, got, want)
		}
	}
	for container, want := range map[string]string{"plain": "00000000a80425fb", "locked": "0000000000000000", "extended": "00000000a80435fa"} {
		// Without root the effective set is empty anyway; the bounding set is what could ever be had.
		if got := status(container, "CapBnd"); got != want {
			t.Errorf("%s: capabilities %s, want %s", container, got, want)
		}
	}
	if all, plain := status("privileged", "CapEff"), status("plain", "CapEff"); all == plain || all == "0000000000000000" {
		t.Errorf("privileged has the capabilities %s, plain %s", all, plain)
	}
	for container, want := range map[string]string{"locked": "1", "plain": "0"} {
		if got := status(container, "NoNewPrivs"); got != want {
			t.Errorf("%s: no_new_privs %s, want %s", container, got, want)
		}
	}
	if out, err := try("locked", "echo x > /tmp/x"); err == nil || !strings.Contains(out, "Read-only file system") {
		t.Errorf("locked writes to its root: %v %s", err, out)
	}
	if out, err := try("locked", "echo x > /data/x && stat -c %g /data/x"); err != nil || out != "3456\n" {
		t.Errorf("a file of locked in the volume has the group %q, want fsGroup: %v", out, err)
	}
	if out, err := try("plain", "mount -t tmpfs x /mnt || mount -t tmpfs x /tmp"); err == nil {
		t.Errorf("plain mounts a file system: %s", out)
	}
	if out, err := try("privileged", "mount -t tmpfs x /tmp && umount /tmp && test -e /dev/kmsg -o -e /dev/loop-control"); err != nil {
		t.Errorf("privileged cannot mount, or does not see the host's devices: %v %s", err, out)
	}
	if out, err := try("plain", "ip link add dummy9 type dummy"); err == nil {
		t.Errorf("plain makes a network interface: %s", out)
	}
	if out, err := try("extended", "ip addr add 192.0.2.9/32 dev lo && ip addr del 192.0.2.9/32 dev lo"); err != nil {
		t.Errorf("extended cannot use NET_ADMIN: %v %s", err, out)
	}
	if out, err := try("plain", "echo 1 > /proc/sys/kernel/panic"); err == nil {
		t.Errorf("plain writes to the kernel's settings: %s", out)
	}

	t.Run("non-root is enforced", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("no-root", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) {
			p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: pointer(true)}
		}))
		waiting(t, e, "no-root", 30*time.Second, "CreateContainerConfigError", "runAsNonRoot")
	})
}
