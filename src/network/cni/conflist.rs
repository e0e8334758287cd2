//! Network configurations: the files in `/etc/cni/net.d` (CNI specification, section 1).
//!
//! As with containerd, the first file in lexical order decides, and one that is wrong is an error instead of a reason
//! to take the next.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::CniError;

/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// A version of the specification that we speak, older ones first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Version {
    /// Results list interfaces and addresses.
    #[serde(rename = "0.3.0")]
    V0_3_0,
    /// The same, and lists of plugins.
    #[serde(rename = "0.3.1")]
    V0_3_1,
    /// Adds CHECK.
    #[serde(rename = "0.4.0")]
    V0_4_0,
    /// Addresses without their own `version`.
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// Adds GC, STATUS and `cniVersions`.
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    const ALL: [Self; 5] = [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    /// The newest.
    pub const LATEST: Self = Self::V1_1_0;

    /// As it is written in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// One that we speak.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }
}

/// A network: a chain of plugins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Conflist {
    /// The network's name, the same for all plugins.
    pub name: String,
    /// What is spoken with its plugins; once they were asked, the newest that all of them know.
    pub version: Version,
    /// CHECK is not to be called.
    pub disable_check: bool,
    /// GC is not to be called.
    #[serde(rename = "disableGC")]
    pub disable_gc: bool,
    /// The plugins' configurations in the order of ADD.
    pub plugins: Vec<Plugin>,
    /// Versions that the file allows, newest first.
    #[serde(skip)]
    pub offered: Vec<Version>,
}

/// One plugin's configuration, as it stands in the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Plugin {
    settings: Map<String, Value>,
}

impl Plugin {
    fn new(value: Value) -> Result<Self, String> {
        let Value::Object(settings) = value else { return Err("a plugin's configuration must be an object".into()) };
        let plugin = Self { settings };
        match plugin.kind() {
            "" => Err("a plugin has no \"type\": write the name of a program in the plugin directory".into()),
            kind if kind.contains('/') => Err(format!("type {kind:?} must be a file name, not a path")),
            _ => Ok(plugin),
        }
    }

    /// `type`: the name of the program.
    pub fn kind(&self) -> &str {
        self.settings.get("type").and_then(Value::as_str).unwrap_or_default()
    }

    /// Whether the plugin wants the argument of a capability.
    pub fn wants(&self, capability: &str) -> bool {
        self.settings.get("capabilities").and_then(|all| all.get(capability)) == Some(&Value::Bool(true))
    }

    /// The settings that are handed to the plugin as they are.
    pub fn request(&self) -> Map<String, Value> {
        let mut request = self.settings.clone();
        // "must not be set" in requests (section 3)
        request.remove("capabilities");
        request
    }
}

/// The network that a directory asks for; none if it is empty or missing.
pub fn load(directory: &Path) -> Result<Option<Conflist>, CniError> {
    let wrong = |file: &Path, reason: String| CniError::Config { file: file.to_owned(), reason };
    let files = list(directory, &["conflist", "conf", "json"])
        .map_err(|error| wrong(directory, format!("cannot be listed: {error}")))?;
    let Some(file) = files.first() else { return Ok(None) };
    let conflist = read(file).and_then(|text| parse(&text, file)).map_err(|reason| wrong(file, reason))?;
    Ok(Some(conflist))
}

/// Files with these extensions in lexical order.
fn list(directory: &Path, extensions: &[&str]) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let wanted = path.extension().is_some_and(|extension| extensions.iter().any(|known| extension == *known));
        if wanted && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(file: &Path) -> Result<String, String> {
    let mut text = String::new();
    let opened = File::open(file).and_then(|opened| opened.take(MAX_FILE + 1).read_to_string(&mut text));
    opened.map_err(|error| format!("cannot be read: {error}"))?;
    match u64::try_from(text.len()) {
        Ok(length) if length <= MAX_FILE => Ok(text),
        _ => Err(format!("is larger than {MAX_FILE} bytes")),
    }
}

