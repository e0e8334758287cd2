//! `gantry images`.

use std::process::ExitCode;

use bytes::Bytes;
use clap::{Arg, ArgMatches, Command};
use http::Method;

use super::client::{CliError, Client, block_on, encode, state_dir_arg};
use super::table;
use crate::server::local::LocalImage;

pub(super) const NAME: &str = "images";

pub(super) fn command() -> Command {
    let remove = Arg::new("rm").long("rm").value_name("IMAGE").help("Remove this image (name or ID) instead");
    Command::new(NAME).about("List the images of this node").arg(remove).arg(state_dir_arg())
}

pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    let client = Client::from_matches(matches);
    match matches.get_one::<String>("rm") {
        Some(reference) => block_on(remove(&client, reference)),
        None => block_on(list(&client)),
    }
}

async fn remove(client: &Client, reference: &str) -> Result<ExitCode, CliError> {
    client.send(Method::DELETE, &format!("/images/{}", encode(reference)), Bytes::new()).await?;
    println!("image {reference} removed");
    Ok(ExitCode::SUCCESS)
}

async fn list(client: &Client) -> Result<ExitCode, CliError> {
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
