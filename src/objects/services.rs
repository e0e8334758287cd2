//! Services, and the environment variables that tell a container where they are.
//!
//! Sources: `pkg/kubelet/envvars/envvars.go`, `pkg/kubelet/kubelet_pods.go` (`getServiceEnvVarMap`). Kept per Service
//! is what those variables need, nothing else: a cluster may have thousands.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Service;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch_objects};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// The Services have not been read once since the agent started. Retryable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("services have not yet been read at least once, cannot construct envvars")]
pub struct ServicesNotRead;

/// What the variables of one Service are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Link {
    cluster_ip: String,
    ports: Vec<Port>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Port {
    name: Option<String>,
    port: i32,
    protocol: String,
}

type Links = HashMap<String, BTreeMap<String, Link>>;

/// All Services of the cluster that have an address, by namespace and name.
#[derive(Debug)]
pub struct ServiceCache {
    links: Arc<RwLock<Links>>,
    /// `None` without an API server.
    read: Option<watch::Receiver<bool>>,
    task: Option<AbortHandle>,
}

impl Drop for ServiceCache {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl ServiceCache {
    /// Starts to watch the Services; call it within a tokio runtime.
    #[must_use]
    pub fn new(client: Client) -> Self {
        let links = Arc::new(RwLock::new(Links::new()));
        let (done, read) = watch::channel(false);
        let task = tokio::spawn(follow(client, links.clone(), done)).abort_handle();
        Self { links, read: Some(read), task: Some(task) }
    }

    /// Without an API server there are no Services, as with a standalone kubelet.
    #[must_use]
    pub fn standalone() -> Self {
        Self { links: Arc::default(), read: None, task: None }
    }

    /// Waits until the Services have been read once.
    ///
    /// # Errors
    /// [`ServicesNotRead`] if that does not happen within `deadline`.
    pub async fn wait_until_read(&self, deadline: Duration) -> Result<(), ServicesNotRead> {
        let Some(read) = &self.read else { return Ok(()) };
        match tokio::time::timeout(deadline, read.clone().wait_for(|read| *read)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ServicesNotRead),
        }
    }

    /// Whether the Services have been read once, or there is no API server to read them from.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.read.as_ref().is_none_or(|read| *read.borrow())
    }

    /// The variables for a Pod of `namespace`: those of `default/kubernetes` always, those of the Pod's own namespace
    /// if `enable_service_links`.
    #[must_use]
    pub fn environment(&self, namespace: &str, enable_service_links: bool) -> BTreeMap<String, String> {
        let links = self.links.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut environment = BTreeMap::new();
        let own = enable_service_links.then(|| links.get(namespace)).flatten();
        // A Service called "kubernetes" of the Pod's own namespace takes the place of the cluster's.
        let shadowed = namespace != "default" && own.is_some_and(|own| own.contains_key("kubernetes"));
        if let Some(link) = links.get("default").and_then(|default| default.get("kubernetes")).filter(|_| !shadowed) {
            link.variables("kubernetes", &mut environment);
        }
        for (name, link) in own.into_iter().flatten() {
            link.variables(name, &mut environment);
        }
        environment
    }
}

async fn follow(client: Client, links: Arc<RwLock<Links>>, read: watch::Sender<bool>) {
    // Headless Services have no variables; kubelet asks with the same selector.
    let config = watcher::Config::default().fields("spec.clusterIP!=None");
    let mut events = std::pin::pin!(watch_objects(Api::<Service>::all(client), config).default_backoff());
    let mut fresh = Links::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => fresh.clear(),
            Ok(Event::InitApply(service)) => apply(&mut fresh, &service),
            Ok(Event::InitDone) => {
                *write(&links) = std::mem::take(&mut fresh);
                read.send_replace(true);
            }
            Ok(Event::Apply(service)) => apply(&mut write(&links), &service),
            Ok(Event::Delete(service)) => remove(&mut write(&links), &service),
            Err(error) => tracing::warn!(%error, "Failed to watch services"),
        }
    }
}

fn write(links: &RwLock<Links>) -> std::sync::RwLockWriteGuard<'_, Links> {
    links.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn identity(service: &Service) -> (&str, &str) {
    (service.metadata.namespace.as_deref().unwrap_or("default"), service.metadata.name.as_deref().unwrap_or_default())
}

fn apply(links: &mut Links, service: &Service) {
    let (namespace, name) = identity(service);
    match Link::new(service) {
        Some(link) => {
            links.entry(namespace.to_owned()).or_default().insert(name.to_owned(), link);
        }
        None => remove(links, service),
    }
}

fn remove(links: &mut Links, service: &Service) {
    let (namespace, name) = identity(service);
    if let Some(names) = links.get_mut(namespace) {
        names.remove(name);
        if names.is_empty() {
            links.remove(namespace);
        }
    }
}

/// The variables of one Service; none if it has no address or no ports.
#[must_use]
pub fn service_environment(service: &Service) -> BTreeMap<String, String> {
    let mut environment = BTreeMap::new();
    if let Some(link) = Link::new(service) {
        link.variables(identity(service).1, &mut environment);
    }
    environment
}

