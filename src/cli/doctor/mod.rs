//! `gantry doctor`: whether this machine can be a node, and how to mend what is in the way.
//!
//! It takes the agent's flags, looks at what that agent would use, and changes nothing.

mod cgroups;
mod cluster;
mod finding;
mod kernel;
mod network;
mod ports;
mod storage;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};

use self::finding::{Finding, Level, render};
use super::client::block_on;
use crate::config::{self, Config, Flags, Host};
use crate::network::cni::{Cni, CniUse, Mode};

pub(super) const NAME: &str = "doctor";

pub(super) fn command() -> Command {
    let json = Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print the findings as JSON");
    config::command(NAME)
        .about("Check whether this machine can be a node, with the flags of gantry agent; exit status 1 if it cannot")
        .arg(json)
}

pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    let json = matches.get_flag("json");
    block_on(async move {
        let findings = examine(matches).await;
        let fatal = findings.iter().any(|finding| finding.level == Level::Fatal);
        if json {
            println!("{}", serde_json::to_string_pretty(&findings).unwrap_or_default());
        } else {
            print!("{}", render(&findings));
        }
        Ok(if fatal { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    })
}

async fn examine(matches: &ArgMatches) -> Vec<Finding> {
    let admin = caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_ADMIN).unwrap_or(false);
    let mut findings = vec![
        kernel::privileges(nix::unistd::geteuid().is_root(), admin),
        kernel::version(&rustix::system::uname().release().to_string_lossy()),
    ];
    findings.push(kernel::overlay(crate::image::probe_overlay()));
    findings.extend(kernel::features(Path::new("/")));
    findings.extend(kernel::limits(Path::new("/")));
    match load(matches) {
        Ok(config) => {
            findings.extend(machine(&config));
            findings.extend(cluster::check(&config).await);
        }
        Err(error) => findings.push(Finding::fatal(
            "configuration",
            error,
            "mend the flag or field it names; what depends on the configuration was not looked at",
        )),
    }
    findings
}

/// The configuration; cgroup v1 is a finding of its own.
fn load(matches: &ArgMatches) -> Result<Config, String> {
    let mut host = Host::read().map_err(|error| format!("cannot read /sys/fs/cgroup: {error}"))?;
    host.cgroup_v2 = true;
    let flags = Flags::from_matches(matches).map_err(|error| error.to_string())?;
    Config::load(flags, &host).map_err(|error| error.to_string())
}

fn machine(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let writable = |path: &Path| nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).is_ok();
    let kubelet = &config.kubelet;
    findings.extend(match Host::read() {
        Ok(host) if host.cgroup_v2 => cgroups::unified(Path::new("/sys/fs/cgroup"), &kubelet.cgroup_root, writable),
        _ => {
            let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            cgroups::legacy(&mountinfo, kubelet.fail_cgroup_v1, writable)
        }
    });
    let builtin = config.cni.policy != CniUse::Required;
    findings.push(kernel::nftables(crate::network::probe_nftables().map_err(|error| error.to_string()), builtin));
    let agent = ports::agent(&config.paths.state_dir);
    for (name, address, number, flag) in [
        ("port", &kubelet.address, kubelet.port, "--port"),
        ("healthz port", &kubelet.healthz_bind_address, kubelet.healthz_port, "--healthz-port"),
        ("read-only port", &kubelet.address, kubelet.read_only_port, "--read-only-port"),
    ] {
        if let (Ok(address), Ok(number @ 1..)) = (address.parse(), u16::try_from(number)) {
            findings.push(ports::port(name, address, number, flag, agent));
        }
    }
    let paths = &config.paths;
    for (path, of) in
        [(&paths.data_dir, storage::DATA), (&paths.root_dir, storage::ROOT), (&paths.state_dir, storage::STATE)]
    {
        match storage::space(path) {
            Ok((space, _)) => findings.push(storage::disk(path, of, space)),
            Err(error) => findings.push(Finding::fatal("disk", format!("{}: {error}", path.display()), "mount it")),
        }
    }
    if let Ok((_, tmpfs)) = storage::space(&paths.state_dir) {
        findings.push(storage::state(&paths.state_dir, tmpfs));
    }
    let cni = Cni::new(config.cni.clone());
    cni.refresh();
    let mode: Mode = cni.mode();
    findings.push(network::plugins(&mode, config.cni.policy, &config.cni.conf_dir));
    let resolver = &kubelet.resolver_config;
    findings.push(network::resolver(resolver, fs::read_to_string(resolver).map_err(|error| error.to_string())));
    // a k3s server tells its nodes
    if config.kubeconfig.is_some() && config.k3s.is_none() {
        findings.push(network::cluster_dns(&kubelet.cluster_dns));
    }
    findings
}
