//! The environment of a container, and the expansion of `$(NAME)` in its command and arguments.
//!
//! Sources: `makeEnvironmentVariables` in `pkg/kubelet/kubelet_pods.go`, `third_party/forked/golang/expansion`,
//! `pkg/kubelet/util/env/env_util.go`.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{
    ConfigMap, Container, EnvFromSource, EnvVar, EnvVarSource, EphemeralContainer, FileKeySelector, Pod,
    ResourceRequirements,
};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};

use crate::objects::{
    FieldContext, FieldError, ObjectCache, ObjectError, SecretObject, ServiceCache, ServicesNotRead, env_field,
    env_resource,
};

/// How long the first container of a fresh agent waits for the Services.
const SERVICES_DEADLINE: Duration = Duration::from_secs(3);

/// The largest file that `fileKeyRef` may name, in bytes.
const MAX_ENV_FILE: u64 = 1 << 20;

/// An environment that cannot be made; the waiting reason is `CreateContainerConfigError`. Retryable: objects, Services
/// and files may change while the Pod exists.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    /// The Services are not known yet.
    #[error(transparent)]
    Services(#[from] ServicesNotRead),
    /// A ConfigMap or Secret.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// A field of the Pod.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The object has no such key.
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    MissingKey {
        /// The key.
        key: String,
        /// `ConfigMap` or `Secret`.
        kind: &'static str,
        /// The namespace.
        namespace: String,
        /// The object's name.
        name: String,
    },
    /// The value cannot be in an environment.
    #[error(
        "the value of environment variable {0:?} is no UTF-8 text or has a NUL byte; mount the key as a file instead"
    )]
    NotText(String),
    /// `fileKeyRef.volumeName` is not mounted.
    #[error("cannot find the volume {0:?} referenced by FileKeyRef")]
    NoVolume(String),
    /// The file is missing, too large or not in the format.
    #[error("couldn't parse env file")]
    File,
    /// The file has no such key.
    #[error("environment variable key {key:?} not found in file {path:?}")]
    FileKey {
        /// The key.
        key: String,
        /// `fileKeyRef.path`
        path: String,
    },
}

/// The parts of a container that its environment is made of; [`From`] a container of any sort.
#[derive(Clone, Copy, Debug)]
pub struct ContainerEnv<'a> {
    env: &'a [EnvVar],
    env_from: &'a [EnvFromSource],
    resources: Option<&'a ResourceRequirements>,
}

impl<'a> From<&'a Container> for ContainerEnv<'a> {
    fn from(container: &'a Container) -> Self {
        Self {
            env: container.env.as_deref().unwrap_or_default(),
            env_from: container.env_from.as_deref().unwrap_or_default(),
            resources: container.resources.as_ref(),
        }
    }
}

impl<'a> From<&'a EphemeralContainer> for ContainerEnv<'a> {
    fn from(container: &'a EphemeralContainer) -> Self {
        Self {
            env: container.env.as_deref().unwrap_or_default(),
            env_from: container.env_from.as_deref().unwrap_or_default(),
            resources: container.resources.as_ref(),
        }
    }
}

/// Where the values come from.
#[derive(Clone, Copy)]
pub struct EnvSources<'a> {
    /// ConfigMaps and Secrets; the Pod is registered there.
    pub objects: &'a ObjectCache,
    /// Services for service links.
    pub services: &'a ServiceCache,
    /// The directory of a mounted volume, for `fileKeyRef`.
    pub volume_path: &'a (dyn Fn(&str) -> Option<PathBuf> + Sync),
}

impl std::fmt::Debug for EnvSources<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EnvSources").finish_non_exhaustive()
    }
}

/// Makes the environment of a container, by name. Values may be secrets: do not log them.
///
/// What comes later wins: service links, `envFrom` in its order, `env` in its order. `env` values may refer to all that
/// came before them.
///
/// # Errors
/// The first variable that has no value and is not optional.
pub async fn make_environment(
    pod: &Pod,
    container: ContainerEnv<'_>,
    context: &FieldContext,
    sources: EnvSources<'_>,
) -> Result<BTreeMap<String, String>, EnvError> {
    if !is_static(pod) {
        sources.services.wait_until_read(SERVICES_DEADLINE).await?;
    }
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links).unwrap_or(true);
    let services = sources.services.environment(namespace, links);
    let mut builder = Builder {
        pod,
        namespace,
        context,
        sources,
        resources: container.resources,
        config_maps: BTreeMap::new(),
        secrets: BTreeMap::new(),
    };
    let mut own = BTreeMap::new();
    for source in container.env_from {
        builder.import(source, &mut own).await?;
    }
    for variable in container.env {
        let value = match (variable.value.as_deref().filter(|value| !value.is_empty()), &variable.value_from) {
            (Some(text), _) => Some(expand(text, |name| lookup(name, &[&own, &services]))),
            (None, Some(source)) => builder.resolve(&variable.name, source).await?,
            (None, None) => Some(String::new()),
        };
        if let Some(value) = value {
            own.insert(variable.name.clone(), value);
        }
    }
    for (name, value) in services {
        own.entry(name).or_insert(value);
    }
    if let Some(name) = own.iter().find_map(|(name, value)| value.contains('\0').then_some(name)) {
        return Err(EnvError::NotText(name.clone()));
    }
    Ok(own)
}