fn parse(text: &str, file: &Path) -> Result<Conflist, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| format!("is no JSON: {error}"))?;
    let Value::Object(mut settings) = value else { return Err("must be a JSON object".into()) };
    let name = text_of(&settings, "name")?.ok_or("has no \"name\"")?;
    let letter = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(letter) {
        return Err(format!("name {name:?} must begin with a letter or digit and have only these, '_', '.' and '-'"));
    }
    let offered = offered(&settings)?;
    let single = file.extension().is_none_or(|extension| extension != "conflist") && !settings.contains_key("plugins");
    let (disable_check, disable_gc, inlined) =
        (flag(&settings, "disableCheck")?, flag(&settings, "disableGC")?, flag(&settings, "loadOnlyInlinedPlugins")?);
    let mut plugins = Vec::new();
    if single {
        plugins.push(Plugin::new(Value::Object(settings))?);
    } else {
        match settings.remove("plugins") {
            Some(Value::Array(list)) if !list.is_empty() => {
                plugins = list.into_iter().map(Plugin::new).collect::<Result<_, _>>()?;
            }
            Some(_) => return Err("plugins must be a list with at least one plugin".into()),
            None if inlined => return Err("loadOnlyInlinedPlugins is true and there are no plugins".into()),
            None => {}
        }
        if !inlined {
            plugins.extend(plugins_of_directory(&file.with_file_name(&name))?);
        }
    }
    if plugins.is_empty() {
        return Err("has no plugins".into());
    }
    let version = offered.first().copied().ok_or("has no cniVersion")?;
    Ok(Conflist { name, version, disable_check, disable_gc, plugins, offered })
}

/// Plugins of one file each, in the directory with the network's name (specification 1.1).
fn plugins_of_directory(directory: &Path) -> Result<Vec<Plugin>, String> {
    let files = list(directory, &["conf"]).map_err(|error| format!("{}: {error}", directory.display()))?;
    let plugin = |file: PathBuf| {
        let value = read(&file).and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string()));
        value.and_then(Plugin::new).map_err(|reason| format!("{}: {reason}", file.display()))
    };
    files.into_iter().map(plugin).collect()
}

/// `cniVersion` and `cniVersions` that we speak, newest first.
fn offered(settings: &Map<String, Value>) -> Result<Vec<Version>, String> {
    let mut texts: Vec<String> = text_of(settings, "cniVersion")?.into_iter().collect();
    match settings.get("cniVersions") {
        None => {}
        Some(Value::Array(list)) => {
            for entry in list {
                texts.push(entry.as_str().ok_or("cniVersions must be a list of strings")?.to_owned());
            }
        }
        Some(_) => return Err("cniVersions must be a list of strings".into()),
    }
    let mut offered: Vec<Version> = texts.iter().filter_map(|text| Version::parse(text)).collect();
    offered.sort();
    offered.dedup();
    offered.reverse();
    if offered.is_empty() {
        let known = Version::ALL.map(Version::as_str).join(", ");
        let found = if texts.is_empty() { "none".to_owned() } else { texts.join(", ") };
        return Err(format!("cniVersion {found} is not supported: use one of {known}"));
    }
    Ok(offered)
}

fn text_of(settings: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match settings.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(format!("{key} must be a string, not {other}")),
    }
}

