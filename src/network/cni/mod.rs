//! CNI plugins: Pods' networks made by programs that a cluster brings along, instead of by the built-in bridge.
//!
//! A file in `/etc/cni/net.d` ([`conflist`]) makes the node use them. Versions 0.3.0 to 1.1.0 of the specification are
//! spoken: what the file allows, reduced to what its plugins say they know.
//!
//! ```text
//! ADD     for each plugin, in order; each reads the result of the one before
//! CHECK   when a Pod's network is to be used again after a restart
//! DEL     in reverse, with the configuration and result of ADD, also after an ADD that failed or was interrupted
//! GC      after the start and when the configuration changes: leases of Pods that are gone
//! STATUS  when the configuration changes, and every few seconds while the answer is no
//! ```
//!
//! Everything here blocks, for a bounded time, and runs on the threads of [`super::Network`]. Calls for one Pod exclude
//! each other there; GC excludes all others here.

mod attachment;
mod conflist;
mod plugin;
mod result;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use attachment::Attachments;
pub use attachment::{Attachment, INTERFACE};
pub use conflist::Conflist;
use conflist::{Plugin, Version};
use plugin::Call;
pub use plugin::Verb;

/// What kubelet says of a node without a network configuration.
const UNINITIALIZED: &str = "cni plugin not initialized";

/// When the node uses plugins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CniUse {
    /// If there is a configuration; the built-in bridge does without one.
    #[default]
    IfConfigured,
    /// Always: without a configuration the node is not ready.
    Required,
    /// Never.
    Never,
}

/// Where plugins and their configuration are.
#[derive(Debug, Clone, PartialEq)]
pub struct CniConfig {
    /// When to use them.
    pub policy: CniUse,
    /// `/etc/cni/net.d`.
    pub conf_dir: PathBuf,
    /// `/opt/cni/bin`.
    pub bin_dirs: Vec<PathBuf>,
    /// Our memory of attachments, on a persistent disk.
    pub cache_dir: PathBuf,
    /// The longest that ADD or DEL of one Pod may take, with all plugins.
    pub deadline: Duration,
}

impl CniConfig {
    /// Never uses plugins, but still detaches Pods that an earlier life attached.
    pub fn never(cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            policy: CniUse::Never,
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into()],
            cache_dir: cache_dir.into(),
            deadline: DEADLINE,
        }
    }
}

/// As long as a kubelet and its runtime wait, with DEL before and after ADD.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// For calls that only ask.
const QUESTION_DEADLINE: Duration = Duration::from_secs(10);

/// Why a plugin or its configuration did not do. All are worth another try: somebody mends files, daemons and networks
/// beside us.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// A configuration file cannot be used.
    #[error("cni config load failed: {} {reason}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The plugin says no.
    #[error("plugin type={plugin:?} failed ({}): {msg}{} (code {code})", verb.as_str(), separated(details))]
    Plugin {
        /// Its `type`.
        plugin: String,
        /// What it was asked to do.
        verb: Verb,
        /// Its code; those below 100 are the specification's.
        code: u32,
        /// A short reason.
        msg: String,
        /// A longer one.
        details: String,
    },
    /// The plugin was killed.
    #[error("plugin type={plugin:?} ({}) did not end before its deadline and was killed", verb.as_str())]
    Deadline {
        /// Its `type`.
        plugin: String,
        /// What it was asked to do.
        verb: Verb,
    },
    /// The program is not there.
    #[error("failed to find plugin {plugin:?} in path [{searched}]: install it there or set --cni-bin-dir")]
    Missing {
        /// Its `type`.
        plugin: String,
        /// Directories.
        searched: String,
    },
    /// The program cannot be run.
    #[error("plugin type={plugin:?} cannot be run: {source}")]
    Start {
        /// Its `type`.
        plugin: String,
        /// Why.
        source: io::Error,
    },
    /// What the plugin said makes no sense.
    #[error("plugin type={plugin:?} ({}) {reason}", verb.as_str())]
    Answer {
        /// Its `type`.
        plugin: String,
        /// What it was asked to do.
        verb: Verb,
        /// What is wrong.
        reason: String,
    },
    /// No version that all plugins know.
    #[error("plugin type={plugin:?} knows cniVersion {known}, the configuration of network {network:?} wants {wanted}")]
    Version {
        /// The plugin's `type`.
        plugin: String,
        /// What it knows.
        known: String,
        /// The network.
        network: String,
        /// What its file allows and the plugins before know.
        wanted: String,
    },
    /// Our memory of a Pod's attachment cannot be read or written.
    #[error("attachment of Pod {uid} in {}: {source}", directory.display())]
    Memory {
        /// The Pod.
        uid: String,
        /// Where it should be.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn separated(details: &str) -> String {
    if details.is_empty() { String::new() } else { format!("; {details}") }
}

