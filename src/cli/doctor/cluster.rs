//! The way to the API server: kubeconfig, certificates, connection, clock.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use kube::config::{Kubeconfig, KubeconfigError};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::finding::Finding;
use crate::config::Config;
use crate::node::certs::CertStore;
use crate::node::client::{ApiClient, Credentials, Limits};
use crate::node::k3s;

const TIMEOUT: Duration = Duration::from_secs(10);
/// Clocks differ by this without harm, in seconds.
const SMALL_SKEW: i64 = 5;
/// Certificates that were just made are not valid yet for who is this far behind, in seconds.
const LARGE_SKEW: i64 = 300;
const DAY: i64 = 86_400;
const NEW_TOKEN: &str = "make a new bootstrap token (kubeadm token create) and write it to the bootstrap kubeconfig";

/// Everything about the cluster that the configuration names.
pub async fn check(config: &Config) -> Vec<Finding> {
    let Some((path, bootstrap)) = kubeconfig(config) else {
        return vec![Finding::ok("kubeconfig", "none: the node runs by itself, with static Pods")];
    };
    let mut findings = certificates(config, &path);
    if config.k3s.is_some() {
        findings.push(k3s(config).await);
        if !path.exists() {
            // joining writes it
            return findings;
        }
    }
    let file = match Kubeconfig::read_from(&path) {
        Ok(file) => file,
        Err(error) => {
            findings.push(unreadable(&path, &error));
            return findings;
        }
    };
    findings.extend(authority(&path, &file));
    let credentials = Credentials {
        kubeconfig: path.clone(),
        rotated: (!bootstrap).then(|| CertStore::client(&config.paths.cert_dir).current_path()),
    };
    let client = match ApiClient::new(credentials, Limits::heartbeat(TIMEOUT)).await {
        Ok(client) => client.client(),
        Err(error) => {
            findings.push(Finding::fatal("kubeconfig", error.to_string(), "write the kubeconfig anew"));
            return findings;
        }
    };
    let server = server_of(&file).unwrap_or_else(|| "the API server".into());
    let request = match http::Request::get("/version").body(kube::client::Body::empty()) {
        Ok(request) => request,
        Err(error) => return vec![Finding::fatal("API server", error.to_string(), "report this")],
    };
    match client.send(request).await {
        Ok(response) => {
            findings.push(answer(&server, response.status().as_u16(), bootstrap));
            let date = response.headers().get(http::header::DATE).and_then(|date| date.to_str().ok());
            findings.push(clock(date, Timestamp::now()));
        }
        Err(error) => findings.push(unreachable(&server, &error)),
    }
    findings
}

/// Whether the k3s server is the one that the token names, and takes it.
async fn k3s(config: &Config) -> Finding {
    const CHECK: &str = "k3s server";
    let server = config.k3s.as_ref().map_or_else(String::new, |k3s| k3s.server.clone());
    match k3s::check(config).await {
        Ok(()) => Finding::ok(CHECK, format!("{server} accepts the token")),
        Err(error) => Finding::fatal(CHECK, error.to_string(), "mend what it says; joining needs that server"),
    }
}

/// The file that would be used now, and whether it is the bootstrap one.
fn kubeconfig(config: &Config) -> Option<(PathBuf, bool)> {
    let own = config.kubeconfig.clone()?;
    match &config.bootstrap_kubeconfig {
        Some(bootstrap) if !own.exists() => Some((bootstrap.clone(), true)),
        _ => Some((own, false)),
    }
}

fn unreadable(path: &Path, error: &KubeconfigError) -> Finding {
    let message = format!("{}: {}", path.display(), chain(error));
    let remedy = "write it with kubeadm join, or see docs/install.md for what it must have";
    Finding::fatal("kubeconfig", message, remedy)
}

fn server_of(file: &Kubeconfig) -> Option<String> {
    let context = file.contexts.iter().find(|context| Some(&context.name) == file.current_context.as_ref())?;
    let name = &context.context.as_ref()?.cluster;
    file.clusters.iter().find(|cluster| &cluster.name == name)?.cluster.as_ref()?.server.clone()
}

