//! `gantry logs`.

use std::io::Write;
use std::process::ExitCode;

use bytes::Bytes;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use http::Method;
use http_body_util::BodyExt;

use super::client::{CliError, Client, block_on, encode, state_dir_arg};
use super::target::{container, container_arg, find_pod, names, namespace_arg, pod_arg};

pub(super) const NAME: &str = "logs";

pub(super) fn command() -> Command {
    let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
    Command::new(NAME)
        .about("Print what a container wrote")
        .arg(pod_arg())
        .arg(namespace_arg())
        .arg(container_arg())
        .arg(flag("follow").short('f').help("Go on until the container ends"))
        .arg(flag("previous").short('p').help("Of the instance before the last restart"))
        .arg(flag("timestamps").help("With the time of each line"))
        .arg(
            Arg::new("tail")
                .long("tail")
                .value_name("LINES")
                .value_parser(value_parser!(u64))
                .help("Only the last lines"),
        )
        .arg(
            Arg::new("since")
                .long("since")
                .value_name("DURATION")
                .help("Only what is newer, for example 90s, 5m or 1h30m"),
        )
        .arg(state_dir_arg())
}

pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    block_on(print(matches))
}

async fn print(matches: &ArgMatches) -> Result<ExitCode, CliError> {
    let query = query(matches)?;
    let client = Client::from_matches(matches);
    let pod = find_pod(&client, matches).await?;
    let (namespace, name) = names(&pod);
    let container = container(&pod, matches)?;
    let path = format!("/containerLogs/{}/{}/{}?{query}", encode(namespace), encode(name), encode(&container));
    let mut body = client.send(Method::GET, &path, Bytes::new()).await?.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| CliError::Broken(error.to_string()))?;
        if let Ok(data) = frame.into_data() {
            let mut stdout = std::io::stdout().lock();
            if stdout.write_all(&data).and_then(|()| stdout.flush()).is_err() {
                // whoever read it (head, for example) has enough
                break;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The options as kubelet's `/containerLogs` takes them.
fn query(matches: &ArgMatches) -> Result<String, CliError> {
    let mut pairs = Vec::new();
    for flag in ["follow", "previous", "timestamps"] {
        if matches.get_flag(flag) {
            pairs.push(format!("{flag}=true"));
        }
    }
    if let Some(lines) = matches.get_one::<u64>("tail") {
        pairs.push(format!("tailLines={lines}"));
    }
    if let Some(since) = matches.get_one::<String>("since") {
        let wrong = || CliError::Other(format!("--since {since:?} is no duration: write 90s, 5m or 1h30m"));
        let duration: crate::config::Duration = since.parse().map_err(|_| wrong())?;
        if duration.std().is_zero() {
            return Err(wrong());
        }
        pairs.push(format!("sinceSeconds={}", duration.std().as_secs().max(1)));
    }
    Ok(pairs.join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_kubelets_options() {
        let query = |args: &[&str]| {
            let all = ["logs", "web"].iter().chain(args);
            super::query(&command().try_get_matches_from(all).unwrap())
        };
        assert_eq!(query(&[]).unwrap(), "");
        assert_eq!(
            query(&["-f", "--previous", "--tail=5", "--since", "1m30s"]).unwrap(),
            "follow=true&previous=true&tailLines=5&sinceSeconds=90"
        );
        for wrong in ["soon", "0s", "5"] {
            assert!(query(&["--since", wrong]).unwrap_err().to_string().contains(wrong));
        }
    }
}
