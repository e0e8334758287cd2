package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"

	"gantry.local/e2e/internal/pki"
	"gantry.local/e2e/internal/proc"
)

func (c *Cluster) pkiPath(name string) string { return c.path("pki", name) }

// makePKI writes all certificates and the kubeconfigs of the control plane.
func (c *Cluster) makePKI() error {
	dir := c.path("pki")
	ca, err := pki.NewAuthority(dir, "ca", "kubernetes")
	if err != nil {
		return err
	}
	frontProxy, err := pki.NewAuthority(dir, "front-proxy-ca", "front-proxy-ca")
	if err != nil {
		return err
	}
	if err := pki.ServiceAccountKeys(dir); err != nil {
		return err
	}
	if _, _, err := ca.Issue("apiserver", pki.Subject{
		CommonName: "kube-apiserver", Server: true,
		DNSNames:  []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"},
		Addresses: []net.IP{net.IPv4(127, 0, 0, 1), c.address(hostControlPlane).IP, net.IPv4(10, 96, 0, 1)},
	}); err != nil {
		return err
	}
	if _, _, err := ca.Issue("apiserver-kubelet-client", pki.Subject{CommonName: "kube-apiserver-kubelet-client"}); err != nil {
		return err
	}
	if _, _, err := frontProxy.Issue("front-proxy-client", pki.Subject{CommonName: "front-proxy-client"}); err != nil {
		return err
	}
	for name, subject := range map[string]pki.Subject{
		"admin":              {CommonName: "kubernetes-admin", Organizations: []string{"system:masters"}},
		"controller-manager": {CommonName: "system:kube-controller-manager"},
		"scheduler":          {CommonName: "system:kube-scheduler"},
	} {
		cert, key, err := ca.Issue(name, subject)
		if err != nil {
			return err
		}
		if err := ca.Kubeconfig(c.path(name+".conf"), c.ServerURL(), "gantry-"+c.Name, subject.CommonName, pki.User{CertFile: cert, KeyFile: key}); err != nil {
			return err
		}
	}
	if c.K3s {
		if err := c.makeK3s(ca); err != nil {
			return err
		}
	}
	// Nodes join with a bootstrap token: six and sixteen characters.
	random := make([]byte, 11)
	if _, err := rand.Read(random); err != nil {
		return err
	}
	token := hex.EncodeToString(random)
	token = token[:6] + "." + token[6:]
	return ca.Kubeconfig(c.path("bootstrap.conf"), c.ServerURL(), "gantry-"+c.Name, "tls-bootstrap-token-user", pki.User{Token: token})
}

// component is one process of the control plane.
type component struct {
	name string
	args []string
}

func (c *Cluster) etcd() component {
	return component{"etcd", []string{
		"--name=default", "--data-dir=" + c.path("etcd"),
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
		"--initial-cluster=default=http://127.0.0.1:2380",
		// A test cluster does not outlive the machine.
		"--unsafe-no-fsync", "--log-level=warn",
	}}
}

