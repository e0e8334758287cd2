//! What the agent wants of the kernel for its own process and machine: no swap, a low score with the OOM killer, many
//! open files.
//!
//! Source: `NewContainerManager` in `pkg/kubelet/cm/container_manager_linux.go`, `run` and `startKubelet` in
//! `cmd/kubelet/app/server.go`.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::KubeletConfiguration;
use crate::resources::machine;

/// Refuses a machine with swap unless it is allowed (`failSwapOn`), before anything is made.
///
/// # Errors
/// A sentence with the remedy.
pub(super) fn check_swap(kubelet: &KubeletConfiguration) -> Result<(), String> {
    if !kubelet.fail_swap_on {
        return Ok(());
    }
    match machine::swap_is_on() {
        Ok(false) => Ok(()),
        Ok(true) => {
            Err("running with swap on is not supported, please disable swap (swapoff -a) or set --fail-swap-on \
                         flag to false (failSwapOn: false)"
                .to_owned())
        }
        Err(error) => Err(format!("failed to determine if swap is on: read /proc/swaps: {error}")),
    }
}

/// Sets `oomScoreAdj` and `maxOpenFiles`, as far as the kernel allows it: a node without `CAP_SYS_RESOURCE` can do its
/// work with less, so a refusal is a warning. Children inherit both: shims set theirs when they start.
pub(super) fn claim_resources(kubelet: &KubeletConfiguration) {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", kubelet.oom_score_adj.to_string()) {
        tracing::warn!(
            oomScoreAdj = kubelet.oom_score_adj,
            %error,
            "the kernel may end the agent before others when memory runs out; CAP_SYS_RESOURCE would allow it"
        );
    }
    let wanted = u64::try_from(kubelet.max_open_files).unwrap_or_default();
    if let Err(error) = raise_open_files(wanted) {
        tracing::warn!(maxOpenFiles = wanted, %error, "the limit of open files is lower than it should be");
    }
}

/// Hard and soft limit alike; only the soft one, up to the hard one, where the kernel allows no more.
fn raise_open_files(wanted: u64) -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).or_else(|refused| {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard)?;
        Err(refused)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn swap_is_refused_where_it_is_on_and_not_allowed() {
        let mut kubelet = Config::for_tests(std::path::Path::new("/t")).kubelet;
        assert!(kubelet.fail_swap_on, "kubelet's default");
        let refused = check_swap(&kubelet);
        assert_eq!(refused.is_err(), machine::swap_is_on().unwrap());
        if let Err(message) = refused {
            assert!(message.contains("failSwapOn"), "{message}");
        }
        kubelet.fail_swap_on = false;
        assert_eq!(check_swap(&kubelet), Ok(()));
    }

    #[test]
    fn open_files_rise_as_far_as_they_can() {
        // of this whole process: nothing else in the tests depends on it
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        raise_open_files(hard).unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
        if raise_open_files(hard.saturating_add(1)).is_err() {
            assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
        }
    }
}
