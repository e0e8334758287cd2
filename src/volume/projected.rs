//! `projected` volumes: several sources in one directory. Source: `pkg/volume/projected/projected.go`.

use std::time::Duration;

use k8s_openapi::api::core::v1::{
    Pod, PodCertificateProjection, ProjectedVolumeSource, ServiceAccountTokenProjection, VolumeProjection,
};

use crate::objects::{CertificateManager, FieldContext, ObjectCache, TokenKey, TokenManager};

use super::atomic::{FileProjection, Payload};
use super::error::SetUpError;
use super::{config_map, downward_api, secret};

/// `defaultMode` where the manifest has none; the API server fills in the same.
const DEFAULT_MODE: u32 = 0o644;

/// Mode and owner of files that have none of their own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    pub mode: u32,
    pub user: Option<u32>,
}

impl Defaults {
    pub fn new(mode: Option<i32>, user: Option<i64>) -> Result<Self, SetUpError> {
        let mode = file_mode(mode, Self { mode: DEFAULT_MODE, user: None })?;
        Ok(Self { mode, user: file_user(user)? })
    }
}

/// Permission bits of a file.
pub(super) fn file_mode(mode: Option<i32>, defaults: Defaults) -> Result<u32, SetUpError> {
    let Some(mode) = mode else { return Ok(defaults.mode) };
    let bits = u32::try_from(mode).ok().filter(|mode| *mode <= 0o777);
    bits.ok_or_else(|| SetUpError::Invalid(format!("mode {mode} must be a number between 0 and 0777 (octal)")))
}

/// Owner of a file.
pub(super) fn file_user(user: Option<i64>) -> Result<Option<u32>, SetUpError> {
    let invalid = |user| SetUpError::Invalid(format!("user {user} must be a user ID between 0 and 2147483647"));
    user.map(|user| u32::try_from(user).ok().filter(|id| *id <= i32::MAX.unsigned_abs()).ok_or_else(|| invalid(user)))
        .transpose()
}

/// The only user that the Pod's containers run as, if the manifest says so for all of them and it is the same.
/// Source: `FsUserFrom` in `pkg/volume/util/util.go`.
fn common_user(pod: &Pod) -> Option<i64> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let main = spec.init_containers.iter().flatten().chain(&spec.containers).map(|c| c.security_context.as_ref());
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| c.security_context.as_ref());
    let mut common = None;
    for context in main.chain(ephemeral) {
        let user = context.and_then(|context| context.run_as_user).or(of_pod)?;
        if common.is_some_and(|common| common != user) {
            return None;
        }
        common = Some(user);
    }
    common
}

/// What the payload of an API-backed volume is made from.
pub(super) struct Sources<'a> {
    pub pod: &'a Pod,
    pub context: &'a FieldContext,
    pub objects: &'a ObjectCache,
    pub tokens: &'a TokenManager,
    pub certificates: &'a CertificateManager,
    /// How long to wait for a first certificate.
    pub patience: Duration,
    pub fs_group: Option<u32>,
}

