//! `RuntimeDefault`: what ordinary programs need, and what each capability is pointless without.
//!
//! The set follows containerd's default profile: everything that is not listed fails with `EPERM`. Names that a
//! kernel or libseccomp does not know are skipped by whoever loads the filter.

use std::collections::BTreeSet;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompOperator, LinuxSyscall,
};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
/// The `CLONE_NEW*` flags of `clone(2)`: user, mount, pid, network, ipc, uts and cgroup namespaces.
const NEW_NAMESPACES: u64 = 0x7e02_0000;
/// `AF_VSOCK`: sockets that no network namespace confines.
const AF_VSOCK: u64 = 40;
/// Arguments of `personality(2)`: `PER_LINUX`, `PER_LINUX32`, both with `UNAME26`, and the query.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Allowed to everybody, by theme.
const ALWAYS: [&str; 14] = [
    // opening, closing and finding files
    "open openat openat2 creat close close_range access faccessat faccessat2 chdir fchdir getcwd stat stat64 lstat \
     lstat64 fstat fstat64 fstatat64 newfstatat statx statfs statfs64 fstatfs fstatfs64 getdents getdents64 readlink \
     readlinkat name_to_handle_at listmount statmount oldstat oldfstat oldlstat",
    // changing directories and attributes
    "mkdir mkdirat rmdir link linkat symlink symlinkat unlink unlinkat rename renameat renameat2 mknod mknodat chmod \
     fchmod fchmodat fchmodat2 chown chown32 fchown fchown32 fchownat lchown lchown32 umask utime utimes utimensat \
     utimensat_time64 futimesat getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr setxattr lsetxattr \
     fsetxattr removexattr lremovexattr fremovexattr getxattrat listxattrat removexattrat setxattrat truncate \
     truncate64 ftruncate ftruncate64 fallocate",
    // reading, writing and syncing
    "read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek _llseek sendfile sendfile64 splice \
     tee vmsplice copy_file_range readahead fadvise64 fadvise64_64 sync syncfs fsync fdatasync sync_file_range flock \
     fcntl fcntl64 ioctl dup dup2 dup3 pipe pipe2 cachestat",
    // waiting for files
    "poll ppoll ppoll_time64 select _newselect pselect6 pselect6_time64 epoll_create epoll_create1 epoll_ctl \
     epoll_ctl_old epoll_wait epoll_wait_old epoll_pwait epoll_pwait2 eventfd eventfd2 signalfd signalfd4 inotify_init \
     inotify_init1 inotify_add_watch inotify_rm_watch fanotify_mark io_setup io_submit io_cancel io_getevents \
     io_pgetevents io_pgetevents_time64 io_destroy",
    // memory
    "brk mmap mmap2 munmap mremap mprotect madvise mincore msync mlock mlock2 mlockall munlock munlockall memfd_create \
     memfd_secret membarrier remap_file_pages pkey_alloc pkey_free pkey_mprotect map_shadow_stack mseal",
    // processes and threads
    "fork vfork execve execveat exit exit_group wait4 waitid waitpid getpid getppid gettid getpgid getpgrp getsid \
     setpgid setsid set_tid_address set_thread_area get_thread_area set_robust_list get_robust_list rseq prctl \
     pidfd_open pidfd_send_signal process_mrelease process_vm_readv process_vm_writev ptrace restart_syscall seccomp \
     landlock_create_ruleset landlock_add_rule landlock_restrict_self uretprobe",
    // signals
    "kill tkill tgkill pause alarm sigaltstack sigreturn sigprocmask rt_sigaction rt_sigpending rt_sigprocmask \
     rt_sigqueueinfo rt_tgsigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64",
    // scheduling and limits
    "sched_yield sched_getaffinity sched_setaffinity sched_getattr sched_setattr sched_getparam sched_setparam \
     sched_getscheduler sched_setscheduler sched_get_priority_max sched_get_priority_min sched_rr_get_interval \
     sched_rr_get_interval_time64 getpriority setpriority ioprio_get ioprio_set getrlimit ugetrlimit setrlimit prlimit64 \
     getrusage times getcpu",
    // identity
    "getuid getuid32 geteuid geteuid32 getgid getgid32 getegid getegid32 getresuid getresuid32 getresgid getresgid32 \
     getgroups getgroups32 setuid setuid32 setgid setgid32 setreuid setreuid32 setregid setregid32 setresuid \
     setresuid32 setresgid setresgid32 setfsuid setfsuid32 setfsgid setfsgid32 setgroups setgroups32 capget capset",
    // time; setting the clock needs CAP_SYS_TIME, adjtimex and clock_adjtime also read it
    "time gettimeofday clock_gettime clock_gettime64 clock_getres clock_getres_time64 clock_nanosleep \
     clock_nanosleep_time64 nanosleep adjtimex clock_adjtime clock_adjtime64 getitimer setitimer timer_create \
     timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create \
     timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64",
    // locks
    "futex futex_time64 futex_waitv futex_wait futex_wake futex_requeue",
    // sockets, once they exist
    "socketcall socketpair bind listen accept accept4 connect shutdown getsockname getpeername getsockopt setsockopt \
     send sendto sendmsg sendmmsg recv recvfrom recvmsg recvmmsg recvmmsg_time64",
    // System V and POSIX interprocess communication
    "ipc msgctl msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget mq_open \
     mq_unlink mq_notify mq_getsetattr mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64",
    // the system
    "uname sysinfo getrandom",
];

