//! The node's password: what proves to a k3s server that a name still belongs to the same machine.
//!
//! Source: `ensureNodePassword` in k3s `pkg/agent/config/config.go`. Servers keep a hash of it in Secret
//! `NAME.node-password.k3s` from the node's first certificate on.

use std::io;
use std::path::Path;

use ring::rand::{SecureRandom, SystemRandom};

use crate::node::certs::write_private;

/// Longer files are no passwords.
const MAX_LENGTH: usize = 1024;

/// The password in the file; made at the first use.
pub(super) fn ensure(path: &Path) -> io::Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let password = text.trim();
            let good = !password.is_empty() && password.len() <= MAX_LENGTH && !password.chars().any(char::is_control);
            if good {
                return Ok(password.to_owned());
            }
            let problem = "is no password of one line: restore it, or remove it and the Secret NAME.node-password.k3s";
            Err(io::Error::new(io::ErrorKind::InvalidData, problem))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(path),
        Err(error) => Err(error),
    }
}

fn make(path: &Path) -> io::Result<String> {
    let mut random = [0; 16];
    SystemRandom::new().fill(&mut random).map_err(|_| io::Error::other("the kernel gives no random numbers"))?;
    let password = hex::encode(random);
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    write_private(path, format!("{password}\n").as_bytes())?;
    Ok(password)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("etc/rancher/node/password");
        let password = ensure(&path).unwrap();
        assert_eq!((password.len(), hex::decode(&password).unwrap().len()), (32, 16));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(ensure(&path).unwrap(), password);
        std::fs::write(&path, "of k3s \n").unwrap();
        assert_eq!(ensure(&path).unwrap(), "of k3s");
        std::fs::write(&path, "\n").unwrap();
        assert!(ensure(&path).unwrap_err().to_string().contains("restore it"));
    }
}
