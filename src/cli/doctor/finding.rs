//! What a look at one part of the machine came to.

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// The node works, and something may not.
    Warning,
    /// The node cannot work.
    Fatal,
}

impl Level {
    /// For the first column.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "WARNING",
            Self::Fatal => "FATAL",
        }
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// How to mend it; nothing if there is nothing to mend.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Finding {
    /// All is well.
    pub fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, message: message.into(), remedy: String::new() }
    }

    /// Something may not work.
    pub fn warning(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, level: Level::Warning, message: message.into(), remedy: remedy.into() }
    }

    /// The node cannot work.
    pub fn fatal(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, level: Level::Fatal, message: message.into(), remedy: remedy.into() }
    }
}

/// The findings as a person reads them, and a last line that counts them.
pub fn render(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        text.push_str(&format!("{:<8} {:<14} {}\n", finding.level.word(), finding.check, finding.message));
        if !finding.remedy.is_empty() {
            text.push_str(&format!("{:<23} -> {}\n", "", finding.remedy));
        }
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (fatal, warnings) = (count(Level::Fatal), count(Level::Warning));
    text.push_str(&match (fatal, warnings) {
        (0, 0) => "This machine is ready for a node.\n".to_owned(),
        (0, _) => format!("This machine can be a node; warnings: {warnings}.\n"),
        _ => format!("This machine cannot be a node yet; fatal: {fatal}, warnings: {warnings}.\n"),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_stand_below_what_they_mend() {
        let findings = [
            Finding::ok("kernel", "6.1"),
            Finding::fatal("port", "10250 is in use", "stop the kubelet"),
            Finding::warning("disk", "nearly full", "make room"),
        ];
        let text = render(&findings);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "ok       kernel         6.1");
        assert_eq!(lines[1], "FATAL    port           10250 is in use");
        assert_eq!(lines[2].trim(), "-> stop the kubelet");
        assert_eq!(lines[5], "This machine cannot be a node yet; fatal: 1, warnings: 1.");
        assert!(render(&findings[..1]).ends_with("ready for a node.\n"));
        assert!(render(&findings[2..]).ends_with("warnings: 1.\n"));
        let json = serde_json::to_value(&findings).unwrap();
        assert_eq!(json[1]["level"], "fatal");
        assert_eq!(json[1]["remedy"], "stop the kubelet");
        assert!(json[0].get("remedy").is_none());
    }
}
