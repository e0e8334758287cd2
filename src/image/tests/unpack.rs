//! What archives become on disk, and what hostile ones do not.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::super::unpack::{UnpackError, Unpacked, unpack_layer};
use super::{Member, tar_of};

/// A layer root with a neighbour that must stay untouched.
struct Sandbox {
    dir: tempfile::TempDir,
    root: PathBuf,
}

impl Sandbox {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("deep/er/root");
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/file"), "untouched").unwrap();
        Self { dir, root }
    }

    fn unpack(&self, members: &[Member]) -> Result<Unpacked, UnpackError> {
        self.unpack_bytes(&tar_of(members))
    }

    fn unpack_bytes(&self, bytes: &[u8]) -> Result<Unpacked, UnpackError> {
        unpack_layer(bytes, File::open(&self.root).unwrap().as_fd())
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn assert_nothing_outside(&self) {
        let mut all = Vec::new();
        list(self.dir.path(), &self.root, &mut all);
        all.sort();
        let expected = ["deep", "deep/er", "deep/er/root", "outside", "outside/file"].map(|p| self.dir.path().join(p));
        assert_eq!(all, expected);
        let file = std::fs::symlink_metadata(self.dir.path().join("outside/file")).unwrap();
        assert_eq!((file.nlink(), file.mode() & 0o7777), (1, 0o644));
        assert_eq!(std::fs::read(self.dir.path().join("outside/file")).unwrap(), b"untouched");
    }
}

fn list(dir: &Path, skip: &Path, all: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.symlink_metadata().unwrap().is_dir() && path != skip {
            list(&path, skip, all);
        }
        all.push(path);
    }
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 256];
    let length = rustix::fs::lgetxattr(path, name, &mut value).ok()?;
    value.truncate(length);
    Some(value)
}

#[test]
fn keeps_all_attributes() {
    let sandbox = Sandbox::new();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let mut device = Member::new("dev/null", tar::EntryType::Char).mode(0o666).owner(0, 5);
    device.device = (1, 3);
    let mut block = Member::new("dev/loop", tar::EntryType::Block);
    block.device = (7, 300);
    sandbox
        .unpack(&[
            Member::dir("./").mode(0o711).owner(9, 9),
            Member::dir("dir").mode(0o2750).owner(1000, 1001),
            Member::file("dir/setuid", b"data").mode(0o6755).owner(1, 2).pax("mtime", b"1234567890.5"),
            Member::file("dir/cap", b"").owner(7, 7).pax("SCHILY.xattr.security.capability", &capability),
            Member::symlink("dir/link", "/etc/passwd").owner(3, 4),
            Member::hardlink("dir/hard", "dir/setuid"),
            device,
            block,
            Member::new("dev/fifo", tar::EntryType::Fifo).mode(0o600),
            Member::file(&long, b"long"),
        ])
        .unwrap();
    let meta = |path: &str| std::fs::symlink_metadata(sandbox.at(path)).unwrap();
    assert_eq!((meta(".").mode() & 0o7777, meta(".").uid()), (0o711, 9));
    let dir = meta("dir");
    assert_eq!((dir.mode() & 0o7777, dir.uid(), dir.gid(), dir.mtime()), (0o2750, 1000, 1001, 1_000_000_000));
    let file = meta("dir/setuid");
    assert_eq!((file.mode() & 0o7777, file.uid(), file.gid(), file.nlink()), (0o6755, 1, 2, 2));
    assert_eq!((file.mtime(), file.mtime_nsec()), (1_234_567_890, 500_000_000));
    assert_eq!(file.ino(), meta("dir/hard").ino());
    assert_eq!(xattr(&sandbox.at("dir/cap"), "security.capability").unwrap(), capability);
    let link = meta("dir/link");
    assert_eq!((link.uid(), link.gid(), link.mtime()), (3, 4, 1_000_000_000));
    assert_eq!(std::fs::read_link(sandbox.at("dir/link")).unwrap(), Path::new("/etc/passwd"));
    let device = meta("dev/null");
    assert!(device.file_type().is_char_device());
    assert_eq!((device.rdev(), device.mode() & 0o7777, device.gid()), (rustix::fs::makedev(1, 3), 0o666, 5));
    assert_eq!(meta("dev/loop").rdev(), rustix::fs::makedev(7, 300));
    assert!(meta("dev/fifo").file_type().is_fifo());
    assert_eq!(std::fs::read(sandbox.at(&long)).unwrap(), b"long");
}

#[test]
fn a_full_disk_is_not_taken_for_a_bad_layer() {
    // a download is written to the store while it is read
    let read = |errno: rustix::io::Errno| UnpackError::Read(errno.into());
    assert!(read(rustix::io::Errno::NOSPC).is_transient());
    assert!(!read(rustix::io::Errno::IO).is_transient(), "a damaged blob is downloaded again");
}

