//! The HTTP side of a streaming request: which protocol it asks for, and the answer.
//!
//! Rules and texts follow Kubernetes' `k8s.io/streaming/pkg/httpstream` (SPDY) and Go's `x/net/websocket`.

use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode,
    header::{
        CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
    },
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_STREAM_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
const SPDY_31: &str = "SPDY/3.1";

/// A streaming request that is not upgraded. Terminal for the request; the client must ask differently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Status of the answer.
    pub status: StatusCode,
    /// Headers of the answer, beside the content type.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Body of the answer, plain text.
    pub message: String,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, headers: Vec::new(), message: message.into() }
    }
}

/// What a request is upgraded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// SPDY/3.1 on the bare connection.
    Spdy,
    /// WebSocket.
    WebSocket,
}

/// An accepted upgrade.
#[derive(Debug)]
pub struct Upgrade {
    /// What carries the streams.
    pub transport: Transport,
    /// The negotiated protocol; empty if a WebSocket client named none.
    pub protocol: &'static str,
    answer: HeaderMap,
}

impl Upgrade {
    /// An upgrade that was negotiated elsewhere.
    #[cfg(test)]
    pub(super) fn accepted(transport: Transport, protocol: &'static str) -> Self {
        Self { transport, protocol, answer: HeaderMap::new() }
    }

    /// The `101 Switching Protocols` answer.
    pub fn response<B: Default>(&self) -> Response<B> {
        let mut response = Response::new(B::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        *response.headers_mut() = self.answer.clone();
        response
    }
}

/// Whether the request wants to become a WebSocket.
pub fn is_websocket(headers: &HeaderMap) -> bool {
    let upgrade = headers.get(UPGRADE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"));
    upgrade && wants_upgrade(headers)
}

fn wants_upgrade(headers: &HeaderMap) -> bool {
    headers.get_all(CONNECTION).iter().any(|value| contains_ignore_case(value, "upgrade"))
}

fn contains_ignore_case(value: &HeaderValue, part: &str) -> bool {
    value.to_str().is_ok_and(|text| text.to_ascii_lowercase().contains(part))
}

/// Negotiates with a request: over SPDY one of `spdy`, over WebSocket one of `websocket` (where `""` stands for a
/// client that names no protocol). The client's order decides.
///
/// # Errors
/// A [`Refusal`]: 400 for a request that cannot be upgraded, 403 if there is no protocol in common.
pub fn negotiate(
    headers: &HeaderMap,
    spdy: &'static [&'static str],
    websocket: &'static [&'static str],
) -> Result<Upgrade, Refusal> {
    if is_websocket(headers) { negotiate_websocket(headers, websocket) } else { negotiate_spdy(headers, spdy) }
}

fn listed<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Vec<&'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|item| !item.is_empty()).collect()
}

fn first_common(wanted: &[&str], offered: &'static [&'static str]) -> Option<&'static str> {
    wanted.iter().find_map(|name| offered.iter().copied().find(|offer| offer == name))
}

fn negotiate_spdy(headers: &HeaderMap, offered: &'static [&'static str]) -> Result<Upgrade, Refusal> {
    if !headers.contains_key(&STREAM_PROTOCOL) {
        let message = format!(
            "unable to upgrade: header X-Stream-Protocol-Version does not exist in request with {} headers",
            headers.keys_len()
        );
        return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
    }
    let wanted = listed(headers, &STREAM_PROTOCOL);
    if wanted.is_empty() {
        let message = "unable to upgrade: header X-Stream-Protocol-Version contains no valid protocols";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
    }
    let Some(protocol) = first_common(&wanted, offered) else {
        let message = format!(
            "unable to upgrade: unable to negotiate protocol: client supports {wanted:?}, server accepts {offered:?}"
        );
        let mut refusal = Refusal::new(StatusCode::FORBIDDEN, message);
        let accepted = offered.iter().map(|name| (ACCEPTED_STREAM_PROTOCOLS, HeaderValue::from_static(name)));
        refusal.headers.extend(accepted);
        return Err(refusal);
    };
    let spdy = headers.get(UPGRADE).is_some_and(|value| contains_ignore_case(value, "spdy/3.1"));
    if !spdy || !wants_upgrade(headers) {
        let message = "unable to upgrade: missing upgrade headers in request: Connection must name Upgrade, and Upgrade must be SPDY/3.1 or websocket";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
    }
    let mut answer = HeaderMap::new();
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(UPGRADE, HeaderValue::from_static(SPDY_31));
    answer.insert(STREAM_PROTOCOL, HeaderValue::from_static(protocol));
    Ok(Upgrade { transport: Transport::Spdy, protocol, answer })
}

