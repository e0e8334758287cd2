//! Profile files of the node, in the OCI format or in Docker's, which adds conditions.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSyscall,
};
use serde::Deserialize;

use super::SpecError;

/// Largest profile that is read; Docker's own has 15 KiB.
const MAX_FILE: u64 = 1 << 20;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: LinuxSeccompAction,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Option<Vec<Arch>>,
    #[serde(default)]
    arch_map: Option<Vec<ArchMap>>,
    #[serde(default)]
    flags: Option<Vec<LinuxSeccompFilterFlag>>,
    listener_path: Option<std::path::PathBuf>,
    listener_metadata: Option<String>,
    #[serde(default)]
    syscalls: Option<Vec<Rule>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: Arch,
    #[serde(default)]
    sub_architectures: Option<Vec<Arch>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    /// Docker's older form of `names`.
    name: Option<String>,
    #[serde(default)]
    names: Option<Vec<String>>,
    action: LinuxSeccompAction,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<LinuxSeccompArg>>,
    #[serde(default)]
    includes: Option<Condition>,
    #[serde(default)]
    excludes: Option<Condition>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(default)]
    caps: Option<Vec<String>>,
    #[serde(default)]
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

pub(super) fn read(path: &Path, capabilities: &BTreeSet<String>) -> Result<LinuxSeccomp, SpecError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|source| SpecError::SeccompRead { path: path.to_owned(), source })?;
    let format = |reason: String| SpecError::SeccompFormat { path: path.to_owned(), reason };
    if bytes.len() as u64 > MAX_FILE {
        return Err(format("larger than 1 MiB".to_owned()));
    }
    let host = Host { capabilities, arch: go_arch(), kernel: kernel_version() };
    parse(&bytes, &host).map_err(format)
}

/// What conditions are about.
struct Host<'a> {
    capabilities: &'a BTreeSet<String>,
    arch: &'static str,
    kernel: (u64, u64),
}

impl Host<'_> {
    fn has(&self, capability: &str) -> bool {
        self.capabilities.contains(capability.strip_prefix("CAP_").unwrap_or(capability))
    }

    /// All conditions of an `includes`.
    fn meets(&self, condition: &Condition) -> Result<bool, String> {
        let arch = condition.arches.as_ref().is_none_or(|list| list.is_empty() || self.is_listed(list));
        let caps = condition.caps.iter().flatten().all(|cap| self.has(cap));
        Ok(arch && caps && condition.min_kernel.as_deref().map_or(Ok(true), |min| self.is_at_least(min))?)
    }

    /// Any condition of an `excludes`.
    fn is_excluded(&self, condition: &Condition) -> Result<bool, String> {
        let arch = condition.arches.as_ref().is_some_and(|list| self.is_listed(list));
        let caps = condition.caps.iter().flatten().any(|cap| self.has(cap));
        Ok(arch || caps || condition.min_kernel.as_deref().map_or(Ok(false), |min| self.is_at_least(min))?)
    }

    fn is_listed(&self, arches: &[String]) -> bool {
        arches.iter().any(|arch| arch == self.arch)
    }

    fn is_at_least(&self, version: &str) -> Result<bool, String> {
        let parsed = parse_version(version).ok_or_else(|| format!("minKernel {version:?}: write it as 5.15"))?;
        Ok(self.kernel >= parsed)
    }
}