#[test]
fn whiteouts_become_overlayfs_ones() {
    let sandbox = Sandbox::new();
    let unpacked = sandbox
        .unpack(&[
            Member::file("dir/.wh.gone", b""),
            Member::file("opaque/.wh..wh..opq", b""),
            Member::file("opaque/new", b"new"),
            Member::file(".wh..wh.plnk", b""),
            // Both orders of hiding something below and having the same name here.
            Member::file("both/kept", b"kept"),
            Member::file(".wh.both", b""),
            Member::file(".wh.again", b""),
            Member::dir("again"),
            Member::file(".wh.implied", b""),
            Member::file("implied/file", b""),
            Member::file("file", b"file"),
            Member::file(".wh.file", b""),
        ])
        .unwrap();
    let gone = std::fs::symlink_metadata(sandbox.at("dir/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    for (dir, opaque) in [("opaque", true), ("both", true), ("again", true), ("implied", true), ("dir", false)] {
        assert_eq!(xattr(&sandbox.at(dir), "trusted.overlay.opaque").is_some(), opaque, "{dir}");
    }
    assert_eq!(std::fs::read(sandbox.at("both/kept")).unwrap(), b"kept");
    assert_eq!(std::fs::read(sandbox.at("file")).unwrap(), b"file");
    assert!(!sandbox.at(".wh..wh.plnk").exists());
    let implied: Vec<_> = unpacked.implied.iter().map(|path| String::from_utf8_lossy(path)).collect();
    assert_eq!(implied, ["", "dir", "opaque"]);
}

#[test]
fn later_members_replace_earlier_ones() {
    let sandbox = Sandbox::new();
    sandbox
        .unpack(&[
            Member::file("a/b/c", b"1"),
            Member::file("a", b"file now"),
            Member::file("x", b"1"),
            Member::file("x", b"2").mode(0o600),
            Member::symlink("l", "x"),
            Member::file("l", b"not through the link"),
            Member::file("d", b""),
            Member::file("d/", b""),
            Member::file("one", b"one"),
            Member::file("two", b"two"),
            Member::hardlink("two", "one"),
        ])
        .unwrap();
    assert_eq!(std::fs::read(sandbox.at("a")).unwrap(), b"file now");
    assert_eq!(std::fs::read(sandbox.at("x")).unwrap(), b"2");
    assert_eq!(std::fs::metadata(sandbox.at("x")).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read(sandbox.at("l")).unwrap(), b"not through the link");
    assert!(sandbox.at("d").is_dir());
    assert_eq!(std::fs::read(sandbox.at("two")).unwrap(), b"one");
}

#[test]
fn links_are_followed_inside_the_root_only() {
    let sandbox = Sandbox::new();
    let outside = sandbox.dir.path().join("outside");
    sandbox
        .unpack(&[
            Member::dir("usr/lib"),
            Member::symlink("lib", "usr/lib"),
            Member::file("lib/a", b"a"),
            Member::symlink("abs", outside.to_str().unwrap()),
            Member::file("abs/file", b"inside"),
            Member::symlink("up", "../../../../../../../outside"),
            Member::file("up/file2", b"inside"),
            Member::file("/rooted", b"r"),
            Member::file("./x/../y", b"y"),
            Member::hardlink("hard", "/lib/a"),
            Member::symlink("to-file", "/rooted"),
            Member::hardlink("hard-to-link", "to-file"),
        ])
        .unwrap();
    assert_eq!(std::fs::read(sandbox.at("usr/lib/a")).unwrap(), b"a");
    assert_eq!(std::fs::read(sandbox.at("hard")).unwrap(), b"a");
    assert_eq!(std::fs::read(sandbox.at("outside/file2")).unwrap(), b"inside");
    let inside = sandbox.at(outside.strip_prefix("/").unwrap().to_str().unwrap()).join("file");
    assert_eq!(std::fs::read(inside).unwrap(), b"inside");
    assert!(sandbox.at("hard-to-link").is_symlink());
    assert!(sandbox.at("rooted").exists() && sandbox.at("y").exists());
    sandbox.assert_nothing_outside();
}

#[test]
fn hostile_members_are_named() {
    let outside = "../../outside/file";
    let mut whiteout = Member::new("w", tar::EntryType::Char);
    whiteout.device = (0, 0);
    let deep = "d/".repeat(300);
    let cases: Vec<(Vec<Member>, &str)> = vec![
        (vec![Member::file("../../../outside/file", b"x")], "leaves the layer"),
        (vec![Member::file("a/../../b", b"x")], "leaves the layer"),
        (vec![Member::hardlink("h", outside)], "leaves the layer"),
        (vec![Member::symlink("s", "/"), Member::hardlink("h", "s/outside/file")], "hard link target"),
        (vec![Member::symlink("s", "s"), Member::file("s/x", b"")], "symbolic links"),
        (vec![Member::symlink("a", "b/x"), Member::symlink("b", "a/x"), Member::file("a/x", b"")], "symbolic links"),
        (vec![Member::hardlink("h", "missing")], "missing"),
        (vec![Member::file("h", b""), Member::hardlink("h", "h")], "itself"),
        (vec![Member::file("f", b""), Member::file("f/g", b"")], "Not a directory"),
        (vec![Member::file(".wh...", b"")], "whiteout must name"),
        (vec![Member::file(".wh.", b"")], "whiteout must name"),
        (vec![Member::file("./", b"").mode(0o755), Member::symlink("/", "x")], "root of a layer"),
        (vec![whiteout], "0:0"),
        (vec![Member::file(&deep, b"")], "nested"),
        (vec![Member::file(&"p".repeat(5000), b"")], "limit is 4096"),
        (vec![Member::file("x", b"").pax("uid", b"4294967295")], "uid"),
        (vec![Member::file("x", b"").pax("GNU.sparse.major", b"1")], "sparse"),
        (vec![Member::new("x", tar::EntryType::new(b'V'))], "not supported"),
        (vec![Member::symlink("x", "")], "without a target"),
    ];
    for (members, expected) in cases {
        let sandbox = Sandbox::new();
        let error = sandbox.unpack(&members).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        sandbox.assert_nothing_outside();
    }
}

#[test]
fn overlayfs_attributes_are_not_taken_from_an_archive() {
    let sandbox = Sandbox::new();
    sandbox
        .unpack(&[Member::dir("d")
            .pax("SCHILY.xattr.trusted.overlay.redirect", b"/etc")
            .pax("SCHILY.xattr.trusted.overlay.opaque", b"y")
            .pax("SCHILY.xattr.user.fine", b"1")])
        .unwrap();
    assert_eq!(xattr(&sandbox.at("d"), "trusted.overlay.redirect"), None);
    assert_eq!(xattr(&sandbox.at("d"), "trusted.overlay.opaque"), None);
    assert_eq!(xattr(&sandbox.at("d"), "user.fine").unwrap(), b"1");
}

#[test]
fn sparse_files_keep_their_holes() {
    let mut header = tar::Header::new_gnu();
    header.set_path("sparse").unwrap();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_mode(0o600);
    header.set_size(1024);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.sparse[0].set_offset(512 << 20);
    gnu.sparse[0].set_length(1024);
    gnu.set_real_size(1 << 30);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend([b'x'; 1024]);
    let sandbox = Sandbox::new();
    sandbox.unpack_bytes(&bytes).unwrap();
    let meta = std::fs::metadata(sandbox.at("sparse")).unwrap();
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() < 64, "{} blocks", meta.blocks());

    header.as_gnu_mut().unwrap().set_real_size(100);
    header.set_cksum();
    assert!(Sandbox::new().unpack_bytes(header.as_bytes()).unwrap_err().to_string().contains("does not fit"));
}

