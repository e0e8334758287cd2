//! Answers.

use http::{
    HeaderValue, Method, StatusCode,
    header::{ALLOW, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS},
};
use serde::Serialize;
use warp::reply::Response;

use super::{api::ApiError, auth::Denied};
use crate::stream::upgrade::Refusal;

/// Plain text, as Go's `http.Error` sends it.
pub(super) fn text(status: StatusCode, body: impl Into<String>) -> Response {
    let mut response = Response::new(body.into().into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// A JSON document.
pub(super) fn json(value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => json_bytes(body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("Internal Error: {error}")),
    }
}

/// Bytes labelled as JSON.
pub(super) fn json_bytes(body: Vec<u8>) -> Response {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Prometheus text.
pub(super) fn metrics(body: String) -> Response {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(super::exposition::CONTENT_TYPE));
    response
}

/// 405, with the methods that would do.
pub(super) fn method_not_allowed(allowed: &[Method]) -> Response {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
    let list = allowed.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
    if let Ok(list) = HeaderValue::from_str(&list) {
        response.headers_mut().insert(ALLOW, list);
    }
    response
}

/// 404 for a path that means nothing.
pub(super) fn not_found() -> Response {
    text(StatusCode::NOT_FOUND, "404: Page Not Found")
}

impl From<ApiError> for Response {
    fn from(error: ApiError) -> Self {
        let status = match &error {
            ApiError::NotFound(_) => StatusCode::NOT_FOUND,
            ApiError::BadRequest(_) => StatusCode::BAD_REQUEST,
            ApiError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        text(status, error.to_string())
    }
}

impl From<Denied> for Response {
    fn from(denied: Denied) -> Self {
        text(denied.status, denied.body)
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Self {
        let mut response = text(refusal.status, refusal.message);
        for (name, value) in refusal.headers {
            response.headers_mut().append(name, value);
        }
        response
    }
}
