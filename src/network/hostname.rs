//! A Pod's hostname and domain (kubelet: `GeneratePodHostNameAndDomain` in `pkg/kubelet/kubelet_pods.go` and
//! `GetNodenameForKernel` in `pkg/kubelet/util/util.go`). Pure.

use k8s_openapi::api::core::v1::Pod;

/// Longest hostname without a domain, in bytes.
const MAX_HOSTNAME: usize = 63;
/// Longest name the kernel holds (`__NEW_UTS_LEN`), in bytes.
const MAX_KERNEL_NAME: usize = 64;
const MAX_SUBDOMAIN: usize = 253;

/// Why a Pod cannot have the hostname its spec asks for. Terminal until the spec changes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostnameError {
    /// A field does not hold a DNS name of the kind it must.
    #[error("pod {field} {value:?} is not a valid DNS {kind}: {rule}")]
    Invalid {
        /// `Hostname`, `Subdomain` or `HostnameOverride`.
        field: &'static str,
        /// What it holds.
        value: String,
        /// `label` or `subdomain`.
        kind: &'static str,
        /// The rule that is broken.
        rule: &'static str,
    },
    /// Nothing is left of the name when it is cut to 63 bytes and trailing separators are removed.
    #[error("hostname for pod {pod:?} was invalid: {hostname:?}")]
    Empty {
        /// The Pod's name.
        pod: String,
        /// The hostname.
        hostname: String,
    },
    /// `setHostnameAsFQDN` with a name the kernel cannot hold.
    #[error(
        "failed to construct FQDN from pod hostname and cluster domain, FQDN {fqdn} is too long ({MAX_KERNEL_NAME} \
        characters is the max, {} characters requested)", .fqdn.len()
    )]
    FqdnTooLong {
        /// The name.
        fqdn: String,
    },
}

/// A Pod's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodHostname {
    /// The short name, at most 63 bytes; what `/etc/hosts` gets.
    pub hostname: String,
    /// `<subdomain>.<namespace>.svc.<cluster domain>`, empty without a `subdomain`.
    pub domain: String,
    /// What the kernel is told: the short name, or with `setHostnameAsFQDN` and a domain both.
    pub kernel: String,
}

/// The names that a Pod's spec asks for.
pub fn pod_hostname(pod: &Pod, cluster_domain: &str) -> Result<PodHostname, HostnameError> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let Some(spec) = &pod.spec else { return short(name, name) };
    if let Some(wanted) = &spec.hostname_override {
        check("HostnameOverride", "subdomain", wanted, is_subdomain(wanted))?;
        return short(name, wanted);
    }
    let wanted = match spec.hostname.as_deref() {
        None | Some("") => name,
        Some(wanted) => {
            check("Hostname", "label", wanted, is_label(wanted))?;
            wanted
        }
    };
    let mut names = short(name, wanted)?;
    if let Some(subdomain) = spec.subdomain.as_deref().filter(|subdomain| !subdomain.is_empty()) {
        check("Subdomain", "label", subdomain, is_label(subdomain))?;
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        names.domain = format!("{subdomain}.{namespace}.svc.{cluster_domain}");
        if spec.set_hostname_as_fqdn == Some(true) {
            let fqdn = format!("{}.{}", names.hostname, names.domain);
            if fqdn.len() > MAX_KERNEL_NAME {
                return Err(HostnameError::FqdnTooLong { fqdn });
            }
            names.kernel = fqdn;
        }
    }
    Ok(names)
}

/// A name without a domain, cut to what fits; it must not end with a separator then.
fn short(pod: &str, wanted: &str) -> Result<PodHostname, HostnameError> {
    let hostname = match wanted.len() <= MAX_HOSTNAME {
        true => wanted,
        false => wanted[..wanted.floor_char_boundary(MAX_HOSTNAME)].trim_end_matches(['-', '.']),
    };
    if hostname.is_empty() {
        return Err(HostnameError::Empty { pod: pod.to_owned(), hostname: wanted.to_owned() });
    }
    Ok(PodHostname { hostname: hostname.to_owned(), domain: String::new(), kernel: hostname.to_owned() })
}

fn check(
    field: &'static str,
    kind: &'static str,
    value: &str,
    verdict: Result<(), &'static str>,
) -> Result<(), HostnameError> {
    verdict.map_err(|rule| HostnameError::Invalid { field, value: value.to_owned(), kind, rule })
}

