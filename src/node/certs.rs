//! Certificates with their keys on disk, as kubelet keeps them: dated files and a `-current.pem` link.
//!
//! Source: client-go `util/certificate/certificate_store.go`. Files are mode 0600; each step is atomic, so a crash
//! leaves the old pair or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

/// A pair that cannot be read or kept. `Io` may pass; `Invalid` is terminal for that file.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    /// The file system refuses.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No certificate, no key, or they do not belong together.
    #[error("{}: {problem}: remove the file to have a new certificate requested", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// A certificate chain with its key.
#[derive(Clone)]
pub struct Pair {
    /// Chain and key, PEM.
    pub pem: String,
    /// Start of validity.
    pub not_before: Timestamp,
    /// End of validity.
    pub not_after: Timestamp,
    /// DNS names of the leaf, sorted.
    pub dns_names: Vec<String>,
    /// Addresses of the leaf, sorted.
    pub addresses: Vec<std::net::IpAddr>,
}

impl std::fmt::Debug for Pair {
    // the key stays out
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// Pairs of one purpose in one directory.
#[derive(Clone, Debug)]
pub struct CertStore {
    directory: PathBuf,
    prefix: &'static str,
}

impl CertStore {
    /// Our client certificate: `kubelet-client-current.pem`.
    #[must_use]
    pub fn client(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), prefix: "kubelet-client" }
    }

    /// Our serving certificate: `kubelet-server-current.pem`.
    #[must_use]
    pub fn serving(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), prefix: "kubelet-server" }
    }

    /// The link to the pair in use.
    #[must_use]
    pub fn current_path(&self) -> PathBuf {
        self.directory.join(format!("{}-current.pem", self.prefix))
    }

    /// The pair in use; none if there never was one.
    pub fn current(&self) -> Result<Option<Pair>, CertError> {
        read(&self.current_path())
    }

    /// Keeps a new pair and makes it the current one.
    pub fn update(&self, chain: &str, key: &str) -> Result<Pair, CertError> {
        let stamp = Timestamp::now().strftime("%Y-%m-%d-%H-%M-%S").to_string();
        let name = format!("{}-{stamp}.pem", self.prefix);
        let path = self.directory.join(&name);
        let mut pem = chain.trim().to_owned();
        pem.push('\n');
        pem.push_str(key.trim());
        pem.push('\n');
        let pair = parse(&path, pem)?;
        let failed = |source| CertError::Io { path: path.clone(), source };
        fs::create_dir_all(&self.directory).map_err(failed)?;
        write_private(&path, pair.pem.as_bytes()).map_err(failed)?;
        let next = self.directory.join(format!("{}-updated.pem", self.prefix));
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        // absolute: others read the link's target
        let target = fs::canonicalize(&path).map_err(failed)?;
        symlink(target, &next).map_err(failed)?;
        fs::rename(&next, self.current_path()).map_err(failed)?;
        File::open(&self.directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
        Ok(pair)
    }
}

/// A pair in one file; none if the file does not exist.
pub fn read(path: &Path) -> Result<Option<Pair>, CertError> {
    match fs::read_to_string(path) {
        Ok(pem) => parse(path, pem).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CertError::Io { path: path.to_owned(), source }),
    }
}

fn parse(path: &Path, pem: String) -> Result<Pair, CertError> {
    let invalid = |problem: String| CertError::Invalid { path: path.to_owned(), problem };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| invalid(format!("invalid certificate data: {error}")))?;
    let leaf = chain.first().ok_or_else(|| invalid("no certificate".to_owned()))?;
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf)
        .map_err(|error| invalid(format!("unable to parse certificate data: {error}")))?;
    let key = private_key(&pem).ok_or_else(|| invalid("no private key".to_owned()))?;
    // keys of a kind that rcgen does not know (RSA) are left to the TLS library to check
    if let Ok(key) = KeyPair::from_pem(key)
        && key.subject_public_key_info() != leaf.public_key().raw
    {
        return Err(invalid("the private key does not belong to the certificate".to_owned()));
    }
    let time = |time: x509_parser::time::ASN1Time| Timestamp::from_second(time.timestamp()).unwrap_or(Timestamp::MIN);
    let (not_before, not_after) = (time(leaf.validity().not_before), time(leaf.validity().not_after));
    let names = leaf.subject_alternative_name().ok().flatten();
    let (mut dns_names, mut addresses) = (Vec::new(), Vec::new());
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            x509_parser::extensions::GeneralName::DNSName(name) => dns_names.push((*name).to_owned()),
            x509_parser::extensions::GeneralName::IPAddress(bytes) => {
                let v4 = <[u8; 4]>::try_from(*bytes).map(Into::into);
                addresses.extend(v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(std::net::IpAddr::from)).ok());
            }
            _ => {}
        }
    }
    dns_names.sort();
    addresses.sort();
    Ok(Pair { not_before, not_after, dns_names, addresses, pem })
}

