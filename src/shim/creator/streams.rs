//! Whose a process' streams are: a program may open `/dev/stdout` again only if the pipe behind it is its user's.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};
use rustix::fs::{FileType, Uid, fchown, fstat};

/// Users of a container, as the node knows them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Users {
    /// First uid inside, first on the node, and how many: a line of user_namespaces(7)'s `uid_map` each.
    ranges: Option<Vec<[u32; 3]>>,
}

impl Users {
    /// From the user namespace of a process.
    pub(super) fn of_process(pid: i32) -> io::Result<Users> {
        let namespace = |of: &str| fs::metadata(format!("/proc/{of}/ns/user")).map(|meta| (meta.dev(), meta.ino()));
        if namespace(&pid.to_string())? == namespace("self")? {
            return Ok(Users::default());
        }
        Users::parse(&fs::read_to_string(format!("/proc/{pid}/uid_map"))?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its uid_map is not as expected"))
    }

    /// From the mappings of a container that is to be made.
    pub(super) fn of_spec(spec: &Spec) -> Users {
        let Some(linux) = spec.linux() else { return Users::default() };
        let mut namespaces = linux.namespaces().iter().flatten();
        if !namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::User) {
            return Users::default();
        }
        let range = |map: &LinuxIdMapping| [map.container_id(), map.host_id(), map.size()];
        Users { ranges: Some(linux.uid_mappings().iter().flatten().map(range).collect()) }
    }

    fn parse(map: &str) -> Option<Users> {
        let range = |line: &str| -> Option<[u32; 3]> {
            let numbers: Vec<u32> = line.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
            numbers.try_into().ok()
        };
        Some(Users { ranges: Some(map.lines().map(range).collect::<Option<_>>()?) })
    }

    /// Whether they are in a user namespace that is not ours.
    pub(super) fn are_mapped(&self) -> bool {
        self.ranges.is_some()
    }

    /// The node's number of a user, `None` if it has none.
    pub(super) fn on_node(&self, uid: u32) -> Option<u32> {
        let Some(ranges) = &self.ranges else { return Some(uid) };
        ranges.iter().find_map(|[inside, outside, count]| {
            let offset = uid.checked_sub(*inside).filter(|offset| offset < count)?;
            outside.checked_add(offset)
        })
    }
}

/// Makes a pipe, socket or terminal a user's own. Nothing else: `/dev/null` is everybody's.
///
/// What cannot be given (a pipe that somebody else made) stays as it is, as with runc: it can still be written to.
pub(super) fn give_to(stream: impl AsFd, owner: Option<u32>) {
    let Some(owner) = owner else { return };
    let Ok(stat) = fstat(&stream) else { return };
    let is_terminal = || rustix::termios::isatty(&stream);
    let own = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo | FileType::Socket => true,
        FileType::CharacterDevice => is_terminal(),
        _ => false,
    };
    if own && stat.st_uid != owner {
        let _stays_as_it_is = fchown(&stream, Some(Uid::from_raw(owner)), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_looked_up_in_every_range() {
        let users = Users::parse("         0     200000      65536\n     70000       5000          1\n").unwrap();
        assert_eq!(
            [0, 1000, 65535, 65536, 70000].map(|uid| users.on_node(uid)),
            [Some(200_000), Some(201_000), Some(265_535), None, Some(5000)]
        );
        assert!(users.are_mapped());
        assert_eq!(Users::parse("0 0\n"), None);
        assert_eq!(Users::parse("0 4294967295 7\n").unwrap().on_node(1), None);
    }

    #[test]
    fn the_nodes_own_namespace_maps_nothing() {
        let users = Users::of_process(std::process::id().cast_signed()).unwrap();
        assert!(!users.are_mapped());
        assert_eq!(users.on_node(7), Some(7));
    }

    #[test]
    fn only_streams_are_given_away() {
        let (pipe, _writer) = std::io::pipe().unwrap();
        give_to(&pipe, Some(1000));
        assert_eq!(fstat(&pipe).unwrap().st_uid, 1000);
        let null = fs::File::open("/dev/null").unwrap();
        give_to(&null, Some(1000));
        assert_eq!(null.metadata().unwrap().uid(), 0);
    }
}
