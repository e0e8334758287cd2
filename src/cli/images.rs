//! `gantry images`.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use bytes::Bytes;
use clap::{Arg, ArgMatches, Command};
use http::Method;

use super::client::{CliError, Client, block_on, encode, state_dir_arg};
use super::table;
use crate::image::{ImageStore, StoreConfig};
use crate::server::local::LocalImage;

pub(super) const NAME: &str = "images";

pub(super) fn command() -> Command {
    let remove = Arg::new("rm").long("rm").value_name("IMAGE").help("Remove this image (name or ID) instead");
    let archive = Arg::new("archive").value_name("FILE").required(true).help("The archive; - is standard input");
    let data_dir = Arg::new("data-dir")
        .long("data-dir")
        .value_name("DIR")
        .help("Write into the store of this data directory, whose agent is not running");
    let import = Command::new("import")
        .about("Import the images of an archive (docker save, or an OCI layout; plain, gzip or zstd)")
        .arg(archive)
        .arg(data_dir);
    let tag = Command::new("tag")
        .about("Give an image one more name")
        .arg(Arg::new("image").value_name("IMAGE").required(true).help("Name or ID"))
        .arg(Arg::new("name").value_name("NAME").required(true).help("The new name"));
    Command::new(NAME)
        .about("List the images of this node, import or remove them")
        .args_conflicts_with_subcommands(true)
        .arg(remove)
        .arg(state_dir_arg().global(true))
        .subcommand(import)
        .subcommand(tag)
}

pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    let text = |matches: &ArgMatches, name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let client = Client::from_matches(matches);
    match matches.subcommand() {
        Some(("import", arguments)) => {
            let archive = text(arguments, "archive");
            match arguments.get_one::<String>("data-dir") {
                Some(data_dir) => block_on(async { import_here(&archive, Path::new(data_dir)) }),
                None => block_on(import(&client, &archive)),
            }
        }
        Some(("tag", arguments)) => block_on(tag(&client, text(arguments, "image"), text(arguments, "name"))),
        _ => match matches.get_one::<String>("rm") {
            Some(reference) => block_on(remove(&client, reference)),
            None => block_on(list(&client)),
        },
    }
}

fn unreadable(archive: &str) -> impl FnOnce(io::Error) -> CliError {
    move |error| CliError::Other(format!("open {archive}: {error}"))
}

/// Sends an archive to the agent.
pub(super) async fn import(client: &Client, archive: &str) -> Result<ExitCode, CliError> {
    let names: Vec<String> = if archive == "-" {
        client.upload("/images", tokio::io::stdin()).await?
    } else {
        client.upload("/images", tokio::fs::File::open(archive).await.map_err(unreadable(archive))?).await?
    };
    told(&names)
}

/// Writes into a store that no agent has open.
fn import_here(archive: &str, data_dir: &Path) -> Result<ExitCode, CliError> {
    let store = ImageStore::open(StoreConfig::new(data_dir)).map_err(|error| CliError::Other(error.to_string()))?;
    let images = if archive == "-" {
        store.import(io::stdin().lock())
    } else {
        store.import(File::open(archive).map_err(unreadable(archive))?)
    };
    let images = images.map_err(|error| CliError::Other(error.to_string()))?;
    told(&images.iter().map(|image| image.name.clone()).collect::<Vec<_>>())
}

fn told(names: &[String]) -> Result<ExitCode, CliError> {
    for name in names {
        println!("image {name} imported");
    }
    Ok(ExitCode::SUCCESS)
}

/// Gives an image one more name.
pub(super) async fn tag(client: &Client, image: String, name: String) -> Result<ExitCode, CliError> {
    let path = format!("/images/{}/tag?name={}", encode(&image), encode(&name));
    let names: Vec<String> = client.post(&path, Bytes::new()).await?;
    println!("image {image} tagged {}", names.join(", "));
    Ok(ExitCode::SUCCESS)
}

async fn remove(client: &Client, reference: &str) -> Result<ExitCode, CliError> {
    client.send(Method::DELETE, &format!("/images/{}", encode(reference)), Bytes::new()).await?;
    println!("image {reference} removed");
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn list(client: &Client) -> Result<ExitCode, CliError> {
    let images: Vec<LocalImage> = client.get("/images").await?;
    let mut rows = vec![["IMAGE", "ID", "SIZE", "LAST USED"].map(str::to_owned).to_vec()];
    let now = jiff::Timestamp::now().as_second();
    for image in images {
        let id = image.id.strip_prefix("sha256:").unwrap_or(&image.id).chars().take(12).collect::<String>();
        // one that has no tag is known by its digest
        let names = if image.tags.is_empty() { &image.digests } else { &image.tags };
        for name in names {
            let last_used = format!("{} ago", table::age(now - image.last_used));
            rows.push(vec![name.clone(), id.clone(), table::size(image.size), last_used]);
        }
    }
    print!("{}", table::render(&rows));
    Ok(ExitCode::SUCCESS)
}
