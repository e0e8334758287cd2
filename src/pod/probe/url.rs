//! The few parts of URLs that probes need: a target from a manifest's `path`, and redirects.
//!
//! Source: `formatURL` of `pkg/probe/http/request.go` and RFC 3986, section 5.

use super::host_port;

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Url {
    /// Whether it is `https`.
    pub(super) tls: bool,
    /// Name or address, without brackets.
    pub(super) host: String,
    /// Port.
    pub(super) port: u16,
    /// Path and query, ready to be sent.
    pub(super) target: String,
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", host_port(&self.host, self.port), self.target)
    }
}

impl Url {
    /// The URL of an `httpGet`. A whole URL in `path` loses its scheme and host.
    pub(super) fn new(tls: bool, host: &str, port: u16, path: &str) -> Self {
        let without_fragment = path.split('#').next().unwrap_or_default();
        let target = if has_valid_escapes(without_fragment) {
            let (_, rest) = split_authority(without_fragment);
            encode(&rooted(rest), false)
        } else {
            // what Go cannot parse, it takes for a path that is not escaped yet
            encode(&rooted(path), true)
        };
        Self { tls, host: host.to_owned(), port, target }
    }

    /// Where a `Location` leads from here; `None` if it is not HTTP.
    pub(super) fn join(&self, location: &str) -> Option<Self> {
        let location = location.split('#').next().unwrap_or_default();
        let (authority, rest) = split_authority(location);
        let scheme = scheme_of(location);
        let tls = match scheme.map(str::to_ascii_lowercase).as_deref() {
            None => self.tls,
            Some("http") => false,
            Some("https") => true,
            Some(_) => return None,
        };
        if let Some(authority) = authority {
            let (host, port) = split_port(authority.rsplit('@').next()?)?;
            let port = port.unwrap_or(if tls { 443 } else { 80 });
            return Some(Self { tls, host: host.to_owned(), port, target: encode(&rooted(rest), false) });
        }
        let own_path = self.target.split('?').next().unwrap_or_default();
        let target = match rest.chars().next() {
            None => self.target.clone(),
            Some('?') => format!("{own_path}{rest}"),
            Some('/') => normalize(rest),
            Some(_) => normalize(&format!("{}{rest}", &own_path[..=own_path.rfind('/').unwrap_or(0)])),
        };
        Some(Self { target: encode(&target, false), ..self.clone() })
    }
}

fn scheme_of(url: &str) -> Option<&str> {
    let (scheme, _) = url.split_once(':')?;
    let valid = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    valid.then_some(scheme)
}

/// Cuts `//host:port`, with a scheme before it or not, off a URL.
fn split_authority(url: &str) -> (Option<&str>, &str) {
    let after_scheme = scheme_of(url).map_or(url, |scheme| &url[scheme.len() + 1..]);
    match after_scheme.strip_prefix("//") {
        None => {
            (None, if after_scheme.len() == url.len() || after_scheme.starts_with('/') { after_scheme } else { url })
        }
        Some(rest) => {
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            (Some(&rest[..end]), &rest[end..])
        }
    }
}

fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, port.strip_prefix(':'))
        }
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    let port = port.filter(|port| !port.is_empty()).map(str::parse).transpose().ok()?;
    (!host.is_empty()).then_some((host, port))
}

fn rooted(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// Removes `.` and `..` from a path; the query stays.
fn normalize(target: &str) -> String {
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    let mut parts: Vec<&str> = Vec::new();
    let mut last = "";
    for part in path.split('/').skip(1) {
        last = part;
        match part {
            "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let slash = if matches!(last, "." | "..") && !parts.is_empty() { "/" } else { "" };
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    format!("/{}{slash}{query}", parts.join("/"))
}

fn has_valid_escapes(text: &str) -> bool {
    let digit = |c: Option<&u8>| c.is_some_and(u8::is_ascii_hexdigit);
    let bytes = text.as_bytes();
    (0..bytes.len()).all(|i| bytes[i] != b'%' || digit(bytes.get(i + 1)) && digit(bytes.get(i + 2)))
        && !bytes.iter().any(u8::is_ascii_control)
}

/// Escapes what must not stand in a request line; `all` also what only has a meaning in URLs.
fn encode(target: &str, all: bool) -> String {
    let mut encoded = String::with_capacity(target.len());
    for byte in target.bytes() {
        let plain =
            byte.is_ascii_graphic() && !matches!(byte, b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}');
        if plain && !(all && matches!(byte, b'%' | b'?' | b'#')) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(path: &str) -> Url {
        Url::new(false, "10.0.0.1", 80, path)
    }

    #[test]
    fn manifests_paths_become_targets() {
        // the cases of pkg/probe/http/http_test.go and request_test.go
        for (path, target) in [
            ("", "/"),
            ("healthz", "/healthz"),
            ("/healthz?a=b&c=%20", "/healthz?a=b&c=%20"),
            ("/a b", "/a%20b"),
            ("?only=query", "/?only=query"),
            ("/x#fragment", "/x"),
            ("http://elsewhere:1/x", "/x"),
            ("//elsewhere/x", "/x"),
            ("/bad%zz?q", "/bad%25zz%3Fq"),
            ("/über", "/%C3%BCber"),
        ] {
            assert_eq!(url(path).target, target, "{path}");
        }
        assert_eq!(Url::new(true, "fd00::1", 443, "/").to_string(), "https://[fd00::1]:443/");
    }

    #[test]
    fn redirects_are_resolved() {
        let from = url("/a/b?c");
        for (location, expected) in [
            ("/new", "http://10.0.0.1:80/new"),
            ("new", "http://10.0.0.1:80/a/new"),
            ("../up", "http://10.0.0.1:80/up"),
            ("?q", "http://10.0.0.1:80/a/b?q"),
            ("", "http://10.0.0.1:80/a/b?c"),
            ("https://10.0.0.1/x", "https://10.0.0.1:443/x"),
            ("//other:8080", "http://other:8080/"),
            ("http://[fd00::1]:81/x", "http://[fd00::1]:81/x"),
            ("/../../etc", "http://10.0.0.1:80/etc"),
        ] {
            assert_eq!(from.join(location).unwrap().to_string(), expected, "{location}");
        }
        assert_eq!(from.join("ftp://10.0.0.1/x"), None);
        assert_eq!(from.join("http://host:port/"), None);
    }

    proptest::proptest! {
        #[test]
        fn targets_fit_a_request_line(path in ".{0,60}", location in ".{0,60}") {
            let from = url(&path);
            for target in [Some(from.target.clone()), from.join(&location).map(|u| u.target)].into_iter().flatten() {
                proptest::prop_assert!(target.starts_with('/') && target.bytes().all(|b| b.is_ascii_graphic()), "{target}");
            }
        }
    }
}
