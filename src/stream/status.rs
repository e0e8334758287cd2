//! What goes on the error stream of an exec or attach.

use serde::Serialize;

use super::remotecommand::Outcome;

/// `metav1.Status`, as far as clients read it.
#[derive(Serialize)]
struct Status<'a> {
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Serialize)]
struct Details<'a> {
    causes: [Cause<'a>; 1],
}

#[derive(Serialize)]
struct Cause<'a> {
    reason: &'a str,
    message: &'a str,
}

/// What goes on the error stream, if anything.
pub(super) fn status_message(outcome: &Outcome, structured: bool) -> Option<String> {
    let message = match outcome {
        Outcome::Exited(0) if !structured => return None,
        Outcome::Exited(0) => None,
        Outcome::Exited(code) => Some(format!("command terminated with non-zero exit code: exit status {code}")),
        Outcome::Failed(cause) => Some(format!("Internal error occurred: {cause}")),
    };
    if !structured {
        return message;
    }
    let code = if let Outcome::Exited(code) = outcome { code.to_string() } else { String::new() };
    let message = message.as_deref();
    let status = match outcome {
        Outcome::Exited(0) => Status { status: "Success", message, reason: None, details: None, code: None },
        Outcome::Exited(_) => {
            let causes = [Cause { reason: "ExitCode", message: &code }];
            let details = Some(Details { causes });
            Status { status: "Failure", message, reason: Some("NonZeroExitCode"), details, code: None }
        }
        Outcome::Failed(_) => {
            Status { status: "Failure", message, reason: Some("InternalError"), details: None, code: Some(500) }
        }
    };
    serde_json::to_string(&status).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        let json = |outcome| status_message(&outcome, true).expect("status");
        assert_eq!(json(Outcome::Exited(0)), r#"{"status":"Success"}"#);
        assert_eq!(
            json(Outcome::Exited(3)),
            concat!(
                r#"{"status":"Failure","message":"command terminated with non-zero exit code: exit status 3","#,
                r#""reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#
            )
        );
        assert_eq!(
            json(Outcome::Failed("no".into())),
            r#"{"status":"Failure","message":"Internal error occurred: no","reason":"InternalError","code":500}"#
        );
        assert_eq!(status_message(&Outcome::Exited(0), false), None);
        let text = status_message(&Outcome::Exited(3), false);
        assert_eq!(text.as_deref(), Some("command terminated with non-zero exit code: exit status 3"));
    }
}
