//! `ctr`, `crictl` and `containerd`: the few command lines of theirs that `kind` runs in a node.
//!
//! `kind load` asks for an image, imports and tags it. Called under one of these names (links to our file in kind's node
//! image) the program does just that, and says of everything else that it is not what its name promises.

use std::path::Path;
use std::process::ExitCode;

use super::USAGE;
use super::client::{CliError, Client, block_on};
use super::images;
use crate::image::is_called;
use crate::server::local::LocalImage;

/// What is read of containerd's configuration: the form of its version 3, and the only snapshotter there is.
const CONFIGURATION: &str =
    "version = 3\n\n[plugins]\n  [plugins.'io.containerd.cri.v1.images']\n    snapshotter = 'overlayfs'\n";

/// Runs a command line of `program`, if that is one of the three names. `arguments` are without the program's name.
pub(super) fn run(program: &str, arguments: &[&str]) -> Option<ExitCode> {
    let known = match program {
        "containerd" => "containerd config dump",
        "crictl" => "crictl inspecti IMAGE; crictl images",
        "ctr" => {
            "ctr --namespace=k8s.io images import --all-platforms --digests --snapshotter=overlayfs -; \
             ctr --namespace=k8s.io images tag --force IMAGE NAME"
        }
        _ => return None,
    };
    let client = Client::new(Path::new("/run/gantry"));
    Some(match (program, arguments) {
        ("containerd", ["config", "dump"]) => {
            print!("{CONFIGURATION}");
            ExitCode::SUCCESS
        }
        ("crictl", ["inspecti", image]) => block_on(inspect(&client, image)),
        ("crictl", ["images"]) => block_on(images::list(&client)),
        ("ctr", ["--namespace=k8s.io", "images", "import", flags @ .., "-"]) if flags.iter().all(is_import_flag) => {
            block_on(images::import(&client, "-"))
        }
        ("ctr", ["--namespace=k8s.io", "images", "tag", "--force", image, name]) => {
            block_on(images::tag(&client, (*image).to_owned(), (*name).to_owned()))
        }
        _ => {
            eprintln!(
                "Error: this {program} is gantry, the node's kubelet and runtime in one, and understands only what kind \
                 asks for: {known}. Everything else is done by gantry itself: gantry --help"
            );
            ExitCode::from(USAGE)
        }
    })
}

/// Flags that ask for what an import does anyway.
fn is_import_flag(flag: &&str) -> bool {
    matches!(*flag, "--all-platforms" | "--digests" | "--snapshotter=overlayfs")
}

/// The fields of `crictl inspecti` that a node without CRI has.
async fn inspect(client: &Client, name: &str) -> Result<ExitCode, CliError> {
    let images: Vec<LocalImage> = client.get("/images").await?;
    let called = |image: &&LocalImage| is_called(name, &image.id, &[image.tags.as_slice(), &image.digests].concat());
    let Some(image) = images.iter().find(called) else {
        return Err(CliError::Other(format!("no such image {name:?} present: gantry images lists them")));
    };
    println!("{:#}", inspected(image));
    Ok(ExitCode::SUCCESS)
}

fn inspected(image: &LocalImage) -> serde_json::Value {
    serde_json::json!({"status": {
        "id": image.id, "repoTags": image.tags, "repoDigests": image.digests, "size": image.size.to_string(),
    }})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(program: &str, arguments: &[&str]) -> String {
        format!("{:?}", run(program, arguments))
    }

    #[test]
    fn only_what_kind_asks_for_is_understood() {
        let (success, usage) = (Some(ExitCode::SUCCESS), Some(ExitCode::from(USAGE)));
        assert_eq!(code("containerd", &["config", "dump"]), format!("{success:?}"));
        for (program, arguments) in [
            ("containerd", &["config", "default"][..]),
            ("containerd", &[]),
            ("crictl", &["ps"]),
            ("ctr", &["images", "import", "-"]),
            ("ctr", &["--namespace=k8s.io", "images", "import", "--base-name=x", "-"]),
            ("ctr", &["--namespace=k8s.io", "images", "tag", "a", "b"]),
        ] {
            assert_eq!(code(program, arguments), format!("{usage:?}"), "{program} {arguments:?}");
        }
        assert!(run("gantry", &["config", "dump"]).is_none());
    }

    #[test]
    fn the_answers_have_what_kind_reads() {
        let image = LocalImage {
            id: "sha256:0123".into(),
            tags: vec!["docker.io/library/app:v1".into()],
            digests: Vec::new(),
            size: 5,
            last_used: 0,
        };
        let status = &inspected(&image)["status"];
        assert_eq!(
            (&status["id"], &status["repoTags"][0]),
            (&"sha256:0123".into(), &"docker.io/library/app:v1".into())
        );
        for line in ["version = 3", "io.containerd.cri.v1.images", "snapshotter = 'overlayfs'"] {
            assert!(CONFIGURATION.contains(line));
        }
    }
}
