//! Who a container runs as.
//!
//! Sources: `verifyRunAsNonRoot` of the kubelet, `WithUser`, `WithAdditionalGIDs` and `WithSupplementalGroups` of
//! containerd, `passwd(5)`, `group(5)`. The files are the image's and may say anything.

use std::io::{self, Read};
use std::path::Path;

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat};

use super::{ContainerInput, Security, SpecError};
use crate::sys::openat2::openat2;

/// Largest file that is read.
const MAX_FILE: u64 = 1 << 20;

/// `/etc/passwd` and `/etc/group` of an image; empty if it has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserFiles {
    /// Contents of `/etc/passwd`.
    pub passwd: Vec<u8>,
    /// Contents of `/etc/group`.
    pub group: Vec<u8>,
}

impl UserFiles {
    /// Reads the files below a mounted root file system, which their links cannot leave. At most 1 MiB each.
    pub fn read(rootfs: &Path) -> io::Result<Self> {
        let root = rustix::fs::open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let read = |path: &str| -> io::Result<Vec<u8>> {
            // a pipe or device in place of the file must not stop us
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            let file = match openat2(&root, path, flags, Mode::empty(), resolve) {
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(Vec::new()),
                result => result?,
            };
            if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("/{path} of the image is no file")));
            }
            let mut bytes = Vec::new();
            std::fs::File::from(file).take(MAX_FILE + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > MAX_FILE {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("/{path} of the image exceeds 1 MiB")));
            }
            Ok(bytes)
        };
        Ok(Self { passwd: read("etc/passwd")?, group: read("etc/group")? })
    }

    fn user(&self, matches: impl Fn(&User) -> bool) -> Option<User> {
        lines(&self.passwd).filter_map(User::parse).find(matches)
    }

    /// Groups that list a user, but for the one with the user's own name.
    fn groups_of(&self, user: &str) -> Vec<u32> {
        let groups = lines(&self.group).filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _, gid, members) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            let listed = name != user && members.split(',').any(|member| member == user);
            listed.then(|| id(gid)).flatten()
        });
        groups.collect()
    }
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &str> {
    bytes.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok()).map(str::trim)
}

fn id(text: &str) -> Option<u32> {
    text.parse::<u32>().ok().filter(|id| i32::try_from(*id).is_ok())
}

#[derive(Debug)]
struct User {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

impl User {
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.splitn(8, ':').collect();
        Some(Self {
            name: (*fields.first()?).to_owned(),
            uid: id(fields.get(2)?)?,
            gid: id(fields.get(3)?)?,
            home: fields.get(5).copied().unwrap_or_default().to_owned(),
        })
    }
}

/// User, groups and home directory of a container's first process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User ID.
    pub uid: u32,
    /// Primary group ID.
    pub gid: u32,
    /// All groups, the primary one first.
    pub groups: Vec<u32>,
    /// Home directory by the image's `/etc/passwd`, `/` if it does not know the user.
    pub home: String,
}

enum ImageUser {
    Uid(i64),
    Name(String),
}

/// The user of an image; a group after a colon is ignored, as a kubelet does. Nothing means root.
fn image_user(user: &str) -> ImageUser {
    match user.split(':').next().unwrap_or_default() {
        "" => ImageUser::Uid(0),
        user => user.parse().map_or_else(|_| ImageUser::Name(user.to_owned()), ImageUser::Uid),
    }
}

/// `name_namespace(uid)`, as kubelets write Pods in messages.
pub(super) fn format_pod(pod: &Pod) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    format!("{}_{}({})", text(&pod.metadata.name), text(&pod.metadata.namespace), text(&pod.metadata.uid))
}

