//! Linux namespaces of a Pod: made on a thread that then ends, pinned by bind mounts, entered by path.
//!
//! Only a thread that ends afterwards may change its namespaces; a tokio worker would carry them into other tasks.

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use tokio::sync::oneshot;

/// How long a connection to a port inside a Pod may take, for each address family.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
/// Deep enough for netlink and file work; the default of 2 MiB is only address space, but so is this.
const STACK_BYTES: usize = 512 * 1024;
/// `f_type` of the file system of namespace files (`NSFS_MAGIC`).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// The kinds of namespace a Pod may have of its own here. (PID and user namespaces belong to its containers.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Interfaces, routes, ports.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Hostname.
    Uts,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Net, Self::Ipc, Self::Uts];

    fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
        }
    }

    fn flag(self) -> CloneFlags {
        match self {
            Self::Net => CloneFlags::CLONE_NEWNET,
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Uts => CloneFlags::CLONE_NEWUTS,
        }
    }
}

/// The directory with a Pod's pinned namespaces: `net`, `ipc`, `uts`.
#[derive(Debug, Clone)]
pub struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// The pins below a Pod's directory.
    pub fn of_pod(pod_dir: &Path) -> Self {
        Self { directory: pod_dir.join("ns") }
    }

    /// Where a namespace is (or would be) pinned.
    pub fn path(&self, kind: Kind) -> PathBuf {
        self.directory.join(kind.name())
    }

    /// Whether a namespace is pinned: the path is a namespace file, not the plain file below it.
    pub fn is_pinned(&self, kind: Kind) -> bool {
        rustix::fs::statfs(self.path(kind)).is_ok_and(|stat| stat.f_type == NSFS_MAGIC)
    }

    /// Moves the calling thread into new namespaces of `kinds`, names the host and pins them.
    ///
    /// Call it only on a thread that ends soon. What a failure leaves behind, [`Self::unpin`] removes.
    pub fn create(&self, kinds: &[Kind], hostname: &str) -> io::Result<()> {
        let flags = kinds.iter().fold(CloneFlags::empty(), |flags, kind| flags | kind.flag());
        fs::create_dir_all(&self.directory)?;
        nix::sched::unshare(flags)?;
        if kinds.contains(&Kind::Uts) {
            nix::unistd::sethostname(hostname)?;
        }
        for kind in kinds {
            let target = self.path(*kind);
            File::create(&target)?;
            let source = format!("/proc/thread-self/ns/{}", kind.name());
            nix::mount::mount(Some(source.as_str()), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        }
        Ok(())
    }

    /// Removes the pins; a namespace lives on as long as a process is in it.
    pub fn unpin(&self) -> io::Result<()> {
        for kind in Kind::ALL {
            let path = self.path(kind);
            loop {
                match nix::mount::umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                    Ok(()) => {}
                    // Not (or no longer) a mount point, or no such file.
                    Err(Errno::EINVAL | Errno::ENOENT) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            ignore_missing(fs::remove_file(&path))?;
        }
        ignore_missing(fs::remove_dir(&self.directory))
    }
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Runs `work` on a fresh thread that may change its namespaces, because it ends with it.
///
/// The thread runs to the end even when the future is dropped. An error means that no thread could be started or
/// that `work` panicked.
pub async fn on_fresh_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (sender, receiver) = oneshot::channel();
    let body = move || drop(sender.send(work()));
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(body)?;
    receiver.await.map_err(|_| io::Error::other("the worker thread panicked"))
}

/// A thread that stays in the namespaces in which it was made, for work to be done there when the thread that made it
/// has moved on.
pub struct Behind<T> {
    work: std::sync::mpsc::Sender<Box<dyn FnOnce() -> T + Send>>,
    thread: std::thread::JoinHandle<Option<T>>,
}

impl<T: Send + 'static> Behind<T> {
    /// Starts the thread.
    pub fn new(name: &str) -> io::Result<Self> {
        let (work, inbox) = std::sync::mpsc::channel::<Box<dyn FnOnce() -> T + Send>>();
        let body = move || inbox.recv().ok().map(|work| work());
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(body)?;
        Ok(Self { work, thread })
    }

    /// Does the work there, and ends the thread.
    pub fn run(self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let panicked = || io::Error::other("the worker thread panicked");
        self.work.send(Box::new(work)).map_err(|_| panicked())?;
        self.thread.join().ok().flatten().ok_or_else(panicked)
    }
}

/// Moves the calling thread into the network namespace behind a file; only for threads that end soon.
pub fn enter(net_ns: impl AsFd) -> io::Result<()> {
    Ok(nix::sched::setns(net_ns, CloneFlags::CLONE_NEWNET)?)
}

/// Runs `work` on a fresh thread inside the network namespace pinned at `net_ns`.
pub async fn in_namespace<T: Send + 'static>(
    net_ns: &Path,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let file = net_ns.to_owned();
    on_fresh_thread("pod-netns", move || {
        enter(File::open(&file)?)?;
        Ok(work())
    })
    .await?
}

/// Connects to `localhost:port` inside a Pod's network namespace, IPv4 first, as port-forward does in containerd.
///
/// Without `net_ns` (a hostNetwork Pod) the connection is made in the calling thread's own namespace. Each family has
/// a deadline of 5 s; the error is that of IPv4.
pub async fn dial_in_namespace(net_ns: Option<&Path>, port: u16) -> io::Result<tokio::net::TcpStream> {
    let dial = move || {
        let connect = |ip: IpAddr| std::net::TcpStream::connect_timeout(&SocketAddr::new(ip, port), DIAL_DEADLINE);
        connect(Ipv4Addr::LOCALHOST.into()).or_else(|first| connect(Ipv6Addr::LOCALHOST.into()).map_err(|_| first))
    };
    let stream = match net_ns {
        Some(path) => in_namespace(path, dial).await??,
        None => on_fresh_thread("dial", dial).await??,
    };
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    tokio::net::TcpStream::from_std(stream)
}
