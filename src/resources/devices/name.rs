//! Names of extended resources.

/// Whether a resource can be a plugin's: with a domain that is not Kubernetes' own.
///
/// Source: `IsExtendedResourceName` in `pkg/apis/core/v1/helper/helpers.go`.
#[must_use]
pub fn is_extended_resource(name: &str) -> bool {
    if name.contains("kubernetes.io/") || name.starts_with("requests.") {
        return false;
    }
    let Some((domain, name)) = name.split_once('/') else { return false };
    // quota counts it under this prefix
    domain.len() + "requests.".len() <= 253 && domain.split('.').all(is_label) && is_name(name)
}

/// RFC 1123: small letters, digits and `-`.
fn is_label(label: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
}

fn is_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    bytes.len() <= 63 && bytes.iter().all(|byte| inner(*byte)) && ends(bytes.first()) && ends(bytes.last())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_a_domain_of_their_own() {
        for good in ["example.com/gpu", "a/B_c.d", "test.device/x-1"] {
            assert!(is_extended_resource(good), "{good}");
        }
        let long = format!("example.com/{}", "x".repeat(64));
        for bad in [
            "cpu",
            "",
            "/",
            "example.com/",
            "/gpu",
            "a/b/c",
            "Example.com/gpu",
            "kubernetes.io/gpu",
            "x.kubernetes.io/gpu",
            "requests.example.com/gpu",
            "example..com/gpu",
            "example.com/-gpu",
            "example.com/gpu.",
            &long,
        ] {
            assert!(!is_extended_resource(bad), "{bad}");
        }
    }
}
