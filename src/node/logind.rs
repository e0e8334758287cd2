//! systemd-logind over D-Bus: an inhibitor lock holds the machine's shutdown back until Pods have ended.
//!
//! Source: `pkg/kubelet/nodeshutdown/systemd/inhibit_linux.go`; <https://systemd.io/INHIBITOR_LOCKS/>.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{Stream, StreamExt};
use zbus::proxy::{Builder, CacheProperties};
use zbus::{Connection, Proxy};

/// Longest wait for an answer on the bus.
const DEADLINE: Duration = Duration::from_secs(10);
/// Where logind's configuration is added to, and the file: kubelet's, so that no two wishes contend.
const LOGIND_CONFIG: &str = "/etc/systemd/logind.conf.d/99-kubelet.conf";
/// A reload of logind is not awaited by its caller: how often the result is looked for, and the first pause.
const RELOAD_TRIES: u32 = 5;
const RELOAD_PAUSE: Duration = Duration::from_millis(100);

/// Why logind is of no help. All may pass, except where it says what to change.
#[derive(Debug, thiserror::Error)]
pub enum LogindError {
    /// No bus, no logind, or a refusal.
    #[error("systemd-logind: {0}")]
    Bus(#[from] zbus::Error),
    /// It does not answer.
    #[error("systemd-logind has not answered within {} s", DEADLINE.as_secs())]
    Late,
    /// Its configuration cannot be written.
    #[error("write {path}: {source}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// It holds a shutdown back for less time than Pods need.
    #[error(
        "systemd-logind delays a shutdown by {actual:?} only, of {wanted:?} that the shutdown periods add up to: is InhibitDelayMaxSec set in another file of /etc/systemd/logind.conf.d?"
    )]
    Delay {
        /// `InhibitDelayMaxSec` in force.
        actual: Duration,
        /// What it should be at least.
        wanted: Duration,
    },
}

/// A connection to logind.
pub struct Logind {
    bus: Connection,
    manager: Proxy<'static>,
    config: PathBuf,
}