/// libcni takes strings for booleans too.
fn flag(settings: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match settings.get(key) {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => Err(format!("{key} must be true or false, not {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        directory
    }

    fn error(name: &str, text: &str) -> String {
        let directory = directory(&[(name, text)]);
        let error = load(directory.path()).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        error
    }

    #[test]
    fn the_first_file_decides() {
        let list = r#"{"cniVersion": "0.3.1", "name": "kindnet", "plugins": [{"type": "ptp", "mtu": 1400}, {"type": "portmap",
            "capabilities": {"portMappings": true, "snat": false}}]}"#;
        let directory =
            directory(&[("10-kindnet.conflist", list), ("99-broken.conf", "{"), ("00-note.txt", ""), ("5.bak", "")]);
        let conflist = load(directory.path()).unwrap().unwrap();
        assert_eq!(conflist.name, "kindnet");
        assert_eq!(conflist.version, Version::V0_3_1);
        let kinds: Vec<&str> = conflist.plugins.iter().map(Plugin::kind).collect();
        assert_eq!(kinds, ["ptp", "portmap"]);
        let portmap = &conflist.plugins[1];
        assert!(portmap.wants("portMappings") && !portmap.wants("snat") && !portmap.wants("bandwidth"));
        assert!(!portmap.request().contains_key("capabilities"));
        assert_eq!(load(&directory.path().join("none")).unwrap(), None);
        let copy: Conflist = serde_json::from_value(serde_json::to_value(&conflist).unwrap()).unwrap();
        assert_eq!((copy.plugins, copy.version), (conflist.plugins, conflist.version));
    }

    #[test]
    fn one_plugin_is_a_network_too() {
        let directory = directory(&[("a.conf", r#"{"cniVersion": "0.4.0", "name": "n", "type": "bridge"}"#)]);
        let conflist = load(directory.path()).unwrap().unwrap();
        assert_eq!(conflist.plugins[0].kind(), "bridge");
        assert_eq!(conflist.version, Version::V0_4_0);
    }

    #[test]
    fn plugins_may_have_files_of_their_own() {
        let directory = directory(&[
            ("a.conflist", r#"{"cniVersion": "1.1.0", "name": "n", "plugins": [{"type": "bridge"}]}"#),
            ("n/2.conf", r#"{"type": "tuning"}"#),
            ("n/1.conf", r#"{"type": "portmap"}"#),
            ("n/readme", ""),
        ]);
        let kinds = |conflist: Conflist| conflist.plugins.iter().map(|p| p.kind().to_owned()).collect::<Vec<_>>();
        assert_eq!(kinds(load(directory.path()).unwrap().unwrap()), ["bridge", "portmap", "tuning"]);
        let only = r#"{"cniVersion": "1.1.0", "name": "n", "plugins": [{"type": "bridge"}],
            "loadOnlyInlinedPlugins": "true"}"#;
        fs::write(directory.path().join("a.conflist"), only).unwrap();
        assert_eq!(kinds(load(directory.path()).unwrap().unwrap()), ["bridge"]);
    }

    #[test]
    fn the_newest_version_we_speak_is_offered_first() {
        let text = r#"{"cniVersion": "0.4.0", "cniVersions": ["0.3.1", "1.0.0", "9.0.0"], "name": "n",
            "plugins": [{"type": "a"}], "disableCheck": true, "disableGC": "FALSE"}"#;
        let directory = directory(&[("a.conflist", text)]);
        let conflist = load(directory.path()).unwrap().unwrap();
        assert_eq!(conflist.offered, [Version::V1_0_0, Version::V0_4_0, Version::V0_3_1]);
        assert!(conflist.disable_check && !conflist.disable_gc);
    }

    #[test]
    fn errors_name_file_field_and_remedy() {
        assert!(error("a.conflist", "{").contains("is no JSON"));
        assert!(error("a.conflist", "[]").contains("object"));
        assert!(error("a.conflist", r#"{"plugins": []}"#).contains("no \"name\""));
        assert!(error("a.conflist", r#"{"name": "a/b"}"#).contains("must begin with a letter"));
        assert!(error("a.conflist", r#"{"name": "a", "cniVersion": "0.2.0"}"#).contains("use one of 0.3.0"));
        assert!(error("a.conflist", r#"{"name": "a", "cniVersion": "1.0.0"}"#).contains("has no plugins"));
        assert!(error("a.conflist", r#"{"name": "a", "cniVersion": "1.0.0", "plugins": []}"#).contains("at least one"));
        let path = r#"{"name": "a", "cniVersion": "1.0.0", "plugins": [{"type": "../x"}]}"#;
        assert!(error("a.conflist", path).contains("not a path"));
        assert!(error("a.conf", r#"{"name": "a", "cniVersion": "1.0.0"}"#).contains("no \"type\""));
        let flag = r#"{"name": "a", "cniVersion": "1.0.0", "disableGC": 1, "plugins": [{"type": "x"}]}"#;
        assert!(error("a.conflist", flag).contains("disableGC must be true or false"));
        assert!(error("big.conf", &" ".repeat(1 << 21)).contains("larger"));
    }
}
