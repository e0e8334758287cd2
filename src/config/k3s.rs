//! The k3s server to join, from flags or the variables that k3s' own agent knows.

use std::fmt;
use std::path::PathBuf;

use super::flags::FlagError;

/// `--k3s-*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct K3s {
    /// `--k3s-server`, an `https://` URL.
    pub server: String,
    /// `--k3s-token`.
    pub token: Option<Secret>,
    /// `--k3s-token-file`.
    pub token_file: Option<PathBuf>,
    /// `--k3s-node-password-file`.
    pub node_password_file: PathBuf,
}

/// A text that is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps a text.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<masked>")
    }
}

/// The server to join and what proves that we may; a token without a server is of no use, and may be meant for others
/// if it is in the environment.
pub(super) fn from_flags(text: &impl Fn(&'static str) -> Option<String>) -> Result<Option<K3s>, FlagError> {
    let error = |flag, value: &str, message: &str| FlagError { flag, value: value.to_owned(), message: message.into() };
    let (token, token_file) = (text("k3s-token"), text("k3s-token-file").map(PathBuf::from));
    let Some(server) = text("k3s-server") else { return Ok(None) };
    let uri: Option<http::Uri> = server.parse().ok();
    if uri.is_none_or(|uri| uri.scheme_str() != Some("https") || uri.host().is_none()) {
        return Err(error("k3s-server", &server, "write the server's URL, https://HOST:6443"));
    }
    // the token stays out of messages
    match (&token, &token_file) {
        (None, None) => {
            let message = "--k3s-server needs it: copy /var/lib/rancher/k3s/server/node-token from the server";
            return Err(error("k3s-token-file", "", message));
        }
        (Some(_), Some(_)) => return Err(error("k3s-token-file", "", "give this or --k3s-token, not both")),
        _ => {}
    }
    let password = text("k3s-node-password-file").map(PathBuf::from);
    Ok(Some(K3s {
        server,
        token: token.map(Secret::new),
        token_file,
        node_password_file: password.unwrap_or_else(|| "/etc/rancher/node/password".into()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, command, normalize};
    use std::ffi::OsString;

    fn flags(args: &[&str]) -> Result<Flags, FlagError> {
        let args = std::iter::once("kubelet").chain(args.iter().copied()).map(OsString::from);
        Flags::from_matches(&command("kubelet").try_get_matches_from(normalize(args)).unwrap())
    }

    #[test]
    fn a_server_and_its_token() {
        let k3s = flags(&["--k3s-server=https://h:6443", "--k3s-token-file=/t"]).unwrap().k3s.unwrap();
        assert_eq!((k3s.server.as_str(), k3s.token_file), ("https://h:6443", Some("/t".into())));
        assert_eq!(k3s.node_password_file, PathBuf::from("/etc/rancher/node/password"));
        let given = flags(&["--k3s-server=https://h", "--k3s-token=K10s3cret", "--k3s-node-password-file=/p"]).unwrap();
        assert!(!format!("{given:?}").contains("s3cret"));
        assert_eq!(given.standalone().k3s, None);
        assert_eq!(flags(&["--k3s-token=x"]).unwrap().k3s, None);
        for (args, flag) in [
            (&["--k3s-server=h:6443", "--k3s-token=s3cret"][..], "k3s-server"),
            (&["--k3s-server=http://h", "--k3s-token=s3cret"], "k3s-server"),
            (&["--k3s-server=https://h"], "k3s-token-file"),
            (&["--k3s-server=https://h", "--k3s-token=s3cret", "--k3s-token-file=/t"], "k3s-token-file"),
        ] {
            let error = flags(args).unwrap_err();
            assert_eq!(error.flag, flag);
            assert!(!error.to_string().contains("s3cret"));
        }
    }
}
