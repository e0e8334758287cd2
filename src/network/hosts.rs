//! The `/etc/hosts` that Pods get (kubelet: `pkg/kubelet/kubelet_pods.go`, `ensureHostsFile`). Pure.

use std::fmt::Write;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::HostAlias;

const HEADER: &str = "# Kubernetes-managed hosts file.\n";
const HEADER_HOST_NETWORK: &str = "# Kubernetes-managed hosts file (host network).\n";
const FIXED: &str = "127.0.0.1\tlocalhost\n\
    ::1\tlocalhost ip6-localhost ip6-loopback\n\
    fe00::0\tip6-localnet\n\
    fe00::0\tip6-mcastprefix\n\
    fe00::1\tip6-allnodes\n\
    fe00::2\tip6-allrouters\n";

/// The file of a Pod with its own network. `domain` is the Pod's, empty without a `subdomain`.
pub fn managed(ips: &[IpAddr], hostname: &str, domain: &str, aliases: &[HostAlias]) -> String {
    let mut text = format!("{HEADER}{FIXED}");
    for ip in ips {
        // Writing to a string cannot fail.
        let _ = match domain {
            "" => writeln!(text, "{ip}\t{hostname}"),
            domain => writeln!(text, "{ip}\t{hostname}.{domain}\t{hostname}"),
        };
    }
    append_aliases(&mut text, aliases);
    text
}

/// The file of a Pod with `hostNetwork`: the node's, and the Pod's aliases.
pub fn host_network(node_hosts: &str, aliases: &[HostAlias]) -> String {
    let mut text = format!("{HEADER_HOST_NETWORK}{node_hosts}");
    append_aliases(&mut text, aliases);
    text
}

fn append_aliases(text: &mut String, aliases: &[HostAlias]) {
    if aliases.is_empty() {
        return;
    }
    text.push_str("\n# Entries added by HostAliases.\n");
    for alias in aliases {
        let _ = writeln!(text, "{}\t{}", alias.ip, alias.hostnames.as_deref().unwrap_or_default().join("\t"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aliases() -> Vec<HostAlias> {
        let hostnames = Some(vec!["foo".into(), "bar".into()]);
        vec![HostAlias { ip: "203.0.113.9".into(), hostnames }]
    }

    #[test]
    fn every_address_is_listed_with_and_without_a_domain() {
        let ips = ["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let text = managed(&ips, "web", "", &[]);
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost "));
        assert!(text.ends_with("fe00::2\tip6-allrouters\n10.0.0.2\tweb\nfd00::2\tweb\n"));
        let text = managed(&ips[..1], "web", "sub.ns.svc.cluster.local", &aliases());
        assert!(text.ends_with(
            "\n10.0.0.2\tweb.sub.ns.svc.cluster.local\tweb\n\n# Entries added by HostAliases.\n203.0.113.9\tfoo\tbar\n"
        ));
    }

    #[test]
    fn with_the_host_network_the_nodes_file_is_kept() {
        let text = host_network("127.0.0.1 localhost\n", &aliases());
        assert_eq!(
            text,
            "# Kubernetes-managed hosts file (host network).\n127.0.0.1 localhost\n\n# Entries added by HostAliases.\n203.0.113.9\tfoo\tbar\n"
        );
    }
}