#[test]
fn a_full_disk_is_the_nodes_trouble() {
    let dir = tempfile::tempdir().unwrap();
    let options = Some(c"size=1m");
    rustix::mount::mount("tmpfs", dir.path(), "tmpfs", rustix::mount::MountFlags::empty(), options).unwrap();
    let root = File::open(dir.path()).unwrap();
    let big = [Member::file("big", &vec![1; 4 << 20])];
    let error = unpack_layer(tar_of(&big).as_slice(), root.as_fd()).unwrap_err();
    // Now that it is full, not even a small one is begun.
    let small = unpack_layer(tar_of(&[Member::file("small", b"x")]).as_slice(), root.as_fd()).unwrap_err();
    drop(root);
    rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(error.is_transient() && error.to_string().contains("big"), "{error}");
    assert!(matches!(small, UnpackError::NoSpace { .. }), "{small}");
}

fn hostile_name() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        Just(".."),
        Just("."),
        Just(""),
        Just("a"),
        Just("b"),
        Just("c"),
        Just(".wh.a"),
        Just(".wh..wh..opq"),
        Just("outside"),
        Just("file"),
        Just("\u{fffd}")
    ];
    (any::<bool>(), proptest::collection::vec(part, 1..6))
        .prop_map(|(absolute, parts)| format!("{}{}", if absolute { "/" } else { "" }, parts.join("/")))
}

fn hostile_member() -> impl Strategy<Value = Member> {
    (hostile_name(), hostile_name(), 0..6u8).prop_map(|(path, link, kind)| match kind {
        0 => Member::file(&path, b"data"),
        1 => Member::dir(&path),
        2 => Member::symlink(&path, &link),
        3 => Member::hardlink(&path, &link),
        4 => Member::symlink(&path, "../../outside"),
        _ => Member::new(&path, tar::EntryType::Fifo),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_archive_reaches_outside(members in proptest::collection::vec(hostile_member(), 1..25)) {
        let sandbox = Sandbox::new();
        let _ = sandbox.unpack(&members);
        sandbox.assert_nothing_outside();
        // And what it made can be taken away again.
        std::fs::remove_dir_all(&sandbox.root).unwrap();
    }

    #[test]
    fn damaged_archives_do_not_panic(
        members in proptest::collection::vec(hostile_member(), 1..4),
        damage in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..8),
    ) {
        let mut bytes = tar_of(&members);
        for (at, byte) in damage {
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte;
        }
        let sandbox = Sandbox::new();
        let _ = sandbox.unpack_bytes(&bytes);
        sandbox.assert_nothing_outside();
    }
}
