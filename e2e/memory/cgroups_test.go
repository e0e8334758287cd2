package memory

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"gantry.local/e2e/internal/kit"
)

// A container that divides its own cgroup, as a service manager or a Docker
// engine in a container does, leaves no room for processes in the outermost one.
// Whoever enters it then goes to where its first process is.
func TestOwnCgroups(t *testing.T) {
	e := kit.New(t)
	// A probe's process may be in the outermost cgroup just then: whatever is found there moves, until there is nobody.
	divide := `mount -o remount,bind,rw /sys/fs/cgroup; cd /sys/fs/cgroup; mkdir inner; echo 0 >inner/cgroup.procs
until echo +memory >cgroup.subtree_control; do
  for pid in $(cat cgroup.procs); do echo $pid >inner/cgroup.procs || true; done
done
touch /tmp/divided
`
	e.Create(e.Pod("divided", "busybox:1.37", []string{"sh", "-ec", divide + kit.Forever[2]}, kit.On(node), func(p *corev1.Pod) {
		c := &p.Spec.Containers[0]
		c.SecurityContext = &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"SYS_ADMIN"}}}
		c.ReadinessProbe = &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"test", "-e", "/tmp/divided"}}},
			PeriodSeconds: 1,
		}
	}))
	e.WaitReady(time.Minute, "divided")
	if where := e.Exec("divided", "main", "cat", "/proc/self/cgroup"); !strings.HasSuffix(strings.TrimSpace(where), "/inner") {
		t.Errorf("the process is in %s", where)
	}
	e.Delete("divided")
	e.WaitGone("divided", time.Minute)
}
