//! Registry credentials: `imagePullSecrets`, the node's own Docker configuration, and which of them fit an image.
//!
//! Matching follows kubelet's `pkg/credentialprovider/keyring.go`: globs per host label, equal ports, path prefixes, the
//! most specific entry first, Docker Hub's entry for names without a domain.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;

use super::error::ImageError;
use super::reference::Reference;

/// Largest credential file.
const MAX_FILE: u64 = 10 << 20;
/// Docker Hub's key in a Docker configuration (its URL ends in `/v1/`).
const DEFAULT_REGISTRY: &str = "index.docker.io";

/// What proves to a registry who is asking. `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credential {
    /// User name; empty if `secret` is a refresh token (`identitytoken` of a Docker configuration).
    pub(super) username: String,
    pub(super) secret: String,
}

impl Credential {
    /// User name and password.
    pub fn basic(username: impl Into<String>, password: impl Into<String>) -> Self {
        Self { username: username.into(), secret: password.into() }
    }

    /// A refresh token that the registry's token server exchanges (OAuth 2, `grant_type=refresh_token`).
    pub fn identity_token(token: impl Into<String>) -> Self {
        Self { username: String::new(), secret: token.into() }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(redacted)")
    }
}

/// Credentials by the registries and repositories they are for.
#[derive(Clone, Debug, Default)]
pub struct Keyring {
    /// By key: `host[:port][/path]`, without a scheme.
    entries: BTreeMap<String, Vec<Credential>>,
}

#[derive(Deserialize)]
struct DockerConfigJson {
    #[serde(default)]
    auths: Option<BTreeMap<String, Entry>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    username: Option<String>,
    password: Option<String>,
    auth: Option<String>,
    identitytoken: Option<String>,
}

impl Keyring {
    /// An empty keyring: every pull is anonymous.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the value of a Secret of type `kubernetes.io/dockerconfigjson` (key `.dockerconfigjson`), or a `config.json`.
    /// `origin` names it in errors.
    pub fn add_docker_config_json(&mut self, origin: &str, json: &[u8]) -> Result<(), ImageError> {
        let config: DockerConfigJson = parse(origin, json)?;
        self.add(origin, config.auths.unwrap_or_default())
    }

    /// Adds the value of a Secret of type `kubernetes.io/dockercfg` (key `.dockercfg`), the older form.
    pub fn add_dockercfg(&mut self, origin: &str, json: &[u8]) -> Result<(), ImageError> {
        let entries: BTreeMap<String, Entry> = parse(origin, json)?;
        self.add(origin, entries)
    }

    /// The node's own credentials, from the first file that can be used, in kubelet's order (`config.go`):
    /// `<root_dir>/config.json`, `$PWD/config.json`, `$HOME/.docker/config.json`, `/.docker/config.json`, then `.dockercfg` in
    /// `<root_dir>`, `$PWD`, `$HOME` and `/`. A file that cannot be parsed is reported in the log and passed over, as there.
    ///
    /// `home` is the home directory of the agent's user. Blocking; call it again for each pull, so that a rotated file counts.
    pub fn from_node(root_dir: &Path, home: &Path) -> Self {
        let cwd = std::env::current_dir().unwrap_or_else(|_| "/".into());
        let json = [root_dir.to_owned(), cwd.clone(), home.join(".docker"), "/.docker".into()];
        let legacy = [root_dir.to_owned(), cwd, home.to_owned(), "/".into()];
        let files =
            json.iter().map(|dir| dir.join("config.json")).chain(legacy.iter().map(|dir| dir.join(".dockercfg")));
        for path in files {
            let Some(bytes) = read_limited(&path) else { continue };
            let origin = path.display().to_string();
            let mut keyring = Self::new();
            let parsed = if path.ends_with("config.json") {
                keyring.add_docker_config_json(&origin, &bytes)
            } else {
                keyring.add_dockercfg(&origin, &bytes)
            };
            match parsed {
                Ok(()) => return keyring,
                Err(error) => tracing::warn!(%error, "registry credentials of the node are not used"),
            }
        }
        Self::new()
    }

    /// Adds everything in `other`.
    pub fn extend(&mut self, other: Self) {
        for (key, credentials) in other.entries {
            self.entries.entry(key).or_default().extend(credentials);
        }
    }

