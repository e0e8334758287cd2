//! Volume kinds that this node cannot mount: each gets an error that names it.

use k8s_openapi::api::core::v1::Volume;

use super::error::SetUpError;

/// The error for a volume of a kind that has no file of its own here.
pub(super) fn refuse(volume: &Volume) -> SetUpError {
    let retry = "schedule the Pod to a node that runs the kubelet, for example with a nodeSelector";
    let removed = "Kubernetes has removed it; use a persistentVolumeClaim of a CSI driver";
    let kinds = [
        (volume.persistent_volume_claim.is_some(), "persistentVolumeClaim", retry),
        (volume.ephemeral.is_some(), "ephemeral", retry),
        (volume.csi.is_some(), "csi", retry),
        (volume.nfs.is_some(), "nfs", retry),
        (volume.iscsi.is_some(), "iscsi", retry),
        (volume.fc.is_some(), "fc", retry),
        (volume.flex_volume.is_some(), "flexVolume", retry),
        (volume.aws_elastic_block_store.is_some(), "awsElasticBlockStore", retry),
        (volume.azure_disk.is_some(), "azureDisk", retry),
        (volume.azure_file.is_some(), "azureFile", retry),
        (volume.cinder.is_some(), "cinder", retry),
        (volume.gce_persistent_disk.is_some(), "gcePersistentDisk", retry),
        (volume.portworx_volume.is_some(), "portworxVolume", retry),
        (volume.vsphere_volume.is_some(), "vsphereVolume", retry),
        (volume.git_repo.is_some(), "gitRepo", "clone in an init container into an emptyDir"),
        (volume.cephfs.is_some(), "cephfs", removed),
        (volume.flocker.is_some(), "flocker", removed),
        (volume.glusterfs.is_some(), "glusterfs", removed),
        (volume.photon_persistent_disk.is_some(), "photonPersistentDisk", removed),
        (volume.quobyte.is_some(), "quobyte", removed),
        (volume.rbd.is_some(), "rbd", removed),
        (volume.scale_io.is_some(), "scaleIO", removed),
        (volume.storageos.is_some(), "storageos", removed),
    ];
    match kinds.into_iter().find(|(is, ..)| *is) {
        Some((_, kind, remedy)) => {
            SetUpError::Unsupported(format!("this node cannot mount volumes of kind {kind} yet; {remedy}"))
        }
        None => SetUpError::Invalid("the volume names no kind, for example emptyDir: {}".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_the_kind() {
        for (source, kind) in [
            (json!({"persistentVolumeClaim": {"claimName": "c"}}), "persistentVolumeClaim"),
            (json!({"csi": {"driver": "d"}}), "csi"),
            (json!({"nfs": {"server": "s", "path": "/"}}), "nfs"),
            (json!({"gitRepo": {"repository": "r"}}), "gitRepo"),
        ] {
            let mut volume = source;
            volume["name"] = json!("v");
            let error = refuse(&serde_json::from_value(volume).unwrap());
            assert!(error.to_string().contains(&format!("kind {kind} yet")), "{error}");
            assert!(error.is_terminal());
        }
        assert!(matches!(refuse(&Volume::default()), SetUpError::Invalid(_)));
    }
}
