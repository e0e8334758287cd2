use std::path::Path;
use std::str::FromStr;

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Capabilities, PodSecurityContext, SeccompProfile, SecurityContext, Sysctl,
};
use oci_spec::image::Config;
use oci_spec::runtime::Capability;

use super::*;

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001:Alice:/home/alice:/bin/sh\nbroken:x:a:b\n";
const GROUP: &str = "root:x:0:root\nalice:x:1001:alice\nwheel:x:50000:bob,alice\nodd:x:nan:alice\n";

/// A container and everything around it, with owned parts that tests change.
struct Fixture {
    pod: Pod,
    image: ImageConfiguration,
    command: Vec<String>,
    args: Vec<String>,
    env: Vec<(String, String)>,
    namespaces: Namespaces,
    limits: Limits,
    users: UserFiles,
    node: NodeTraits,
    devices: Vec<DeviceGrant>,
}

impl Fixture {
    fn new() -> Self {
        let container = Container { name: "c".into(), ..Container::default() };
        let mut pod = crate::resources::fixture::pod(vec![container]);
        pod.metadata.name = Some("p".into());
        pod.metadata.namespace = Some("ns".into());
        pod.metadata.uid = Some("u".into());
        let mut config = Config::default();
        config.set_entrypoint(Some(vec!["/entry".into()]));
        config.set_cmd(Some(vec!["default".into()]));
        let mut image = ImageConfiguration::default();
        image.set_config(Some(config));
        let mut node = NodeTraits::detect(true, "/nowhere".into(), false).unwrap();
        node.capabilities = ["CHOWN", "KILL", "NET_RAW", "NET_ADMIN", "SYS_ADMIN", "SYS_TIME", "SETPCAP", "SETUID"]
            .map(str::to_owned)
            .into();
        node.min_oom_score_adj = None;
        node.apparmor = false;
        node.selinux = false;
        Self {
            pod,
            image,
            command: Vec::new(),
            args: Vec::new(),
            env: Vec::new(),
            namespaces: Namespaces::default(),
            limits: Limits::default(),
            users: UserFiles { passwd: PASSWD.into(), group: GROUP.into() },
            node,
            devices: Vec::new(),
        }
    }

    fn pod_spec(&mut self) -> &mut PodSpec {
        self.pod.spec.as_mut().unwrap()
    }

    fn container(&mut self) -> &mut Container {
        &mut self.pod_spec().containers[0]
    }

    fn security(&mut self) -> &mut SecurityContext {
        self.container().security_context.get_or_insert_default()
    }

    fn pod_security(&mut self) -> &mut PodSecurityContext {
        self.pod_spec().security_context.get_or_insert_default()
    }

    fn config(&mut self, change: impl FnOnce(&mut Config)) {
        let mut config = self.image.config().clone().unwrap();
        change(&mut config);
        self.image.set_config(Some(config));
    }

    fn build(&self) -> Result<Bundle, SpecError> {
        build(&ContainerInput {
            pod: &self.pod,
            container: &self.pod.spec.as_ref().unwrap().containers[0],
            image: &self.image,
            command: &self.command,
            args: &self.args,
            env: &self.env,
            mounts: &[],
            namespaces: &self.namespaces,
            rootfs: Path::new("/run/rootfs"),
            shm: Path::new("/run/pod/shm"),
            cgroup_path: "/kubepods/podu/c",
            hostname: "p",
            limits: &self.limits,
            devices: &self.devices,
            device_mounts: &[],
            annotations: &BTreeMap::from([("vendor.test/a".to_owned(), "b".to_owned())]),
            host_devices: &[LinuxDevice::default()],
            volume_groups: &[],
            users: &self.users,
            node: &self.node,
        })
    }

    fn built(&self) -> Bundle {
        self.build().unwrap()
    }

    fn built_args(&self) -> Vec<String> {
        self.built().spec.process().as_ref().unwrap().args().clone().unwrap()
    }

    fn built_env(&self) -> Vec<String> {
        self.built().spec.process().as_ref().unwrap().env().clone().unwrap()
    }

