//! A seccomp profile compiled to BPF once per container; every process of it loads the same bytes.
//!
//! Compiled here and not by libcontainer, which swaps the operands of `SCMP_CMP_MASKED_EQ` and gives no filter
//! to exec'd processes (`docs/upstream.md`).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::libc;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use rustix::fs::{MemfdFlags, memfd_create};

/// A filter ready for `seccomp(2)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// `struct sock_filter` instructions.
    pub(super) program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub(super) flags: u64,
}

/// Why a profile cannot be used. All are terminal: the profile must change.
#[derive(Debug, thiserror::Error)]
pub(super) enum SeccompError {
    #[error("seccomp: {what}: {source}")]
    Library { what: String, source: libseccomp::error::SeccompError },
    #[error("seccomp: SCMP_ACT_NOTIFY in `{0}` is not supported; use SCMP_ACT_ERRNO or SCMP_ACT_ALLOW")]
    Notify(String),
    #[error("seccomp: keep the compiled filter: {0}")]
    Io(#[from] io::Error),
    #[error("seccomp: errno {0} of an action is out of range")]
    Errno(u32),
    #[error("seccomp: `{syscall}` has an argument index of {index}, the last one is 5")]
    Index { syscall: String, index: usize },
}

fn library(what: impl Into<String>) -> impl FnOnce(libseccomp::error::SeccompError) -> SeccompError {
    let what = what.into();
    move |source| SeccompError::Library { what, source }
}

/// Compiles a profile.
pub(super) fn compile(profile: &LinuxSeccomp) -> Result<Filter, SeccompError> {
    let default = action(profile.default_action(), profile.default_errno_ret(), "defaultAction")?;
    let mut context = ScmpFilterContext::new(default).map_err(library("defaultAction"))?;
    for arch in profile.architectures().iter().flatten() {
        context.add_arch(translate_arch(*arch)).map_err(library(format!("architecture {arch}")))?;
    }
    let mut known = BTreeSet::new();
    for rule in profile.syscalls().iter().flatten() {
        let names = rule.names().join(", ");
        let action = action(rule.action(), rule.errno_ret(), &names)?;
        for name in rule.names() {
            // Unknown names are skipped, as runc does: profiles name system calls of other kernels and machines.
            let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
            known.insert(syscall.as_raw_syscall());
            if action == default {
                continue; // libseccomp refuses a rule that says what the default says
            }
            add_rules(&mut context, action, syscall, name, rule.args().as_deref().unwrap_or_default())?;
        }
    }
    let mut program = export(&context)?;
    if matches!(default, ScmpAction::Errno(errno) if errno != libc::ENOSYS)
        && let Some(last) = known.last()
    {
        program.splice(0..0, unknown_is_enosys(*last));
    }
    let flags = profile.flags().iter().flatten().map(|flag| match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        // One thread has nobody to synchronise with, and nothing here waits for a notification.
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    });
    Ok(Filter { program, flags: flags.fold(0, |all, flag| all | flag) })
}

/// libseccomp before 2.6 writes filters to a descriptor only.
fn export(context: &ScmpFilterContext) -> Result<Vec<u8>, SeccompError> {
    let mut file = File::from(memfd_create("seccomp", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
    context.export_bpf(&file).map_err(library("export"))?;
    file.rewind()?;
    let mut program = Vec::new();
    file.read_to_end(&mut program)?;
    Ok(program)
}

fn add_rules(
    context: &mut ScmpFilterContext,
    action: ScmpAction,
    syscall: ScmpSyscall,
    name: &str,
    args: &[LinuxSeccompArg],
) -> Result<(), SeccompError> {
    let failed = || library(format!("rule for `{name}`"));
    if args.is_empty() {
        return context.add_rule(action, syscall).map(drop).map_err(failed());
    }
    let comparisons: Vec<ScmpArgCompare> = args.iter().map(|arg| compare(arg, name)).collect::<Result<_, _>>()?;
    let indices: BTreeSet<usize> = args.iter().map(LinuxSeccompArg::index).collect();
    if indices.len() == args.len() {
        return context.add_rule_conditional(action, syscall, &comparisons).map(drop).map_err(failed());
    }
    // libseccomp takes one comparison per argument and rule: as in runc, each becomes a rule of its own.
    for comparison in comparisons {
        context.add_rule_conditional(action, syscall, &[comparison]).map_err(failed())?;
    }
    Ok(())
}

fn compare(arg: &LinuxSeccompArg, syscall: &str) -> Result<ScmpArgCompare, SeccompError> {
    let index = u32::try_from(arg.index()).ok().filter(|index| *index < 6);
    let index = index.ok_or_else(|| SeccompError::Index { syscall: syscall.to_owned(), index: arg.index() })?;
    let (operator, datum) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // OCI: `value` is the mask and `valueTwo` what must be left (config-linux.md, "seccomp").
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or_default())
        }
    };
    Ok(ScmpArgCompare::new(index, operator, datum))
}

fn action(action: LinuxSeccompAction, errno: Option<u32>, place: &str) -> Result<ScmpAction, SeccompError> {
    let value = errno.unwrap_or(libc::EPERM.cast_unsigned());
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => {
            ScmpAction::Errno(i32::try_from(value).map_err(|_| SeccompError::Errno(value))?)
        }
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(value).map_err(|_| SeccompError::Errno(value))?)
        }
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => return Err(SeccompError::Notify(place.to_owned())),
    })
}