/// How Pods get their network now.
#[derive(Debug, Clone, PartialEq)]
pub enum Mode {
    /// From the bridge.
    BuiltIn,
    /// From plugins.
    Plugins(Arc<Conflist>),
    /// Not at all until something changes: the reason.
    Waiting(String),
}

/// The node's plugins.
pub struct Cni {
    config: CniConfig,
    attachments: Attachments,
    mode: Mutex<Mode>,
    /// There was a configuration in this life.
    configured: AtomicBool,
    /// ADD, DEL and CHECK share it, GC has it alone.
    busy: RwLock<()>,
}

impl Cni {
    /// Looks at nothing yet: call [`Self::refresh`].
    pub fn new(config: CniConfig) -> Self {
        let mode = match config.policy {
            CniUse::Never | CniUse::IfConfigured => Mode::BuiltIn,
            CniUse::Required => Mode::Waiting(UNINITIALIZED.into()),
        };
        let attachments = Attachments::new(&config.cache_dir);
        Self { config, attachments, mode: Mutex::new(mode), configured: AtomicBool::new(false), busy: RwLock::new(()) }
    }

    /// How Pods get their network now.
    pub fn mode(&self) -> Mode {
        self.mode.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where configurations are.
    pub fn conf_dir(&self) -> &Path {
        &self.config.conf_dir
    }

    /// Whether plugins are never asked for a new Pod's network.
    pub fn is_off(&self) -> bool {
        self.config.policy == CniUse::Never
    }

    /// Looks at the configuration and asks the plugins; true when the mode is another than before.
    ///
    /// A configuration that vanishes leaves the node not ready instead of back at the bridge: a network that is being
    /// replaced must not leave Pods in two. Only a later life that finds neither configuration nor attached Pods goes back.
    pub fn refresh(&self) -> bool {
        let found = if self.is_off() { Ok(None) } else { self.usable() };
        if !matches!(found, Ok(None)) {
            self.configured.store(true, Ordering::Relaxed);
        }
        let attached = || self.attachments.uids().is_ok_and(|uids| !uids.is_empty());
        let used = || self.configured.load(Ordering::Relaxed) || attached();
        let mode = match found {
            Ok(Some(conflist)) => Mode::Plugins(Arc::new(conflist)),
            Err(error) => Mode::Waiting(error.to_string()),
            Ok(None) if self.is_off() => Mode::BuiltIn,
            Ok(None) if self.config.policy == CniUse::Required || used() => {
                let directory = self.config.conf_dir.display();
                Mode::Waiting(format!("no network config found in {directory}: {UNINITIALIZED}"))
            }
            Ok(None) => Mode::BuiltIn,
        };
        let mut known = self.mode.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = *known != mode;
        *known = mode;
        changed
    }

    fn usable(&self) -> Result<Option<Conflist>, CniError> {
        let Some(mut conflist) = conflist::load(&self.config.conf_dir)? else { return Ok(None) };
        if let Mode::Plugins(known) = self.mode()
            && (Conflist { version: known.version, ..conflist.clone() }) == *known
        {
            return Ok(Some(Conflist::clone(&known)));
        }
        conflist.version = self.negotiate(&conflist)?;
        if conflist.version >= Version::V1_1_0 {
            for plugin in &conflist.plugins {
                let mut request = plugin.request();
                request.insert("cniVersion".into(), conflist.version.as_str().into());
                request.insert("name".into(), conflist.name.clone().into());
                self.ask(Verb::Status, plugin, &request)?;
            }
        }
        Ok(Some(conflist))
    }

    /// The newest version that the file allows and every plugin knows.
    fn negotiate(&self, conflist: &Conflist) -> Result<Version, CniError> {
        let mut common = conflist.offered.clone();
        let request = Map::from_iter([("cniVersion".to_owned(), json!(Version::LATEST.as_str()))]);
        for plugin in &conflist.plugins {
            let answer = self.ask(Verb::Version, plugin, &request)?;
            let answer: Option<Value> = serde_json::from_slice(&answer).ok();
            let listed = answer.as_ref().and_then(|answer| answer.get("supportedVersions")).and_then(Value::as_array);
            let listed = listed.ok_or_else(|| CniError::Answer {
                plugin: plugin.kind().to_owned(),
                verb: Verb::Version,
                reason: "answered without supportedVersions".into(),
            })?;
            let known: Vec<&str> = listed.iter().filter_map(Value::as_str).collect();
            let wanted = common.clone();
            common.retain(|version| known.contains(&version.as_str()));
            if common.is_empty() {
                return Err(CniError::Version {
                    plugin: plugin.kind().to_owned(),
                    known: known.join(", "),
                    network: conflist.name.clone(),
                    wanted: wanted.iter().map(|version| version.as_str()).collect::<Vec<_>>().join(", "),
                });
            }
        }
        Ok(common.first().copied().unwrap_or(conflist.version))
    }

    fn ask(&self, verb: Verb, plugin: &Plugin, request: &Map<String, Value>) -> Result<Vec<u8>, CniError> {
        let until = Instant::now() + QUESTION_DEADLINE.min(self.config.deadline);
        self.call(verb, plugin.kind(), &[], request, until).execute()
    }

    fn call<'a>(
        &'a self,
        verb: Verb,
        plugin: &'a str,
        environment: &'a [(&'static str, OsString)],
        request: &'a Map<String, Value>,
        until: Instant,
    ) -> Call<'a> {
        Call { verb, plugin, bin_dirs: &self.config.bin_dirs, environment, request, until }
    }

    /// Whether a Pod is attached, or was once and never detached.
    pub fn knows(&self, uid: &str) -> bool {
        self.attachments.exists(uid)
    }

    fn memory(&self, uid: &str) -> impl FnOnce(io::Error) -> CniError {
        let (uid, directory) = (uid.to_owned(), self.config.cache_dir.clone());
        move |source| CniError::Memory { uid, directory, source }
    }

    /// ADD: attaches a Pod that is not attached, and returns its addresses. What a failure leaves, [`Self::detach`]
    /// removes.
    pub fn attach(&self, mut attachment: Attachment) -> Result<Vec<IpAddr>, CniError> {
        let _busy = self.busy.read().unwrap_or_else(PoisonError::into_inner);
        let uid = attachment.container_id.clone();
        // intent before action: DEL can be called from here on
        self.attachments.write(&attachment).map_err(self.memory(&uid))?;
        let until = Instant::now() + self.config.deadline;
        let environment = attachment.environment(true);
        let mut previous: Option<Map<String, Value>> = None;
        let mut addresses = Vec::new();
        for (position, plugin) in attachment.network.plugins.iter().enumerate() {
            let request = attachment.request(plugin, previous.as_ref());
            let call = self.call(Verb::Add, plugin.kind(), &environment, &request, until);
            let answer = result::parse(&call.execute()?, attachment.network.version);
            let answer = answer.map_err(|reason| call.nonsense(reason))?;
            if position + 1 == attachment.network.plugins.len() {
                addresses = result::addresses(&answer, INTERFACE).map_err(|reason| call.nonsense(reason))?;
            }
            previous = Some(answer);
        }
        attachment.result = previous;
        self.attachments.write(&attachment).map_err(self.memory(&uid))?;
        Ok(addresses)
    }

    /// ADD, and DEL if it fails ("a delete must still be executed even if the add fails"). Should DEL fail too, or we be
    /// killed, a later [`Self::detach`] does it.
    pub fn attach_or_detach(&self, attachment: Attachment) -> Result<Vec<IpAddr>, CniError> {
        let uid = attachment.container_id.clone();
        self.attach(attachment).inspect_err(|_| {
            if let Err(error) = self.detach(&uid, true) {
                tracing::warn!(uid, %error, "what ADD left stays for now");
            }
        })
    }

    /// CHECK: an error if a Pod's attachment does not work any more.
    pub fn check(&self, uid: &str) -> Result<(), CniError> {
        let _busy = self.busy.read().unwrap_or_else(PoisonError::into_inner);
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let attachment = self.attachments.read(uid).and_then(|found| found.ok_or_else(gone));
        let attachment = attachment.map_err(self.memory(uid))?;
        let network = &attachment.network;
        if network.disable_check || network.version < Version::V0_4_0 {
            return Ok(());
        }
        let until = Instant::now() + self.config.deadline;
        let environment = attachment.environment(true);
        for plugin in &network.plugins {
            let request = attachment.request(plugin, attachment.result.as_ref());
            self.call(Verb::Check, plugin.kind(), &environment, &request, until).execute()?;
        }
        Ok(())
    }

    /// DEL: detaches a Pod, which may be attached by half, or not any more. `alive`: its namespace is still there.
    pub fn detach(&self, uid: &str, alive: bool) -> Result<(), CniError> {
        let _busy = self.busy.read().unwrap_or_else(PoisonError::into_inner);
        let Some(attachment) = self.attachments.read(uid).map_err(self.memory(uid))? else { return Ok(()) };
        let until = Instant::now() + self.config.deadline;
        let environment = attachment.environment(alive);
        for plugin in attachment.network.plugins.iter().rev() {
            let request = attachment.request(plugin, attachment.result.as_ref());
            self.call(Verb::Del, plugin.kind(), &environment, &request, until).execute()?;
        }
        self.attachments.remove(uid).map_err(self.memory(uid))
    }

    /// The uids of attached Pods that `keep` does not want.
    pub fn orphans(&self, keep: impl Fn(&str) -> bool) -> io::Result<Vec<String>> {
        let mut uids = self.attachments.uids()?;
        uids.retain(|uid| !keep(uid));
        Ok(uids)
    }

    /// GC: lets plugins forget all attachments but those that we know. Every plugin is asked; the error is the first.
    pub fn collect(&self) -> Result<(), CniError> {
        let Mode::Plugins(network) = self.mode() else { return Ok(()) };
        if network.disable_gc || network.version < Version::V1_1_0 {
            return Ok(());
        }
        let _alone = self.busy.write().unwrap_or_else(PoisonError::into_inner);
        let known = self.attachments.uids().map_err(self.memory("*"))?;
        let valid: Vec<Value> = known.iter().map(|uid| json!({ "containerID": uid, "ifname": INTERFACE })).collect();
        let until = Instant::now() + self.config.deadline;
        let mut failed = Ok(());
        for plugin in &network.plugins {
            let mut request = plugin.request();
            request.insert("cniVersion".into(), network.version.as_str().into());
            request.insert("name".into(), network.name.clone().into());
            // the first is what the specification says, the second what it once said; libcni sets both
            request.insert("cni.dev/valid-attachments".into(), valid.clone().into());
            request.insert("cni.dev/attachments".into(), valid.clone().into());
            let result = self.call(Verb::Gc, plugin.kind(), &[], &request, until).execute();
            failed = failed.and(result.map(drop));
        }
        failed
    }
}
