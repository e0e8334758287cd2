//! `gantry exec`: the streams of `kubectl exec` (WebSocket, `v5.channel.k8s.io`) over the local socket.

use std::process::ExitCode;

use bytes::Bytes;
use clap::{Arg, ArgAction, ArgMatches, Command};
use futures::{SinkExt, StreamExt};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::{ClientRequestBuilder, Error as WsError, Message};

use super::client::{CliError, Client, block_on, encode, state_dir_arg};
use super::target::{container, container_arg, find_pod, names, namespace_arg, pod_arg};

pub(super) const NAME: &str = "exec";

const PROTOCOL: &str = "v5.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// Before a channel's number: it has ended.
const CLOSE: u8 = 255;

/// Input read at once.
const CHUNK: usize = 32 << 10;

pub(super) fn command() -> Command {
    let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
    Command::new(NAME)
        .about("Run a command in a container")
        .arg(pod_arg())
        .arg(namespace_arg())
        .arg(container_arg())
        .arg(flag("stdin").short('i').help("Give it our input"))
        .arg(flag("tty").short('t').help("Give it a terminal"))
        .arg(state_dir_arg())
        .arg(
            Arg::new("command")
                .value_name("COMMAND")
                .required(true)
                .num_args(1..)
                .last(true)
                .help("Program and arguments, behind --"),
        )
}

pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    block_on(exec(matches))
}

/// Our terminal without line editing, until dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        if !isatty(&stdin) {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // a terminal that is gone needs no settings
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Flush, &self.0);
    }
}

async fn exec(matches: &ArgMatches) -> Result<ExitCode, CliError> {
    let client = Client::from_matches(matches);
    let pod = find_pod(&client, matches).await?;
    let container = container(&pod, matches)?;
    let (stdin, mut tty) = (matches.get_flag("stdin"), matches.get_flag("tty"));
    if tty && stdin && !isatty(std::io::stdin()) {
        eprintln!("Unable to use a TTY - input is not a terminal");
        tty = false;
    }
    let (namespace, name) = names(&pod);
    let mut uri = format!("ws://localhost/exec/{}/{}/{}?output=1", encode(namespace), encode(name), encode(&container));
    uri.push_str(if tty { "&tty=1" } else { "&error=1" });
    if stdin {
        uri.push_str("&input=1");
    }
    for word in matches.get_many::<String>("command").into_iter().flatten() {
        uri.push_str(&format!("&command={}", encode(word)));
    }
    let uri = uri.parse().map_err(|error| CliError::Other(format!("the command cannot be sent: {error}")))?;
    let request = ClientRequestBuilder::new(uri).with_sub_protocol(PROTOCOL);
    let (socket, _) =
        tokio_tungstenite::client_async(request, client.connect().await?).await.map_err(|error| match error {
            WsError::Http(response) => {
                let text = response.body().as_deref().map(String::from_utf8_lossy).unwrap_or_default();
                CliError::Refused { status: response.status(), message: text.trim_end().to_owned() }
            }
            error => CliError::Broken(error.to_string()),
        })?;
    let raw = if tty { Raw::enter() } else { None };
    let (mut sink, mut stream) = socket.split();
    let (outgoing, mut queue) = mpsc::channel::<Message>(4);
    let sender = tokio::spawn(async move {
        while let Some(message) = queue.recv().await {
            if sink.send(message).await.is_err() {
                return;
            }
        }
        // who has nothing to send keeps the connection open all the same
        std::future::pending::<()>().await;
    });
    if tty {
        tokio::spawn(send_sizes(outgoing.clone()));
    }
    if stdin {
        tokio::spawn(send_input(outgoing.clone()));
    }
    let mut status = None;
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let broken = |error: std::io::Error| CliError::Other(format!("write output: {error}"));
    while let Some(message) = stream.next().await {
        let data: Bytes = match message {
            Ok(Message::Binary(data)) => data,
            Ok(Message::Close(_)) => break,
            Ok(_) => continue,
            Err(_) if status.is_some() => break,
            Err(error) => return Err(CliError::Broken(error.to_string())),
        };
        let Some((channel, payload)) = data.split_first() else { continue };
        match *channel {
            STDOUT => {
                stdout.write_all(payload).await.map_err(broken)?;
                stdout.flush().await.map_err(broken)?;
            }
            STDERR => {
                stderr.write_all(payload).await.map_err(broken)?;
                stderr.flush().await.map_err(broken)?;
            }
            STATUS if !payload.is_empty() => status = Some(exit(payload)),
            _ => {}
        }
    }
    sender.abort();
    drop(raw);
    status.unwrap_or_else(|| Err(CliError::Broken("the connection ended before the command".to_owned())))
}

/// Sends the terminal's size now and whenever it changes.
async fn send_sizes(outgoing: mpsc::Sender<Message>) {
    let Ok(mut changed) = signal(SignalKind::window_change()) else { return };
    loop {
        if let Ok(size) = tcgetwinsize(std::io::stdout()) {
            let mut message = vec![RESIZE];
            message.extend(json!({"Width": size.ws_col, "Height": size.ws_row}).to_string().into_bytes());
            if outgoing.send(Message::binary(message)).await.is_err() {
                return;
            }
        }
        if changed.recv().await.is_none() {
            return;
        }
    }
}

async fn send_input(outgoing: mpsc::Sender<Message>) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; CHUNK];
    while let Ok(length @ 1..) = stdin.read(&mut buffer).await {
        let mut message = Vec::with_capacity(1 + length);
        message.push(STDIN);
        message.extend_from_slice(&buffer[..length]);
        if outgoing.send(Message::binary(message)).await.is_err() {
            return;
        }
    }
    // an agent that has left needs no end
    let _ = outgoing.send(Message::binary(vec![CLOSE, STDIN])).await;
}

#[derive(Deserialize)]
struct Status {
    status: String,
    message: Option<String>,
    details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Deserialize)]
struct Cause {
    reason: String,
    message: String,
}

/// The exit code from the `metav1.Status` at the end.
fn exit(payload: &[u8]) -> Result<ExitCode, CliError> {
    let status: Status = serde_json::from_slice(payload).map_err(|error| CliError::Broken(error.to_string()))?;
    if status.status == "Success" {
        return Ok(ExitCode::SUCCESS);
    }
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let code = causes.filter(|cause| cause.reason == "ExitCode").find_map(|cause| cause.message.parse::<i32>().ok());
    match code {
        Some(code) => Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)),
        None => Err(CliError::Other(status.message.unwrap_or_else(|| "the command failed".to_owned()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_is_the_exit_code() {
        let of = |text: &str| exit(text.as_bytes()).map(|code| format!("{code:?}")).map_err(|error| error.to_string());
        assert_eq!(of(r#"{"status":"Success"}"#), Ok(format!("{:?}", ExitCode::SUCCESS)));
        let failed = r#"{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"137"}]}}"#;
        assert_eq!(of(failed), Ok(format!("{:?}", ExitCode::from(137))));
        assert_eq!(of(r#"{"status":"Failure","message":"no such file"}"#), Err("no such file".to_owned()));
        assert!(of("garbage").is_err());
    }

    #[test]
    fn the_command_is_what_follows_the_dashes() {
        let matches = command().try_get_matches_from(["exec", "-it", "web", "--", "sh", "-c", "ls -l"]).unwrap();
        let words: Vec<_> = matches.get_many::<String>("command").unwrap().collect();
        assert_eq!(words, ["sh", "-c", "ls -l"]);
        assert!(matches.get_flag("stdin") && matches.get_flag("tty"));
        assert!(command().try_get_matches_from(["exec", "web"]).is_err());
    }
}
