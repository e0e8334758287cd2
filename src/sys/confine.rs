//! What a process gives up just before `execve`: signal dispositions, capabilities, system calls.

use std::io;
use std::mem;

use nix::libc;

/// Capability sets as kernel bit masks: bit `n` is capability number `n`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilityMasks {
    /// Upper bound of what `execve` may grant.
    pub bounding: u64,
    /// What the kernel checks.
    pub effective: u64,
    /// What may be made effective.
    pub permitted: u64,
    /// Kept over `execve` of a file that is marked inheritable.
    pub inheritable: u64,
    /// Kept over `execve` by a non-root user.
    pub ambient: u64,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const LOW_HALF: u64 = 0xffff_ffff;

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn half(mask: u64) -> u32 {
    u32::try_from(mask & LOW_HALF).unwrap_or(u32::MAX)
}

/// Sets all five capability sets of the calling thread. Needs CAP_SETPCAP where the bounding set shrinks.
pub fn set_capabilities(wanted: &CapabilityMasks) -> io::Result<()> {
    for number in 0..64u64 {
        // SAFETY: PR_CAPBSET_READ and PR_CAPBSET_DROP take one integer and touch no memory of ours.
        let present = unsafe { libc::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0) };
        if present < 0 {
            break; // past the last capability that this kernel knows
        }
        if present == 1 && wanted.bounding & (1 << number) == 0 {
            // SAFETY: as above.
            check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) }.into())?;
        }
    }
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) }.into())?;
    let header = CapHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let data = [0, 32].map(|shift| CapData {
        effective: half(wanted.effective >> shift),
        permitted: half(wanted.permitted >> shift),
        inheritable: half(wanted.inheritable >> shift),
    });
    // SAFETY: version 3 reads a header and exactly two data elements; both live until the call returns.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    for number in (0..64u64).filter(|number| wanted.ambient & (1 << number) != 0) {
        // SAFETY: integers only.
        check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, number, 0, 0) }.into())?;
    }
    Ok(())
}

/// The calling thread's bounding set, as a mask.
pub fn bounding_set() -> u64 {
    (0..64u64)
        // SAFETY: integers only; a negative result means that the kernel does not know the number.
        .filter(|number| unsafe { libc::prctl(libc::PR_CAPBSET_READ, *number, 0, 0, 0) } == 1)
        .fold(0, |mask, number| mask | 1 << number)
}

/// Loads a compiled seccomp filter (an array of `struct sock_filter` as bytes) for the calling thread.
/// Without `no_new_privs` this needs CAP_SYS_ADMIN. `flags` are `SECCOMP_FILTER_FLAG_*`.
pub fn load_seccomp(program: &[u8], flags: u64) -> io::Result<()> {
    let size = mem::size_of::<libc::sock_filter>();
    let count = u16::try_from(program.len() / size).map_err(|_| {
        io::Error::new(io::ErrorKind::InvalidInput, "the seccomp filter has more than 65535 instructions")
    })?;
    // Bytes read from a file have no alignment; the kernel wants an array.
    let filters: Vec<libc::sock_filter> = program
        .chunks_exact(size)
        .map(|b| libc::sock_filter {
            code: u16::from_ne_bytes([b[0], b[1]]),
            jt: b[2],
            jf: b[3],
            k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        })
        .collect();
    let description = libc::sock_fprog { len: count, filter: filters.as_ptr().cast_mut() };
    // SAFETY: the description points at `count` instructions that outlive the call; the kernel copies and checks them.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const description) })
}

/// Puts every signal back to its default disposition and unblocks all: `execve` keeps ignored and blocked ones.
pub fn reset_signals() {
    /// The kernel's `struct sigaction`, at least as long as on any machine; all zero is SIG_DFL without flags.
    const DEFAULT: [u64; 8] = [0; 8];
    /// Bytes of the kernel's signal set.
    const SET_SIZE: usize = 8;
    for signal in 1..=64 {
        // SAFETY: the kernel reads one sigaction from `DEFAULT` and writes nothing (no old action is asked for).
        // Not through the C library, which refuses the two signals that it uses itself; SIGKILL and SIGSTOP refuse.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, DEFAULT.as_ptr(), std::ptr::null_mut::<u64>(), SET_SIZE)
        };
    }
    let none = 0u64;
    // SAFETY: the kernel reads a set of eight bytes.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            std::ptr::null_mut::<u64>(),
            SET_SIZE,
        )
    };
}

/// Ignores `signal`, so that a stray one does not end a shim.
pub fn ignore_signal(signal: i32) {
    // SAFETY: SIG_IGN installs no handler.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Empties the environment. Only for a process that has exactly one thread.
pub fn clear_environment() {
    // SAFETY: the caller has one thread, so nobody reads `environ` meanwhile.
    unsafe { libc::clearenv() };
}
