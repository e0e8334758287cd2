//! Reviews by the API server: `TokenReview` and `SubjectAccessReview`.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::{Api, Client, api::PostParams};
use serde::{Serialize, de::DeserializeOwned};

use super::auth::{AccessReview, ReviewError, Reviewer, UserInfo};

/// For one review, with its repetitions.
const DEADLINE: Duration = Duration::from_secs(10);
/// Pause before a review that failed for a passing reason is repeated; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// Asks the API server with the node's own credentials.
pub struct ApiReviewer {
    client: Client,
    node: String,
}

impl ApiReviewer {
    /// Reviews of requests to this node.
    pub fn new(client: Client, node: impl Into<String>) -> Self {
        Self { client, node: node.into() }
    }

    async fn create<T>(&self, review: &T) -> Result<T, ReviewError>
    where
        T: kube::Resource<Scope = k8s_openapi::ClusterResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + Serialize
            + DeserializeOwned,
    {
        let api: Api<T> = Api::all(self.client.clone());
        let attempts = async {
            let mut pause = FIRST_PAUSE;
            loop {
                match api.create(&PostParams::default(), review).await {
                    Err(error) if is_passing(&error) => {
                        tokio::time::sleep(pause).await;
                        pause *= 2;
                    }
                    outcome => return outcome.map_err(|error| ReviewError(error.to_string())),
                }
            }
        };
        let late = |_| Err(ReviewError(format!("the API server did not answer within {DEADLINE:?}")));
        tokio::time::timeout(DEADLINE, attempts).await.unwrap_or_else(late)
    }
}

/// Whether asking again may help: the API server is overloaded, restarting or not reachable.
fn is_passing(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code == 429 || status.code >= 500,
        kube::Error::HyperError(_) | kube::Error::Service(_) => true,
        _ => false,
    }
}

impl Reviewer for ApiReviewer {
    fn token<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<UserInfo>, ReviewError>> {
        async move {
            let spec = TokenReviewSpec { token: token.to_owned(), ..TokenReviewSpec::default() };
            let review = self.create(&TokenReview { spec, ..TokenReview::default() }).await?;
            let Some(status) = review.status else { return Ok(None) };
            if status.authenticated != Some(true) {
                return Ok(None);
            }
            let Some(user) = status.user else { return Ok(None) };
            Ok(Some(UserInfo {
                name: user.username.unwrap_or_default(),
                uid: user.uid.unwrap_or_default(),
                groups: user.groups.unwrap_or_default(),
                extra: user.extra.unwrap_or_default(),
            }))
        }
        .boxed()
    }

    fn access<'a>(&'a self, review: &'a AccessReview) -> BoxFuture<'a, Result<bool, ReviewError>> {
        async move {
            let AccessReview { user, verb, subresource } = review;
            let attributes = ResourceAttributes {
                version: Some("v1".into()),
                resource: Some("nodes".into()),
                subresource: Some((*subresource).into()),
                name: Some(self.node.clone()),
                verb: Some((*verb).into()),
                ..ResourceAttributes::default()
            };
            let some = |text: &String| (!text.is_empty()).then(|| text.clone());
            let spec = SubjectAccessReviewSpec {
                resource_attributes: Some(attributes),
                user: some(&user.name),
                uid: some(&user.uid),
                groups: Some(user.groups.clone()),
                extra: (!user.extra.is_empty()).then(|| user.extra.clone()),
                ..SubjectAccessReviewSpec::default()
            };
            let answer = self.create(&SubjectAccessReview { spec, ..SubjectAccessReview::default() }).await?;
            Ok(answer.status.is_some_and(|status| status.allowed))
        }
        .boxed()
    }
}
