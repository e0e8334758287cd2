//! A pseudo terminal of the container's own `devpts`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, fstat, fstatfs, major, minor};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};

use super::streams::give_to;

/// `DEVPTS_SUPER_MAGIC` of linux/magic.h.
const DEVPTS: u64 = 0x1cd1;
/// Device number of `/dev/ptmx` (linux/major.h).
const PTMX: (u32, u32) = (5, 2);

/// Opens one as `/dev/ptmx` of the current root: master and slave, which belongs to `owner` (a uid of the node).
///
/// What is at that path is the container's to choose, so it is checked; the slave is had from the master and not by a path.
pub(super) fn open(owner: Option<u32>) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    check(&master)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    give_to(&slave, owner);
    Ok((master, slave))
}

/// The slave of a container's terminal, given to its user.
pub(super) fn give_slave_to(master: impl AsFd, owner: Option<u32>) -> io::Result<()> {
    let slave = ioctl_tiocgptpeer(master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    give_to(&slave, owner);
    Ok(())
}

fn check(master: impl AsFd) -> io::Result<()> {
    let stat = fstat(&master)?;
    let device = (major(stat.st_rdev), minor(stat.st_rdev));
    let of_devpts = u64::try_from(fstatfs(&master)?.f_type) == Ok(DEVPTS);
    if of_devpts && FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && device == PTMX {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the container's /dev/ptmx is not that of a devpts"))
}