/// RFC 1123, as Kubernetes has it: lower case only.
fn is_label(text: &str) -> Result<(), &'static str> {
    match text.len() <= MAX_HOSTNAME {
        true => has_label_syntax(text),
        false => Err("must be no more than 63 characters"),
    }
}

fn is_subdomain(text: &str) -> Result<(), &'static str> {
    match text.len() <= MAX_SUBDOMAIN {
        true => text.split('.').try_for_each(has_label_syntax),
        false => Err("must be no more than 253 characters"),
    }
}

fn has_label_syntax(text: &str) -> Result<(), &'static str> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match !text.is_empty() && text.chars().all(inner) && !text.starts_with('-') && !text.ends_with('-') {
        true => Ok(()),
        false => Err("use lower case letters, digits and '-', and begin and end with a letter or digit"),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::PodSpec;
    use proptest::prelude::*;

    use super::*;

    fn pod(name: &str, spec: PodSpec) -> Pod {
        let mut pod = Pod { spec: Some(spec), ..Pod::default() };
        pod.metadata.name = Some(name.into());
        pod.metadata.namespace = Some("default".into());
        pod
    }

    fn spec(hostname: &str, subdomain: &str, over: Option<&str>, fqdn: bool) -> PodSpec {
        PodSpec {
            hostname: Some(hostname.into()),
            subdomain: Some(subdomain.into()),
            hostname_override: over.map(Into::into),
            set_hostname_as_fqdn: Some(fqdn),
            ..PodSpec::default()
        }
    }

    #[test]
    fn the_spec_decides() {
        let long = "a".repeat(65);
        let cut = "a".repeat(63);
        let dotted = format!("{}.b", "a".repeat(62));
        // name, hostname, subdomain, override, setHostnameAsFQDN => hostname, domain, kernel
        let cases = [
            (("web", "", "", None, false), ("web", "", "web")),
            (("web", "custom", "", None, true), ("custom", "", "custom")),
            (("web", "", "sub", None, false), ("web", "sub.default.svc.cluster.local", "web")),
            (
                ("web", "h", "sub", None, true),
                ("h", "sub.default.svc.cluster.local", "h.sub.default.svc.cluster.local"),
            ),
            (("web", "h", "sub", Some("over.ride"), true), ("over.ride", "", "over.ride")),
            ((long.as_str(), "", "", None, false), (cut.as_str(), "", cut.as_str())),
            ((dotted.as_str(), "", "", None, false), (&cut[..62], "", &cut[..62])),
        ];
        for ((name, hostname, subdomain, over, fqdn), expected) in cases {
            let names = pod_hostname(&pod(name, spec(hostname, subdomain, over, fqdn)), "cluster.local").unwrap();
            assert_eq!((names.hostname.as_str(), names.domain.as_str(), names.kernel.as_str()), expected);
        }
    }

    #[test]
    fn errors_name_field_and_value() {
        let long = "a".repeat(64);
        let cases = [
            (spec("Invalid-!", "", None, false), "pod Hostname \"Invalid-!\" is not a valid DNS label"),
            (spec(&long, "", None, false), "must be no more than 63 characters"),
            (spec("", "in_valid", None, false), "pod Subdomain \"in_valid\" is not a valid DNS label"),
            (spec("", "", Some("-x"), false), "pod HostnameOverride \"-x\" is not a valid DNS subdomain"),
            (spec("", "", Some(""), false), "pod HostnameOverride \"\" is not a valid DNS subdomain"),
            (spec(&"a".repeat(40), "sub", None, true), "(64 characters is the max, 70 characters requested)"),
        ];
        for (spec, expected) in cases {
            let error = pod_hostname(&pod("web", spec), "cluster.local").unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(matches!(
            pod_hostname(&pod(&"-".repeat(70), PodSpec::default()), ""),
            Err(HostnameError::Empty { .. })
        ));
    }

    proptest! {
        #[test]
        fn the_kernel_takes_every_name(name in "\\PC{1,100}", hostname in "[a-z.-]{0,70}", fqdn: bool) {
            if let Ok(names) = pod_hostname(&pod(&name, spec(&hostname, "sub", None, fqdn)), "cluster.local") {
                prop_assert!(!names.kernel.is_empty() && names.kernel.len() <= 64);
            }
        }
    }
}