/// The cluster's authority in a kubeconfig.
fn authority(path: &Path, file: &Kubeconfig) -> Option<Finding> {
    use base64::Engine as _;
    let cluster = file.clusters.iter().find_map(|cluster| cluster.cluster.as_ref())?;
    let place = format!("the authority in {}", path.display());
    if cluster.insecure_skip_tls_verify == Some(true) {
        let remedy = "write certificate-authority-data instead of insecure-skip-tls-verify";
        return Some(Finding::warning("CA", format!("{place} is not verified"), remedy));
    }
    let pem = match (&cluster.certificate_authority_data, &cluster.certificate_authority) {
        (Some(data), _) => base64::engine::general_purpose::STANDARD.decode(data).map_err(|error| error.to_string()),
        (None, Some(file)) => std::fs::read(file).map_err(|error| format!("{file}: {error}")),
        (None, None) => return None,
    };
    Some(match pem.and_then(|pem| validity(&pem)) {
        Ok(span) => {
            valid("CA", &place, span, Timestamp::now(), "copy /etc/kubernetes/pki/ca.crt from a control plane node")
        }
        Err(error) => Finding::fatal(
            "CA",
            format!("{place}: {error}"),
            "copy /etc/kubernetes/pki/ca.crt from a control plane node",
        ),
    })
}

/// When the first certificate begins and ends.
fn validity(pem: &[u8]) -> Result<(Timestamp, Timestamp), String> {
    let first =
        CertificateDer::pem_slice_iter(pem).next().ok_or("no certificate")?.map_err(|error| error.to_string())?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&first).map_err(|error| error.to_string())?;
    let time =
        |at: x509_parser::time::ASN1Time| Timestamp::from_second(at.timestamp()).map_err(|error| error.to_string());
    Ok((time(parsed.validity().not_before)?, time(parsed.validity().not_after)?))
}

fn valid(check: &'static str, what: &str, span: (Timestamp, Timestamp), now: Timestamp, remedy: &str) -> Finding {
    let (from, until) = span;
    if now < from {
        let message = format!("{what} is not valid before {from}, and it is {now} here");
        return Finding::fatal(check, message, "set this machine's clock (timedatectl set-ntp true)");
    }
    if now > until {
        return Finding::fatal(check, format!("{what} has expired on {until}"), remedy);
    }
    if until.as_second() - now.as_second() < DAY {
        return Finding::warning(check, format!("{what} expires on {until}"), remedy);
    }
    Finding::ok(check, format!("{what} is valid until {until}"))
}

/// The node's own certificates.
fn certificates(config: &Config, kubeconfig: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let directory = &config.paths.cert_dir;
    let client = format!(
        "remove {} and {}; then the node bootstraps anew, for which it needs a token: {NEW_TOKEN}",
        kubeconfig.display(),
        CertStore::client(directory).current_path().display()
    );
    let serving = "remove it; the node then makes or asks for another".to_owned();
    for (check, store, remedy) in [
        ("client cert", CertStore::client(directory), client),
        ("serving cert", CertStore::serving(directory), serving),
    ] {
        let what = store.current_path().display().to_string();
        match store.current() {
            Ok(Some(pair)) => {
                findings.push(valid(check, &what, (pair.not_before, pair.not_after), Timestamp::now(), &remedy));
            }
            Ok(None) => {}
            Err(error) => findings.push(Finding::fatal(check, error.to_string(), remedy)),
        }
    }
    let file = &config.kubelet.authentication.x509.client_ca_file;
    if !file.is_empty() {
        let remedy =
            "copy /etc/kubernetes/pki/ca.crt from a control plane node, or set authentication.x509.clientCAFile";
        let pem = std::fs::read(file).map_err(|error| error.to_string());
        findings.push(match pem.and_then(|pem| validity(&pem)) {
            Ok(span) => valid("client CA", file, span, Timestamp::now(), remedy),
            Err(error) => Finding::fatal("client CA", format!("{file}: {error}"), remedy),
        });
    }
    findings
}