func (c *Cluster) apiServer() component {
	args := []string{
		"--etcd-servers=http://127.0.0.1:2379",
		"--bind-address=0.0.0.0", fmt.Sprintf("--secure-port=%d", apiServerPort),
		"--advertise-address=" + c.address(hostControlPlane).IP.String(),
		"--tls-cert-file=" + c.pkiPath("apiserver.crt"), "--tls-private-key-file=" + c.pkiPath("apiserver.key"),
		"--client-ca-file=" + c.pkiPath("ca.crt"),
		// What a node may not do must fail here as it fails in production.
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--enable-bootstrap-token-auth=true",
		"--kubelet-client-certificate=" + c.pkiPath("apiserver-kubelet-client.crt"),
		"--kubelet-client-key=" + c.pkiPath("apiserver-kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + c.pkiPath("sa.pub"), "--service-account-signing-key-file=" + c.pkiPath("sa.key"),
		"--requestheader-client-ca-file=" + c.pkiPath("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + c.pkiPath("front-proxy-client.crt"), "--proxy-client-key-file=" + c.pkiPath("front-proxy-client.key"),
		// The control plane has routes to Pods, but no kube-proxy.
		"--enable-aggregator-routing=true",
		"--allow-privileged=true", "--service-cluster-ip-range=" + serviceCIDR,
	}
	if c.K3s {
		args = append(args, c.k3sAPIServerArgs()...)
	}
	if c.Audit {
		args = append(args, "--audit-policy-file="+c.path("audit-policy.yaml"), "--audit-log-path="+c.AuditLog())
	}
	return component{"kube-apiserver", args}
}

func (c *Cluster) controllerManager() component {
	conf := c.path("controller-manager.conf")
	return component{"kube-controller-manager", []string{
		"--kubeconfig=" + conf, "--authentication-kubeconfig=" + conf, "--authorization-kubeconfig=" + conf,
		"--bind-address=127.0.0.1", "--leader-elect=false",
		"--root-ca-file=" + c.pkiPath("ca.crt"), "--client-ca-file=" + c.pkiPath("ca.crt"),
		"--requestheader-client-ca-file=" + c.pkiPath("front-proxy-ca.crt"),
		"--service-account-private-key-file=" + c.pkiPath("sa.key"), "--use-service-account-credentials=true",
		"--cluster-signing-cert-file=" + c.pkiPath("ca.crt"), "--cluster-signing-key-file=" + c.pkiPath("ca.key"),
		"--cluster-signing-duration=" + c.ClusterSigningDuration.String(),
		"--allocate-node-cidrs=true", "--cluster-cidr=" + podCIDR, "--service-cluster-ip-range=" + serviceCIDR,
		"--cluster-name=gantry-" + c.Name,
		"--controllers=*,bootstrapsigner,tokencleaner",
		"--node-monitor-grace-period=" + c.NodeMonitorGracePeriod.String(),
	}}
}

func (c *Cluster) scheduler() component {
	conf := c.path("scheduler.conf")
	return component{"kube-scheduler", []string{
		"--kubeconfig=" + conf, "--authentication-kubeconfig=" + conf, "--authorization-kubeconfig=" + conf,
		"--bind-address=127.0.0.1", "--leader-elect=false",
	}}
}

// startComponent starts a program of the control plane in its network.
func (c *Cluster) startComponent(p component) error {
	return c.startProcess(p.name, proc.Spec{
		Args:             append([]string{filepath.Join(c.Home.Bin, p.name)}, p.args...),
		Env:              []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.Dir},
		NetworkNamespace: c.namespaceFile("control-plane"),
	})
}

// startProcess starts a daemon and records it.
func (c *Cluster) startProcess(name string, spec proc.Spec) error {
	if err := os.MkdirAll(c.path("log"), 0o755); err != nil {
		return err
	}
	spec.Dir, spec.LogFile = c.Dir, c.processLog(name)
	id, err := proc.Start(spec)
	if err != nil {
		return err
	}
	c.Processes[name] = id
	return c.save()
}

// failure explains why waiting for a process was in vain: with the end of its log.
func (c *Cluster) failure(name string, cause error) error {
	what := "does not get ready"
	if !c.Processes[name].Alive() {
		what = "has ended"
	}
	err := fmt.Errorf("%s %s: %w\n--- the end of %s:\n%s", name, what, cause, c.processLog(name), tail(c.processLog(name), 30))
	for _, n := range c.Nodes {
		if n.Guest && name == guestProcess(n) {
			err = fmt.Errorf("%w\n--- the end of %s:\n%s", err, c.processLog(agentProcess(n)), tail(c.processLog(agentProcess(n)), 30))
		}
	}
	return err
}

// poll calls check until it succeeds, the process dies or ctx ends.
func (c *Cluster) poll(ctx context.Context, process string, check func(context.Context) error) error {
	for {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := check(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if process != "" && !c.Processes[process].Alive() {
			return c.failure(process, err)
		}
		select {
		case <-ctx.Done():
			if process == "" {
				return err
			}
			return c.failure(process, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Client is an administrator's client.
func (c *Cluster) Client() (*kubernetes.Clientset, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 200, 400
	return kubernetes.NewForConfig(config)
}

func (c *Cluster) waitAPIServer(ctx context.Context, client *kubernetes.Clientset) error {
	return c.poll(ctx, "kube-apiserver", func(ctx context.Context) error {
		body, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if err != nil {
			return fmt.Errorf("/readyz: %w %s", err, body)
		}
		return nil
	})
}

func (c *Cluster) waitRegistry(ctx context.Context) error {
	return c.poll(ctx, "supervisor", func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.Registry()+"/v2/", nil)
		if err != nil {
			return err
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errors.New("registry answers " + response.Status)
		}
		return nil
	})
}

// waitDefaults waits for what every Pod needs and controllers make.
func (c *Cluster) waitDefaults(ctx context.Context, client *kubernetes.Clientset) error {
	return c.poll(ctx, "kube-controller-manager", func(ctx context.Context) error {
		if _, err := client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{}); err != nil {
			return err
		}
		_, err := client.CoreV1().ConfigMaps("default").Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
		return err
	})
}

// makeJoinable creates what kubeadm creates so that nodes can join by a
// bootstrap token and the API server may use their kubelet endpoints.
func (c *Cluster) makeJoinable(ctx context.Context, client *kubernetes.Clientset) error {
	bootstrap, err := clientcmd.LoadFromFile(c.path("bootstrap.conf"))
	if err != nil {
		return err
	}
	token := bootstrap.AuthInfos["tls-bootstrap-token-user"].Token
	// Discovery wants one cluster without a name, and no credentials.
	bootstrap.Clusters = map[string]*clientcmdapi.Cluster{"": bootstrap.Clusters["gantry-"+c.Name]}
	bootstrap.AuthInfos, bootstrap.Contexts, bootstrap.CurrentContext = nil, nil, ""
	info, err := clientcmd.Write(*bootstrap)
	if err != nil {
		return err
	}

	const bootstrappers = "system:bootstrappers:kubeadm:default-node-token"
	group := func(name string) rbacv1.Subject {
		return rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: name}
	}
	user := func(name string) rbacv1.Subject {
		return rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: name}
	}
	bind := func(name, role string, subject rbacv1.Subject) runtime.Object {
		return &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
			Subjects:   []rbacv1.Subject{subject},
		}
	}
	objects := []runtime.Object{
		&corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "bootstrap-token-" + token[:6]},
			Type:       corev1.SecretTypeBootstrapToken,
			StringData: map[string]string{
				"token-id": token[:6], "token-secret": token[7:],
				"usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true",
				"auth-extra-groups": bootstrappers,
			},
		},
		bind("kubeadm:kubelet-bootstrap", "system:node-bootstrapper", group(bootstrappers)),
		bind("kubeadm:node-autoapprove-bootstrap", "system:certificates.k8s.io:certificatesigningrequests:nodeclient", group(bootstrappers)),
		bind("kubeadm:node-autoapprove-certificate-rotation", "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient", group("system:nodes")),
		bind("gantry:apiserver-kubelet-client", "system:kubelet-api-admin", user("kube-apiserver-kubelet-client")),
		&corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Namespace: "kube-public", Name: "cluster-info"},
			Data:       map[string]string{"kubeconfig": string(info)},
		},
		&rbacv1.Role{
			ObjectMeta: metav1.ObjectMeta{Namespace: "kube-public", Name: "kubeadm:bootstrap-signer-clusterinfo"},
			Rules:      []rbacv1.PolicyRule{{Verbs: []string{"get"}, APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{"cluster-info"}}},
		},
		&rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Namespace: "kube-public", Name: "kubeadm:bootstrap-signer-clusterinfo"},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "kubeadm:bootstrap-signer-clusterinfo"},
			Subjects:   []rbacv1.Subject{user("system:anonymous")},
		},
	}
	for _, object := range objects {
		// The namespaces are made by the API server right after it gets ready.
		if err := c.poll(ctx, "kube-apiserver", func(ctx context.Context) error { return create(ctx, client, object) }); err != nil {
			raw, _ := yaml.Marshal(object)
			return fmt.Errorf("create %T: %w\n%s", object, err, raw)
		}
	}
	return nil
}

func create(ctx context.Context, client *kubernetes.Clientset, object runtime.Object) error {
	var err error
	switch o := object.(type) {
	case *corev1.Secret:
		_, err = client.CoreV1().Secrets(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *corev1.ConfigMap:
		_, err = client.CoreV1().ConfigMaps(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.ClusterRoleBinding:
		_, err = client.RbacV1().ClusterRoleBindings().Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.Role:
		_, err = client.RbacV1().Roles(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.RoleBinding:
		_, err = client.RbacV1().RoleBindings(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	default:
		return fmt.Errorf("no client for %T", object)
	}
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}
