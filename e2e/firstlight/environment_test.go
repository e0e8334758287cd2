package firstlight

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"gantry.local/e2e/internal/kit"
)

// settings makes a ConfigMap and a Secret of the same name.
func settings(t *testing.T, e *kit.Env, name string, config, secret map[string]string) {
	t.Helper()
	meta := metav1.ObjectMeta{Name: name}
	if _, err := e.Client.CoreV1().ConfigMaps(e.Namespace).Create(e.Ctx, &corev1.ConfigMap{ObjectMeta: meta, Data: config}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Client.CoreV1().Secrets(e.Namespace).Create(e.Ctx, &corev1.Secret{ObjectMeta: meta, StringData: secret}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// What a container's process is started with: variables from every source, and
// references to them in other variables, the command and its arguments.
func TestEnvironment(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	settings(t, e, "app", map[string]string{"colour": "green", "SHAPE": "round"}, map[string]string{"password": "s3cr$t"})

	field := func(path string) *corev1.EnvVarSource {
		return &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}
	}
	amount := func(name, divisor string) *corev1.EnvVarSource {
		return &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{Resource: name, Divisor: resource.MustParse(divisor)}}
	}
	local := corev1.LocalObjectReference{Name: "app"}
	optional := true
	pod := e.Pod("environment", "busybox:1.37", []string{"sh", "-c"}, kit.On(node), func(p *corev1.Pod) {
		p.Annotations = map[string]string{"example.org/note": "a note"}
		c := &p.Spec.Containers[0]
		c.WorkingDir = "/var/www"
		c.Args = []string{`echo 'args: $(GREETING) $$(GREETING) $(NOBODY)'; trap 'exit 0' TERM; while :; do sleep 3600 & wait; done`}
		c.Resources.Limits = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1500m"), corev1.ResourceMemory: resource.MustParse("64Mi")}
		c.Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m")}
		c.EnvFrom = []corev1.EnvFromSource{
			{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: local}},
			{Prefix: "SECRET_", SecretRef: &corev1.SecretEnvSource{LocalObjectReference: local}},
			{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "none"}, Optional: &optional}},
		}
		c.Env = []corev1.EnvVar{
			{Name: "NAME", Value: "world"},
			{Name: "GREETING", Value: "hello $(NAME), $$(NAME), $(LATER), $(colour)"},
			{Name: "LATER", Value: "too late"},
			{Name: "SHAPE", Value: "square"},
			{Name: "COLOUR", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: local, Key: "colour"}}},
			{Name: "PASSWORD", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: local, Key: "password"}}},
			{Name: "ABSENT", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: local, Key: "none", Optional: &optional}}},
			{Name: "POD", ValueFrom: field("metadata.name")},
			{Name: "POD_NAMESPACE", ValueFrom: field("metadata.namespace")},
			{Name: "POD_UID", ValueFrom: field("metadata.uid")},
			{Name: "APP", ValueFrom: field("metadata.labels['app']")},
			{Name: "NOTE", ValueFrom: field("metadata.annotations['example.org/note']")},
			{Name: "NODE", ValueFrom: field("spec.nodeName")},
			{Name: "ACCOUNT", ValueFrom: field("spec.serviceAccountName")},
			{Name: "POD_IP", ValueFrom: field("status.podIP")},
			{Name: "HOST_IP", ValueFrom: field("status.hostIP")},
			{Name: "CPUS", ValueFrom: amount("limits.cpu", "1")},
			{Name: "MILLI_CPUS", ValueFrom: amount("limits.cpu", "1m")},
			{Name: "MEMORY", ValueFrom: amount("limits.memory", "1Mi")},
			{Name: "CPU_REQUEST", ValueFrom: amount("requests.cpu", "1m")},
		}
	})
	e.Create(pod)
	running := e.WaitReady(60*time.Second, "environment")[0]

	have := map[string]string{}
	// Of the process itself, not of one that is added.
	for _, variable := range strings.Split(e.Exec("environment", "main", "cat", "/proc/1/environ"), "\x00") {
		name, value, _ := strings.Cut(variable, "=")
		have[name] = value
	}
	for name, want := range map[string]string{
		"NAME": "world", "GREETING": "hello world, $(NAME), $(LATER), green", "SHAPE": "square", "colour": "green", "SECRET_password": "s3cr$t",
		"COLOUR": "green", "PASSWORD": "s3cr$t",
		"POD": "environment", "POD_NAMESPACE": e.Namespace, "POD_UID": string(running.UID), "APP": "environment", "NOTE": "a note",
		"NODE": node, "ACCOUNT": "default", "POD_IP": running.Status.PodIP, "HOST_IP": running.Status.HostIP,
		"CPUS": "2", "MILLI_CPUS": "1500", "MEMORY": "64", "CPU_REQUEST": "10",
		"HOSTNAME": "environment", "KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443",
	} {
		if got, ok := have[name]; !ok || got != want {
			t.Errorf("%s=%q, want %q", name, got, want)
		}
	}
	if value, ok := have["ABSENT"]; ok {
		t.Errorf("ABSENT=%q, though its optional key does not exist", value)
	}
	if running.Status.PodIP == "" || running.Status.HostIP == "" {
		t.Errorf("Pod IP %q, host IP %q", running.Status.PodIP, running.Status.HostIP)
	}
	if got := e.Logs("environment", "main"); got != "args: hello world, $(NAME), $(LATER), green $(GREETING) $(NOBODY)\n" {
		t.Errorf("arguments: %q", got)
	}
	if got := e.Exec("environment", "main", "readlink", "/proc/1/cwd"); got != "/var/www\n" {
		t.Errorf("working directory %q", got)
	}
}
