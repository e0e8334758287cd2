//! Ports that the node opens, and who has them.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::finding::Finding;
use crate::agent::socket_path;

/// The agent that uses the same state directory now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agent {
    /// None does.
    Absent,
    /// Its process.
    Process(u32),
    /// It answers from a PID namespace that cannot be seen from here.
    Elsewhere,
}

/// Asks the agent's socket who made it.
pub fn agent(state_dir: &Path) -> Agent {
    let Ok(stream) = UnixStream::connect(socket_path(state_dir)) else { return Agent::Absent };
    // the kernel writes 0 for a process that has no number here
    let pid = getsockopt(&stream, PeerCredentials).ok().and_then(|peer| u32::try_from(peer.pid()).ok());
    pid.filter(|pid| *pid > 0).map_or(Agent::Elsewhere, Agent::Process)
}

/// Whether a port is free, or the agent's own.
pub fn port(name: &'static str, address: IpAddr, port: u16, flag: &str, agent: Agent) -> Finding {
    let socket = SocketAddr::new(address, port);
    match TcpListener::bind(socket) {
        Ok(_) => Finding::ok(name, format!("{socket} is free")),
        Err(error) => taken(name, socket, flag, &error, agent, owner(Path::new("/proc"), socket, agent)),
    }
}

fn taken(
    name: &'static str,
    socket: SocketAddr,
    flag: &str,
    error: &io::Error,
    agent: Agent,
    owner: Option<Owner>,
) -> Finding {
    if error.kind() != io::ErrorKind::AddrInUse {
        let message = format!("{socket} cannot be opened: {error}");
        return Finding::fatal(name, message, format!("set an address of this machine, or another {flag}"));
    }
    let remedy = format!("stop it (a kubelet: systemctl disable --now kubelet), or give this node another {flag}");
    match (owner, agent) {
        (Some(owner), Agent::Process(pid)) if owner.pid == pid => {
            Finding::ok(name, format!("{socket} is served by the agent that runs here, process {pid}"))
        }
        (Some(Owner { pid, command }), Agent::Absent) => {
            Finding::fatal(name, format!("{socket} is in use by process {pid} ({command})"), remedy)
        }
        (Some(Owner { pid, command }), _) => {
            let message = format!("{socket} is in use by process {pid} ({command}), not by the agent that runs here");
            Finding::fatal(name, message, remedy)
        }
        (None, Agent::Elsewhere) => {
            let message = format!("{socket} is in use; that it is by the agent that runs here cannot be seen");
            Finding::warning(name, message, "run gantry doctor in the agent's own container or PID namespace")
        }
        (None, _) => {
            let message = format!("{socket} is in use by a process that cannot be seen from here");
            Finding::fatal(
                name,
                message,
                format!("look for it as root with ss -ltnp, outside of this container if it is one; {remedy}"),
            )
        }
    }
}

/// Who has a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Owner {
    pid: u32,
    command: String,
}

/// The process that listens where `socket` would, in the network namespace of this one. If the agent is among those
/// that do, it is the agent.
fn owner(proc: &Path, socket: SocketAddr, agent: Agent) -> Option<Owner> {
    let mut wanted = Vec::new();
    for table in ["self/net/tcp", "self/net/tcp6"] {
        let text = fs::read_to_string(proc.join(table)).unwrap_or_default();
        let listeners = text.lines().skip(1).filter_map(listener).filter(|(local, _)| clash(*local, socket));
        wanted.extend(listeners.map(|(_, inode)| format!("socket:[{inode}]")));
    }
    let named = |pid: u32| {
        let command = fs::read_to_string(proc.join(format!("{pid}/comm"))).unwrap_or_default();
        Owner { pid, command: command.trim().to_owned() }
    };
    if let Agent::Process(pid) = agent
        && holds(proc, pid, &wanted)
    {
        return Some(named(pid));
    }
    let processes = fs::read_dir(proc).ok()?.filter_map(Result::ok);
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| holds(proc, *pid, &wanted)).map(named)
}

/// Whether a process has one of these files open.
fn holds(proc: &Path, pid: u32, files: &[String]) -> bool {
    let Ok(descriptors) = fs::read_dir(proc.join(format!("{pid}/fd"))) else { return false };
    let mut links = descriptors.filter_map(Result::ok).filter_map(|fd| fs::read_link(fd.path()).ok());
    links.any(|link| files.iter().any(|file| link.as_os_str() == file.as_str()))
}

