//! The k3s server to join, from flags or the variables that k3s' own agent knows.

use std::fmt;
use std::path::PathBuf;

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
