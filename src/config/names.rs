//! The forms of names, labels and keys (apimachinery `util/validation/validation.go`).

fn is_word(text: &str, middle: &[u8]) -> bool {
    let bytes = text.as_bytes();
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || middle.contains(byte))
}

/// What is wrong with a label value; nothing if it is one.
pub(crate) fn label_value(value: &str) -> Option<String> {
    if value.is_empty() || (value.len() <= 63 && is_word(value, b"-_.")) {
        return None;
    }
    Some(
        "a valid label must be an empty string or consist of at most 63 alphanumeric characters, '-', '_' or '.', \
         and must start and end with an alphanumeric character"
            .to_owned(),
    )
}

/// What is wrong with a label, annotation or taint key; nothing if it is one.
pub(crate) fn qualified_name(key: &str) -> Option<String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if let Some(prefix) = prefix
        && let Some(problem) = dns_subdomain(prefix)
    {
        return Some(format!("prefix part {problem}"));
    }
    if name.len() <= 63 && is_word(name, b"-_.") {
        return None;
    }
    Some(
        "name part must consist of 1 to 63 alphanumeric characters, '-', '_' or '.', and must start and end with an \
         alphanumeric character"
            .to_owned(),
    )
}

/// What is wrong with an RFC 1123 subdomain, the form of most object names; nothing if it is one.
pub(crate) fn dns_subdomain(name: &str) -> Option<String> {
    let lower = |label: &str| is_word(label, b"-") && !label.bytes().any(|byte| byte.is_ascii_uppercase());
    if name.len() <= 253 && name.split('.').all(lower) {
        return None;
    }
    Some(
        "a lowercase RFC 1123 subdomain must consist of at most 253 lower case alphanumeric characters, '-' or '.', and \
         must start and end with an alphanumeric character"
            .to_owned(),
    )
}

/// What is wrong with an RFC 1123 label, the form of container and volume names; nothing if it is one.
pub(crate) fn dns_label(name: &str) -> Option<String> {
    if name.len() <= 63 && !name.contains('.') && dns_subdomain(name).is_none() {
        return None;
    }
    Some(
        "a lowercase RFC 1123 label must consist of at most 63 lower case alphanumeric characters or '-', and must start \
         and end with an alphanumeric character"
            .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        for good in ["a", "A.b_c-d", "example.com/x", "9"] {
            assert_eq!(qualified_name(good), None, "{good}");
        }
        for bad in ["", "-a", "a-", "/a", "a/", "a/b/c", "Ex.com/a", "a b"] {
            assert!(qualified_name(bad).is_some(), "{bad}");
        }
        assert_eq!(label_value(""), None);
        assert!(label_value(&"x".repeat(64)).is_some());
        assert!(dns_subdomain("a..b").is_some() && dns_subdomain("a.b-c").is_none());
        assert!(dns_label("a.b").is_some() && dns_label("a-b").is_none() && dns_label("A").is_some());
    }
}