fn verify_non_root(input: &ContainerInput<'_>, security: &Security<'_>, image: &ImageUser) -> Result<(), SpecError> {
    if !security.run_as_non_root {
        return Ok(());
    }
    let (pod, container) = (format_pod(input.pod), input.container.name.clone());
    match (security.run_as_user, image) {
        (Some(0), _) => Err(SpecError::RunAsUserIsRoot { pod, container }),
        (Some(_), _) => Ok(()),
        (None, ImageUser::Name(user)) => Err(SpecError::NonNumericUser { user: user.clone(), pod, container }),
        (None, ImageUser::Uid(0)) => Err(SpecError::ImageIsRoot { pod, container }),
        (None, ImageUser::Uid(uid)) if i32::try_from(*uid).is_err() || *uid < 0 => {
            Err(SpecError::InvalidImageUser { uid: *uid, pod, container })
        }
        (None, ImageUser::Uid(_)) => Ok(()),
    }
}

fn checked(what: &'static str, value: i64) -> Result<u32, SpecError> {
    let in_range = i32::try_from(value).ok().and_then(|id| u32::try_from(id).ok());
    in_range.ok_or(SpecError::InvalidId { what, value })
}

pub(super) fn resolve(
    input: &ContainerInput<'_>,
    pod: &PodSpec,
    security: &Security<'_>,
) -> Result<Identity, SpecError> {
    let config_user = input.image.config().as_ref().and_then(|c| c.user().as_deref()).unwrap_or_default();
    let image = image_user(config_user);
    verify_non_root(input, security, &image)?;

    let (uid, entry) = match (security.run_as_user, image) {
        (Some(uid), _) => by_uid(input.users, checked("runAsUser", uid)?),
        (None, ImageUser::Uid(uid)) => by_uid(input.users, checked("user of the image", uid)?),
        (None, ImageUser::Name(name)) => {
            let user = input.users.user(|user| user.name == name).ok_or(SpecError::UnknownUser(name))?;
            (user.uid, Some(user))
        }
    };
    let gid = match security.run_as_group {
        Some(gid) => checked("runAsGroup", gid)?,
        None => entry.as_ref().map_or(0, |user| user.gid),
    };

    let context = pod.security_context.as_ref();
    let mut groups = vec![gid];
    match context.and_then(|s| s.supplemental_groups_policy.as_deref()) {
        None | Some("Merge") => groups.extend(entry.iter().flat_map(|user| input.users.groups_of(&user.name))),
        Some("Strict") => {}
        Some(other) => return Err(SpecError::SupplementalGroupsPolicy(other.to_owned())),
    }
    let asked = context.and_then(|s| s.fs_group).into_iter();
    let asked = asked.chain(context.iter().flat_map(|s| s.supplemental_groups.iter().flatten().copied()));
    for group in asked.chain(input.volume_groups.iter().copied()) {
        groups.push(checked("supplementary group", group)?);
    }
    let mut seen = std::collections::HashSet::new();
    groups.retain(|group| seen.insert(*group));

    let home = entry.map(|user| user.home).filter(|home| home.starts_with('/')).unwrap_or_else(|| "/".to_owned());
    Ok(Identity { uid, gid, groups, home })
}

fn by_uid(users: &UserFiles, uid: u32) -> (u32, Option<User>) {
    (uid, users.user(|user| user.uid == uid))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_of_the_image_stay_in_the_image() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        symlink("/etc/hostile", root.path().join("etc/passwd")).unwrap();
        std::fs::write(root.path().join("etc/hostile"), "inside:x:7:8::/home\n").unwrap();
        symlink("../../../../../../etc/group", root.path().join("etc/group")).unwrap();
        let error = UserFiles::read(root.path()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ELOOP), "{error}");
        std::fs::remove_file(root.path().join("etc/group")).unwrap();
        let files = UserFiles::read(root.path()).unwrap();
        assert_eq!(files.user(|u| u.uid == 7).unwrap().name, "inside");
        assert!(files.group.is_empty());
    }

    #[test]
    fn refuses_pipes_and_giants() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let path = root.path().join("etc/passwd");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(UserFiles::read(root.path()).unwrap_err().to_string().contains("is no file"));
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, vec![b'x'; (1 << 20) + 1]).unwrap();
        assert!(UserFiles::read(root.path()).unwrap_err().to_string().contains("exceeds"));
    }

    proptest::proptest! {
        #[test]
        fn hostile_files_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            let files = UserFiles { passwd: bytes.clone(), group: bytes };
            files.user(|_| false);
            files.groups_of("root");
        }
    }
}
