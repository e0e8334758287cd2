//! PEM as Go's `encoding/pem` reads and writes it, for certificates that come from the API server.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

const BEGIN: &str = "-----BEGIN ";
const END: &str = "-----END ";
const DASHES: &str = "-----";
const CERTIFICATE: &str = "CERTIFICATE";
/// Characters of base64 in one line.
const LINE: usize = 64;

/// The certificates in `text`, as DER, in their order. What is between blocks, headers, blocks of another type and
/// blocks that do not decode are left out; the API server has refused all but the first of these already.
pub(super) fn certificates(text: &str) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    // Label and base64 of the block that is open. A second BEGIN starts anew.
    let mut open: Option<(&str, String)> = None;
    for line in text.lines().map(|line| line.trim_end_matches([' ', '\t', '\r'])) {
        if let Some(label) = line.strip_prefix(BEGIN).and_then(|line| line.strip_suffix(DASHES)) {
            open = Some((label, String::new()));
        } else if let Some(end) = line.strip_prefix(END) {
            let Some((label, body)) = open.take() else { continue };
            if label == CERTIFICATE && end.strip_suffix(DASHES) == Some(label) {
                found.extend(STANDARD.decode(body).ok().filter(|der| !der.is_empty()));
            }
        } else if let Some((_, body)) = &mut open
            && !(body.is_empty() && line.contains(':'))
        {
            body.extend(line.chars().filter(|c| !c.is_whitespace()));
        }
    }
    found
}

/// Appends one block.
pub(super) fn encode(label: &str, der: &[u8], out: &mut String) {
    let body = STANDARD.encode(der);
    out.reserve(body.len() + body.len() / LINE + 2 * (label.len() + 18));
    out.extend([BEGIN, label, DASHES, "\n"]);
    let mut rest = body.as_str();
    while !rest.is_empty() {
        // base64 is ASCII: every index is a character's
        let (line, after) = rest.split_at(LINE.min(rest.len()));
        out.extend([line, "\n"]);
        rest = after;
    }
    out.extend([END, label, DASHES, "\n"]);
}

/// Appends one certificate.
pub(super) fn encode_certificate(der: &[u8], out: &mut String) {
    encode(CERTIFICATE, der, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(label: &str, der: &[u8]) -> String {
        let mut text = String::new();
        encode(label, der, &mut text);
        text
    }

    #[test]
    fn writes_lines_of_64_characters() {
        let text = block("CERTIFICATE", &[0; 49]);
        let expected = format!("-----BEGIN CERTIFICATE-----\n{}\nAA==\n-----END CERTIFICATE-----\n", "A".repeat(64));
        assert_eq!(text, expected);
        assert_eq!(block("X", &[0; 48]).lines().count(), 3);
    }

    #[test]
    fn reads_what_go_reads() {
        let good = block("CERTIFICATE", b"good");
        let headers = good.replace("-----\nZ", "-----\nProc-Type: 4\nOther: x\n\nZ");
        let spaces = good.replace('\n', " \t\r\n").replace("Z2", "Z 2");
        let again = format!("-----BEGIN CERTIFICATE-----\nAAAA\n{good}");
        for text in [&good, &headers, &spaces, &again, &format!("text\n{good}more\n"), good.trim_end()] {
            assert_eq!(certificates(text), [b"good"], "{text}");
        }
        let key = block("PRIVATE KEY", b"key");
        let other_end = good.replace("END CERTIFICATE", "END KEY");
        let bad = good.replace("Z2", "!!");
        let unfinished = good.replace("-----END", "");
        for text in
            ["", "\n", "-----END CERTIFICATE-----", &key, &other_end, &bad, &unfinished, &block("CERTIFICATE", b"")]
        {
            assert!(certificates(text).is_empty(), "{text}");
            assert_eq!(certificates(&format!("{text}\n{good}")), [b"good"], "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(ders in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..200), 0..8)) {
            let mut text = String::new();
            for der in &ders {
                encode_certificate(der, &mut text);
            }
            prop_assert_eq!(certificates(&text), ders);
        }

        #[test]
        fn nothing_panics_or_grows(parts in proptest::collection::vec(prop_oneof![
            Just("-----BEGIN CERTIFICATE-----\n".to_owned()), Just("-----END CERTIFICATE-----\n".to_owned()),
            Just("-----".to_owned()), Just("\n".to_owned()), Just("a: b\n".to_owned()), "\\PC{0,20}", "[A-Za-z0-9+/=]{0,80}\n",
        ], 0..40)) {
            let text = parts.concat();
            let total: usize = certificates(&text).iter().map(Vec::len).sum();
            prop_assert!(total <= text.len());
        }
    }
}
