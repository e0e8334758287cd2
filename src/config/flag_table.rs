//! Every flag of a v1.37 kubelet and the few that are Gantry's own, as data.
//!
//! Source: `cmd/kubelet/app/options/options.go`, `globalflags*.go`, component-base `logs/api/v1/options.go`.

/// How a flag's value is written, after pflag's types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Text,
    Int32,
    Int64,
    Unsigned,
    Duration,
    Ip,
    /// `a,b`; repeating appends.
    List,
    /// `k=v,k=v`; repeating adds.
    Map,
    /// `k=true,k=false`.
    BoolMap,
    /// `k<v,k<v`, as eviction thresholds are written.
    LessMap,
    /// `k:v,k:v`, values of one key collect.
    Headers,
    /// `key=value:effect,...`.
    Taints,
    /// `node:type=amount,...;node:...`.
    ReservedMemory,
    /// `pattern=level,...`.
    VModule,
    Quantity,
}

/// One flag.
pub(super) struct Flag {
    /// Without dashes in front.
    pub(super) name: &'static str,
    /// How its value is written.
    pub(super) kind: Kind,
    /// The field of the configuration file it stands for; empty if there is none.
    pub(super) field: &'static str,
    /// One line of help.
    pub(super) help: &'static str,
}

const fn flag(name: &'static str, kind: Kind, field: &'static str, help: &'static str) -> Flag {
    Flag { name, kind, field, help }
}

use Kind::{
    Bool, BoolMap, Duration, Headers, Int32, Int64, Ip, LessMap, List, Map, Quantity, ReservedMemory, Taints, Text,
    Unsigned, VModule,
};

/// Environment variables that stand for flags: those of k3s' own agent.
pub(super) const VARIABLES: [(&str, &str); 3] =
    [("k3s-server", "K3S_URL"), ("k3s-token", "K3S_TOKEN"), ("k3s-token-file", "K3S_TOKEN_FILE")];