    /// Credentials to try for an image, in this order. Empty means anonymous.
    pub fn lookup(&self, image: &Reference) -> Vec<Credential> {
        let target = image.repository();
        let mut found = Vec::new();
        // Reverse order puts longer keys before their prefixes.
        for (key, credentials) in self.entries.iter().rev() {
            if key_matches(key, &target) {
                found.extend(credentials.iter().cloned());
            }
        }
        if found.is_empty() && image.domain() == "docker.io" {
            found.extend(self.entries.get(DEFAULT_REGISTRY).into_iter().flatten().cloned());
        }
        let mut unique: Vec<Credential> = Vec::with_capacity(found.len());
        for credential in found {
            if !unique.contains(&credential) {
                unique.push(credential);
            }
        }
        unique
    }

    fn add(&mut self, origin: &str, entries: BTreeMap<String, Entry>) -> Result<(), ImageError> {
        for (registry, entry) in entries {
            let credential = credential(origin, &registry, entry)?;
            if let Some(key) = key(&registry) {
                self.entries.entry(key).or_default().push(credential);
            }
        }
        Ok(())
    }
}

fn parse<'a, T: Deserialize<'a>>(origin: &str, json: &'a [u8]) -> Result<T, ImageError> {
    // serde's messages can quote the input, and the input is secret: only the place is told.
    serde_json::from_slice(json).map_err(|e| ImageError::Credentials {
        origin: origin.to_owned(),
        detail: format!("not a Docker configuration in JSON (line {}, column {})", e.line(), e.column()),
    })
}

fn credential(origin: &str, registry: &str, entry: Entry) -> Result<Credential, ImageError> {
    if let Some(token) = entry.identitytoken.filter(|t| !t.is_empty()) {
        return Ok(Credential::identity_token(token));
    }
    let Some(auth) = entry.auth.filter(|a| !a.is_empty()) else {
        return Ok(Credential::basic(entry.username.unwrap_or_default(), entry.password.unwrap_or_default()));
    };
    let decoded =
        if auth.trim_end().ends_with('=') { STANDARD.decode(auth.trim()) } else { STANDARD_NO_PAD.decode(auth.trim()) };
    decoded
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .and_then(|text| text.split_once(':').map(|(user, password)| Credential::basic(user, password)))
        .ok_or_else(|| ImageError::Credentials {
            origin: origin.to_owned(),
            detail: format!("field auths[{registry:?}].auth must be base64(username:password)"),
        })
}

/// `host[:port][/path]` of an entry: scheme and a leading `/v1/` or `/v2/` do not count.
fn key(registry: &str) -> Option<String> {
    let bare = registry.strip_prefix("https://").or_else(|| registry.strip_prefix("http://")).unwrap_or(registry);
    let (host, path) = match bare.find('/') {
        Some(at) => bare.split_at(at),
        None => (bare, ""),
    };
    if host.is_empty() {
        return None;
    }
    let path = match path.strip_prefix("/v1/").or_else(|| path.strip_prefix("/v2/")) {
        Some(rest) => format!("/{rest}"),
        None => path.to_owned(),
    };
    Some(if path == "/" { host.to_owned() } else { format!("{host}{path}") })
}

fn key_matches(key: &str, target: &str) -> bool {
    let split = |text: &str| -> (String, String) {
        match text.find('/') {
            Some(at) => (text[..at].to_owned(), text[at..].to_owned()),
            None => (text.to_owned(), String::new()),
        }
    };
    let (key_host, key_path) = split(key);
    let (host, path) = split(target);
    let (key_host, key_port) = key_host.rsplit_once(':').unwrap_or((&key_host, ""));
    let (host, port) = host.rsplit_once(':').unwrap_or((&host, ""));
    let (globs, labels): (Vec<_>, Vec<_>) = (key_host.split('.').collect(), host.split('.').collect());
    key_port == port
        && globs.len() == labels.len()
        && path.starts_with(&key_path)
        && globs.iter().zip(labels).all(|(glob, label)| glob_matches(glob.as_bytes(), label.as_bytes()))
}

/// `*` and `?` of Go's `filepath.Match`, in linear space and without backtracking over more than one star.
fn glob_matches(glob: &[u8], text: &[u8]) -> bool {
    let (mut g, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        match glob.get(g) {
            Some(b'*') => {
                star = Some((g, t));
                g += 1;
            }
            Some(b) if *b == b'?' || *b == text[t] => {
                g += 1;
                t += 1;
            }
            _ => match star {
                Some((at, matched)) => {
                    star = Some((at, matched + 1));
                    g = at + 1;
                    t = matched + 1;
                }
                None => return false,
            },
        }
    }
    glob[g..].iter().all(|b| *b == b'*')
}

