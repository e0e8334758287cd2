//! ext4's hint that directories have nothing to do with each other.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

/// Asks ext4 to put the directories that are made in `dir` into block groups far from each other (chattr(1), attribute T).
///
/// Otherwise they all begin in one group, with what is made in them: those that are filled side by side contend for its
/// bitmap of inodes, which has the gaps of removed ones besides (without a journal ext4 leaves those alone for minutes,
/// one by one). Other file systems refuse, which is fine.
pub fn spread(dir: &Path) {
    let mark = || -> io::Result<()> {
        let dir = File::open(dir)?;
        let flags = ioctl_getflags(&dir)?;
        Ok(ioctl_setflags(&dir, flags | IFlags::TOPDIR)?)
    };
    if let Err(error) = mark() {
        tracing::debug!(dir = %dir.display(), %error, "the file system spreads directories as it likes");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `EXT4_SUPER_MAGIC` of linux/magic.h.
    const EXT4: u64 = 0xef53;

    #[test]
    fn a_directory_of_ext4_is_marked_and_others_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        spread(dir.path());
        let opened = File::open(dir.path()).unwrap();
        let is_ext4 = u64::try_from(rustix::fs::fstatfs(&opened).unwrap().f_type) == Ok(EXT4);
        assert_eq!(ioctl_getflags(&opened).is_ok_and(|flags| flags.contains(IFlags::TOPDIR)), is_ext4);
        spread(&dir.path().join("missing"));
    }
}