/// Instructions that answer system calls newer than the profile with ENOSYS, before the profile is asked, so that C
/// libraries fall back to the older call instead of reporting EPERM (runc's `patchbpf` does the same).
fn unknown_is_enosys(last_known: i32) -> Vec<u8> {
    let Some(native) = audit_arch() else {
        return Vec::new();
    };
    let last_known = last_known.max(0).cast_unsigned();
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_EQUAL: u16 = 0x15;
    const JUMP_GREATER: u16 = 0x25;
    const RETURN: u16 = 0x06;
    const X32_BIT: u32 = 0x4000_0000;
    // SECCOMP_RET_ERRNO | ENOSYS
    let enosys = 0x0005_0000 | libc::ENOSYS.cast_unsigned();
    let instructions: [(u16, u8, u8, u32); 6] = [
        (LOAD, 0, 0, 4),                   // arch
        (JUMP_EQUAL, 0, 4, native),        // another machine: over to the profile
        (LOAD, 0, 0, 0),                   // system call number
        (JUMP_GREATER, 2, 0, X32_BIT - 1), // x32 has numbers of its own: over to the profile
        (JUMP_GREATER, 0, 1, last_known),  // known: over to the profile
        (RETURN, 0, 0, enosys),
    ];
    let mut bytes = Vec::with_capacity(instructions.len() * 8);
    for (code, jump_true, jump_false, k) in instructions {
        bytes.extend(code.to_ne_bytes());
        bytes.extend([jump_true, jump_false]);
        bytes.extend(k.to_ne_bytes());
    }
    bytes
}

/// What the kernel calls this machine in a filter's data.
fn audit_arch() -> Option<u32> {
    match std::env::consts::ARCH {
        "x86_64" => Some(0xc000_003e),  // AUDIT_ARCH_X86_64
        "aarch64" => Some(0xc000_00b7), // AUDIT_ARCH_AARCH64
        _ => None,
    }
}

fn translate_arch(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn profile(value: serde_json::Value) -> LinuxSeccomp {
        serde_json::from_value(value).expect("a profile")
    }

    /// What a filter answers to a system call: classic BPF as the kernel runs it (the instructions libseccomp uses).
    fn run(filter: &Filter, number: u32, args: [u64; 6]) -> u32 {
        let mut data = number.to_ne_bytes().to_vec();
        data.extend(audit_arch().expect("a machine that has filters").to_ne_bytes());
        data.extend([0; 8]);
        args.iter().for_each(|arg| data.extend(arg.to_ne_bytes()));
        let program: Vec<_> = filter.program.chunks_exact(8).collect();
        let (mut at, mut a) = (0, 0u32);
        loop {
            let i = program[at];
            let k = u32::from_ne_bytes([i[4], i[5], i[6], i[7]]);
            let (jump_true, jump_false) = (usize::from(i[2]), usize::from(i[3]));
            at += 1;
            let jump = |taken: bool| if taken { jump_true } else { jump_false };
            match u16::from_ne_bytes([i[0], i[1]]) {
                0x20 => {
                    let k = usize::try_from(k).expect("offset");
                    a = u32::from_ne_bytes([data[k], data[k + 1], data[k + 2], data[k + 3]]);
                }
                0x54 => a &= k,
                0x05 => at += usize::try_from(k).expect("jump"),
                0x15 => at += jump(a == k),
                0x25 => at += jump(a > k),
                0x35 => at += jump(a >= k),
                0x45 => at += jump(a & k != 0),
                0x06 => return k,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    /// A system call's number on this machine.
    fn number(name: &str) -> u32 {
        i32::from(ScmpSyscall::from_name(name).expect(name)).cast_unsigned()
    }

    const ALLOW: u32 = 0x7fff_0000;
    const EPERM: u32 = 0x0005_0001;
    const ENOSYS: u32 = 0x0005_0026;

    #[test]
    fn masked_equality_has_the_mask_first() {
        let filter = compile(&profile(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_NATIVE"],
            "syscalls": [{"names": ["kill"], "action": "SCMP_ACT_ERRNO",
                "args": [{"index": 1, "value": 15, "valueTwo": 9, "op": "SCMP_CMP_MASKED_EQ"}]}],
        })))
        .expect("compiles");
        let kill = |signal| run(&filter, number("kill"), [1, signal, 0, 0, 0, 0]);
        assert_eq!([kill(9), kill(25), kill(11), kill(15)], [EPERM, EPERM, ALLOW, ALLOW]);
    }

    #[test]
    fn newer_system_calls_do_not_exist() {
        let x86 = cfg!(target_arch = "x86_64");
        let architectures: &[&str] = if x86 {
            &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
        } else {
            &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
        };
        let filter = compile(&profile(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": architectures,
            "syscalls": [{"names": ["read", "futex", "not_a_syscall"], "action": "SCMP_ACT_ALLOW"}],
        })))
        .expect("compiles");
        assert_eq!(run(&filter, number("read"), [0; 6]), ALLOW);
        assert_eq!(run(&filter, number("write"), [0; 6]), EPERM, "known but not allowed");
        assert_eq!(run(&filter, 5000, [0; 6]), ENOSYS);
        if x86 {
            assert_eq!(run(&filter, 0x4000_0000 | number("write"), [0; 6]), EPERM, "x32 is not mistaken for new");
        }
    }

    #[test]
    fn notify_is_refused_by_name() {
        let refused = compile(&profile(json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]})));
        assert!(refused.expect_err("refused").to_string().contains("`mount`"));
    }
}
