//! Challenges of registries and their token servers
//! (<https://distribution.github.io/distribution/spec/auth/token/>, RFC 9110 section 11).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;

use super::credentials::Credential;

/// Longest error text that is taken over from a server.
const MAX_MESSAGE: usize = 512;

/// What a 401 asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User name and password.
    Basic,
    /// A token from somewhere.
    Bearer(Bearer),
}

/// Where to get a token, and for what.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Bearer {
    pub realm: String,
    pub service: Option<String>,
    pub scope: Option<String>,
}

impl Challenge {
    /// The best challenge in a response: bearer before basic.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut basic = None;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            let Ok(value) = value.to_str() else { continue };
            let (scheme, parameters) = value.trim().split_once(' ').unwrap_or((value.trim(), ""));
            if scheme.eq_ignore_ascii_case("bearer") {
                let mut bearer = Bearer::default();
                for (key, value) in parameters_of(parameters) {
                    match key.to_ascii_lowercase().as_str() {
                        "realm" => bearer.realm = value,
                        "service" => bearer.service = Some(value),
                        "scope" => bearer.scope = Some(value),
                        _ => {}
                    }
                }
                if !bearer.realm.is_empty() {
                    return Some(Self::Bearer(bearer));
                }
            } else if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Self::Basic);
            }
        }
        basic
    }
}

/// `key=value` and `key="quoted \"value\""`, separated by commas.
fn parameters_of(text: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut rest = text;
    while let Some((key, after)) = rest.split_once('=') {
        let key = key.trim_matches(|c: char| c == ',' || c.is_whitespace()).to_owned();
        let mut value = String::new();
        let mut chars = after.char_indices();
        let mut end = after.len();
        if after.starts_with('"') {
            chars.next();
            while let Some((at, c)) = chars.next() {
                match c {
                    '\\' => value.extend(chars.next().map(|(_, c)| c)),
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    _ => value.push(c),
                }
            }
        } else {
            end = after.find(',').unwrap_or(after.len());
            value.push_str(after[..end].trim());
        }
        all.push((key, value));
        rest = &after[end..];
    }
    all
}

/// `Authorization: Basic`; `None` never, but callers treat both kinds alike.
pub(super) fn basic(credential: &Credential) -> Option<HeaderValue> {
    let encoded = STANDARD.encode(format!("{}:{}", credential.username, credential.secret));
    secret_header(&format!("Basic {encoded}"))
}

fn secret_header(value: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(value).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The request for a token to pull from `repository`.
pub(super) fn token_request(
    client: &reqwest::Client,
    mut realm: reqwest::Url,
    bearer: &Bearer,
    repository: &str,
    credential: Option<&Credential>,
) -> reqwest::RequestBuilder {
    let scope = bearer.scope.clone().unwrap_or_else(|| format!("repository:{repository}:pull"));
    if let Some(Credential { secret, .. }) = credential.filter(|c| c.username.is_empty() && !c.secret.is_empty()) {
        let mut form = realm.clone();
        form.set_query(None);
        {
            let mut pairs = form.query_pairs_mut();
            pairs
                .append_pair("grant_type", "refresh_token")
                .append_pair("client_id", "gantry")
                .append_pair("scope", &scope);
            pairs.append_pair("refresh_token", secret);
            if let Some(service) = &bearer.service {
                pairs.append_pair("service", service);
            }
        }
        // A query string is also the encoding of a form; the token goes in the body, never in a URL.
        let body = form.query().unwrap_or_default().to_owned();
        return client.post(realm).header("content-type", "application/x-www-form-urlencoded").body(body);
    }
    {
        let mut pairs = realm.query_pairs_mut();
        if let Some(service) = &bearer.service {
            pairs.append_pair("service", service);
        }
        pairs.append_pair("scope", &scope);
    }
    let request = client.get(realm);
    match credential.and_then(basic) {
        Some(value) => request.header(reqwest::header::AUTHORIZATION, value),
        None => request,
    }
}

/// `Authorization: Bearer` from a token server's reply.
pub(super) fn bearer_header(body: &[u8]) -> Option<HeaderValue> {
    #[derive(Deserialize)]
    struct Reply {
        token: Option<String>,
        access_token: Option<String>,
    }
    let reply: Reply = serde_json::from_slice(body).ok()?;
    let token = reply.token.filter(|t| !t.is_empty()).or(reply.access_token)?;
    secret_header(&format!("Bearer {token}"))
}

/// The text of a registry's error document (distribution specification, "Error Codes"), fit for an event.
pub(super) fn server_message(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Envelope {
        errors: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Envelope>(body) {
        Ok(envelope) => {
            let items = envelope.errors.iter().map(|item| format!("{}: {}", item.code.to_lowercase(), item.message));
            items.collect::<Vec<_>>().join("; ")
        }
        Err(_) => String::new(),
    };
    text.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn challenge(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(value).unwrap());
        }
        Challenge::from_headers(&headers)
    }

    #[test]
    fn parses_challenges() {
        let expected = Bearer {
            realm: "https://auth.example/token".into(),
            service: Some("a, \"b\"".into()),
            scope: Some("repository:a/b:pull,push".into()),
        };
        let header =
            r#"Bearer realm="https://auth.example/token",service="a, \"b\"", scope="repository:a/b:pull,push""#;
        assert_eq!(challenge(&["Basic realm=x", header]), Some(Challenge::Bearer(expected)));
        assert_eq!(challenge(&["basic realm=\"x\""]), Some(Challenge::Basic));
        assert_eq!(challenge(&["Negotiate", "Bearer service=x"]), None);
    }

    #[test]
    fn a_token_that_is_no_header_is_refused() {
        assert!(bearer_header(br#"{"token": "a\nb"}"#).is_none());
        let header = bearer_header(br#"{"access_token": "abc", "token": ""}"#).unwrap();
        assert_eq!(header, "Bearer abc");
        assert!(!format!("{header:?}").contains("abc"));
    }

    #[test]
    fn tokens_of_users_do_not_travel_in_urls() {
        // reqwest has no provider of its own here; see `Registry::new`.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::new();
        let realm: reqwest::Url = "https://auth.example/token".parse().unwrap();
        let bearer = Bearer { realm: String::new(), service: Some("s".into()), scope: None };
        let build = |credential: &Credential| {
            token_request(&client, realm.clone(), &bearer, "a/b", Some(credential)).build().unwrap()
        };
        let refresh = build(&Credential::identity_token("s3cret"));
        assert_eq!(refresh.method(), "POST");
        assert!(!refresh.url().as_str().contains("s3cret"));
        let body = String::from_utf8(refresh.body().unwrap().as_bytes().unwrap().to_vec()).unwrap();
        assert!(body.contains("refresh_token=s3cret") && body.contains("scope=repository%3Aa%2Fb%3Apull"), "{body}");
        let basic = build(&Credential::basic("u", "p"));
        assert_eq!(basic.url().as_str(), "https://auth.example/token?service=s&scope=repository%3Aa%2Fb%3Apull");
        assert_eq!(basic.headers()["authorization"], "Basic dTpw");
    }

    #[test]
    fn server_messages_are_cleaned() {
        let text = server_message(br#"{"errors": [{"code": "DENIED", "message": "no\u001b[31m"}]}"#);
        assert_eq!(text, "denied: no[31m");
        assert_eq!(server_message(b"<html>"), "");
    }

    proptest! {
        #[test]
        fn any_header_is_parsed_without_panic(text in "[ -~]{0,120}") {
            let _ = challenge(&[&text, &format!("Bearer {text}")]);
        }
    }
}
