//! Image names as people write them, and the one form in which the store keeps them.
//!
//! Grammar and defaults are those of `github.com/distribution/reference`, which kubelet
//! (`pkg/util/parsers/parsers.go`) and containerd use: `busybox` is `docker.io/library/busybox:latest`, and a tag beside
//! a digest is dropped because the digest decides.

use std::fmt;
use std::str::FromStr;

use super::digest::Digest;
use super::error::ImageError;

/// Longest repository name, domain included (`reference.RepositoryNameTotalLengthMax`).
const MAX_NAME: usize = 255;
/// Longest tag.
const MAX_TAG: usize = 128;
const DEFAULT_DOMAIN: &str = "docker.io";
const OFFICIAL: &str = "library";

/// A parsed, normalised image name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    target: Target,
}

/// What a name points at within its repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// A tag, which may move.
    Tag(String),
    /// Content, which cannot.
    Digest(Digest),
}

impl Reference {
    /// Host and port, `docker.io` for the default registry.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Repository without the domain.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Tag or digest.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// `domain/path`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The same repository at a digest.
    pub fn with_digest(&self, digest: &Digest) -> Self {
        Self { target: Target::Digest(digest.clone()), ..self.clone() }
    }

    /// The host that serves the registry API: Docker Hub's is not at `docker.io`.
    pub fn registry_host(&self) -> &str {
        match self.domain.as_str() {
            DEFAULT_DOMAIN | "index.docker.io" => "registry-1.docker.io",
            host => host,
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.path)?;
        match &self.target {
            Target::Tag(tag) => write!(f, ":{tag}"),
            Target::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        parse(name).map_err(|detail| ImageError::InvalidName { name: name.chars().take(512).collect(), detail })
    }
}

/// Whether `text` is an image ID: `sha256:` and 64 digits, or the digits alone.
pub(crate) fn image_id(text: &str) -> Option<Digest> {
    if text.len() == 64 {
        return format!("sha256:{text}").parse().ok();
    }
    text.parse().ok()
}

fn parse(name: &str) -> Result<Reference, String> {
    const FORMAT: &str = "invalid reference format";
    if image_id(name).is_some_and(|_| name.len() == 64) {
        return Err(format!("invalid repository name ({name}), cannot specify 64-byte hexadecimal strings"));
    }
    let (rest, digest) = match name.split_once('@') {
        Some((rest, digest)) => {
            let digest = digest.parse::<Digest>().map_err(|_| FORMAT.to_owned())?;
            (rest, Some(digest))
        }
        None => (name, None),
    };
    // A colon after the last slash starts a tag; one before it starts a port.
    let last_slash = rest.rfind('/').map_or(0, |at| at + 1);
    let (repository, tag) = match rest[last_slash..].find(':') {
        Some(at) => (&rest[..last_slash + at], Some(&rest[last_slash + at + 1..])),
        None => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(FORMAT.to_owned());
    }
    let (domain, path) = split_domain(repository);
    if path.bytes().any(|b| b.is_ascii_uppercase()) && !path.is_empty() {
        return Err(format!("{FORMAT}: repository name ({path}) must be lowercase"));
    }
    if !is_domain(&domain) || path.is_empty() || !path.split('/').all(is_path_component) {
        return Err(FORMAT.to_owned());
    }
    if domain.len() + 1 + path.len() > MAX_NAME {
        return Err(format!("repository name must not be more than {MAX_NAME} characters"));
    }
    let target = match (digest, tag) {
        (Some(digest), _) => Target::Digest(digest),
        (None, Some(tag)) => Target::Tag(tag.to_owned()),
        (None, None) => Target::Tag("latest".to_owned()),
    };
    Ok(Reference { domain, path, target })
}

/// The first component is a domain if it looks like one: a dot, a port, `localhost`, or upper case.
fn split_domain(repository: &str) -> (String, String) {
    let (domain, path) = match repository.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_DOMAIN, repository),
    };
    let domain = if domain == "index.docker.io" { DEFAULT_DOMAIN } else { domain };
    if domain == DEFAULT_DOMAIN && !path.contains('/') && !path.is_empty() {
        return (domain.to_owned(), format!("{OFFICIAL}/{path}"));
    }
    (domain.to_owned(), path.to_owned())
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = tag.bytes();
    tag.len() <= MAX_TAG && bytes.next().is_some_and(word) && bytes.all(|b| word(b) || b == b'.' || b == b'-')
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) => {
                let port = port.strip_prefix(':').or(port.is_empty().then_some("0"));
                return address.parse::<std::net::Ipv6Addr>().is_ok()
                    && port.is_some_and(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()));
            }
            None => return false,
        },
        None => match domain.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (domain, None),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    host.split('.').all(label) && port.is_none_or(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
}

