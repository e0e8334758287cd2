//! What ADD answers: interfaces, addresses, routes (CNI specification, section 5). Only the addresses matter to us, the
//! rest is for later plugins and for DEL.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::conflist::Version;

/// Reads an answer. A plugin may leave out `cniVersion`: then it is that of the request.
pub fn parse(answer: &[u8], version: Version) -> Result<Map<String, Value>, String> {
    if answer.iter().all(u8::is_ascii_whitespace) {
        return Err("answered nothing: a result is expected".into());
    }
    let mut result: Map<String, Value> =
        serde_json::from_slice(answer).map_err(|error| format!("answered no result: {error}"))?;
    match result.get("cniVersion") {
        None => drop(result.insert("cniVersion".into(), version.as_str().into())),
        Some(Value::String(text)) if Version::parse(text).is_some() => {}
        Some(other) => return Err(format!("answered in an unknown cniVersion {other}")),
    }
    Ok(result)
}

/// The addresses of one interface inside the container, at most one for each family, IPv4 first (what containerd and
/// kubelet make of a result).
pub fn addresses(result: &Map<String, Value>, interface: &str) -> Result<Vec<IpAddr>, String> {
    let interfaces = result.get("interfaces").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let inside = |index: usize| {
        let entry = interfaces.get(index)?;
        let text = |key| entry.get(key).and_then(Value::as_str).unwrap_or_default();
        Some(!text("sandbox").is_empty() && text("name") == interface)
    };
    let mut found: Vec<IpAddr> = Vec::new();
    for entry in result.get("ips").and_then(Value::as_array).into_iter().flatten() {
        let address = entry.get("address").and_then(Value::as_str).unwrap_or_default();
        let net: IpNet = address.parse().map_err(|_| format!("answered with the invalid address {address:?}"))?;
        let ours = match entry.get("interface").filter(|index| !index.is_null()) {
            None => true,
            Some(index) => {
                let known = index.as_u64().and_then(|index| usize::try_from(index).ok()).and_then(inside);
                known.ok_or_else(|| format!("answered with address {address} of the unknown interface {index}"))?
            }
        };
        if ours && !found.iter().any(|other| other.is_ipv4() == net.addr().is_ipv4()) {
            found.push(net.addr());
        }
    }
    if found.is_empty() {
        return Err(format!("answered without an address for {interface}"));
    }
    found.sort_by_key(IpAddr::is_ipv6);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(text: &str) -> Result<Vec<String>, String> {
        let result = parse(text.as_bytes(), Version::V1_0_0)?;
        Ok(addresses(&result, "eth0")?.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_addresses_inside_the_container_count() {
        let text = r#"{"cniVersion": "0.4.0", "interfaces": [{"name": "cni0"}, {"name": "eth0"}, {"name": "eth0",
            "sandbox": "/n"}, {"name": "net1", "sandbox": "/n"}], "ips": [
            {"version": "6", "interface": 2, "address": "fd00::5/64"}, {"version": "4", "interface": 0, "address": "10.0.0.1/24"},
            {"version": "4", "interface": 3, "address": "10.9.0.1/24"}, {"version": "4", "interface": 2, "address": "10.0.0.5/24"},
            {"version": "4", "interface": 2, "address": "10.0.0.6/24"}]}"#;
        assert_eq!(ips(text).unwrap(), ["10.0.0.5", "fd00::5"]);
        assert_eq!(ips(r#"{"ips": [{"address": "10.0.0.9/32"}]}"#).unwrap(), ["10.0.0.9"]);
        let filled = parse(br#"{"ips": []}"#, Version::V0_3_1).unwrap();
        assert_eq!(filled["cniVersion"], "0.3.1");
    }

    #[test]
    fn nonsense_is_named() {
        assert!(ips(" \n").unwrap_err().contains("answered nothing"));
        assert!(ips("oops").unwrap_err().contains("no result"));
        assert!(ips("[]").unwrap_err().contains("no result"));
        assert!(ips(r#"{"cniVersion": "7.0.0"}"#).unwrap_err().contains("7.0.0"));
        assert!(ips("{}").unwrap_err().contains("without an address for eth0"));
        assert!(ips(r#"{"ips": [{"address": "10.0.0.9"}]}"#).unwrap_err().contains("10.0.0.9"));
        assert!(ips(r#"{"ips": [{"address": "10.0.0.9/8", "interface": 4}]}"#).unwrap_err().contains("interface 4"));
        assert!(ips(r#"{"ips": [{"address": "10.0.0.9/8", "interface": -1}]}"#).unwrap_err().contains("interface -1"));
    }
}