fn answer(server: &str, status: u16, bootstrap: bool) -> Finding {
    const CHECK: &str = "API server";
    match status {
        200..300 => Finding::ok(CHECK, server),
        401 if bootstrap => {
            let message = format!("{server} does not know the bootstrap token: it has expired or is wrong");
            Finding::fatal(CHECK, message, NEW_TOKEN)
        }
        401 => {
            let message = format!("{server} does not accept the node's credentials: expired, or of another cluster");
            let remedy = format!(
                "remove the kubeconfig and the client certificate, so that the node bootstraps anew; {NEW_TOKEN}"
            );
            Finding::fatal(CHECK, message, remedy)
        }
        403 => Finding::ok(CHECK, format!("{server} (it does not tell us its version)")),
        status => {
            let message = format!("{server} answers with status {status}");
            Finding::warning(CHECK, message, "look at the API server's log; try again when it is healthy")
        }
    }
}

/// The server's `Date` against our clock.
fn clock(date: Option<&str>, now: Timestamp) -> Finding {
    const CHECK: &str = "clock";
    let parsed = date.and_then(|date| jiff::fmt::rfc2822::parse(date).ok());
    let Some(theirs) = parsed.map(|date| date.timestamp()) else {
        return Finding::warning(CHECK, "the API server does not tell the time", "compare the clocks by hand: date -u");
    };
    let ahead = now.as_second() - theirs.as_second();
    let (by, direction) = (ahead.abs(), if ahead > 0 { "ahead of" } else { "behind" });
    let message = format!("this clock is {by} s {direction} the API server's");
    let remedy = "synchronize both: timedatectl set-ntp true, or chrony";
    match by {
        0..=SMALL_SKEW => Finding::ok(CHECK, "as the API server's"),
        by if by < LARGE_SKEW => Finding::warning(CHECK, message, remedy),
        _ => Finding::fatal(CHECK, format!("{message}: certificates and tokens will not be accepted"), remedy),
    }
}

/// Why there was no answer: the cause, and what mends it.
fn unreachable(server: &str, error: &(dyn Error + 'static)) -> Finding {
    use rustls::{CertificateError, Error as Tls};
    let tls = causes(error).find_map(tls_error);
    const CLOCK: &str =
        "set this machine's clock, or renew the API server's certificate (kubeadm certs renew apiserver)";
    let (why, remedy) = match tls {
        Some(Tls::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => (
            "its certificate is not signed by the authority in the kubeconfig".to_owned(),
            "the CA is that of another cluster: copy /etc/kubernetes/pki/ca.crt from a control plane node",
        ),
        Some(Tls::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. })) => {
            ("its certificate has expired".to_owned(), CLOCK)
        }
        Some(Tls::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. })) => {
            ("its certificate is not valid yet".to_owned(), CLOCK)
        }
        Some(Tls::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => (
            "its certificate is for other names".to_owned(),
            "use a name of the certificate as server in the kubeconfig, or add this one (kubeadm: apiServer.certSANs)",
        ),
        Some(other) => (other.to_string(), "the port may belong to something else: check server in the kubeconfig"),
        None => (
            chain(error),
            "check server in the kubeconfig, the name in DNS, routes and firewalls between here and there (port 6443), \
             and that the API server runs",
        ),
    };
    Finding::fatal("API server", format!("{server} cannot be reached: {why}"), remedy)
}

/// What rustls said, below any number of I/O errors: these name as their source what is below the error they hold.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<rustls::Error> {
    let mut error: &'a (dyn Error + 'static) = error;
    loop {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(tls.clone());
        }
        error = error.downcast_ref::<std::io::Error>()?.get_ref()?;
    }
}

/// An error and its causes.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let this = next?;
        next = this.source();
        Some(this)
    })
}