fn read_limited(path: &Path) -> Option<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    file.take(MAX_FILE).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keyring(json: &str) -> Keyring {
        let mut keyring = Keyring::new();
        keyring.add_docker_config_json("test", json.as_bytes()).unwrap();
        keyring
    }

    fn users(keyring: &Keyring, image: &str) -> Vec<String> {
        keyring.lookup(&image.parse().unwrap()).into_iter().map(|c| c.username).collect()
    }

    #[test]
    fn most_specific_first() {
        let ring = keyring(
            r#"{"auths": {
                "quay.io": {"username": "host", "password": "p"},
                "https://quay.io/v2/team/app": {"username": "app", "password": "p"},
                "quay.io/team": {"auth": "dGVhbTpw"},
                "*.example.com:8443/a": {"username": "glob", "password": "p"},
                "https://index.docker.io/v1/": {"auth": "aHViOnB3OngK"}
            }}"#,
        );
        assert_eq!(users(&ring, "quay.io/team/app:1"), ["app", "team", "host"]);
        assert_eq!(users(&ring, "quay.io/other"), ["host"]);
        assert_eq!(users(&ring, "r.example.com:8443/a/b"), ["glob"]);
        assert!(users(&ring, "r.example.com/a/b").is_empty());
        assert!(users(&ring, "a.r.example.com:8443/a/b").is_empty());
        assert!(users(&ring, "r.example.com:8443/b").is_empty());
        assert_eq!(users(&ring, "busybox"), ["hub"]);
        assert_eq!(ring.lookup(&"busybox".parse().unwrap())[0].secret, "pw:x\n");
    }

    #[test]
    fn dockercfg_and_identity_tokens() {
        let mut ring = Keyring::new();
        ring.add_dockercfg("s", br#"{"r.io": {"username": "u", "password": "p", "email": "e"}}"#).unwrap();
        ring.extend(keyring(r#"{"auths": {"t.io": {"auth": "", "identitytoken": "tok"}}, "credsStore": "x"}"#));
        assert_eq!(users(&ring, "r.io/a"), ["u"]);
        assert_eq!(ring.lookup(&"t.io/a".parse().unwrap()), [Credential::identity_token("tok")]);
    }

    #[test]
    fn nothing_secret_is_shown() {
        let ring = keyring(r#"{"auths": {"quay.io": {"username": "user", "password": "hunter2"}}}"#);
        assert!(!format!("{ring:?}").contains("hunter2"));
        for bad in [
            r#"{"auths": {"q": {"auth": "hunter2!"}}}"#,
            r#"{"auths": {"q": {"password": hunter2}}}"#,
            r#"{"auths": "hunter2"}"#,
        ] {
            let error = Keyring::new().add_docker_config_json("secret ns/name", bad.as_bytes()).unwrap_err();
            assert!(error.to_string().contains("secret ns/name") && !error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn node_files_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let (root, home) = (dir.path().join("kubelet"), dir.path().join("home"));
        std::fs::create_dir_all(home.join(".docker")).unwrap();
        std::fs::create_dir_all(&root).unwrap();
        let file = |user: &str| format!(r#"{{"auths": {{"r.io": {{"username": "{user}", "password": "p"}}}}}}"#);
        std::fs::write(home.join(".docker/config.json"), file("home")).unwrap();
        assert_eq!(users(&Keyring::from_node(&root, &home), "r.io/a"), ["home"]);
        std::fs::write(root.join("config.json"), "not json").unwrap();
        assert_eq!(users(&Keyring::from_node(&root, &home), "r.io/a"), ["home"]);
        std::fs::write(root.join("config.json"), file("root")).unwrap();
        assert_eq!(users(&Keyring::from_node(&root, &home), "r.io/a"), ["root"]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), key in "\\PC{0,40}") {
            let _ = Keyring::new().add_dockercfg("p", &bytes);
            let _ = super::key(&key).map(|k| key_matches(&k, "quay.io:80/a/b"));
        }

        #[test]
        fn a_glob_of_itself_matches(text in "[a-z0-9-]{0,12}", at in 0usize..12) {
            prop_assert!(glob_matches(text.as_bytes(), text.as_bytes()));
            let mut glob = text.clone();
            glob.insert(at.min(text.len()), '*');
            prop_assert!(glob_matches(glob.as_bytes(), text.as_bytes()));
        }
    }
}