impl Sources<'_> {
    pub fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or("default")
    }

    /// The files of projected volume `volume`. A later source takes a path from an earlier one.
    pub async fn projected(&self, volume: &str, source: &ProjectedVolumeSource) -> Result<Payload, SetUpError> {
        let defaults = Defaults::new(source.default_mode, source.default_user)?;
        let parts = source.sources.iter().flatten().enumerate();
        let parts = parts.map(|(index, part)| self.part((volume, index), part, defaults));
        let mut payload = Payload::new();
        let mut errors = Vec::new();
        for part in futures::future::join_all(parts).await {
            match part {
                Ok(files) => payload.extend(files),
                Err(error) => errors.push(error),
            }
        }
        SetUpError::collect(errors).map(|()| payload)
    }

    async fn part(
        &self,
        place: (&str, usize),
        part: &VolumeProjection,
        defaults: Defaults,
    ) -> Result<Payload, SetUpError> {
        let namespace = self.namespace();
        if let Some(source) = &part.config_map {
            let optional = source.optional.unwrap_or_default();
            let items = source.items.as_deref();
            config_map::payload(self.objects, namespace, &source.name, items, optional, defaults).await
        } else if let Some(source) = &part.secret {
            let optional = source.optional.unwrap_or_default();
            let items = source.items.as_deref();
            secret::payload(self.objects, namespace, &source.name, items, optional, defaults).await
        } else if let Some(source) = &part.downward_api {
            downward_api::payload(self.pod, source.items.as_deref(), self.context, defaults)
        } else if let Some(source) = &part.service_account_token {
            self.token(source, defaults).await
        } else if let Some(source) = &part.cluster_trust_bundle {
            let (mode, user) = self.owner(source.user, defaults)?;
            let data = self.objects.trust_anchors(source).await?.into_bytes();
            Ok([(source.path.clone(), FileProjection { data, mode, user })].into())
        } else if let Some(source) = &part.pod_certificate {
            self.certificate(place, source, defaults).await
        } else {
            let known = "configMap, secret, downwardAPI, serviceAccountToken, clusterTrustBundle or podCertificate";
            Err(SetUpError::Invalid(format!("a source of a projected volume names none of {known}")))
        }
    }

    async fn token(&self, source: &ServiceAccountTokenProjection, defaults: Defaults) -> Result<Payload, SetUpError> {
        let (mode, user) = self.owner(source.user, defaults)?;
        let token = self.tokens.token(&token_key(self.pod, source)).await?;
        let file = FileProjection { data: token.value().as_bytes().to_vec(), mode, user };
        Ok([(source.path.clone(), file)].into())
    }

    async fn certificate(
        &self,
        (volume, index): (&str, usize),
        source: &PodCertificateProjection,
        defaults: Defaults,
    ) -> Result<Payload, SetUpError> {
        let (mode, user) = self.owner(source.user, defaults)?;
        let credential = self.certificates.credential(self.pod, volume, index, source, self.patience).await?;
        let files = [
            (&source.credential_bundle_path, [credential.key(), credential.chain()].concat()),
            (&source.key_path, credential.key().to_owned()),
            (&source.certificate_chain_path, credential.chain().to_owned()),
        ];
        let wanted = files.into_iter().filter_map(|(path, text)| {
            let path = path.clone().filter(|path| !path.is_empty())?;
            Some((path, FileProjection { data: text.into_bytes(), mode, user }))
        });
        Ok(wanted.collect())
    }

    /// Mode and owner of a credential: only its owner may read it, and `fsGroup` adds the group. Source:
    /// `resolveFsUser`.
    fn owner(&self, user: Option<i64>, defaults: Defaults) -> Result<(u32, Option<u32>), SetUpError> {
        let user = match file_user(user)?.or(defaults.user) {
            Some(user) => Some(user),
            None => file_user(common_user(self.pod))?,
        };
        let mode = if user.is_some() || self.fs_group.is_some() { 0o600 } else { defaults.mode };
        Ok((mode, user))
    }
}

/// The identity of the token that `source` asks for.
pub(super) fn token_key(pod: &Pod, source: &ServiceAccountTokenProjection) -> TokenKey {
    let metadata = &pod.metadata;
    let account =
        pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref()).filter(|name| !name.is_empty());
    TokenKey {
        namespace: metadata.namespace.clone().unwrap_or_else(|| "default".to_owned()),
        service_account: account.unwrap_or("default").to_owned(),
        pod_name: metadata.name.clone().unwrap_or_default(),
        pod_uid: metadata.uid.clone().unwrap_or_default(),
        audience: source.audience.clone().filter(|audience| !audience.is_empty()),
        expiration_seconds: source.expiration_seconds,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn user(pod: Option<i64>, containers: &[Option<i64>]) -> Option<i64> {
        let containers: Vec<_> =
            containers.iter().map(|u| json!({"name": "c", "securityContext": {"runAsUser": u}})).collect();
        let pod = json!({"spec": {"containers": containers, "securityContext": {"runAsUser": pod}}});
        common_user(&serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn the_token_belongs_to_the_only_user() {
        assert_eq!(user(None, &[None]), None);
        assert_eq!(user(Some(5), &[None, None]), Some(5));
        assert_eq!(user(Some(5), &[None, Some(5)]), Some(5));
        assert_eq!(user(Some(5), &[None, Some(6)]), None);
        assert_eq!(user(None, &[Some(6), None]), None);
        assert_eq!(user(None, &[Some(6), Some(6)]), Some(6));
    }

    #[test]
    fn refuses_modes_and_users_that_are_none() {
        let defaults = Defaults::new(None, None).unwrap();
        assert_eq!(defaults.mode, 0o644);
        for mode in [-1, 0o1000] {
            assert!(file_mode(Some(mode), defaults).is_err());
        }
        assert!(file_user(Some(-1)).is_err() && file_user(Some(1 << 31)).is_err());
        assert_eq!(file_user(Some(1000)).unwrap(), Some(1000));
    }
}