/// The address and inode of a listening socket, if this line of `/proc/net/tcp` or `tcp6` is one.
fn listener(line: &str) -> Option<(SocketAddr, &str)> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = fields.get(1)?.rsplit_once(':')?;
    if *fields.get(3)? != LISTEN {
        return None;
    }
    // words of 32 bits, each as a number of this machine's byte order whose bytes are those of the network's
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let mut bytes = [0; 16];
            bytes.copy_from_slice(words.as_flattened());
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some((SocketAddr::new(address.to_canonical(), u16::from_str_radix(port, 16).ok()?), fields.get(9).copied()?))
}

/// Whether the kernel lets only one of them listen: an unspecified address is all of them.
fn clash(there: SocketAddr, here: SocketAddr) -> bool {
    let same = there.ip() == here.ip() || there.ip().is_unspecified() || here.ip().is_unspecified();
    there.port() == here.port() && same
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::super::finding::Level;
    use super::*;

    const REMEDY: &str = "stop it (a kubelet: systemctl disable --now kubelet), or give this node another --port";

    #[test]
    fn the_owner_of_a_port_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let look = |agent| port("port", address.ip(), address.port(), "--port", agent);
        let own = std::process::id();
        let finding = look(Agent::Absent);
        assert_eq!((finding.level, finding.remedy.as_str()), (Level::Fatal, REMEDY));
        assert!(finding.message.contains(&format!("in use by process {own} (")), "{}", finding.message);
        let finding = look(Agent::Process(own));
        assert_eq!(finding.level, Level::Ok);
        assert!(finding.message.ends_with(&format!("the agent that runs here, process {own}")), "{}", finding.message);
        // an agent runs, and it is another process that has the port
        for agent in [Agent::Process(1), Agent::Elsewhere] {
            let finding = look(agent);
            assert_eq!((finding.level, finding.remedy.as_str()), (Level::Fatal, REMEDY));
            assert!(finding.message.contains(&format!("in use by process {own} (")), "{}", finding.message);
            assert!(finding.message.ends_with("not by the agent that runs here"), "{}", finding.message);
        }
        drop(listener);
        assert_eq!(look(Agent::Absent).level, Level::Ok);
    }

    #[test]
    fn an_owner_that_cannot_be_seen_is_not_taken_for_the_agent() {
        let (socket, error) = ("127.0.0.1:1".parse().unwrap(), io::Error::from(io::ErrorKind::AddrInUse));
        let look = |agent| taken("port", socket, "--port", &error, agent, None);
        assert_eq!(look(Agent::Elsewhere).level, Level::Warning);
        for agent in [Agent::Absent, Agent::Process(1)] {
            assert_eq!(look(agent).level, Level::Fatal);
            assert!(look(agent).remedy.contains("ss -ltnp") && look(agent).remedy.ends_with(REMEDY));
        }
    }

    #[test]
    fn the_agent_is_who_made_its_socket() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(agent(directory.path()), Agent::Absent);
        let listener = UnixListener::bind(socket_path(directory.path())).unwrap();
        assert_eq!(agent(directory.path()), Agent::Process(std::process::id()));
        drop(listener);
        assert_eq!(agent(directory.path()), Agent::Absent, "a name that a dead agent left");
    }

    #[test]
    fn an_address_of_another_machine_cannot_be_opened() {
        let finding = port("port", "192.0.2.1".parse().unwrap(), 10250, "--port", Agent::Absent);
        assert_eq!(finding.level, Level::Fatal);
        assert!(finding.message.contains("192.0.2.1:10250 cannot be opened"));
    }

    #[test]
    fn only_listeners_that_clash_count() {
        let line = |local: &str, state: &str| {
            format!("   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 4711 1")
        };
        let loopback = format!("{:08X}:280A", u32::from_ne_bytes([127, 0, 0, 1]));
        let found = line(&loopback, "0A");
        let (local, inode) = listener(&found).unwrap();
        assert_eq!((local, inode), ("127.0.0.1:10250".parse().unwrap(), "4711"));
        assert_eq!(listener(&line(&loopback, "01")), None);
        let (zero, one) = ("00000000".repeat(3), format!("{:08X}", u32::from_ne_bytes([0, 0, 0, 1])));
        let found = line(&format!("{zero}{one}:280A"), "0A");
        assert_eq!(listener(&found).unwrap().0, "[::1]:10250".parse().unwrap());
        assert_eq!(listener(""), None);
        let clashes = |here: &str| clash(local, here.parse().unwrap());
        assert!(clashes("127.0.0.1:10250") && clashes("0.0.0.0:10250"));
        assert!(!clashes("127.0.0.1:10251") && !clashes("127.0.0.2:10250"));
        assert!(clash("[::]:10250".parse().unwrap(), local));
    }
}