/// `kubetypes.IsStaticPod`: the Pod does not come from the API server.
fn is_static(pod: &Pod) -> bool {
    let source = pod.metadata.annotations.as_ref().and_then(|map| map.get("kubernetes.io/config.source"));
    source.is_some_and(|source| source != "api")
}

fn lookup(name: &str, maps: &[&BTreeMap<String, String>]) -> String {
    maps.iter().find_map(|map| map.get(name)).cloned().unwrap_or_else(|| format!("$({name})"))
}

struct Builder<'a> {
    pod: &'a Pod,
    namespace: &'a str,
    context: &'a FieldContext,
    sources: EnvSources<'a>,
    resources: Option<&'a ResourceRequirements>,
    /// Each object is read once, so that all variables of a container come from the same version.
    config_maps: BTreeMap<String, Arc<ConfigMap>>,
    secrets: BTreeMap<String, Arc<SecretObject>>,
}

impl Builder<'_> {
    /// The ConfigMap, or `None` if it is missing and that is allowed.
    async fn config_map(&mut self, name: &str, optional: bool) -> Result<Option<Arc<ConfigMap>>, EnvError> {
        Ok(match self.config_maps.entry(name.to_owned()) {
            Entry::Occupied(entry) => Some(entry.get().clone()),
            Entry::Vacant(entry) => match self.sources.objects.config_map(self.namespace, name).await {
                Ok(object) => Some(entry.insert(object).clone()),
                Err(error) if optional && error.is_not_found() => None,
                Err(error) => return Err(error.into()),
            },
        })
    }

    async fn secret(&mut self, name: &str, optional: bool) -> Result<Option<Arc<SecretObject>>, EnvError> {
        Ok(match self.secrets.entry(name.to_owned()) {
            Entry::Occupied(entry) => Some(entry.get().clone()),
            Entry::Vacant(entry) => match self.sources.objects.secret(self.namespace, name).await {
                Ok(object) => Some(entry.insert(object).clone()),
                Err(error) if optional && error.is_not_found() => None,
                Err(error) => return Err(error.into()),
            },
        })
    }

    /// All keys of an `envFrom` source.
    async fn import(&mut self, source: &EnvFromSource, own: &mut BTreeMap<String, String>) -> Result<(), EnvError> {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &source.config_map_ref {
            let optional = reference.optional.unwrap_or_default();
            if let Some(object) = self.config_map(&reference.name, optional).await? {
                own.extend(object.data.iter().flatten().map(|(key, value)| (format!("{prefix}{key}"), value.clone())));
            }
        } else if let Some(reference) = &source.secret_ref {
            let optional = reference.optional.unwrap_or_default();
            if let Some(object) = self.secret(&reference.name, optional).await? {
                for (key, value) in &object.data {
                    let name = format!("{prefix}{key}");
                    let value = text(&name, value)?;
                    own.insert(name, value);
                }
            }
        }
        Ok(())
    }

    /// The value of a `valueFrom`; `None` leaves the variable out.
    async fn resolve(&mut self, variable: &str, source: &EnvVarSource) -> Result<Option<String>, EnvError> {
        if let Some(field) = &source.field_ref {
            return Ok(Some(env_field(self.pod, field, self.context)?));
        }
        if let Some(resource) = &source.resource_field_ref {
            return Ok(Some(env_resource(self.pod, self.resources, resource, self.context)?));
        }
        let missing = |kind, name: &str, key: &str| EnvError::MissingKey {
            key: key.to_owned(),
            kind,
            namespace: self.namespace.to_owned(),
            name: name.to_owned(),
        };
        if let Some(selector) = &source.config_map_key_ref {
            let (optional, error) =
                (selector.optional.unwrap_or_default(), missing("ConfigMap", &selector.name, &selector.key));
            let Some(object) = self.config_map(&selector.name, optional).await? else { return Ok(None) };
            return match object.data.as_ref().and_then(|data| data.get(&selector.key)) {
                Some(value) => Ok(Some(value.clone())),
                None if optional => Ok(None),
                None => Err(error),
            };
        }
        if let Some(selector) = &source.secret_key_ref {
            let (optional, error) =
                (selector.optional.unwrap_or_default(), missing("Secret", &selector.name, &selector.key));
            let Some(object) = self.secret(&selector.name, optional).await? else { return Ok(None) };
            return match object.data.get(&selector.key) {
                Some(value) => text(variable, value).map(Some),
                None if optional => Ok(None),
                None => Err(error),
            };
        }
        match &source.file_key_ref {
            Some(selector) => self.file_value(selector).await,
            None => Ok(Some(String::new())),
        }
    }

    async fn file_value(&self, selector: &FileKeySelector) -> Result<Option<String>, EnvError> {
        let volume = (self.sources.volume_path)(&selector.volume_name)
            .ok_or_else(|| EnvError::NoVolume(selector.volume_name.clone()))?;
        let (path, key) = (selector.path.clone(), selector.key.clone());
        let value = tokio::task::spawn_blocking(move || read_env_file(&volume, &path, &key))
            .await
            .map_err(|error| error.to_string())
            .flatten()
            .map_err(|reason| {
                tracing::error!(pod = self.pod.metadata.name, path = selector.path, reason, "Failed to parse env file");
                EnvError::File
            })?;
        match value {
            Some(value) => Ok(Some(value)),
            None if selector.optional.unwrap_or_default() => Ok(None),
            None => Err(EnvError::FileKey { key: selector.key.clone(), path: selector.path.clone() }),
        }
    }
}

