//! What a k3s server tells its nodes about the cluster (`/v1-k3s/config`).

use serde::{Deserialize, Serialize};

use super::connection::Endpoint;

/// What the cluster's settings mean for a node (`pkg/daemons/config/types.go`, field names as Go writes them).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ServerConfig {
    /// DNS servers of the cluster, one per family.
    #[serde(rename = "ClusterDNSs", deserialize_with = "or_default")]
    cluster_dns_all: Vec<String>,
    /// The first of them.
    #[serde(rename = "ClusterDNS", deserialize_with = "or_default")]
    cluster_dns: String,
    /// DNS domain of the cluster.
    #[serde(deserialize_with = "or_default")]
    pub cluster_domain: String,
    /// Port of the API server.
    #[serde(rename = "HTTPSPort")]
    https_port: u16,
    /// Port of the supervisor.
    supervisor_port: u16,
}

/// Go writes `null` for what is not there.
fn or_default<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl ServerConfig {
    /// DNS servers of the cluster.
    #[must_use]
    pub fn dns(&self) -> Vec<String> {
        match self.cluster_dns_all.as_slice() {
            [] => Some(self.cluster_dns.clone()).filter(|address| !address.is_empty()).into_iter().collect(),
            all => all.to_vec(),
        }
    }

    /// Where the API server is, seen from who knows the supervisor under a name.
    #[must_use]
    pub fn api_server(&self, supervisor: &Endpoint) -> Endpoint {
        let apart = self.https_port > 0 && self.https_port != self.supervisor_port;
        let port = if apart { self.https_port } else { supervisor.port };
        Endpoint { host: supervisor.host.clone(), port }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_as_go_writes_them() {
        let text = r#"{"ClusterDNS":"10.43.0.10","ClusterDNSs":["10.43.0.10","fd00::a"],"ClusterDomain":"c.local",
            "HTTPSPort":6443,"SupervisorPort":9345,"Skips":null,"ClusterIPRange":{"IP":"10.42.0.0","Mask":"//8AAA=="}}"#;
        let config: ServerConfig = serde_json::from_str(text).unwrap();
        assert_eq!(
            (config.dns(), config.cluster_domain.as_str()),
            (vec!["10.43.0.10".into(), "fd00::a".into()], "c.local")
        );
        let supervisor = Endpoint { host: "h".into(), port: 9345 };
        assert_eq!(config.api_server(&supervisor).port, 6443);
        let older = r#"{"ClusterDNS":"10.43.0.10","ClusterDNSs":null,"ClusterDomain":"","HTTPSPort":6443,"SupervisorPort":6443}"#;
        let config: ServerConfig = serde_json::from_str(older).unwrap();
        assert_eq!(config.dns(), ["10.43.0.10"]);
        // a load balancer's port is not the server's
        assert_eq!(config.api_server(&Endpoint { host: "h".into(), port: 443 }).port, 443);
        let nothing: ServerConfig = serde_json::from_str(r#"{"ClusterDNS":null}"#).unwrap();
        assert_eq!(nothing.dns(), Vec::<String>::new());
        assert_eq!(serde_json::from_str::<ServerConfig>(&serde_json::to_string(&config).unwrap()).unwrap(), config);
    }
}