/// As long as it lives, a shutdown waits.
pub struct Inhibitor(#[allow(dead_code, reason = "closing it is what it is for")] OwnedFd);

async fn answer<T>(call: impl Future<Output = zbus::Result<T>>) -> Result<T, LogindError> {
    tokio::time::timeout(DEADLINE, call).await.map_err(|_| LogindError::Late)?.map_err(LogindError::Bus)
}

impl Logind {
    /// Connects to the system's bus.
    ///
    /// # Errors
    /// If there is none; then there is no systemd, or it is not up yet.
    pub async fn connect() -> Result<Self, LogindError> {
        Self::on(answer(Connection::system()).await?, Path::new(LOGIND_CONFIG)).await
    }

    async fn on(bus: Connection, config: &Path) -> Result<Self, LogindError> {
        let manager = Builder::<Proxy<'static>>::new(&bus)
            .destination("org.freedesktop.login1")
            .path("/org/freedesktop/login1")
            .interface("org.freedesktop.login1.Manager")
            .cache_properties(CacheProperties::No);
        Ok(Self { manager: answer(manager.build()).await?, bus, config: config.to_owned() })
    }

    async fn delay(&self) -> Result<Duration, LogindError> {
        Ok(Duration::from_micros(answer(self.manager.get_property("InhibitDelayMaxUSec")).await?))
    }

    /// Makes logind hold back a shutdown for at least that long: by its configuration, if it is less.
    ///
    /// # Errors
    /// If logind does not take the configuration, or it cannot be written.
    pub async fn ensure_delay(&self, wanted: Duration) -> Result<(), LogindError> {
        let mut actual = self.delay().await?;
        if actual >= wanted {
            return Ok(());
        }
        let text =
            format!("# Time for Pods to end before the node does\n[Login]\nInhibitDelayMaxSec={}\n", wanted.as_secs());
        let written = || {
            self.config.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(&self.config, &text)
        };
        written().map_err(|source| LogindError::Write { path: self.config.clone(), source })?;
        // SIGHUP makes it read its files again
        let systemd = Some("org.freedesktop.systemd1");
        let interface = Some("org.freedesktop.systemd1.Manager");
        let body = ("systemd-logind.service", "all", 1_i32);
        answer(self.bus.call_method(systemd, "/org/freedesktop/systemd1", interface, "KillUnit", &body)).await?;
        for attempt in 0..RELOAD_TRIES {
            actual = self.delay().await?;
            if actual >= wanted {
                return Ok(());
            }
            tokio::time::sleep(RELOAD_PAUSE * 2_u32.pow(attempt)).await;
        }
        Err(LogindError::Delay { actual, wanted })
    }

    /// Holds shutdowns back.
    ///
    /// # Errors
    /// If logind refuses, or a shutdown is under way.
    pub async fn inhibit(&self) -> Result<Inhibitor, LogindError> {
        let why = "Kubelet needs time to handle node shutdown";
        let lock: zbus::OwnedFd = answer(self.manager.call("Inhibit", &("shutdown", "kubelet", why, "delay"))).await?;
        Ok(Inhibitor(lock.into()))
    }

    /// True when the machine is about to shut down, false when that was called off; ends with the connection.
    ///
    /// # Errors
    /// If the bus refuses.
    pub async fn shutdowns(&self) -> Result<impl Stream<Item = bool> + use<>, LogindError> {
        let signals = answer(self.manager.receive_signal("PrepareForShutdown")).await?;
        Ok(signals.filter_map(|signal| async move { signal.body().deserialize::<bool>().ok() }))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// As much of logind, and of systemd, as is spoken to here.
    struct FakeLogind {
        delay: Arc<Mutex<u64>>,
        asked: Arc<Mutex<Vec<String>>>,
        lock: Arc<Mutex<Option<UnixStream>>>,
    }

    #[zbus::interface(name = "org.freedesktop.login1.Manager")]
    impl FakeLogind {
        #[zbus(property, name = "InhibitDelayMaxUSec")]
        fn inhibit_delay_max_usec(&self) -> u64 {
            *self.delay.lock().unwrap()
        }

        fn inhibit(&self, what: String, who: String, _why: String, mode: String) -> zbus::OwnedFd {
            self.asked.lock().unwrap().push(format!("{what} {who} {mode}"));
            let (ours, theirs) = UnixStream::pair().unwrap();
            *self.lock.lock().unwrap() = Some(ours);
            OwnedFd::from(theirs).into()
        }

        #[zbus(signal)]
        async fn prepare_for_shutdown(
            emitter: &zbus::object_server::SignalEmitter<'_>,
            active: bool,
        ) -> zbus::Result<()>;
    }

    struct FakeSystemd {
        config: PathBuf,
        delay: Arc<Mutex<u64>>,
    }

    #[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
    impl FakeSystemd {
        fn kill_unit(&self, unit: String, who: String, signal: i32) {
            assert_eq!((unit.as_str(), who.as_str(), signal), ("systemd-logind.service", "all", 1));
            let text = fs::read_to_string(&self.config).unwrap();
            let seconds: u64 = text.rsplit('=').next().unwrap().trim().parse().unwrap();
            *self.delay.lock().unwrap() = seconds * 1_000_000;
        }
    }

    #[tokio::test]
    async fn a_shutdown_waits_for_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("logind.conf.d/99-kubelet.conf");
        let delay = Arc::new(Mutex::new(5_000_000));
        let (asked, lock) = (Arc::new(Mutex::default()), Arc::new(Mutex::default()));
        let fake = FakeLogind { delay: delay.clone(), asked: asked.clone(), lock: lock.clone() };
        let systemd = FakeSystemd { config: config.clone(), delay: delay.clone() };
        let (left, right) = UnixStream::pair().unwrap();
        let server = zbus::connection::Builder::unix_stream(left)
            .server(zbus::Guid::generate())
            .p2p()
            .serve_at("/org/freedesktop/login1", fake)
            .serve_at("/org/freedesktop/systemd1", systemd);
        let client = zbus::connection::Builder::unix_stream(right).p2p();
        let (server, client) = tokio::try_join!(server.build(), client.build()).unwrap();
        let logind = Logind::on(client, &config).await.unwrap();

        logind.ensure_delay(Duration::from_secs(4)).await.unwrap();
        assert!(!config.exists(), "what is enough is left alone");
        logind.ensure_delay(Duration::from_secs(90)).await.unwrap();
        assert_eq!(*delay.lock().unwrap(), 90_000_000);

        let mut shutdowns = std::pin::pin!(logind.shutdowns().await.unwrap());
        let inhibitor = logind.inhibit().await.unwrap();
        assert_eq!(*asked.lock().unwrap(), ["shutdown kubelet delay"]);
        let emitter = zbus::object_server::SignalEmitter::new(&server, "/org/freedesktop/login1").unwrap();
        for active in [true, false] {
            FakeLogind::prepare_for_shutdown(&emitter, active).await.unwrap();
            assert_eq!(shutdowns.next().await, Some(active));
        }
        let mut held = lock.lock().unwrap().take().unwrap();
        held.set_nonblocking(true).unwrap();
        assert_eq!(held.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(inhibitor);
        assert_eq!(held.read(&mut [0]).unwrap(), 0, "the lock is released");
        server.close().await.unwrap();
        assert_eq!(tokio::time::timeout(DEADLINE, shutdowns.next()).await, Ok(None), "the end of the bus is heard");
    }
}