/// An error with its causes, those left out that repeat what was said.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error).skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn clocks_that_differ_are_told() {
        let date = "Wed, 25 Nov 2026 12:00:00 GMT";
        let theirs = "2026-11-25T12:00:00Z".parse::<Timestamp>().unwrap().as_second();
        assert_eq!(clock(Some(date), at(theirs + 2)).level, Level::Ok);
        let behind = clock(Some(date), at(theirs - 60));
        assert_eq!(behind.level, Level::Warning);
        assert_eq!(behind.message, "this clock is 60 s behind the API server's");
        let ahead = clock(Some(date), at(theirs + 4000));
        assert_eq!(ahead.level, Level::Fatal);
        assert!(ahead.message.contains("4000 s ahead of") && ahead.remedy.contains("timedatectl"));
        assert_eq!(clock(None, at(0)).level, Level::Warning);
        assert_eq!(clock(Some("now"), at(0)).level, Level::Warning);
    }

    #[test]
    fn certificates_have_a_beginning_and_an_end() {
        let span = (at(1_000), at(1_000_000));
        let finding = |now| valid("CA", "ca.crt", span, at(now), "renew it");
        assert!(finding(10).remedy.contains("clock"));
        assert_eq!(finding(5_000).level, Level::Ok);
        assert_eq!(finding(999_000).level, Level::Warning);
        let expired = finding(2_000_000);
        assert_eq!((expired.level, expired.remedy.as_str()), (Level::Fatal, "renew it"));
        assert!(expired.message.contains("ca.crt has expired on 1970-01-12"));
        assert!(validity(b"nothing").unwrap_err().contains("no certificate"));
    }

    #[test]
    fn refused_credentials_name_the_mend() {
        assert!(answer("s", 401, true).remedy.contains("kubeadm token create"));
        assert!(answer("s", 401, true).message.contains("expired"));
        assert!(answer("s", 401, false).remedy.contains("bootstraps anew"));
        assert_eq!(answer("s", 200, false).level, Level::Ok);
        assert_eq!(answer("s", 403, false).level, Level::Ok);
        assert_eq!(answer("s", 500, false).level, Level::Warning);
    }

    #[test]
    fn tls_errors_are_told_apart() {
        use rustls::{CertificateError, Error as Tls};
        let text = |error: CertificateError| {
            // as it comes: wrapped by the stream, and once more by the connector
            let stream = std::io::Error::new(std::io::ErrorKind::InvalidData, Tls::InvalidCertificate(error));
            let error = std::io::Error::other(stream);
            let finding = unreachable("https://x:6443", &error);
            assert_eq!(finding.level, Level::Fatal);
            format!("{} {}", finding.message, finding.remedy)
        };
        assert!(text(CertificateError::UnknownIssuer).contains("the CA is that of another cluster"));
        assert!(text(CertificateError::Expired).contains("has expired"));
        assert!(text(CertificateError::NotValidYet).contains("set this machine's clock"));
        assert!(text(CertificateError::NotValidForName).contains("certSANs"));
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let finding = unreachable("https://x:6443", &refused);
        assert!(finding.message.contains("connection refused") && finding.remedy.contains("firewalls"));
    }

    #[tokio::test]
    async fn a_node_by_itself_needs_no_cluster() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = Config::for_tests(directory.path());
        config.kubeconfig = None;
        let findings = check(&config).await;
        assert_eq!((findings.len(), findings[0].level), (1, Level::Ok));
    }

    #[tokio::test]
    async fn a_missing_kubeconfig_and_a_silent_server_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = Config::for_tests(directory.path());
        let path = directory.path().join("kubelet.conf");
        config.kubeconfig = Some(path.clone());
        config.kubelet.authentication.x509.client_ca_file = "/does/not/exist".into();
        let findings = check(&config).await;
        assert!(findings.iter().all(|finding| finding.level == Level::Fatal));
        assert!(findings[0].message.contains("/does/not/exist") && findings[0].remedy.contains("pki/ca.crt"));
        assert!(findings[1].message.contains("kubelet.conf") && findings[1].remedy.contains("kubeadm join"));
        // a port on which nobody listens
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n\
            users: [{name: u, user: {token: t}}]\nclusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\n";
        std::fs::write(&path, text).unwrap();
        config.kubelet.authentication.x509.client_ca_file = String::new();
        let findings = check(&config).await;
        let last = findings.last().unwrap();
        assert_eq!(last.level, Level::Fatal, "{findings:?}");
        assert!(last.message.starts_with("http://127.0.0.1:1 cannot be reached"), "{}", last.message);
    }
}
