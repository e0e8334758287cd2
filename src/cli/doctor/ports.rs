//! Ports that the node opens.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;

use super::finding::Finding;

/// Whether a port is free; `ours` if the agent of the same state directory runs.
pub fn port(name: &'static str, address: IpAddr, port: u16, flag: &str, ours: bool) -> Finding {
    let socket = SocketAddr::new(address, port);
    match TcpListener::bind(socket) {
        Ok(_) => Finding::ok(name, format!("{socket} is free")),
        Err(error) => taken(name, socket, flag, ours, &error, owner(Path::new("/proc"), port)),
    }
}

fn taken(
    name: &'static str,
    socket: SocketAddr,
    flag: &str,
    ours: bool,
    error: &io::Error,
    owner: Option<String>,
) -> Finding {
    if error.kind() == io::ErrorKind::AddrInUse {
        if ours {
            return Finding::ok(name, format!("{socket} is served by the agent that runs here"));
        }
        let by = owner.map(|owner| format!(" by {owner}")).unwrap_or_default();
        let remedy = format!("stop it (a kubelet: systemctl disable --now kubelet), or give this node another {flag}");
        return Finding::fatal(name, format!("{socket} is in use{by}"), remedy);
    }
    let message = format!("{socket} cannot be opened: {error}");
    Finding::fatal(name, message, format!("set an address of this machine, or another {flag}"))
}

/// `pid (name)` of the process that listens on a TCP port.
fn owner(proc: &Path, port: u16) -> Option<String> {
    let inode = ["self/net/tcp", "self/net/tcp6"].into_iter().find_map(|table| {
        let text = fs::read_to_string(proc.join(table)).ok()?;
        text.lines().skip(1).find_map(|line| listener(line, port).map(str::to_owned))
    })?;
    let wanted = format!("socket:[{inode}]");
    for entry in fs::read_dir(proc).ok()?.filter_map(Result::ok) {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if pid.parse::<u32>().is_err() {
            continue;
        }
        let Ok(descriptors) = fs::read_dir(entry.path().join("fd")) else { continue };
        let mut links = descriptors.filter_map(Result::ok).filter_map(|fd| fs::read_link(fd.path()).ok());
        if links.any(|link| link.as_os_str() == wanted.as_str()) {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", name.trim()));
        }
    }
    None
}

/// The inode of a listening socket, if this line of `/proc/net/tcp` is one on `port`.
fn listener(line: &str, port: u16) -> Option<&str> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (_, local) = fields.get(1)?.rsplit_once(':')?;
    let here = u16::from_str_radix(local, 16).ok()? == port && *fields.get(3)? == LISTEN;
    here.then(|| fields.get(9).copied()).flatten()
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    #[test]
    fn the_owner_of_a_port_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let finding = port("port", address.ip(), address.port(), "--port", false);
        assert_eq!(finding.level, Level::Fatal);
        assert!(finding.message.contains(&format!("in use by process {}", std::process::id())), "{}", finding.message);
        assert!(finding.remedy.contains("systemctl disable --now kubelet") && finding.remedy.contains("--port"));
        assert_eq!(port("port", address.ip(), address.port(), "--port", true).level, Level::Ok);
        drop(listener);
        assert_eq!(port("port", address.ip(), address.port(), "--port", false).level, Level::Ok);
    }

    #[test]
    fn an_address_of_another_machine_cannot_be_opened() {
        let finding = port("port", "192.0.2.1".parse().unwrap(), 10250, "--port", false);
        assert_eq!(finding.level, Level::Fatal);
        assert!(finding.message.contains("192.0.2.1:10250 cannot be opened"));
    }

    #[test]
    fn only_listeners_count() {
        let line = "   0: 0100007F:280A 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1";
        assert_eq!(listener(line, 10250), Some("4711"));
        assert_eq!(listener(line, 10251), None);
        assert_eq!(listener(&line.replace(" 0A ", " 01 "), 10250), None);
        assert_eq!(listener("", 1), None);
    }
}
