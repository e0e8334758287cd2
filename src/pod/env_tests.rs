use super::*;
use crate::objects::fake_api::FakeApi;
use proptest::prelude::*;
use serde_json::{Value, json};

/// The examples of the expansion design (`expansion_test.go` tests the same grammar).
#[test]
fn expands_references() {
    let vars = [("A", "a"), ("B", "$(A)"), ("EMPTY", ""), ("WITH SPACE", "s")];
    let map: BTreeMap<String, String> = vars.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    for (input, expected) in [
        ("$(A)", "a"),
        ("x$(A)y$(A)", "xaya"),
        ("$(B)", "$(A)"),
        ("$(EMPTY)", ""),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$a"),
        ("$$$$(A)", "$$(A)"),
        ("$", "$"),
        ("a$", "a$"),
        ("$A", "$A"),
        ("$(A", "$(A"),
        ("$(", "$("),
        ("$()", "$()"),
        ("$((A))", "$((A))"),
        ("$(WITH SPACE)", "s"),
        ("$é$(A)", "$éa"),
        ("${A} %$(A)%", "${A} %a%"),
        ("\n$(A)\u{0}", "\na\u{0}"),
    ] {
        assert_eq!(expand(input, |name| lookup(name, &[&map])), expected, "{input:?}");
    }
    assert_eq!(expand_all(&["$(A)".into(), "b".into()], &map), ["a", "b"]);
}

proptest! {
    #[test]
    fn text_without_dollar_signs_stays(input in "[^$]{0,40}") {
        prop_assert_eq!(expand(&input, |_| unreachable!()), input);
    }

    #[test]
    fn escaping_every_dollar_sign_gives_the_text_back(input in ".{0,40}") {
        prop_assert_eq!(expand(&input.replace('$', "$$"), |_| "X".to_owned()), input);
    }

    #[test]
    fn an_unknown_name_changes_nothing_but_escapes(input in "[$()a-cé]{0,30}") {
        let once = expand(&input, |name| format!("$({name})"));
        prop_assert!(once.len() <= input.len());
        if !input.contains("$$") { prop_assert_eq!(once, input); }
    }

    #[test]
    fn parsing_never_panics(content in "[A-C='#\n\r \t]{0,60}") {
        let _ = parse_env_file(&content, "A");
    }
}

#[test]
fn reads_env_files_strictly() {
    let parse = |content: &str| parse_env_file(content, "K");
    for (content, value) in [
        ("K='v'", Some("v")),
        ("# c\n\n  \tK='v' # comment\n", Some("v")),
        ("A='1'\r\nK='v'\r\n", Some("v")),
        ("K='$(X) \"\\n'", Some("$(X) \"\\n")),
        ("A='x\ny'\nK='l1\nl2'", Some("l1\nl2")),
        ("K='first'\nK='second'", Some("first")),
        ("K= 'v'", None),
        ("K=''", None),
        ("A='1'", None),
        ("", None),
    ] {
        assert_eq!(parse(content), Ok(value.map(str::to_owned)), "{content:?}");
    }
    for bad in ["K", "='v'", "K ='v'", "K=v", "K=\"v\"", "K='v", "K='v'x", "A=1\nK='v'"] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}

fn sources<'a>(
    objects: &'a ObjectCache,
    services: &'a ServiceCache,
    volume_path: &'a (dyn Fn(&str) -> Option<PathBuf> + Sync),
) -> EnvSources<'a> {
    EnvSources { objects, services, volume_path }
}

async fn environment(container: Value, links: bool) -> Result<BTreeMap<String, String>, EnvError> {
    let api = FakeApi::new();
    let object = |kind: &str, name: &str, data: Value| json!({"apiVersion": "v1", "kind": kind, "metadata": {"namespace": "ns", "name": name}, "data": data});
    api.put(
        "/api/v1/namespaces/ns/configmaps",
        &object("ConfigMap", "cm", json!({"a": "cm-a", "b": "cm-b", "odd.name": "o"})),
    );
    api.put("/api/v1/namespaces/ns/secrets", &object("Secret", "sec", json!({"a": "c2VjLWE="})));
    api.put("/api/v1/namespaces/ns/secrets", &object("Secret", "bin", json!({"a": "/w==", "nul": "AA=="})));
    for (namespace, name, ip) in [("default", "kubernetes", "10.0.0.1"), ("ns", "db", "10.0.0.2")] {
        api.put(
            "/api/v1/services",
            &json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": namespace, "name": name},
                "spec": {"clusterIP": ip, "ports": [{"port": 80}]}}),
        );
    }
    let mut container = container;
    container["name"] = json!("c");
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"namespace": "ns", "name": "p", "uid": "u"},
        "spec": {"enableServiceLinks": links, "containers": [container]}
    }))
    .unwrap();
    let objects = ObjectCache::new(api.client());
    objects.register_pod(&pod);
    let services = ServiceCache::new(api.client());
    let context = FieldContext { pod_ips: vec!["10.1.0.7".into()], ..FieldContext::default() };
    let container = &pod.spec.as_ref().unwrap().containers[0];
    make_environment(&pod, container.into(), &context, sources(&objects, &services, &|_| None)).await
}

