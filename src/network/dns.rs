//! A Pod's `resolv.conf` from its `dnsPolicy` and `dnsConfig`, the node's `resolv.conf` and the cluster's DNS settings.
//!
//! Pure; the rules are those of kubelet's `pkg/kubelet/network/dns/dns.go`, including its limits, which are those of
//! API validation, and the texts of its events. Options keep the order in which they were first named (kubelet's order
//! is random).

use std::fmt::Write;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

/// Nameservers that glibc uses (`MaxDNSNameservers`).
const MAX_NAMESERVERS: usize = 3;
/// `MaxDNSSearchPaths`.
const MAX_SEARCH_PATHS: usize = 32;
/// Bytes of the search line without the keyword (`MaxDNSSearchListChars`).
const MAX_SEARCH_LINE: usize = 2048;
/// Bytes of one search path (`DNS1123SubdomainMaxLength`): some resolvers abort on longer ones.
const MAX_SEARCH_PATH: usize = 253;
/// Search paths that ClusterFirst adds.
const CLUSTER_SEARCH_PATHS: usize = 3;
/// Largest node `resolv.conf` that is read, in bytes.
pub const MAX_RESOLV_CONF: usize = 10 << 20;

/// The contents of a `resolv.conf`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// `nameserver` lines.
    pub nameservers: Vec<String>,
    /// The `search` line.
    pub searches: Vec<String>,
    /// The `options` line.
    pub options: Vec<String>,
}

/// A `resolv.conf` that cannot be used. Terminal until the file changes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolvConfError {
    /// A `nameserver` line without an address.
    #[error("resolv.conf line {0}: nameserver list is empty: add an address or remove the line")]
    EmptyNameserver(usize),
    /// Larger than any real one.
    #[error("resolv.conf is larger than {MAX_RESOLV_CONF} bytes")]
    TooLarge,
}

impl ResolvConf {
    /// Parses a node's file. Nameservers accumulate, the last `search` line wins, later options replace earlier ones of
    /// the same name, everything else is passed over.
    pub fn parse(text: &str) -> Result<Self, ResolvConfError> {
        if text.len() > MAX_RESOLV_CONF {
            return Err(ResolvConfError::TooLarge);
        }
        let mut parsed = Self::default();
        for (number, line) in text.lines().enumerate() {
            let mut fields = line.split_whitespace();
            match fields.next() {
                Some("nameserver") => {
                    let server = fields.next().ok_or(ResolvConfError::EmptyNameserver(number + 1))?;
                    parsed.nameservers.push(server.to_owned());
                }
                Some("search") => {
                    // With and without the final dot it is the same domain.
                    let domains = fields.filter(|domain| *domain != ".");
                    parsed.searches = domains.map(|d| d.strip_suffix('.').unwrap_or(d).to_owned()).collect();
                }
                Some("options") => fields.for_each(|option| set_option(&mut parsed.options, option.to_owned())),
                _ => {}
            }
        }
        Ok(parsed)
    }

    /// The text of the file, as containerd writes it.
    pub fn render(&self) -> String {
        let mut text = String::new();
        if !self.searches.is_empty() {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "search {}", self.searches.join(" "));
        }
        for server in &self.nameservers {
            let _ = writeln!(text, "nameserver {server}");
        }
        if !self.options.is_empty() {
            let _ = writeln!(text, "options {}", self.options.join(" "));
        }
        text
    }
}

/// DNS settings of the node.
#[derive(Debug, Clone, Default)]
pub struct NodeDns {
    /// The node's resolver configuration (`resolvConf`); none when the setting is empty, which gives Pods with the
    /// policy Default the node's own loopback as server.
    pub resolver: Option<ResolvConf>,
    /// `clusterDNS`.
    pub cluster_dns: Vec<IpAddr>,
    /// `clusterDomain`; may be empty.
    pub cluster_domain: String,
    /// The node's addresses.
    pub node_ips: Vec<IpAddr>,
}

/// Whom an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// The Pod.
    Pod,
    /// The Node.
    Node,
}

/// An event of type Warning to record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsEvent {
    /// The involved object.
    pub subject: Subject,
    /// `DNSConfigForming`, `MissingClusterDNS` or `CheckLimitsForResolvConf`.
    pub reason: &'static str,
    /// The message.
    pub message: String,
}

enum Source {
    Cluster,
    Node,
    None,
}