/// The certificates of a PEM text, without whatever else it has.
pub(super) fn certificates(pem: &str) -> String {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    let mut found = String::new();
    for part in pem.split(BEGIN).skip(1) {
        if let Some((body, _)) = part.split_once(END) {
            found.extend([BEGIN, body, END, "\n"]);
        }
    }
    found
}

/// The key's part of a PEM file.
pub(super) fn private_key(pem: &str) -> Option<&str> {
    let start = pem
        .match_indices("-----BEGIN ")
        .map(|(at, _)| at)
        .find(|&at| pem[at..].lines().next().is_some_and(|line| line.ends_with("PRIVATE KEY-----")))?;
    let length = pem[start..].find("PRIVATE KEY-----\n").and_then(|first| {
        let rest = &pem[start + first + 17..];
        rest.find("PRIVATE KEY-----").map(|second| first + 17 + second + 16)
    })?;
    pem.get(start..start + length)
}

/// Writes a file that only we may read, whole or not at all.
pub(super) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A self-signed pair that is valid from `before` seconds ago for `lifetime` seconds.
    pub(crate) fn pair(before: i64, lifetime: i64, names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        let moment = |offset: i64| {
            let at = Timestamp::now() + jiff::SignedDuration::from_secs(offset);
            let date = at.to_zoned(jiff::tz::TimeZone::UTC).datetime();
            let u8 = |value: i8| u8::try_from(value).unwrap();
            let day = rcgen::date_time_ymd(i32::from(date.year()), u8(date.month()), u8(date.day()));
            day + std::time::Duration::from_secs(
                u64::from(u8(date.hour())) * 3600 + u64::from(u8(date.minute())) * 60 + u64::from(u8(date.second())),
            )
        };
        params.not_before = moment(-before);
        params.not_after = moment(lifetime - before);
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    #[test]
    fn updates_are_links_to_dated_private_files() {
        let dir = tempfile::tempdir().unwrap();
        let store = CertStore::client(&dir.path().join("pki"));
        assert!(store.current().unwrap().is_none());
        let (cert, key) = pair(10, 1000, &["n", "10.0.0.1"]);
        store.update(&cert, &key).unwrap();
        let current = store.current().unwrap().unwrap();
        assert_eq!((current.dns_names, current.addresses), (vec!["n".to_owned()], vec!["10.0.0.1".parse().unwrap()]));
        let life = current.not_after.duration_since(current.not_before).as_secs();
        assert_eq!(life, 1000);
        let target = fs::read_link(store.current_path()).unwrap();
        assert!(target.is_absolute() && target.file_name().unwrap().to_str().unwrap().starts_with("kubelet-client-2"));
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
        // again, as after a crash between link and rename
        symlink("nowhere", dir.path().join("pki/kubelet-client-updated.pem")).unwrap();
        let (cert, key) = pair(0, 2000, &[]);
        store.update(&cert, &key).unwrap();
        let current = store.current().unwrap().unwrap();
        assert_eq!(current.not_after.duration_since(current.not_before).as_secs(), 2000);
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = CertStore::serving(dir.path());
        let ((cert, key), (_, other)) = (pair(0, 10, &[]), pair(0, 10, &[]));
        assert!(matches!(store.update(&cert, &other), Err(CertError::Invalid { .. })));
        assert!(matches!(store.update("", &key), Err(CertError::Invalid { .. })));
        assert!(matches!(store.update(&cert, ""), Err(CertError::Invalid { .. })));
        assert!(store.current().unwrap().is_none());
    }

    #[test]
    fn certificates_and_keys_are_told_apart() {
        let (cert, key) = pair(0, 10, &[]);
        let text = format!("{cert}{cert}{key}");
        assert_eq!(certificates(&text), format!("{cert}{cert}").replace('\r', ""));
        assert_eq!(private_key(&text).unwrap().trim(), key.trim());
        assert_eq!((certificates(&key).as_str(), private_key(&cert)), ("", None));
        assert_eq!(certificates("-----BEGIN CERTIFICATE-----\nabc"), "");
    }

    #[test]
    fn keys_stay_out_of_debug_output() {
        let (cert, key) = pair(0, 10, &[]);
        let pair = parse(Path::new("x"), format!("{cert}{key}")).unwrap();
        assert!(!format!("{pair:?}").contains("PRIVATE"));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_files_never_panic(text in "(-----(BEGIN|END) (PRIVATE KEY|CERTIFICATE)-----\n?|[A-Za-z0-9=\n]{0,20}){0,6}") {
            let _ = parse(Path::new("x"), text);
        }
    }
}
