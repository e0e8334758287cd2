//! Feature gates: which are known, which are on.
//!
//! Source: component-base `featuregate/feature_gate.go`.

use std::collections::BTreeMap;

use super::gate_table::{DEPENDENCIES, GATES};

/// How grown up a feature is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Off unless asked for.
    Alpha,
    /// Tested; often on.
    Beta,
    /// Stable; the gate will go away.
    Ga,
    /// Kept for those who still depend on it.
    Deprecated,
}

/// Gates that cannot be set so; terminal, the configuration is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// No feature of v1.37 has this name.
    #[error("unrecognized feature gate: {0}")]
    Unknown(String),
    /// Stable features cannot be switched off any more.
    #[error("cannot set feature gate {name} to {value}, feature is locked to {locked}")]
    Locked {
        /// The gate.
        name: String,
        /// What was asked for.
        value: bool,
        /// What it always is.
        locked: bool,
    },
    /// A gate is on, another one that it needs is not.
    #[error("{name} is enabled, but depends on features that are disabled: [{}]", .disabled.join(" "))]
    Dependency {
        /// The gate.
        name: String,
        /// The ones it needs.
        disabled: Vec<String>,
    },
}

/// The effective gates: defaults of v1.37 with the configured changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FeatureGates {
    set: BTreeMap<String, bool>,
    all_alpha: Option<bool>,
    all_beta: Option<bool>,
}

impl FeatureGates {
    /// Applies `featureGates` to the defaults; every unknown, locked or unsatisfied gate is an error.
    pub fn new(configured: &BTreeMap<String, bool>) -> Result<Self, Vec<GateError>> {
        let mut gates = Self::default();
        let mut errors = Vec::new();
        for (name, &value) in configured {
            match name.as_str() {
                "AllAlpha" => gates.all_alpha = Some(value),
                "AllBeta" => gates.all_beta = Some(value),
                _ => match known(name) {
                    None => return Err(vec![GateError::Unknown(name.clone())]),
                    Some((_, default, true)) if default != value => {
                        errors.push(GateError::Locked { name: name.clone(), value, locked: default });
                    }
                    Some(_) => {
                        gates.set.insert(name.clone(), value);
                    }
                },
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        for (name, needs) in DEPENDENCIES {
            let off = |need: &&&str| known(need).is_some() && !gates.enabled(need);
            let disabled: Vec<_> = needs.iter().filter(off).map(|need| (*need).to_owned()).collect();
            if gates.enabled(name) && !disabled.is_empty() {
                errors.push(GateError::Dependency { name: (*name).to_owned(), disabled });
            }
        }
        if errors.is_empty() { Ok(gates) } else { Err(errors) }
    }

    /// Whether a feature is on. Unknown features are off.
    #[must_use]
    pub fn enabled(&self, name: &str) -> bool {
        if let Some(&value) = self.set.get(name) {
            return value;
        }
        let Some((stage, default, locked)) = known(name) else { return false };
        let all = match stage {
            Stage::Alpha => self.all_alpha,
            Stage::Beta => self.all_beta,
            _ => None,
        };
        if locked { default } else { all.unwrap_or(default) }
    }

    /// Gates that were set although they are stable or deprecated and so will be removed, with the stage.
    pub fn fading(&self) -> impl Iterator<Item = (&str, Stage)> {
        let stage = |name: &String| known(name).map_or(Stage::Alpha, |(stage, ..)| stage);
        let fading = |(name, stage): &(&str, Stage)| !name.is_empty() && matches!(stage, Stage::Ga | Stage::Deprecated);
        self.set.keys().map(move |name| (name.as_str(), stage(name))).filter(fading)
    }
}

fn known(name: &str) -> Option<(Stage, bool, bool)> {
    let index = GATES.binary_search_by(|(known, ..)| (*known).cmp(name)).ok()?;
    let (_, stage, default, locked) = GATES[index];
    Some((stage, default, locked))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gates(pairs: &[(&str, bool)]) -> Result<FeatureGates, Vec<GateError>> {
        FeatureGates::new(&pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect())
    }

    #[test]
    fn the_table_is_sorted_and_consistent() {
        assert!(GATES.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(gates(&[]), Ok(FeatureGates::default()));
        for (gate, _) in DEPENDENCIES {
            assert!(known(gate).is_some(), "{gate}");
        }
    }

    #[test]
    fn defaults_are_those_of_1_37() {
        let gates = gates(&[]).unwrap();
        for (name, on) in [
            ("NodeDeclaredFeatures", true),
            ("MemoryQoS", true),
            ("KubeletInUserNamespace", true),
            ("DefaultPodSysctls", false),
            ("ContainerStopSignals", false),
            ("ExtendWebSocketsToKubelet", true),
            ("NoSuchGate", false),
        ] {
            assert_eq!(gates.enabled(name), on, "{name}");
        }
    }

    #[test]
    fn unknown_and_locked_gates_are_refused_in_kubelets_words() {
        let words = |pairs| gates(pairs).unwrap_err()[0].to_string();
        assert_eq!(words(&[("SidecarContainers", true)]), "unrecognized feature gate: SidecarContainers");
        assert_eq!(
            words(&[("NodeDeclaredFeatures", false)]),
            "cannot set feature gate NodeDeclaredFeatures to false, feature is locked to true"
        );
        assert_eq!(
            words(&[("ClusterTrustBundle", false), ("ClusterTrustBundleProjection", true)]),
            "ClusterTrustBundleProjection is enabled, but depends on features that are disabled: [ClusterTrustBundle]"
        );
    }

    #[test]
    fn all_alpha_and_all_beta_move_what_is_not_named() {
        let gates = gates(&[("AllAlpha", true), ("AllBeta", true), ("ContainerStopSignals", false)]).unwrap();
        assert!(gates.enabled("DefaultPodSysctls"));
        assert!(!gates.enabled("ContainerStopSignals"));
    }
}
