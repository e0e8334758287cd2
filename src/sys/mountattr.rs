//! `mount_setattr(2)`, which neither std, nix nor rustix wrap.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};

use nix::libc;

/// What to change on a mount.
#[derive(Clone, Copy, Debug, Default)]
pub struct MountAttributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or 0 for no change.
    pub propagation: u64,
    /// Also on every mount below.
    pub recursive: bool,
}

/// Changes the mount (tree) whose root `mount` is, which may be detached.
pub fn mount_setattr(mount: impl AsFd, attributes: &MountAttributes) -> io::Result<()> {
    let attr =
        libc::mount_attr { attr_set: attributes.set, attr_clr: 0, propagation: attributes.propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if attributes.recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: an empty C string, and a struct of the size that is passed; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            mem::size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
