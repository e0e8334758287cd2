//! Names in the `kubepods` tree, for both cgroup drivers.
//!
//! Source: `pkg/kubelet/cm/cgroup_manager_linux.go`. Paths are absolute within a hierarchy. With the driver
//! `systemd` the names are those of slices and scopes, so that tools which parse them find what they expect.

use crate::resources::qos::QosClass;

/// `cgroupDriver`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Driver {
    /// Plain directory names: `/kubepods/burstable/pod<uid>/<container>`.
    #[default]
    Cgroupfs,
    /// Slices: `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice/gantry-<container>.scope`.
    Systemd,
}

/// Builds and reads names below one root.
#[derive(Clone, Debug)]
pub struct Names {
    driver: Driver,
    root: Vec<String>,
}

impl Names {
    /// Names below `cgroup_root` (`cgroupRoot` of the configuration, `/` by default).
    #[must_use]
    pub fn new(driver: Driver, cgroup_root: &str) -> Self {
        let mut root = components(driver, cgroup_root);
        root.push("kubepods".to_owned());
        Self { driver, root }
    }

    /// The path of a cgroup that the administrator names (`kubeReservedCgroup`), wherever it is.
    #[must_use]
    pub fn other(&self, cgroup: &str) -> String {
        let components = components(self.driver, cgroup);
        self.render(components.iter().map(String::as_str))
    }

    /// The cgroup above all Pods.
    #[must_use]
    pub fn root(&self) -> String {
        self.path(&[])
    }

    /// The cgroup above the Pods of one class.
    #[must_use]
    pub fn tier(&self, class: QosClass) -> String {
        self.path(tier_components(class))
    }

    /// A Pod's own cgroup.
    #[must_use]
    pub fn pod(&self, class: QosClass, uid: &str) -> String {
        let pod = format!("pod{uid}");
        match tier_components(class) {
            [tier] => self.path(&[tier, &pod]),
            _ => self.path(&[&pod]),
        }
    }

    /// A container's cgroup in that of its Pod.
    #[must_use]
    pub fn container(&self, pod_path: &str, container_id: &str) -> String {
        match self.driver {
            Driver::Cgroupfs => format!("{pod_path}/{container_id}"),
            Driver::Systemd => format!("{pod_path}/gantry-{container_id}.scope"),
        }
    }

    /// The UID in the directory name of a Pod's cgroup, `None` for any other directory.
    #[must_use]
    pub fn pod_uid(&self, directory: &str) -> Option<String> {
        let uid = match self.driver {
            Driver::Cgroupfs => directory.strip_prefix("pod")?.to_owned(),
            Driver::Systemd => {
                let last = directory.strip_suffix(".slice")?.rsplit('-').next()?;
                unescape(last.strip_prefix("pod")?)
            }
        };
        (!uid.is_empty()).then_some(uid)
    }

    fn path(&self, below: &[&str]) -> String {
        self.render(self.root.iter().map(String::as_str).chain(below.iter().copied()))
    }

    fn render<'a>(&self, components: impl Iterator<Item = &'a str>) -> String {
        match self.driver {
            Driver::Cgroupfs => format!("/{}", components.collect::<Vec<_>>().join("/")),
            Driver::Systemd => {
                let mut path = String::new();
                let mut slice = String::new();
                for component in components {
                    if !slice.is_empty() {
                        slice.push('-');
                    }
                    slice.push_str(&component.replace('-', "_"));
                    path.push('/');
                    path.push_str(&slice);
                    path.push_str(".slice");
                }
                path
            }
        }
    }
}

/// The names of a cgroup and those above it.
fn components(driver: Driver, cgroup: &str) -> Vec<String> {
    match driver {
        Driver::Cgroupfs => split(cgroup).map(str::to_owned).collect(),
        // the last slice names all of its ancestors
        Driver::Systemd => split(cgroup)
            .next_back()
            .map(|slice| slice.strip_suffix(".slice").unwrap_or(slice).split('-').map(unescape).collect())
            .unwrap_or_default(),
    }
}

fn split(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty())
}

fn unescape(part: &str) -> String {
    part.replace('_', "-")
}

fn tier_components(class: QosClass) -> &'static [&'static str] {
    match class {
        QosClass::Guaranteed => &[],
        QosClass::Burstable => &["burstable"],
        QosClass::BestEffort => &["besteffort"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0e9c-4f";

    #[test]
    fn cgroupfs_names() {
        let names = Names::new(Driver::Cgroupfs, "/");
        assert_eq!(names.root(), "/kubepods");
        assert_eq!(names.tier(QosClass::Burstable), "/kubepods/burstable");
        assert_eq!(names.pod(QosClass::Guaranteed, UID), "/kubepods/pod0e9c-4f");
        let pod = names.pod(QosClass::BestEffort, UID);
        assert_eq!(pod, "/kubepods/besteffort/pod0e9c-4f");
        assert_eq!(names.container(&pod, "c1"), "/kubepods/besteffort/pod0e9c-4f/c1");
        assert_eq!(Names::new(Driver::Cgroupfs, "/a/b").root(), "/a/b/kubepods");
        assert_eq!(names.other("/system/kube"), "/system/kube");
    }

    #[test]
    fn systemd_names() {
        let names = Names::new(Driver::Systemd, "/");
        assert_eq!(names.root(), "/kubepods.slice");
        let pod = names.pod(QosClass::Burstable, UID);
        assert_eq!(pod, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0e9c_4f.slice");
        assert_eq!(names.container(&pod, "c1").rsplit('/').next(), Some("gantry-c1.scope"));
        assert_eq!(names.pod(QosClass::Guaranteed, UID), "/kubepods.slice/kubepods-pod0e9c_4f.slice");
        let nested = Names::new(Driver::Systemd, "/a.slice/a-b.slice");
        assert_eq!(nested.root(), "/a.slice/a-b.slice/a-b-kubepods.slice");
        assert_eq!(names.other("/system.slice"), "/system.slice");
        assert_eq!(names.other("kube-reserved.slice"), "/kube.slice/kube-reserved.slice");
    }

    proptest::proptest! {
        #[test]
        fn uids_are_read_back(uid in "[0-9a-f]{8}(-[0-9a-f]{4}){0,3}", systemd in proptest::bool::ANY) {
            let names = Names::new(if systemd { Driver::Systemd } else { Driver::Cgroupfs }, "/");
            for class in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
                let path = names.pod(class, &uid);
                let directory = path.rsplit('/').next().unwrap();
                let read_back = names.pod_uid(directory);
                proptest::prop_assert_eq!(read_back.as_deref(), Some(uid.as_str()));
                let tier = names.tier(class);
                proptest::prop_assert_eq!(names.pod_uid(tier.rsplit('/').next().unwrap()), None);
            }
        }
    }
}