/// A Pod's DNS configuration and what is to be told about it.
pub fn pod_dns(pod: &Pod, node: &NodeDns) -> (ResolvConf, Vec<DnsEvent>) {
    let mut events = Vec::new();
    let mut source = source(pod);
    if matches!(source, Source::Cluster) && node.cluster_dns.is_empty() {
        let message = "kubelet does not have ClusterDNS IP configured and cannot create Pod using \"ClusterFirst\" \
            policy. Falling back to \"Default\" policy.";
        let about_pod = format!("pod: {:?}. {message}", describe(pod));
        for (subject, message) in [(Subject::Node, message.to_owned()), (Subject::Pod, about_pod)] {
            events.push(DnsEvent { subject, reason: "MissingClusterDNS", message });
        }
        source = Source::Node;
    }
    let mut config = match source {
        Source::None => ResolvConf::default(),
        Source::Cluster => ResolvConf {
            nameservers: node.cluster_dns.iter().map(ToString::to_string).collect(),
            searches: cluster_searches(pod, node),
            options: vec!["ndots:5".into()],
        },
        Source::Node => node.resolver.clone().unwrap_or_else(|| loopback(&node.node_ips)),
    };
    if let Some(extra) = pod.spec.as_ref().and_then(|spec| spec.dns_config.as_ref()) {
        config.nameservers.extend(extra.nameservers.iter().flatten().cloned());
        omit_duplicates(&mut config.nameservers);
        config.searches.extend(extra.searches.iter().flatten().cloned());
        omit_duplicates(&mut config.searches);
        for option in extra.options.iter().flatten() {
            let name = option.name.as_deref().unwrap_or_default();
            let text = match option.value.as_deref() {
                None | Some("") => name.to_owned(),
                Some(value) => format!("{name}:{value}"),
            };
            set_option(&mut config.options, text);
        }
    }
    fit_limits(&mut config, &mut events);
    (config, events)
}

fn source(pod: &Pod) -> Source {
    let spec = pod.spec.as_ref();
    let host_network = spec.and_then(|spec| spec.host_network).unwrap_or_default();
    match spec.and_then(|spec| spec.dns_policy.as_deref()) {
        Some("None") => Source::None,
        Some("Default") => Source::Node,
        // The API server admits no other value than the remaining two; absent means ClusterFirst.
        Some("ClusterFirst") | None if host_network => Source::Node,
        _ => Source::Cluster,
    }
}

fn cluster_searches(pod: &Pod, node: &NodeDns) -> Vec<String> {
    let of_node = node.resolver.iter().flat_map(|resolver| resolver.searches.iter().cloned());
    let domain = &node.cluster_domain;
    if domain.is_empty() {
        return of_node.collect();
    }
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let of_cluster = [format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
    let mut searches: Vec<String> = of_cluster.into_iter().chain(of_node).collect();
    omit_duplicates(&mut searches);
    searches
}

/// What a resolver without any nameserver asks: the local machine.
fn loopback(node_ips: &[IpAddr]) -> ResolvConf {
    let server = |ip: &IpAddr| if ip.is_ipv6() { "::1" } else { "127.0.0.1" }.to_owned();
    let mut nameservers: Vec<String> = node_ips.iter().map(server).collect();
    if nameservers.is_empty() {
        nameservers.push("127.0.0.1".into());
    }
    ResolvConf { nameservers, searches: vec![".".into()], options: Vec::new() }
}

/// `name_namespace(uid)`, as kubelet writes Pods in messages (`pkg/kubelet/util/format`).
fn describe(pod: &Pod) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let metadata = &pod.metadata;
    format!("{}_{}({})", text(&metadata.name), text(&metadata.namespace), text(&metadata.uid))
}

fn omit_duplicates(list: &mut Vec<String>) {
    let mut seen = std::collections::HashSet::new();
    list.retain(|entry| seen.insert(entry.clone()));
}

/// Replaces the option of the same name or appends it.
fn set_option(options: &mut Vec<String>, option: String) {
    let name = |option: &str| option.split_once(':').map_or(option, |(name, _)| name).to_owned();
    let wanted = name(&option);
    match options.iter_mut().find(|present| name(present) == wanted) {
        Some(present) => *present = option,
        None => options.push(option),
    }
}

fn fit_limits(config: &mut ResolvConf, events: &mut Vec<DnsEvent>) {
    let mut exceeded = |message| events.push(DnsEvent { subject: Subject::Pod, reason: "DNSConfigForming", message });
    if config.nameservers.len() > MAX_NAMESERVERS {
        config.nameservers.truncate(MAX_NAMESERVERS);
        let applied = config.nameservers.join(" ");
        exceeded(format!(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {applied}"
        ));
    }
    if fit_searches(&mut config.searches) {
        let applied = config.searches.join(" ");
        exceeded(format!(
            "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {applied}"
        ));
    }
}