#[tokio::test]
async fn later_sources_win_and_values_refer_to_earlier_ones() {
    let env = environment(
        json!({
            "envFrom": [
                {"configMapRef": {"name": "cm"}},
                {"prefix": "P_", "secretRef": {"name": "sec"}},
                {"configMapRef": {"name": "gone", "optional": true}},
                {"secretRef": {"name": "gone", "optional": true}}],
            "env": [
                {"name": "b", "value": "own"},
                {"name": "REF", "value": "$(a)/$(P_a)/$(b)/$(LATER)/$(DB_SERVICE_HOST)/$$(a)"},
                {"name": "LATER", "value": "x"},
                {"name": "EMPTY"},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "CM", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "a"}}},
                {"name": "SEC", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "a"}}},
                {"name": "OPT", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "zz", "optional": true}}},
                {"name": "OPT2", "valueFrom": {"secretKeyRef": {"name": "gone", "key": "zz", "optional": true}}},
                {"name": "DB_PORT", "value": "mine"}]
        }),
        true,
    )
    .await
    .unwrap();
    for (name, value) in [
        ("a", "cm-a"),
        ("odd.name", "o"),
        ("P_a", "sec-a"),
        ("b", "own"),
        ("REF", "cm-a/sec-a/own/$(LATER)/10.0.0.2/$(a)"),
        ("EMPTY", ""),
        ("IP", "10.1.0.7"),
        ("CM", "cm-a"),
        ("SEC", "sec-a"),
        ("DB_PORT", "mine"),
        ("DB_SERVICE_HOST", "10.0.0.2"),
        ("KUBERNETES_SERVICE_HOST", "10.0.0.1"),
    ] {
        assert_eq!(env.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert!(!env.contains_key("OPT") && !env.contains_key("OPT2"));
}

#[tokio::test]
async fn without_service_links_only_the_api_server_is_named() {
    let env = environment(json!({}), false).await.unwrap();
    assert!(env.contains_key("KUBERNETES_PORT_80_TCP_ADDR") && !env.contains_key("DB_SERVICE_HOST"));
}

#[tokio::test]
async fn errors_have_kubelets_texts() {
    let key = |kind: &str, name: &str, key: &str| json!({"env": [{"name": "X", "valueFrom": {kind: {"name": name, "key": key}}}]});
    for (container, text) in [
        (key("configMapKeyRef", "cm", "zz"), "couldn't find key zz in ConfigMap ns/cm"),
        (key("secretKeyRef", "sec", "zz"), "couldn't find key zz in Secret ns/sec"),
        (key("configMapKeyRef", "gone", "zz"), "configmap \"gone\" not found"),
        (json!({"envFrom": [{"secretRef": {"name": "gone"}}]}), "secret \"gone\" not found"),
        (
            key("secretKeyRef", "bin", "a"),
            "the value of environment variable \"X\" is no UTF-8 text or has a NUL byte; mount the key as a file instead",
        ),
        (
            key("secretKeyRef", "bin", "nul"),
            "the value of environment variable \"X\" is no UTF-8 text or has a NUL byte; mount the key as a file instead",
        ),
        (
            json!({"env": [{"name": "X", "valueFrom": {"fileKeyRef": {"volumeName": "v", "path": "f", "key": "K"}}}]}),
            "cannot find the volume \"v\" referenced by FileKeyRef",
        ),
    ] {
        assert_eq!(environment(container, true).await.unwrap_err().to_string(), text);
    }
}

#[tokio::test]
async fn a_static_pod_does_not_wait_for_services() {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"namespace": "ns", "name": "p", "annotations": {"kubernetes.io/config.source": "file"}},
        "spec": {"containers": [{"name": "c", "env": [{"name": "A", "value": "1"}]}]}
    }))
    .unwrap();
    let api = FakeApi::new();
    api.fail("/api/v1/services", 503, usize::MAX);
    let (objects, services) = (ObjectCache::standalone(), ServiceCache::new(api.client()));
    let container = &pod.spec.as_ref().unwrap().containers[0];
    let context = FieldContext::default();
    let env =
        make_environment(&pod, container.into(), &context, sources(&objects, &services, &|_| None)).await.unwrap();
    assert_eq!(env, [("A".to_owned(), "1".to_owned())].into());
}

#[tokio::test]
async fn file_keys_are_read_inside_the_volume_only() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("env"), "K='v'\n").unwrap();
    std::fs::write(dir.path().join("outside"), "K='stolen'\n").unwrap();
    std::os::unix::fs::symlink("../outside", volume.join("up")).unwrap();
    std::os::unix::fs::symlink("/env", volume.join("rooted")).unwrap();
    let fifo = volume.join("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from(0o600), 0).unwrap();
    let objects = ObjectCache::standalone();
    let services = ServiceCache::standalone();
    let ask = async |path: &str, key: &str, optional: bool| {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "env": [
            {"name": "X", "valueFrom": {"fileKeyRef": {"volumeName": "v", "path": path, "key": key, "optional": optional}}}]}]}}))
        .unwrap();
        let find = |name: &str| (name == "v").then(|| volume.clone());
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let context = FieldContext::default();
        make_environment(&pod, container.into(), &context, sources(&objects, &services, &find)).await
    };
    assert_eq!(ask("env", "K", false).await.unwrap()["X"], "v");
    assert_eq!(ask("rooted", "K", false).await.unwrap()["X"], "v");
    assert!(ask("env", "Z", true).await.unwrap().is_empty());
    let error = ask("env", "Z", false).await.unwrap_err();
    assert_eq!(error.to_string(), "environment variable key \"Z\" not found in file \"env\"");
    for path in ["up", "../outside", "fifo", "none", "."] {
        assert_eq!(ask(path, "K", false).await, Err(EnvError::File), "{path}");
    }
}