fn parse(bytes: &[u8], host: &Host<'_>) -> Result<LinuxSeccomp, String> {
    let profile: Profile = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let mut architectures = profile.architectures;
    if let Some(map) = profile.arch_map.filter(|map| !map.is_empty()) {
        if architectures.as_ref().is_some_and(|list| !list.is_empty()) {
            return Err("architectures and archMap exclude each other: remove one".to_owned());
        }
        let own = map.into_iter().find(|entry| entry.architecture == native_arch());
        architectures = own.map(|entry| {
            std::iter::once(entry.architecture).chain(entry.sub_architectures.into_iter().flatten()).collect()
        });
    }
    let mut syscalls = Vec::new();
    for (index, rule) in profile.syscalls.into_iter().flatten().enumerate() {
        let wrong = |reason: &str| format!("syscalls[{index}]: {reason}");
        let included = rule.includes.as_ref().map_or(Ok(true), |condition| host.meets(condition))?;
        let excluded = rule.excludes.as_ref().map_or(Ok(false), |condition| host.is_excluded(condition))?;
        if !included || excluded {
            continue;
        }
        let names = match (rule.name, rule.names.filter(|names| !names.is_empty())) {
            (Some(name), None) if !name.is_empty() => vec![name],
            (None, Some(names)) => names,
            (Some(_), Some(_)) => return Err(wrong("name and names exclude each other: keep names")),
            _ => return Err(wrong("names must list a system call")),
        };
        if rule.args.iter().flatten().any(|arg| arg.index() > 5) {
            return Err(wrong("args[].index must be between 0 and 5"));
        }
        let mut syscall = LinuxSyscall::default();
        syscall.set_names(names);
        syscall.set_action(rule.action);
        syscall.set_errno_ret(rule.errno_ret);
        syscall.set_args(rule.args.filter(|args| !args.is_empty()));
        syscalls.push(syscall);
    }
    let mut result = LinuxSeccomp::default();
    result.set_default_action(profile.default_action);
    result.set_default_errno_ret(profile.default_errno_ret);
    result.set_architectures(architectures);
    result.set_flags(profile.flags);
    result.set_listener_path(profile.listener_path);
    result.set_listener_metadata(profile.listener_metadata);
    result.set_syscalls((!syscalls.is_empty()).then_some(syscalls));
    Ok(result)
}

fn parse_version(text: &str) -> Option<(u64, u64)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel_version() -> (u64, u64) {
    rustix::system::uname().release().to_str().ok().and_then(parse_version).unwrap_or_default()
}

fn native_arch() -> Arch {
    if cfg!(target_arch = "aarch64") { Arch::ScmpArchAarch64 } else { Arch::ScmpArchX86_64 }
}

/// The name of this machine in Docker's profiles.
fn go_arch() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str, capabilities: &[&str]) -> Result<LinuxSeccomp, String> {
        let capabilities = capabilities.iter().map(|c| (*c).to_owned()).collect();
        parse(text.as_bytes(), &Host { capabilities: &capabilities, arch: "amd64", kernel: (5, 15) })
    }

    fn names(profile: &LinuxSeccomp) -> Vec<&str> {
        profile.syscalls().iter().flatten().flat_map(|s| s.names().iter().map(String::as_str)).collect()
    }

    #[test]
    fn reads_the_oci_format() {
        let profile = parsed(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86_64"],
                "flags":["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls":[{"names":["read","write"],"action":"SCMP_ACT_ALLOW",
                             "args":[{"index":1,"value":5,"valueTwo":6,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
            &[],
        )
        .unwrap();
        assert_eq!(names(&profile), ["read", "write"]);
        assert_eq!(
            (profile.default_action(), profile.default_errno_ret()),
            (LinuxSeccompAction::ScmpActErrno, Some(38))
        );
        assert_eq!(profile.syscalls().as_ref().unwrap()[0].args().as_ref().unwrap()[0].value_two(), Some(6));
    }

    #[test]
    fn applies_the_conditions_of_dockers_format() {
        let text = r#"{"defaultAction":"SCMP_ACT_ERRNO",
            "archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]},
                       {"architecture":"SCMP_ARCH_AARCH64","subArchitectures":[]}],
            "syscalls":[{"name":"old","action":"SCMP_ACT_ALLOW"},
                        {"names":["ptrace"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"}},
                        {"names":["future"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"9.0"}},
                        {"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
                        {"names":["clone"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_SYS_ADMIN"]}},
                        {"names":["arm"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["arm64"]}}]}"#;
        let plain = parsed(text, &[]).unwrap();
        assert_eq!(names(&plain), ["old", "ptrace", "clone"]);
        assert_eq!(plain.architectures().as_ref().unwrap().len(), if cfg!(target_arch = "aarch64") { 1 } else { 2 });
        assert_eq!(names(&parsed(text, &["SYS_ADMIN"]).unwrap()), ["old", "ptrace", "mount"]);
    }

    #[test]
    fn names_what_is_wrong() {
        for (text, hint) in [
            ("{", "EOF"),
            ("{}", "defaultAction"),
            (r#"{"defaultAction":"SCMP_ACT_NOPE"}"#, "SCMP_ACT_NOPE"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"action":"SCMP_ACT_ALLOW"}]}"#, "syscalls[0]"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_ALLOW",
                    "args":[{"index":9,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
                "index",
            ),
        ] {
            assert!(parsed(text, &[]).unwrap_err().contains(hint), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in "[{}\\[\\]\",:a-zA-Z0-9_ ]{0,200}") {
            let _ = parsed(&text, &[]);
        }
    }
}
