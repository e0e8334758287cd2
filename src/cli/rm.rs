//! `gantry rm`.

use std::process::ExitCode;

use bytes::Bytes;
use clap::{Arg, ArgMatches, Command, value_parser};
use http::Method;

use super::client::{CliError, Client, block_on, encode, state_dir_arg};
use super::target::{find_pod, names, namespace_arg, pod_arg};

pub(super) const NAME: &str = "rm";

pub(super) fn command() -> Command {
    let grace = Arg::new("grace-period").long("grace-period").value_name("SECONDS").value_parser(value_parser!(u32));
    Command::new(NAME)
        .about("End a Pod that gantry run started, and wait until nothing is left of it")
        .arg(pod_arg())
        .arg(namespace_arg())
        .arg(grace.help("At most so much time to end by itself; by default the Pod's own"))
        .arg(state_dir_arg())
}

pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    block_on(remove(matches))
}

async fn remove(matches: &ArgMatches) -> Result<ExitCode, CliError> {
    let client = Client::from_matches(matches);
    let pod = find_pod(&client, matches).await?;
    let (namespace, name) = names(&pod);
    let path = format!("/pods/{}/{}", encode(namespace), encode(name));
    // first, so that its end is not missed
    let mut news = client.lines(&format!("{path}/watch")).await?;
    let grace = matches.get_one::<u32>("grace-period").map(|grace| format!("?grace={grace}")).unwrap_or_default();
    client.send(Method::DELETE, &format!("{path}{grace}"), Bytes::new()).await?;
    while news.next().await?.is_some() {}
    println!("pod {namespace}/{name} removed");
    Ok(ExitCode::SUCCESS)
}