fn negotiate_websocket(headers: &HeaderMap, offered: &'static [&'static str]) -> Result<Upgrade, Refusal> {
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let mut refusal = Refusal::new(StatusCode::BAD_REQUEST, "missing or bad WebSocket Version");
        refusal.headers.push((SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13")));
        return Err(refusal);
    }
    let Some(key) = headers.get(SEC_WEBSOCKET_KEY).filter(|key| !key.is_empty()) else {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "missing Sec-WebSocket-Key"));
    };
    let wanted = listed(headers, &SEC_WEBSOCKET_PROTOCOL);
    let found = if wanted.is_empty() { first_common(&[""], offered) } else { first_common(&wanted, offered) };
    let Some(protocol) = found else {
        let message = format!("requested protocol(s) are not supported: {wanted:?}; supports {offered:?}");
        return Err(Refusal::new(StatusCode::FORBIDDEN, message));
    };
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| Refusal::new(StatusCode::BAD_REQUEST, "bad Sec-WebSocket-Key"))?;
    let mut answer = HeaderMap::new();
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(SEC_WEBSOCKET_ACCEPT, accept);
    if !protocol.is_empty() {
        answer.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    Ok(Upgrade { transport: Transport::WebSocket, protocol, answer })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPDY: &[&str] = &["v4.channel.k8s.io", "channel.k8s.io"];
    const WEBSOCKET: &[&str] = &["", "channel.k8s.io", "v5.channel.k8s.io"];

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        headers
    }

    fn refused(list: &[(&'static str, &'static str)]) -> Refusal {
        negotiate(&headers(list), SPDY, WEBSOCKET).expect_err("refused")
    }

    #[test]
    fn spdy_takes_the_clients_first_choice() {
        let request = headers(&[
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v5.channel.k8s.io"),
            ("x-stream-protocol-version", "v4.channel.k8s.io, channel.k8s.io"),
        ]);
        let upgrade = negotiate(&request, SPDY, WEBSOCKET).expect("accepted");
        assert_eq!((upgrade.transport, upgrade.protocol), (Transport::Spdy, "v4.channel.k8s.io"));
        let response: Response<String> = upgrade.response();
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(response.headers()["upgrade"], "SPDY/3.1");
        assert_eq!(response.headers()["x-stream-protocol-version"], "v4.channel.k8s.io");
    }

    #[test]
    fn spdy_refusals() {
        let upgrade = [("connection", "Upgrade"), ("upgrade", "SPDY/3.1")];
        assert_eq!(refused(&upgrade).status, StatusCode::BAD_REQUEST);
        assert_eq!(
            refused(&[upgrade[0], upgrade[1], ("x-stream-protocol-version", " , ")]).status,
            StatusCode::BAD_REQUEST
        );
        assert_eq!(refused(&[("x-stream-protocol-version", "channel.k8s.io")]).status, StatusCode::BAD_REQUEST);
        let forbidden = refused(&[upgrade[0], upgrade[1], ("x-stream-protocol-version", "v5.channel.k8s.io")]);
        assert_eq!(forbidden.status, StatusCode::FORBIDDEN);
        let accepted: Vec<_> =
            forbidden.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let name = "x-accepted-stream-protocol-versions";
        assert_eq!(accepted, [(name, &b"v4.channel.k8s.io"[..]), (name, b"channel.k8s.io")]);
    }

    #[test]
    fn websocket_handshake() {
        // The key and its answer are the example of RFC 6455, section 1.3.
        let base = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "WebSocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let plain = negotiate(&headers(&base), SPDY, WEBSOCKET).expect("accepted");
        let response: Response<String> = plain.response();
        assert_eq!(response.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert!(!response.headers().contains_key("sec-websocket-protocol"));
        let mut named = headers(&base);
        named.insert("sec-websocket-protocol", HeaderValue::from_static("v9, v5.channel.k8s.io"));
        assert_eq!(negotiate(&named, SPDY, WEBSOCKET).expect("accepted").protocol, "v5.channel.k8s.io");
        named.insert("sec-websocket-protocol", HeaderValue::from_static("v9"));
        assert_eq!(negotiate(&named, SPDY, WEBSOCKET).expect_err("refused").status, StatusCode::FORBIDDEN);
        named.remove("sec-websocket-version");
        assert_eq!(negotiate(&named, SPDY, WEBSOCKET).expect_err("refused").status, StatusCode::BAD_REQUEST);
    }
}