/// Cuts what is too much; true when something was.
fn fit_searches(searches: &mut Vec<String>) -> bool {
    let before = searches.len();
    searches.truncate(MAX_SEARCH_PATHS);
    searches.retain(|search| search.len() <= MAX_SEARCH_PATH);
    while line_length(searches) > MAX_SEARCH_LINE {
        searches.pop();
    }
    searches.len() < before
}

fn line_length(searches: &[String]) -> usize {
    searches.iter().map(String::len).sum::<usize>() + searches.len().saturating_sub(1)
}

/// What kubelet says about the node's file at start: the message of an event `CheckLimitsForResolvConf` on the Node.
pub fn check_limits(path: &str, resolver: &ResolvConf, cluster_domain: &str) -> Option<DnsEvent> {
    let paths = MAX_SEARCH_PATHS - if cluster_domain.is_empty() { 0 } else { CLUSTER_SEARCH_PATHS };
    let searches = &resolver.searches;
    let message = if searches.len() > paths {
        format!("Resolv.conf file '{path}' contains search line consisting of more than {paths} domains!")
    } else if searches.iter().any(|search| search.len() > MAX_SEARCH_PATH) {
        format!(
            "Resolv.conf file {path:?} contains a search path which length is more than allowed {MAX_SEARCH_PATH} chars!"
        )
    } else if line_length(searches) > MAX_SEARCH_LINE {
        format!(
            "Resolv.conf file '{path}' contains search line which length is more than allowed {MAX_SEARCH_LINE} chars!"
        )
    } else {
        return None;
    };
    Some(DnsEvent { subject: Subject::Node, reason: "CheckLimitsForResolvConf", message })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodDNSConfig, PodDNSConfigOption, PodSpec};
    use proptest::prelude::*;

    use super::*;

    fn node() -> NodeDns {
        NodeDns {
            resolver: Some(ResolvConf::parse("nameserver 9.9.9.9\nsearch corp.example\noptions timeout:1\n").unwrap()),
            cluster_dns: vec!["10.96.0.10".parse().unwrap()],
            cluster_domain: "cluster.local".into(),
            node_ips: vec!["192.0.2.1".parse().unwrap()],
        }
    }

    fn pod(policy: Option<&str>, host_network: bool, config: Option<PodDNSConfig>) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = Some("web".into());
        pod.metadata.namespace = Some("shop".into());
        pod.metadata.uid = Some("u1".into());
        let dns_policy = policy.map(Into::into);
        let host_network = Some(host_network);
        pod.spec = Some(PodSpec { dns_policy, host_network, dns_config: config, ..PodSpec::default() });
        pod
    }

    const CLUSTER: &str = "search shop.svc.cluster.local svc.cluster.local cluster.local corp.example\n\
        nameserver 10.96.0.10\noptions ndots:5\n";
    const NODE: &str = "search corp.example\nnameserver 9.9.9.9\noptions timeout:1\n";

    #[test]
    fn the_policy_chooses_the_source() {
        let cases = [
            (Some("ClusterFirst"), false, CLUSTER),
            (None, false, CLUSTER),
            (Some("ClusterFirst"), true, NODE),
            (Some("ClusterFirstWithHostNet"), true, CLUSTER),
            (Some("ClusterFirstWithHostNet"), false, CLUSTER),
            (Some("Default"), false, NODE),
            (Some("None"), false, ""),
        ];
        for (policy, host_network, expected) in cases {
            let (config, events) = pod_dns(&pod(policy, host_network, None), &node());
            assert_eq!(config.render(), expected, "{policy:?} {host_network}");
            assert!(events.is_empty());
        }
    }

    #[test]
    fn without_cluster_dns_the_nodes_is_used_and_said_so() {
        let (config, events) = pod_dns(&pod(None, false, None), &NodeDns { cluster_dns: Vec::new(), ..node() });
        assert_eq!(config.render(), NODE);
        assert_eq!(events.iter().map(|event| event.subject).collect::<Vec<_>>(), [Subject::Node, Subject::Pod]);
        assert!(events.iter().all(|event| event.reason == "MissingClusterDNS"));
        assert!(events[1].message.starts_with("pod: \"web_shop(u1)\". kubelet does not have ClusterDNS IP"));
    }

    #[test]
    fn without_a_resolver_the_loopback_is_asked() {
        let ips = vec!["192.0.2.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let node = NodeDns { resolver: None, node_ips: ips, ..node() };
        let (config, _) = pod_dns(&pod(Some("Default"), false, None), &node);
        assert_eq!(config.render(), "search .\nnameserver 127.0.0.1\nnameserver ::1\n");
        let (config, _) = pod_dns(&pod(None, false, None), &node);
        assert_eq!(config.searches, ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
    }

    #[test]
    fn dns_config_is_merged_and_wins() {
        let option = |name: &str, value: Option<&str>| PodDNSConfigOption {
            name: Some(name.into()),
            value: value.map(Into::into),
        };
        let config = PodDNSConfig {
            nameservers: Some(vec!["1.1.1.1".into(), "10.96.0.10".into()]),
            searches: Some(vec!["extra".into(), "cluster.local".into()]),
            options: Some(vec![option("ndots", Some("2")), option("edns0", None), option("edns0", Some(""))]),
        };
        let (config, events) = pod_dns(&pod(None, false, Some(config)), &node());
        assert_eq!(config.nameservers, ["10.96.0.10", "1.1.1.1"]);
        assert_eq!(config.searches.last().unwrap(), "extra");
        assert_eq!(config.searches.len(), 5);
        assert_eq!(config.options, ["ndots:2", "edns0"]);
        assert!(events.is_empty());
    }

    #[test]
    fn limits_cut_and_tell() {
        let config = PodDNSConfig {
            nameservers: Some((1..6).map(|n| format!("1.1.1.{n}")).collect()),
            searches: Some((0..40).map(|n| format!("d{n}")).collect()),
            options: None,
        };
        let (config, events) = pod_dns(&pod(Some("None"), false, Some(config)), &node());
        assert_eq!((config.nameservers.len(), config.searches.len()), (3, 32));
        assert_eq!(events.len(), 2);
        assert!(events[0].message.ends_with("the applied nameserver line is: 1.1.1.1 1.1.1.2 1.1.1.3"));
        assert!(events[1].message.ends_with("d30 d31"));
    }

    #[test]
    fn the_nodes_file_is_read_as_resolvers_do() {
        let text = "# x\n; y\nsearch a.\nnameserver 1.1.1.1 # z\n  search b. . c\noptions ndots:1 rotate\noptions ndots:3\nnameserver ::1\nsortlist q\n";
        let parsed = ResolvConf::parse(text).unwrap();
        assert_eq!(parsed.nameservers, ["1.1.1.1", "::1"]);
        assert_eq!(parsed.searches, ["b", "c"]);
        assert_eq!(parsed.options, ["ndots:3", "rotate"]);
        assert_eq!(ResolvConf::parse("a\nnameserver \n"), Err(ResolvConfError::EmptyNameserver(2)));
    }

    #[test]
    fn the_nodes_limits_leave_room_for_the_clusters_domains() {
        let with = |count: usize, length: usize| ResolvConf {
            searches: (0..count).map(|_| "x".repeat(length)).collect(),
            ..ResolvConf::default()
        };
        assert_eq!(check_limits("/r", &with(29, 3), "cluster.local"), None);
        assert!(check_limits("/r", &with(30, 3), "cluster.local").unwrap().message.contains("more than 29 domains"));
        assert_eq!(check_limits("/r", &with(32, 3), ""), None);
        assert!(check_limits("/r", &with(1, 254), "").unwrap().message.contains("253 chars"));
        assert!(check_limits("/r", &with(9, 250), "").unwrap().message.contains("2048 chars"));
    }

    proptest! {
        #[test]
        fn hostile_files_neither_panic_nor_exceed_limits(text in "(nameserver|search|options|[ .#;:a-z\n\t]){0,60}") {
            if let Ok(resolver) = ResolvConf::parse(&text) {
                let node = NodeDns { resolver: Some(resolver), ..node() };
                let (config, _) = pod_dns(&pod(None, false, None), &node);
                prop_assert!(config.nameservers.len() <= 3 && config.searches.len() <= 32);
                prop_assert_eq!(ResolvConf::parse(&config.render()).unwrap(), config);
            }
        }

        #[test]
        fn the_search_line_always_fits(searches in proptest::collection::vec("[a-z]{1,300}", 0..50)) {
            let mut fitted = searches.clone();
            let cut = fit_searches(&mut fitted);
            prop_assert!(fitted.len() <= 32 && line_length(&fitted) <= 2048);
            prop_assert!(fitted.iter().all(|search| search.len() <= 253));
            prop_assert_eq!(cut, fitted != searches);
        }
    }
}