impl Link {
    fn new(service: &Service) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        let cluster_ip = spec.cluster_ip.clone().filter(|ip| !ip.is_empty() && ip != "None")?;
        let ports: Vec<Port> = spec
            .ports
            .iter()
            .flatten()
            .map(|port| Port {
                name: port.name.clone().filter(|name| !name.is_empty()),
                port: port.port,
                protocol: port.protocol.clone().filter(|p| !p.is_empty()).unwrap_or_else(|| "TCP".to_owned()),
            })
            .collect();
        (!ports.is_empty()).then_some(Self { cluster_ip, ports })
    }

    fn variables(&self, service: &str, out: &mut BTreeMap<String, String>) {
        let prefix = variable_name(service);
        let address = &self.cluster_ip;
        let host = if address.contains(':') { format!("[{address}]") } else { address.clone() };
        out.insert(format!("{prefix}_SERVICE_HOST"), address.clone());
        for (index, port) in self.ports.iter().enumerate() {
            let (number, protocol) = (port.port, port.protocol.to_lowercase());
            let url = format!("{protocol}://{host}:{number}");
            if index == 0 {
                out.insert(format!("{prefix}_SERVICE_PORT"), number.to_string());
                out.insert(format!("{prefix}_PORT"), url.clone());
            }
            if let Some(name) = &port.name {
                out.insert(format!("{prefix}_SERVICE_PORT_{}", variable_name(name)), number.to_string());
            }
            let link = format!("{prefix}_PORT_{number}_{}", protocol.to_uppercase());
            out.insert(format!("{link}_PROTO"), protocol);
            out.insert(format!("{link}_PORT"), number.to_string());
            out.insert(format!("{link}_ADDR"), address.clone());
            out.insert(link, url);
        }
    }
}

fn variable_name(name: &str) -> String {
    name.replace('-', "_").to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::fake_api::FakeApi;
    use serde_json::json;

    fn service(namespace: &str, name: &str, ip: &str) -> serde_json::Value {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": namespace, "name": name, "resourceVersion": "1"},
            "spec": {"clusterIP": ip, "ports": [{"port": 80, "name": "p-one"}, {"port": 53, "protocol": "UDP", "name": "dns"}]}
        })
    }

    #[test]
    fn variables_are_named_as_kubelet_names_them() {
        let environment = service_environment(&serde_json::from_value(service("ns", "foo-bar", "1.2.3.4")).unwrap());
        let expected = [
            ("FOO_BAR_PORT", "tcp://1.2.3.4:80"),
            ("FOO_BAR_PORT_53_UDP", "udp://1.2.3.4:53"),
            ("FOO_BAR_PORT_53_UDP_ADDR", "1.2.3.4"),
            ("FOO_BAR_PORT_53_UDP_PORT", "53"),
            ("FOO_BAR_PORT_53_UDP_PROTO", "udp"),
            ("FOO_BAR_PORT_80_TCP", "tcp://1.2.3.4:80"),
            ("FOO_BAR_PORT_80_TCP_ADDR", "1.2.3.4"),
            ("FOO_BAR_PORT_80_TCP_PORT", "80"),
            ("FOO_BAR_PORT_80_TCP_PROTO", "tcp"),
            ("FOO_BAR_SERVICE_HOST", "1.2.3.4"),
            ("FOO_BAR_SERVICE_PORT", "80"),
            ("FOO_BAR_SERVICE_PORT_DNS", "53"),
            ("FOO_BAR_SERVICE_PORT_P_ONE", "80"),
        ];
        assert_eq!(environment, expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        let six = service_environment(&serde_json::from_value(service("ns", "six", "fd00::1")).unwrap());
        assert_eq!(six["SIX_PORT"], "tcp://[fd00::1]:80");
        assert_eq!(six["SIX_SERVICE_HOST"], "fd00::1");
        for headless in ["None", ""] {
            assert!(service_environment(&serde_json::from_value(service("ns", "x", headless)).unwrap()).is_empty());
        }
    }

    #[tokio::test]
    async fn follows_the_api_server() {
        let api = FakeApi::new();
        api.put("/api/v1/services", &service("default", "kubernetes", "10.96.0.1"));
        api.put("/api/v1/services", &service("shop", "db", "10.96.0.2"));
        api.put("/api/v1/services", &service("other", "secretive", "10.96.0.3"));
        let cache = ServiceCache::new(api.client());
        cache.wait_until_read(Duration::from_secs(5)).await.unwrap();

        let bare = cache.environment("shop", false);
        assert_eq!(bare["KUBERNETES_SERVICE_HOST"], "10.96.0.1");
        assert!(!bare.contains_key("DB_SERVICE_HOST"));
        let linked = cache.environment("shop", true);
        assert_eq!(linked["DB_SERVICE_HOST"], "10.96.0.2");
        assert!(!linked.contains_key("SECRETIVE_SERVICE_HOST"));

        api.put("/api/v1/services", &service("shop", "kubernetes", "10.96.0.9"));
        api.until(|| cache.environment("shop", true)["KUBERNETES_SERVICE_HOST"] == "10.96.0.9").await;
        assert_eq!(cache.environment("shop", false)["KUBERNETES_SERVICE_HOST"], "10.96.0.1");
        api.delete("/api/v1/services", "shop", "db");
        api.until(|| !cache.environment("shop", true).contains_key("DB_SERVICE_HOST")).await;
        assert_eq!(api.requests()[0].query.get("fieldSelector").map(String::as_str), Some("spec.clusterIP!=None"));
    }

    #[tokio::test]
    async fn says_when_services_were_never_read() {
        let api = FakeApi::new();
        api.fail("/api/v1/services", 503, usize::MAX);
        let cache = ServiceCache::new(api.client());
        assert_eq!(cache.wait_until_read(Duration::from_millis(50)).await, Err(ServicesNotRead));
        assert!(!cache.is_read());
        assert!(ServiceCache::standalone().is_read());
    }
}
