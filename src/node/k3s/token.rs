//! What a k3s server gives out to join with: a full token (`K10HASH::USER:PASSWORD`), a bootstrap token, or a bare
//! password.
//!
//! Source: k3s `pkg/clientaccess/token.go`, `pkg/kubeadm/utils.go`.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

const PREFIX: &str = "K10";
/// SHA-256 in hexadecimal digits.
const HASH_LENGTH: usize = 64;

/// A token that cannot be one; terminal. The token itself is never shown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Nothing there.
    #[error("the k3s token is empty: use that of /var/lib/rancher/k3s/server/node-token on a server")]
    Empty,
    /// The part before `::`.
    #[error(
        "the k3s token has a CA hash of {0} characters instead of 64: copy the whole of /var/lib/rancher/k3s/server/node-token"
    )]
    HashLength(usize),
    /// The part after it.
    #[error(
        "the k3s token has no password: write K10HASH::USER:PASSWORD as in /var/lib/rancher/k3s/server/node-token, or the password alone"
    )]
    Format,
    /// A header cannot carry it.
    #[error("the k3s token has a control character: copy it anew from /var/lib/rancher/k3s/server/node-token")]
    Character,
}

/// A token in its parts.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// What the cluster's authority must hash to; without it the first one seen is trusted.
    pub ca_hash: Option<String>,
    /// The `Authorization` header that proves that we have it.
    authorization: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("ca_hash", &self.ca_hash).finish_non_exhaustive()
    }
}

impl Token {
    /// Reads a token; white space around it is ignored.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(TokenError::Empty);
        }
        if text.chars().any(char::is_control) {
            return Err(TokenError::Character);
        }
        let (hash, credentials) = match text.strip_prefix(PREFIX) {
            // without a hash the whole rest is the credentials, as k3s reads it
            Some(rest) => rest.split_once("::").unwrap_or(("", rest)),
            None if is_bootstrap_token(text) => ("", text),
            None => return Ok(Self::password(None, text)),
        };
        let ca_hash = match hash.len() {
            0 => None,
            HASH_LENGTH => Some(hash.to_owned()),
            length => return Err(TokenError::HashLength(length)),
        };
        if is_bootstrap_token(credentials) {
            return Ok(Self { ca_hash, authorization: format!("Bearer {credentials}") });
        }
        match credentials.split_once(':') {
            Some((_, password)) if !password.is_empty() => Ok(Self::password(ca_hash, password)),
            _ => Err(TokenError::Format),
        }
    }

    /// Agents are the user `node`, whomever the token names.
    fn password(ca_hash: Option<String>, password: &str) -> Self {
        Self { ca_hash, authorization: format!("Basic {}", STANDARD.encode(format!("node:{password}"))) }
    }

    /// Value of the `Authorization` header.
    pub(super) fn authorization(&self) -> &str {
        &self.authorization
    }
}

/// `[a-z0-9]{6}.[a-z0-9]{16}` (cluster-bootstrap `token/api`).
fn is_bootstrap_token(text: &str) -> bool {
    let word =
        |part: &str, length| part.len() == length && part.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9'));
    text.split_once('.').is_some_and(|(id, secret)| word(id, 6) && word(secret, 16))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(password: &str) -> String {
        format!("Basic {}", STANDARD.encode(format!("node:{password}")))
    }

    #[test]
    fn all_forms() {
        let hash = "a1".repeat(32);
        for (text, ca_hash, authorization) in [
            (format!("K10{hash}::server:s3cret"), Some(hash.clone()), basic("s3cret")),
            (format!(" K10{hash}::node:s3:cr::et\n"), Some(hash.clone()), basic("s3:cr::et")),
            (format!("K10{hash}::abcdef.0123456789abcdef"), Some(hash), "Bearer abcdef.0123456789abcdef".to_owned()),
            ("abcdef.0123456789abcdef".to_owned(), None, "Bearer abcdef.0123456789abcdef".to_owned()),
            ("my password".to_owned(), None, basic("my password")),
            ("K10::server:x".to_owned(), None, basic("x")),
            ("a:b".to_owned(), None, basic("a:b")),
        ] {
            let token = Token::parse(&text).unwrap();
            assert_eq!((&token.ca_hash, token.authorization()), (&ca_hash, authorization.as_str()), "{text}");
        }
    }

    #[test]
    fn wrong_ones_are_refused_without_being_shown() {
        let hash = "a".repeat(64);
        for (text, error) in [
            ("", TokenError::Empty),
            (" \n", TokenError::Empty),
            ("K10abc::server:hidden", TokenError::HashLength(3)),
            (&format!("K10{hash}::server:"), TokenError::Format),
            (&format!("K10{hash}::hidden"), TokenError::Format),
            ("hid\u{1}den", TokenError::Character),
        ] {
            let found = Token::parse(text).unwrap_err();
            assert_eq!(found, error);
            assert!(!found.to_string().contains("hidden"));
        }
        assert!(!format!("{:?}", Token::parse("hidden").unwrap()).contains("hidden"));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "(K10)?[a-f0-9]{0,70}(::)?\\PC{0,40}") {
            let _ = Token::parse(&text);
        }
    }
}