    fn error(&self) -> String {
        self.build().unwrap_err().to_string()
    }
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

#[test]
fn command_and_args_replace_the_images() {
    // the table in "Define a Command and Arguments for a Container"
    for (command, args, expected) in [
        (&[][..], &[][..], &["/entry", "default"][..]),
        (&["/own"], &[], &["/own"]),
        (&[], &["a"], &["/entry", "a"]),
        (&["/own"], &["a"], &["/own", "a"]),
    ] {
        let mut f = Fixture::new();
        (f.command, f.args) = (strings(command), strings(args));
        assert_eq!(f.built_args(), expected);
    }
}

#[test]
fn something_must_run() {
    let mut f = Fixture::new();
    f.image.set_config(None);
    assert_eq!(f.error(), "no command specified");
    assert_eq!(f.build().unwrap_err().reason(), "CreateContainerError");
    f.command = vec!["a\0b".into()];
    assert!(f.error().contains("NUL"));
}

#[test]
fn variables_of_the_pod_override_those_of_the_image() {
    let mut f = Fixture::new();
    f.config(|c| {
        c.set_env(Some(strings(&["A=image", "PATH=/image", "B=two=parts", "odd"])));
    });
    f.env = vec![("A".into(), "pod".into()), ("EMPTY".into(), String::new()), ("A".into(), "last".into())];
    assert_eq!(f.built_env(), ["PATH=/image", "HOSTNAME=p", "A=last", "B=two=parts", "EMPTY=", "HOME=/root"]);
    f.container().tty = Some(true);
    assert!(f.built_env().contains(&"TERM=xterm".to_owned()));
    f.env = vec![("S".into(), "secret\0".into())];
    assert!(!f.error().contains("secret"));
}

#[test]
fn path_and_home_are_always_there() {
    let f = Fixture::new();
    assert!(f.built_env()[0].starts_with("PATH=/usr/local/sbin:"));
    let mut f = Fixture::new();
    f.security().run_as_user = Some(4711);
    assert!(f.built_env().contains(&"HOME=/".to_owned()));
}

#[test]
fn users_are_looked_up_in_the_image() {
    let identity = |user: &str, change: fn(&mut Fixture)| {
        let mut f = Fixture::new();
        f.config(|c| {
            c.set_user(Some(user.to_owned()));
        });
        change(&mut f);
        let i = f.built().identity;
        (i.uid, i.gid, i.groups, i.home)
    };
    assert_eq!(identity("", |_| ()), (0, 0, vec![0], "/root".into()));
    assert_eq!(identity("alice", |_| ()), (1000, 1001, vec![1001, 50000], "/home/alice".into()));
    assert_eq!(identity("1000:7", |_| ()).1, 1001);
    assert_eq!(identity("4711", |_| ()), (4711, 0, vec![0], "/".into()));
    let own = identity("alice", |f| {
        f.pod_security().run_as_user = Some(5);
        f.security().run_as_user = Some(1000);
        f.security().run_as_group = Some(9);
    });
    assert_eq!((own.0, own.1), (1000, 9));
    let mut f = Fixture::new();
    f.config(|c| {
        c.set_user(Some("mallory".into()));
    });
    assert_eq!(f.error(), "unable to find user mallory: no matching entries in passwd file");
}

#[test]
fn supplementary_groups_merge_or_not() {
    // the cases of test/e2e/common/node/security_context.go
    for (policy, expected) in [
        (None, vec![1000, 50000, 60000]),
        (Some("Merge"), vec![1000, 50000, 60000]),
        (Some("Strict"), vec![1000, 60000]),
    ] {
        let mut f = Fixture::new();
        f.users.passwd = b"alice:x:1000:1000::/home/alice:/bin/sh".to_vec();
        let s = f.pod_security();
        s.run_as_user = Some(1000);
        s.run_as_group = Some(1000);
        s.supplemental_groups = Some(vec![60000]);
        s.supplemental_groups_policy = policy.map(str::to_owned);
        assert_eq!(f.built().identity.groups, expected, "{policy:?}");
    }
    let mut f = Fixture::new();
    f.pod_security().fs_group = Some(2000);
    f.pod_security().supplemental_groups = Some(vec![2000, 3]);
    assert_eq!(f.built().identity.groups, [0, 2000, 3]);
    f.pod_security().supplemental_groups = Some(vec![-1]);
    assert!(f.error().contains("supplementary group -1"));
}

#[test]
fn non_root_is_verified_as_kubelets_do() {
    let check = |user: &str, change: fn(&mut Fixture)| {
        let mut f = Fixture::new();
        f.pod_security().run_as_non_root = Some(true);
        f.config(|c| {
            c.set_user(Some(user.to_owned()));
        });
        change(&mut f);
        let result = f.build().map(|_| ());
        assert!(result.as_ref().err().is_none_or(|e| e.reason() == "CreateContainerConfigError"));
        result.map_err(|e| e.to_string())
    };
    let suffix = "(pod: \"p_ns(u)\", container: c)";
    assert_eq!(check("", |_| ()), Err(format!("container has runAsNonRoot and image will run as root {suffix}")));
    assert_eq!(
        check("alice", |_| ()),
        Err(format!(
            "container has runAsNonRoot and image has non-numeric user (alice), cannot verify user is non-root {suffix}"
        ))
    );
    assert_eq!(
        check("1000", |f| f.security().run_as_user = Some(0)),
        Err(format!("container's runAsUser breaks non-root policy {suffix}"))
    );
    assert!(check("-5", |_| ()).unwrap_err().contains("invalid user id (-5)"));
    assert_eq!(check("1000", |_| ()), Ok(()));
    assert_eq!(check("alice", |f| f.security().run_as_user = Some(1)), Ok(()));
    assert_eq!(check("", |f| f.security().run_as_non_root = Some(false)), Ok(()));
}

fn bounding(f: &Fixture) -> Vec<String> {
    f.built().setup.capabilities.bounding
}

#[test]
fn capabilities_are_added_and_dropped() {
    let with = |add: &[&str], drop: &[&str]| {
        let mut f = Fixture::new();
        f.security().capabilities = Some(Capabilities { add: Some(strings(add)), drop: Some(strings(drop)) });
        bounding(&f)
    };
    let default = ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW", "CAP_SETPCAP", "CAP_SETUID"];
    assert_eq!(bounding(&Fixture::new()), default);
    assert_eq!(with(&["NET_ADMIN"], &["ALL"]), ["CAP_NET_ADMIN"]);
    assert_eq!(with(&[], &["ALL"]), Vec::<String>::new());
    assert_eq!(with(&["cap_net_admin"], &["KILL", "CHOWN", "SETUID", "SETPCAP"]), ["CAP_NET_ADMIN", "CAP_NET_RAW"]);
    assert_eq!(with(&["ALL"], &["SYS_TIME"]).len(), 7);
    // what the node lacks, and what does not exist, cannot be granted
    assert_eq!(with(&["SYS_MODULE", "NO_SUCH"], &["ALL"]), Vec::<String>::new());
}

#[test]
fn two_capabilities_are_lent_to_the_executor_only() {
    let mut f = Fixture::new();
    f.security().capabilities = Some(Capabilities { add: None, drop: Some(strings(&["ALL"])) });
    let bundle = f.built();
    let process = bundle.spec.process().clone().unwrap();
    let caps = process.capabilities().as_ref().unwrap();
    let lent = [Capability::SysAdmin, Capability::Setpcap].into();
    assert_eq!(
        (caps.bounding(), caps.effective(), caps.permitted()),
        (&Some(std::collections::HashSet::clone(&lent)), &Some(lent.clone()), &Some(lent))
    );
    assert_eq!((caps.inheritable(), caps.ambient()), (&None, &None));
    assert!(bundle.setup.capabilities.effective.is_empty());
    assert!(Capability::from_str("SYS_ADMIN").is_ok());
}

#[test]
fn what_goes_around_libcontainers_bugs_is_kept() {
    let mut f = Fixture::new();
    f.node.seccomp_default = true;
    f.security().allow_privilege_escalation = Some(false);
    let bundle = f.built();
    let json = serde_json::to_value(&bundle.spec).unwrap();
    assert!(json["linux"].get("seccomp").is_none());
    assert!(json["process"].get("noNewPrivileges").is_none());
    assert!(json["process"].get("rlimits").is_none());
    assert_eq!(json["linux"]["cgroupsPath"], "/kubepods/podu/c");
    assert!(bundle.setup.no_new_privs && bundle.setup.seccomp.is_some());
}

#[test]
fn privileged_containers_get_everything() {
    let mut f = Fixture::new();
    f.node.seccomp_default = true;
    f.security().privileged = Some(true);
    f.security().capabilities = Some(Capabilities { add: None, drop: Some(strings(&["ALL"])) });
    let bundle = f.built();
    let json = serde_json::to_value(&bundle.spec).unwrap();
    assert_eq!(bundle.setup.capabilities.bounding.len(), f.node.capabilities.len());
    assert_eq!(bundle.setup.seccomp, None);
    assert_eq!(
        (
            json["linux"]["maskedPaths"].as_array().unwrap().len(),
            json["linux"]["readonlyPaths"].as_array().unwrap().len()
        ),
        (0, 0)
    );
    assert_eq!(json["linux"]["devices"].as_array().unwrap().len(), 1);
    let rules = json["linux"]["resources"]["devices"].as_array().unwrap();
    assert_eq!((rules[0]["allow"].as_bool(), rules[1]["allow"].as_bool()), (Some(false), Some(true)));
    for mount in
        json["mounts"].as_array().unwrap().iter().filter(|m| m["destination"].as_str().unwrap().starts_with("/sys"))
    {
        assert!(mount["options"].as_array().unwrap().contains(&"rw".into()), "{mount}");
    }
    assert!(!namespace_types(&f).contains(&"cgroup".to_owned()));
}

#[test]
fn ordinary_containers_are_confined() {
    let json = serde_json::to_value(&Fixture::new().built().spec).unwrap();
    let masked = json["linux"]["maskedPaths"].as_array().unwrap();
    assert!(masked.contains(&"/proc/kcore".into()) && masked.contains(&"/sys/firmware".into()));
    assert!(json["linux"]["readonlyPaths"].as_array().unwrap().contains(&"/proc/sys".into()));
    assert!(json["linux"]["devices"].as_array().unwrap().is_empty());
    let sys = json["mounts"].as_array().unwrap().iter().find(|m| m["destination"] == "/sys").unwrap();
    assert!(sys["options"].as_array().unwrap().contains(&"ro".into()));
    let mut f = Fixture::new();
    f.security().proc_mount = Some("Unmasked".into());
    f.security().read_only_root_filesystem = Some(true);
    let json = serde_json::to_value(&f.built().spec).unwrap();
    assert!(json["linux"]["maskedPaths"].as_array().unwrap().is_empty());
    assert_eq!(json["root"]["readonly"], true);
}

fn namespace_types(f: &Fixture) -> Vec<String> {
    let spec = f.built().spec;
    let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
    namespaces
        .iter()
        .map(|n| n.path().as_ref().map_or(n.typ().to_string(), |p| format!("{}:{}", n.typ(), p.display())))
        .collect()
}

#[test]
fn namespaces_are_joined_shared_or_new() {
    let mut f = Fixture::new();
    assert_eq!(namespace_types(&f), ["mnt", "net", "uts", "ipc", "pid", "cgroup"]);
    assert_eq!(f.built().spec.hostname().as_deref(), Some("p"));
    f.namespaces.network = Some("/run/net".into());
    f.namespaces.uts = Some("/run/uts".into());
    f.node.cgroup_v2 = false;
    assert_eq!(namespace_types(&f), ["mnt", "net:/run/net", "uts:/run/uts", "ipc", "pid"]);
    assert_eq!(f.built().spec.hostname(), &None);
    f.namespaces = Namespaces::default();
    let pod = f.pod_spec();
    (pod.host_network, pod.host_ipc, pod.host_pid) = (Some(true), Some(true), Some(true));
    assert_eq!(namespace_types(&f), ["mnt"]);
    assert_eq!(f.built().spec.hostname(), &None);
}

#[test]
fn shared_memory_is_the_pods_or_the_hosts() {
    let source = |f: &Fixture| {
        let spec = f.built().spec;
        let mounts = spec.mounts().clone().unwrap();
        mounts.iter().find(|m| m.destination() == Path::new("/dev/shm")).unwrap().source().clone().unwrap()
    };
    let mut f = Fixture::new();
    assert_eq!(source(&f), Path::new("/run/pod/shm"));
    f.pod_spec().host_ipc = Some(true);
    assert_eq!(source(&f), Path::new("/dev/shm"));
}

#[test]
fn limits_and_preferences_are_written() {
    let mut f = Fixture::new();
    f.limits = Limits {
        cpu_shares: Some(512),
        cpu_quota: Some(-1),
        cpu_period: Some(100_000),
        memory: Some(1 << 20),
        huge_pages: [(2 << 20, 0)].into(),
        unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
        ..Limits::default()
    };
    let json = serde_json::to_value(&f.built().spec).unwrap();
    let resources = &json["linux"]["resources"];
    assert_eq!((&resources["cpu"]["shares"], &resources["cpu"]["quota"]), (&512.into(), &(-1).into()));
    assert_eq!(resources["memory"]["limit"], 1 << 20);
    assert_eq!(resources["hugepageLimits"][0]["pageSize"], "2MB");
    assert_eq!(resources["unified"]["memory.oom.group"], "1");
    assert_eq!(json["process"]["oomScoreAdj"], 1000);
    f.pod_spec().priority = Some(2_000_001_000);
    f.pod_spec().priority_class_name = Some("system-node-critical".into());
    f.node.min_oom_score_adj = Some(-500);
    assert_eq!(serde_json::to_value(&f.built().spec).unwrap()["process"]["oomScoreAdj"], -500);
}

#[test]
fn sysctls_take_both_separators() {
    let mut f = Fixture::new();
    let sysctl = |name: &str| Sysctl { name: name.into(), value: "1".into() };
    f.pod_security().sysctls = Some(vec![sysctl("net/ipv4/tcp_syncookies"), sysctl("kernel.shm_rmid_forced")]);
    let spec = f.built().spec;
    let set = spec.linux().as_ref().unwrap().sysctl().clone().unwrap();
    assert!(set.contains_key("net.ipv4.tcp_syncookies") && set.contains_key("kernel.shm_rmid_forced"));
    f.pod_security().sysctls = Some(vec![sysctl("net/ipv4/conf/eth0.1/forwarding")]);
    assert!(f.error().contains("eth0.1"));
}

#[test]
fn seccomp_profiles_come_from_container_pod_and_node() {
    let profile = |type_: &str, name: Option<&str>| {
        Some(SeccompProfile { type_: type_.into(), localhost_profile: name.map(str::to_owned) })
    };
    let mut f = Fixture::new();
    assert_eq!(f.built().setup.seccomp, None);
    f.node.seccomp_default = true;
    assert!(f.built().setup.seccomp.is_some());
    f.pod_security().seccomp_profile = profile("Unconfined", None);
    assert_eq!(f.built().setup.seccomp, None);
    f.security().seccomp_profile = profile("RuntimeDefault", None);
    assert!(f.built().setup.seccomp.is_some());

    let directory = tempfile::tempdir().unwrap();
    f.node.seccomp_directory = directory.path().to_owned();
    f.security().seccomp_profile = profile("Localhost", Some("a.json"));
    assert!(f.error().starts_with("cannot load seccomp profile"));
    std::fs::write(directory.path().join("a.json"), r#"{"defaultAction":"SCMP_ACT_LOG"}"#).unwrap();
    assert!(f.built().setup.seccomp.is_some());
    f.security().seccomp_profile = profile("Localhost", Some("../a.json"));
    assert!(matches!(f.build(), Err(SpecError::LocalhostProfilePath(_))));
    f.security().seccomp_profile = profile("Localhost", None);
    assert_eq!(f.error(), "localhostProfile must be set if seccompProfile type is Localhost.");
}

#[test]
fn apparmor_is_refused_where_it_is_absent() {
    let mut f = Fixture::new();
    let profile = |type_: &str| Some(AppArmorProfile { type_: type_.into(), localhost_profile: Some("mine".into()) });
    f.security().app_armor_profile = profile("Localhost");
    assert!(f.error().contains("AppArmor is not enabled on the host"));
    f.node.apparmor = true;
    let set = |f: &Fixture| f.built().spec.process().clone().unwrap().apparmor_profile().clone();
    assert_eq!(set(&f).as_deref(), Some("mine"));
    f.security().app_armor_profile = profile("Unconfined");
    assert_eq!(set(&f), None);
    f.security().app_armor_profile = None;
    f.pod.metadata.annotations =
        Some([("container.apparmor.security.beta.kubernetes.io/c".to_owned(), "localhost/old".to_owned())].into());
    assert_eq!(set(&f).as_deref(), Some("old"));
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let mut f = Fixture::new();
    f.pod_spec().host_users = Some(false);
    assert!(f.error().starts_with("spec.hostUsers: false"));
    assert_eq!(f.build().unwrap_err().reason(), "CreateContainerConfigError");
    let mut f = Fixture::new();
    f.container().working_dir = Some("relative".into());
    assert!(f.error().contains("relative"));
}

#[test]
fn an_execed_process_is_like_the_first_one() {
    let mut f = Fixture::new();
    f.pod_security().run_as_user = Some(1000);
    let bundle = f.built();
    let first = bundle.spec.process().clone().unwrap();
    let command = strings(&["id"]);
    let process = exec_process(&bundle.spec, ExecOptions { command: &command, tty: true }).unwrap();
    assert_eq!(process.args(), &Some(command));
    assert_eq!(process.terminal(), Some(true));
    assert!(process.env().as_ref().unwrap().contains(&"TERM=xterm".to_owned()));
    assert_eq!(
        (process.user(), process.capabilities(), process.cwd(), process.oom_score_adj()),
        (first.user(), first.capabilities(), first.cwd(), first.oom_score_adj())
    );
    assert!(exec_process(&bundle.spec, ExecOptions { command: &[], tty: false }).is_err());
}

#[test]
fn the_configuration_survives_its_file() {
    let bundle = Fixture::new().built();
    let spec: Spec = serde_json::from_str(&serde_json::to_string(&bundle.spec).unwrap()).unwrap();
    assert_eq!(spec, bundle.spec);
    let setup: Setup = serde_json::from_str(&serde_json::to_string(&bundle.setup).unwrap()).unwrap();
    assert_eq!(setup, bundle.setup);
}