/// Lower-case alphanumeric runs, separated by one dot, one or two underscores, or any number of dashes.
fn is_path_component(component: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().is_some_and(alphanumeric) || !bytes.last().is_some_and(alphanumeric) {
        return false;
    }
    bytes.chunk_by(|a, b| alphanumeric(a) == alphanumeric(b)).all(|run| {
        alphanumeric(&run[0]) || run == b"." || run == b"_" || run == b"__" || run.iter().all(|b| *b == b'-')
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn normal(name: &str) -> String {
        name.parse::<Reference>().unwrap_or_else(|e| panic!("{name}: {e}")).to_string()
    }

    #[test]
    fn applies_defaults() {
        let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
        for (given, expected) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("user/app", "docker.io/user/app:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("docker.io/library/busybox", "docker.io/library/busybox:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:v1", "localhost:5000/app:v1"),
            ("[::1]:5000/a/b:v1", "[::1]:5000/a/b:v1"),
            ("registry.k8s.io/e2e-test-images/agnhost:2.53", "registry.k8s.io/e2e-test-images/agnhost:2.53"),
            ("Host/app", "Host/app:latest"),
            ("a__b/c---d.e", "docker.io/a__b/c---d.e:latest"),
        ] {
            assert_eq!(normal(given), expected);
        }
        assert_eq!(normal(&format!("app:v1@{digest}")), format!("docker.io/library/app@{digest}"));
        assert_eq!("busybox".parse::<Reference>().unwrap().registry_host(), "registry-1.docker.io");
    }

    #[test]
    fn names_the_broken_rule_like_kubelet() {
        assert_eq!(
            "inv@lid".parse::<Reference>().unwrap_err().to_string(),
            "Failed to apply default image tag \"inv@lid\": couldn't parse image name \"inv@lid\": invalid reference format"
        );
        assert_eq!("inv@lid".parse::<Reference>().unwrap_err().reason(), "InvalidImageName");
        for bad in [
            "",
            ":",
            "/",
            "a/",
            "/a",
            "a//b",
            "a:",
            "a:b:c",
            "a b",
            "a@sha256:00",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a/.b",
            "Upper",
            "app:-x",
            "host:/a",
            "[::1/a",
            "[]/a",
            "ho_st.x/a",
            "ä",
            &"a".repeat(300),
            &"0".repeat(64),
            &format!("a:{}", "t".repeat(129)),
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_is_idempotent(name in "\\PC{0,80}") {
            if let Ok(reference) = name.parse::<Reference>() {
                let text = reference.to_string();
                prop_assert_eq!(text.parse::<Reference>().unwrap(), reference);
            }
        }

        #[test]
        fn plausible_names_agree_with_oci_spec(
            name in "([a-z]{1,4}(\\.[a-z]{1,3})?(:[0-9]{1,4})?/)?[a-z0-9._-]{1,6}(/[a-z0-9._-]{1,6})?(:[a-z0-9._-]{0,5})?"
        ) {
            // A host with an underscore ("ho_st.x/a" above) is a path to them, of no registry.
            prop_assume!(!name.split_once('/').is_some_and(|(host, _)| host.contains('.') && host.contains('_')));
            let ours = name.parse::<Reference>().map(|r| r.to_string()).ok();
            let theirs = name.parse::<oci_spec::distribution::Reference>().map(|r| r.whole()).ok();
            prop_assert_eq!(ours, theirs);
        }
    }
}
