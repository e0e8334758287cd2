//! Pods' network and DNS.

use std::path::Path;

use super::finding::Finding;
use crate::network::cni::{CniUse, Mode};
use crate::network::dns::ResolvConf;

/// How Pods would get their network.
pub fn plugins(mode: &Mode, policy: CniUse, conf_dir: &Path) -> Finding {
    const CHECK: &str = "CNI";
    let directory = conf_dir.display();
    match (mode, policy) {
        (Mode::Plugins(network), _) => Finding::ok(CHECK, format!("network {:?} of {directory}", network.name)),
        (Mode::BuiltIn, CniUse::Never) => Finding::ok(CHECK, "not used: --network-plugin=builtin"),
        (Mode::BuiltIn, _) => {
            Finding::ok(CHECK, format!("{directory} has no configuration: the built-in bridge is used"))
        }
        (Mode::Waiting(why), CniUse::Required) if why.contains("no network config") => Finding::warning(
            CHECK,
            why.clone(),
            "install the cluster's network (its DaemonSet writes the file), or leave out --network-plugin=cni",
        ),
        (Mode::Waiting(why), _) => {
            let remedy =
                format!("mend or remove the file in {directory}, install its plugins, or set --network-plugin=builtin");
            Finding::fatal(CHECK, why.clone(), remedy)
        }
    }
}

/// `resolvConf`: the file's text, or why it cannot be read.
pub fn resolver(path: &str, text: Result<String, String>) -> Finding {
    const CHECK: &str = "DNS";
    const REMEDY: &str = "set resolvConf (--resolv-conf) to a file with a nameserver that Pods can reach";
    if path.is_empty() {
        return Finding::ok(CHECK, "resolvConf is empty: Pods get no nameserver of the node");
    }
    let parsed = text.and_then(|text| ResolvConf::parse(&text).map_err(|error| error.to_string()));
    let servers = match parsed {
        Err(error) => return Finding::warning(CHECK, format!("{path}: {error}"), REMEDY),
        Ok(parsed) => parsed.nameservers,
    };
    let loopback = |server: &&String| server.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    if servers.is_empty() {
        return Finding::warning(CHECK, format!("{path} names no nameserver"), REMEDY);
    }
    if let Some(server) = servers.iter().find(loopback) {
        let remedy =
            "set resolvConf (--resolv-conf) to /run/systemd/resolve/resolv.conf, or what the local server asks";
        return Finding::warning(CHECK, format!("{path} names {server}, which Pods cannot reach"), remedy);
    }
    Finding::ok(CHECK, format!("{path}: {}", servers.join(", ")))
}

/// `clusterDNS`.
pub fn cluster_dns(servers: &[String]) -> Finding {
    const CHECK: &str = "cluster DNS";
    match servers {
        [] => Finding::warning(
            CHECK,
            "clusterDNS is empty: Pods cannot look up Services",
            "set clusterDNS to the address of the cluster's DNS Service: kubectl -n kube-system get service kube-dns",
        ),
        servers => Finding::ok(CHECK, servers.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    #[test]
    fn a_network_that_waits_says_for_what() {
        let directory = Path::new("/etc/cni/net.d");
        let waiting = Mode::Waiting("no network config found in /etc/cni/net.d: cni plugin not initialized".into());
        let finding = plugins(&waiting, CniUse::Required, directory);
        assert_eq!(finding.level, Level::Warning);
        assert!(finding.remedy.contains("DaemonSet"));
        let wrong = Mode::Waiting("cni config load failed: /etc/cni/net.d/a.conflist is no JSON".into());
        for policy in [CniUse::Required, CniUse::IfConfigured] {
            let finding = plugins(&wrong, policy, directory);
            assert_eq!(finding.level, Level::Fatal);
            assert!(finding.remedy.contains("mend or remove the file in /etc/cni/net.d"));
        }
        assert!(plugins(&Mode::BuiltIn, CniUse::IfConfigured, directory).message.contains("built-in bridge"));
        assert!(plugins(&Mode::BuiltIn, CniUse::Never, directory).message.contains("builtin"));
    }

    #[test]
    fn resolvers_that_pods_cannot_reach_are_told() {
        let stub = resolver("/etc/resolv.conf", Ok("nameserver 127.0.0.53\n".into()));
        assert_eq!(stub.level, Level::Warning);
        assert!(stub.message.contains("127.0.0.53") && stub.remedy.contains("/run/systemd/resolve/resolv.conf"));
        let none = resolver("/etc/resolv.conf", Ok("search example.org\n".into()));
        assert_eq!((none.level, none.message.as_str()), (Level::Warning, "/etc/resolv.conf names no nameserver"));
        assert!(resolver("/x", Err("No such file".into())).message.contains("/x: No such file"));
        assert_eq!(resolver("/x", Ok("nameserver 192.0.2.1\n".into())).level, Level::Ok);
        assert_eq!(resolver("", Err("unused".into())).level, Level::Ok);
    }

    #[test]
    fn pods_need_the_clusters_dns() {
        assert!(cluster_dns(&[]).remedy.contains("kube-dns"));
        assert_eq!(cluster_dns(&["10.96.0.10".into()]).level, Level::Ok);
    }
}