#[cfg(target_arch = "x86_64")]
const OF_THIS_MACHINE: &str = "arch_prctl modify_ldt";
#[cfg(target_arch = "aarch64")]
const OF_THIS_MACHINE: &str = "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls";
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const OF_THIS_MACHINE: &str = "";

/// Allowed with a capability.
const WITH_CAPABILITY: [(&str, &str); 14] = [
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount \
         open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "delete_module init_module finit_module"),
    ("SYS_PACCT", "acct"),
    ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("SYS_RAWIO", "iopl ioperm"),
    ("SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("SYS_TTY_CONFIG", "vhangup"),
    ("SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("SYSLOG", "syslog"),
    ("BPF", "bpf"),
    ("PERFMON", "perf_event_open"),
];

/// The filter for processes that are bounded by these capabilities (names without prefix).
#[must_use]
pub fn runtime_default(capabilities: &BTreeSet<String>) -> LinuxSeccomp {
    let mut allowed: BTreeSet<&str> = ALWAYS.iter().flat_map(|names| names.split_whitespace()).collect();
    allowed.extend(OF_THIS_MACHINE.split_whitespace());
    for (capability, names) in WITH_CAPABILITY {
        if capabilities.contains(capability) {
            allowed.extend(names.split_whitespace());
        }
    }
    let mut rules = vec![allow(allowed, None)];
    rules.extend(PERSONALITIES.map(|value| allow(["personality"], Some(arg(value, LinuxSeccompOperator::ScmpCmpEq)))));
    rules.push(allow(["socket"], Some(arg(AF_VSOCK, LinuxSeccompOperator::ScmpCmpNe))));
    if !capabilities.contains("SYS_ADMIN") {
        // flags & NEW_NAMESPACES == 0
        let flags = LinuxSeccompArgBuilder::default().value(NEW_NAMESPACES).value_two(0_u64);
        rules.push(allow(["clone"], Some(flags.op(LinuxSeccompOperator::ScmpCmpMaskedEq))));
        // its flags are in memory, where no filter sees them: make C libraries fall back to clone
        let mut missing = LinuxSyscall::default();
        missing.set_names(vec!["clone3".to_owned()]);
        missing.set_action(LinuxSeccompAction::ScmpActErrno);
        missing.set_errno_ret(Some(ENOSYS));
        rules.push(missing);
    }
    let mut profile = LinuxSeccomp::default();
    profile.set_default_action(LinuxSeccompAction::ScmpActErrno);
    profile.set_default_errno_ret(Some(EPERM));
    profile.set_architectures(Some(architectures()));
    profile.set_syscalls(Some(rules));
    profile
}

/// A condition on the first argument.
fn arg(value: u64, op: LinuxSeccompOperator) -> LinuxSeccompArgBuilder {
    LinuxSeccompArgBuilder::default().value(value).op(op)
}

fn allow<'a>(names: impl IntoIterator<Item = &'a str>, arg: Option<LinuxSeccompArgBuilder>) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.into_iter().map(str::to_owned).collect());
    rule.set_action(LinuxSeccompAction::ScmpActAllow);
    rule.set_args(arg.map(|arg| vec![arg.build().expect("every field has a default")]));
    rule
}