/// All flags; [`super::flags::Flags`] holds the typed values of those without a field.
#[rustfmt::skip]
pub(super) const FLAGS: &[Flag] = &[
    // where things are
    flag("config", Text, "", "KubeletConfiguration file"),
    flag("config-dir", Text, "", "Directory of drop-in configuration files (*.conf), merged in lexical order"),
    flag("kubeconfig", Text, "", "Kubeconfig of the API server; without it only static Pods run (standalone mode)"),
    flag("bootstrap-kubeconfig", Text, "", "Kubeconfig with which a client certificate is requested if --kubeconfig has none that is valid"),
    flag("hostname-override", Text, "", "Name of the node instead of the host's name"),
    flag("node-ip", Text, "", "Address of the node, or one IPv4 and one IPv6 address separated by a comma"),
    flag("cert-dir", Text, "", "Directory of certificates [/var/lib/kubelet/pki]"),
    flag("cloud-provider", Text, "", "Empty, or 'external' for a cloud controller manager"),
    flag("cloud-config", Text, "", "Accepted and ignored: cloud providers are external"),
    flag("root-dir", Text, "", "Directory of volumes and plugin sockets [/var/lib/kubelet]"),
    flag("node-labels", Map, "", "Labels of a Node we create, key=value separated by commas"),
    flag("seccomp-default", Bool, "seccompDefault", "RuntimeDefault seccomp profile for all workloads"),
    flag("lock-file", Text, "", "File to lock while running"),
    flag("exit-on-lock-contention", Bool, "", "Exit when somebody else opens the lock file"),
    flag("image-credential-provider-config", Text, "", "Credential provider configuration file or directory"),
    flag("image-credential-provider-bin-dir", Text, "", "Directory of credential provider plugins"),
    // Gantry's own
    flag("data-dir", Text, "", "Directory of images and container file systems [/var/lib/gantry]"),
    flag("state-dir", Text, "", "Directory of the state of running Pods, on a tmpfs [/run/gantry]"),
    flag("container-logs-dir", Text, "", "Directory of links to container logs [/var/log/containers]"),
    flag("insecure-registry", List, "", "Registry (host:port) to speak plain HTTP with; may be repeated"),
    flag("bridge-name", Text, "", "Bridge of the built-in Pod network [gantry0]"),
    flag("cluster-cidr", List, "", "Network of Pods and Services that is never masqueraded; may be repeated"),
    flag("nested", Bool, "", "This node is a container of another: keep to the container's own cgroup"),
    flag("leave-stateful-set", Text, "", "This node is a Pod of NAMESPACE/NAME: when that is scaled down or deleted, SIGTERM drains the node and deletes its Node"),
    flag("leave-kubeconfig", Text, "", "Kubeconfig that may get that StatefulSet and delete this Node"),
    flag("leave-timeout", Duration, "", "Time for the drain, within the Pod's grace period [1m]"),
    flag("k3s-server", Text, "", "Join this k3s server (https://HOST:6443) by its own protocol, instead of --bootstrap-kubeconfig"),
    flag("k3s-token", Text, "", "Its token, whole (K10…) so that the server is verified; other users of this machine see it: rather --k3s-token-file"),
    flag("k3s-token-file", Text, "", "File with the token"),
    flag("k3s-node-password-file", Text, "", "Where the password is kept by which k3s knows the node again [/etc/rancher/node/password]"),
    flag("network-plugin", Text, "", "'cni': wait for a CNI configuration; 'builtin': never use one; empty: use one if it is there"),
    flag("cni-conf-dir", Text, "", "Directory of CNI configurations [/etc/cni/net.d]"),
    flag("cni-bin-dir", List, "", "Directory of CNI plugins; may be repeated [/opt/cni/bin]"),
    flag("cni-cache-dir", Text, "", "Directory of what has to be known to detach Pods from CNI networks [cni in --data-dir]"),
    // deprecated, or without a meaning here: accepted, with a warning
    flag("runtime-cgroups", Text, "", "Accepted and ignored: the runtime is the agent itself"),
    flag("minimum-container-ttl-duration", Duration, "", "DEPRECATED: least age of a dead container before it is removed"),
    flag("maximum-dead-containers-per-container", Int32, "", "DEPRECATED: most dead instances kept of one container [1]"),
    flag("maximum-dead-containers", Int32, "", "DEPRECATED: most dead containers kept; negative for no limit [-1]"),
    flag("experimental-mounter-path", Text, "", "DEPRECATED: accepted and ignored"),
    flag("experimental-allocatable-ignore-eviction", Bool, "", "DEPRECATED: leave hard eviction thresholds out of allocatable"),
    flag("pod-infra-container-image", Text, "", "DEPRECATED: accepted and ignored, there is no pause container"),
    flag("housekeeping-interval", Duration, "", "Accepted and ignored: statistics are read when they are asked for"),
    // configuration file fields as flags
    flag("enable-server", Bool, "enableServer", "Serve HTTPS"),
    flag("fail-swap-on", Bool, "failSwapOn", "Refuse to start with swap on"),
    flag("pod-manifest-path", Text, "staticPodPath", "Static Pod manifest file or directory"),
    flag("sync-frequency", Duration, "syncFrequency", "Longest time between two looks at a Pod"),
    flag("file-check-frequency", Duration, "fileCheckFrequency", "Time between two looks at static Pod files"),
    flag("http-check-frequency", Duration, "httpCheckFrequency", "Time between two requests for static Pods"),
    flag("manifest-url", Text, "staticPodURL", "URL of static Pods"),
    flag("manifest-url-header", Headers, "staticPodURLHeader", "Headers for it, name:value separated by commas"),
    flag("address", Ip, "address", "Address to serve on"),
    flag("port", Int32, "port", "Port to serve on"),
    flag("read-only-port", Int32, "readOnlyPort", "Port without authentication, 0 for none"),
    flag("fail-cgroupv1", Bool, "failCgroupV1", "Refuse to start on a cgroup v1 host"),
    flag("container-runtime-endpoint", Text, "containerRuntimeEndpoint", "Accepted and ignored: the runtime is the agent itself"),
    flag("image-service-endpoint", Text, "imageServiceEndpoint", "Accepted and ignored: the image service is the agent itself"),
    flag("anonymous-auth", Bool, "authentication.anonymous.enabled", "Let requests without credentials in as system:anonymous"),
    flag("authentication-token-webhook", Bool, "authentication.webhook.enabled", "Check bearer tokens with TokenReview"),
    flag("authentication-token-webhook-cache-ttl", Duration, "authentication.webhook.cacheTTL", "How long such answers hold"),
    flag("client-ca-file", Text, "authentication.x509.clientCAFile", "Authorities of client certificates"),
    flag("authorization-mode", Text, "authorization.mode", "AlwaysAllow or Webhook"),
    flag("authorization-webhook-cache-authorized-ttl", Duration, "authorization.webhook.cacheAuthorizedTTL", "How long a yes of the webhook holds"),
    flag("authorization-webhook-cache-unauthorized-ttl", Duration, "authorization.webhook.cacheUnauthorizedTTL", "How long a no of the webhook holds"),
    flag("tls-cert-file", Text, "tlsCertFile", "Serving certificate"),
    flag("tls-private-key-file", Text, "tlsPrivateKeyFile", "Its key"),
    flag("rotate-server-certificates", Bool, "serverTLSBootstrap", "Ask the cluster for the serving certificate"),
    flag("tls-cipher-suites", List, "tlsCipherSuites", "Cipher suites of the server"),
    flag("tls-min-version", Text, "tlsMinVersion", "Least TLS version: VersionTLS12 or VersionTLS13"),
    flag("rotate-certificates", Bool, "rotateCertificates", "Renew the client certificate before it expires"),
    flag("registry-qps", Int32, "registryPullQPS", "Image pulls a second, 0 for no limit"),
    flag("registry-burst", Int32, "registryBurst", "Pulls at once above that"),
    flag("event-qps", Int32, "eventRecordQPS", "Events a second, 0 for no limit"),
    flag("event-burst", Int32, "eventBurst", "Events at once above that"),
    flag("enable-debugging-handlers", Bool, "enableDebuggingHandlers", "Serve logs, exec, attach and port-forward"),
    flag("contention-profiling", Bool, "enableContentionProfiling", "Accepted and ignored: Go only"),
    flag("healthz-port", Int32, "healthzPort", "Port of /healthz, 0 for none"),
    flag("healthz-bind-address", Ip, "healthzBindAddress", "Address of /healthz"),
    flag("oom-score-adj", Int32, "oomScoreAdj", "oom_score_adj of the agent"),
    flag("cluster-domain", Text, "clusterDomain", "DNS domain of the cluster"),
    flag("volume-plugin-dir", Text, "volumePluginDir", "Directory of flex volume plugins"),
    flag("cluster-dns", List, "clusterDNS", "DNS servers of the cluster"),
    flag("streaming-connection-idle-timeout", Duration, "streamingConnectionIdleTimeout", "Exec, attach and port-forward end after this much silence"),
    flag("node-status-update-frequency", Duration, "nodeStatusUpdateFrequency", "Time between two computations of the Node's status"),
    flag("minimum-image-ttl-duration", Duration, "imageMinimumGCAge", "Least age of an unused image before it is removed"),
    flag("image-gc-high-threshold", Int32, "imageGCHighThresholdPercent", "Disk use that starts image collection, percent"),
    flag("image-gc-low-threshold", Int32, "imageGCLowThresholdPercent", "Disk use at which it stops, percent"),
    flag("volume-stats-agg-period", Duration, "volumeStatsAggPeriod", "Time between two measurements of volumes"),
    flag("feature-gates", BoolMap, "featureGates", "Features to switch, name=true|false separated by commas"),
    flag("kubelet-cgroups", Text, "kubeletCgroups", "Cgroup for the agent itself"),
    flag("system-cgroups", Text, "systemCgroups", "Cgroup for all other system processes"),
    flag("provider-id", Text, "providerID", "The node's identity with its provider"),
    flag("cgroups-per-qos", Bool, "cgroupsPerQOS", "One cgroup per QoS class"),
    flag("cgroup-driver", Text, "cgroupDriver", "cgroupfs or systemd"),
    flag("cgroup-root", Text, "cgroupRoot", "Cgroup under which Pods live"),
    flag("cpu-manager-policy", Text, "cpuManagerPolicy", "none or static"),
    flag("cpu-manager-policy-options", Map, "cpuManagerPolicyOptions", "Options of the policy"),
    flag("cpu-manager-reconcile-period", Duration, "cpuManagerReconcilePeriod", "Time between two checks of CPU sets"),
    flag("qos-reserved", Map, "qosReserved", "Share of requests reserved per QoS class, percent"),
    flag("topology-manager-policy", Text, "topologyManagerPolicy", "none, best-effort, restricted or single-numa-node"),
    flag("topology-manager-scope", Text, "topologyManagerScope", "container or pod"),
    flag("topology-manager-policy-options", Map, "topologyManagerPolicyOptions", "Options of the policy"),
    flag("runtime-request-timeout", Duration, "runtimeRequestTimeout", "Longest runtime call"),
    flag("hairpin-mode", Text, "hairpinMode", "promiscuous-bridge, hairpin-veth or none"),
    flag("max-pods", Int32, "maxPods", "Most Pods on this node"),
    flag("pod-cidr", Text, "podCIDR", "Pod addresses in standalone mode"),
    flag("pod-max-pids", Int64, "podPidsLimit", "Most processes in a Pod, -1 for the node's limit"),
    flag("resolv-conf", Text, "resolvConf", "Basis of the Pods' resolv.conf"),
    flag("runonce", Bool, "runOnce", "Refused: removed from kubelet"),
    flag("cpu-cfs-quota", Bool, "cpuCFSQuota", "Enforce CPU limits"),
    flag("cpu-cfs-quota-period", Duration, "cpuCFSQuotaPeriod", "Period of that quota"),
    flag("enable-controller-attach-detach", Bool, "enableControllerAttachDetach", "Leave attaching volumes to the controller"),
    flag("make-iptables-util-chains", Bool, "makeIPTablesUtilChains", "Accepted and ignored: no iptables here"),
    flag("container-log-max-size", Text, "containerLogMaxSize", "Size at which a container log is rotated"),
    flag("container-log-max-files", Int32, "containerLogMaxFiles", "Most files of a container log"),
    flag("allowed-unsafe-sysctls", List, "allowedUnsafeSysctls", "Unsafe sysctls that Pods may set"),
    flag("node-status-max-images", Int32, "nodeStatusMaxImages", "Most images in the Node's status, -1 for all"),
    flag("kernel-memcg-notification", Bool, "kernelMemcgNotification", "Kernel notifications of memory pressure"),
    flag("local-storage-capacity-isolation", Bool, "localStorageCapacityIsolation", "Track local storage of Pods"),
    flag("max-open-files", Int64, "maxOpenFiles", "Most open files of the agent"),
    flag("kube-api-content-type", Text, "contentType", "Accepted and ignored: the agent speaks JSON"),
    flag("kube-api-qps", Int32, "kubeAPIQPS", "API requests a second"),
    flag("kube-api-burst", Int32, "kubeAPIBurst", "API requests at once above that"),
    flag("serialize-image-pulls", Bool, "serializeImagePulls", "Pull one image at a time"),
    flag("eviction-hard", LessMap, "evictionHard", "Hard eviction thresholds, for example memory.available<100Mi"),
    flag("eviction-soft", LessMap, "evictionSoft", "Soft eviction thresholds"),
    flag("eviction-soft-grace-period", Map, "evictionSoftGracePeriod", "How long they must hold"),
    flag("eviction-pressure-transition-period", Duration, "evictionPressureTransitionPeriod", "How long pressure stays reported"),
    flag("eviction-max-pod-grace-period", Int32, "evictionMaxPodGracePeriod", "Longest grace period in a soft eviction, seconds"),
    flag("eviction-minimum-reclaim", Map, "evictionMinimumReclaim", "Least amounts to free"),
    flag("pods-per-core", Int32, "podsPerCore", "Most Pods per core, 0 for no limit"),
    flag("protect-kernel-defaults", Bool, "protectKernelDefaults", "Refuse to start if kernel tunables differ"),
    flag("reserved-cpus", Text, "reservedSystemCPUs", "CPUs kept for the system"),
    flag("system-reserved", Map, "systemReserved", "Resources kept for the system"),
    flag("kube-reserved", Map, "kubeReserved", "Resources kept for Kubernetes' daemons"),
    flag("enforce-node-allocatable", List, "enforceNodeAllocatable", "Which reservations are enforced"),
    flag("system-reserved-cgroup", Text, "systemReservedCgroup", "Cgroup in which the first is enforced"),
    flag("kube-reserved-cgroup", Text, "kubeReservedCgroup", "Cgroup in which the second is enforced"),
    flag("memory-manager-policy", Text, "memoryManagerPolicy", "None or Static"),
    flag("reserved-memory", ReservedMemory, "reservedMemory", "Memory kept per NUMA node, node:type=amount,...;..."),
    flag("register-node", Bool, "registerNode", "Create our Node"),
    flag("register-with-taints", Taints, "registerWithTaints", "Taints of a Node we create, key=value:effect separated by commas"),
    // logging
    flag("logging-format", Text, "logging.format", "text or json"),
    flag("log-flush-frequency", Duration, "logging.flushFrequency", "Accepted and ignored: lines are written at once"),
    flag("v", Unsigned, "logging.verbosity", "Log verbosity: 0-2 info, 3-4 debug, 5 and more trace"),
    flag("vmodule", VModule, "logging.vmodule", "Verbosity by source file, pattern=N separated by commas"),
    flag("log-text-split-stream", Bool, "logging.options.text.splitStream", "ALPHA: errors to stderr, the rest to stdout"),
    flag("log-text-info-buffer-size", Quantity, "logging.options.text.infoBufferSize", "ALPHA: buffer for the latter"),
    flag("log-json-split-stream", Bool, "logging.options.json.splitStream", "ALPHA: errors to stderr, the rest to stdout"),
    flag("log-json-info-buffer-size", Quantity, "logging.options.json.infoBufferSize", "ALPHA: buffer for the latter"),
];