fn text(variable: &str, value: &[u8]) -> Result<String, EnvError> {
    String::from_utf8(value.to_vec()).map_err(|_| EnvError::NotText(variable.to_owned()))
}

/// Reads `key` from a file that a container has written: links are resolved as if the volume were the root, and what is
/// no regular file is not opened for longer than it takes to see that.
fn read_env_file(volume: &Path, path: &str, key: &str) -> Result<Option<String>, String> {
    let root = rustix::fs::openat(CWD, volume, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let root = root.map_err(|error| format!("open volume: {error}"))?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = crate::sys::openat2::openat2(root, path, flags, Mode::empty(), resolve)
        .map_err(|error| format!("open: {error}"))?;
    let stat = rustix::fs::fstat(&file).map_err(|error| format!("stat: {error}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("not a regular file".to_owned());
    }
    let mut content = String::new();
    let read = std::fs::File::from(file).take(MAX_ENV_FILE + 1).read_to_string(&mut content);
    match read.map_err(|error| format!("read: {error}"))? {
        length if length as u64 > MAX_ENV_FILE => Err(format!("larger than {MAX_ENV_FILE} bytes")),
        _ => parse_env_file(&content, key),
    }
}

/// Finds `key` in lines of `NAME='value'`, where the value may span lines and a comment may follow. An empty value
/// counts as missing.
fn parse_env_file(content: &str, key: &str) -> Result<Option<String>, String> {
    let content = content.replace("\r\n", "\n");
    let mut lines = content.strip_suffix('\n').unwrap_or(&content).split('\n').enumerate();
    while let Some((index, line)) = lines.next() {
        let line = line.trim_start_matches([' ', '\t']);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |what: &str| Err(format!("invalid environment variable format at line {}: {what}", index + 1));
        let Some((name, value)) = line.split_once('=') else { return wrong("missing '='") };
        if name.trim_end_matches([' ', '\t']).is_empty() {
            return wrong("empty variable name");
        }
        if name.ends_with([' ', '\t']) {
            return wrong("whitespace before '=' is not allowed");
        }
        if value.starts_with([' ', '\t']) {
            // As a shell reads it: an empty assignment before a command.
            if name == key {
                return Ok(None);
            }
            continue;
        }
        let Some(mut rest) = value.strip_prefix('\'') else { return wrong("value must be enclosed in single quotes") };
        let mut value = String::new();
        let after = loop {
            if let Some((end, after)) = rest.split_once('\'') {
                value.push_str(end);
                break after;
            }
            value.push_str(rest);
            value.push('\n');
            match lines.next() {
                Some((_, line)) => rest = line,
                None => return wrong("unclosed single quote"),
            }
        };
        let after = after.trim_start_matches([' ', '\t']);
        if !after.is_empty() && !after.starts_with('#') {
            return wrong("unexpected content after closing quote");
        }
        if name == key {
            return Ok(Some(value).filter(|value| !value.is_empty()));
        }
    }
    Ok(None)
}

/// Replaces every `$(NAME)` by what `mapping` makes of `NAME`; `$$` is a dollar sign, any other `$` stays.
pub fn expand(input: &str, mut mapping: impl FnMut(&str) -> String) -> String {
    let mut output = String::with_capacity(input.len());
    let mut rest = input;
    while let Some((before, after)) = rest.split_once('$') {
        output.push_str(before);
        if let Some(escaped) = after.strip_prefix('$') {
            output.push('$');
            rest = escaped;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|reference| reference.split_once(')')) {
            output.push_str(&mapping(name));
            rest = tail;
        } else {
            output.push('$');
            // The character after the sign is not the start of another reference.
            let next = after.chars().next();
            output.extend(next);
            rest = &after[next.map_or(0, char::len_utf8)..];
        }
    }
    output.push_str(rest);
    output
}

/// Expands the `command` or `args` of a container; a reference to an unknown variable stays as it is.
#[must_use]
pub fn expand_all(words: &[String], environment: &BTreeMap<String, String>) -> Vec<String> {
    words.iter().map(|word| expand(word, |name| lookup(name, &[environment]))).collect()
}

#[cfg(test)]
#[path = "env_tests.rs"]
mod tests;