/// This machine's, with the 32-bit programs that it can run.
fn architectures() -> Vec<Arch> {
    if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchArm, Arch::ScmpArchAarch64]
    } else {
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
    }
}

#[cfg(test)]
mod tests {
    use libseccomp::ScmpSyscall;

    use super::*;

    fn rules(capabilities: &[&str]) -> Vec<LinuxSyscall> {
        let capabilities = capabilities.iter().map(|c| (*c).to_owned()).collect();
        runtime_default(&capabilities).syscalls().clone().unwrap()
    }

    fn allows(rules: &[LinuxSyscall], name: &str) -> bool {
        rules.iter().any(|r| r.action() == LinuxSeccompAction::ScmpActAllow && r.names().iter().any(|n| n == name))
    }

    #[test]
    fn ordinary_programs_cannot_leave_their_namespaces() {
        let rules = rules(&["CHOWN", "NET_RAW"]);
        for name in [
            "mount",
            "unshare",
            "setns",
            "bpf",
            "reboot",
            "init_module",
            "kexec_load",
            "add_key",
            "keyctl",
            "io_uring_setup",
            "userfaultfd",
            "pivot_root",
            "swapon",
        ] {
            assert!(!allows(&rules, name), "{name}");
        }
        let clone = rules.iter().find(|r| r.names() == &["clone"]).unwrap();
        let arg = clone.args().as_ref().unwrap()[0];
        assert_eq!(
            (arg.value(), arg.value_two(), arg.op()),
            (0x7e02_0000, Some(0), LinuxSeccompOperator::ScmpCmpMaskedEq)
        );
        let clone3 = rules.iter().find(|r| r.names() == &["clone3"]).unwrap();
        assert_eq!(clone3.errno_ret(), Some(ENOSYS));
    }

    #[test]
    fn capabilities_open_what_they_are_for() {
        let admin = rules(&["SYS_ADMIN"]);
        for name in ["mount", "unshare", "setns", "clone3"] {
            assert!(allows(&admin, name), "{name}");
        }
        assert!(allows(&rules(&["SYS_CHROOT"]), "chroot"));
        assert!(!allows(&rules(&[]), "chroot"));
    }

    #[test]
    fn the_executor_can_finish_its_work_under_the_filter() {
        let rules = rules(&[]);
        for name in
            ["execve", "execveat", "prctl", "capset", "capget", "write", "close", "exit_group", "rt_sigprocmask"]
        {
            assert!(allows(&rules, name), "{name}");
        }
    }

    #[test]
    fn names_are_those_of_system_calls() {
        // libseccomp 2.5 knows all but the newest; a typing error would not resolve either
        let newer = [
            "cachestat",
            "fchmodat2",
            "futex_wait",
            "futex_wake",
            "futex_requeue",
            "map_shadow_stack",
            "mseal",
            "getxattrat",
            "listxattrat",
            "removexattrat",
            "setxattrat",
            "listmount",
            "statmount",
            "uretprobe",
            "set_mempolicy_home_node",
            "process_mrelease",
            "futex_waitv",
            "quotactl_fd",
            "memfd_secret",
            "epoll_pwait2",
        ];
        let all = ["SYS_ADMIN", "SYS_TIME", "SYS_PTRACE", "SYS_NICE", "SYS_MODULE", "SYS_RAWIO"];
        for name in rules(&all).iter().flat_map(|r| r.names().clone()) {
            assert!(newer.contains(&name.as_str()) || ScmpSyscall::from_name(&name).is_ok(), "{name}");
        }
    }
}
