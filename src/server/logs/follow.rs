//! The asynchronous side of reading logs: a reader on a blocking thread, woken by writes and by the end of the
//! container.

use std::io;

use bytes::Bytes;
use tokio::{sync::mpsc, task::JoinError};

use super::{
    options::LogOptions,
    reader::{LogReader, Progress},
    watch::{LogWatcher, Subscription},
};
use crate::server::api::LogSource;

/// Chunks that may wait for a slow client.
const PENDING_CHUNKS: usize = 2;

/// Opens the log and reads it in the background. Chunks come through the channel; dropping it stops the reading.
/// With `follow` it ends when the container has ended and everything it wrote was delivered.
///
/// # Errors
/// If the files cannot be opened or watched.
pub async fn read(
    source: LogSource,
    options: LogOptions,
    watcher: &LogWatcher,
) -> io::Result<mpsc::Receiver<io::Result<Bytes>>> {
    // Watch first: what is written between opening and watching would otherwise go unnoticed.
    let changes = if options.follow { Some(watcher.watch(&source.directory)?) } else { None };
    let (directory, attempt) = (source.directory.clone(), source.attempt);
    let open = tokio::task::spawn_blocking(move || LogReader::open(directory, attempt, &options));
    let reader = open.await.map_err(lost)??;
    let (sender, chunks) = mpsc::channel(PENDING_CHUNKS);
    tokio::spawn(async move {
        if let Err(error) = run(reader, source, changes, &sender).await {
            // If the client is gone too, nobody is left to be told.
            let _ = sender.send(Err(error)).await;
        }
    });
    Ok(chunks)
}

fn lost(error: JoinError) -> io::Error {
    io::Error::other(error)
}

async fn run(
    mut reader: LogReader,
    mut source: LogSource,
    mut changes: Option<Subscription>,
    sender: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    loop {
        // Both are noted before reading, so that what happens meanwhile wakes us.
        let complete = *source.complete.borrow_and_update() || source.complete.has_changed().is_err();
        if let Some(changes) = &mut changes {
            changes.mark_seen();
        }
        let fill = tokio::task::spawn_blocking(move || {
            let mut out = Vec::new();
            let progress = reader.fill(&mut out, complete);
            (reader, out, progress)
        });
        let (returned, out, progress) = fill.await.map_err(lost)?;
        reader = returned;
        if !out.is_empty() && sender.send(Ok(out.into())).await.is_err() {
            return Ok(());
        }
        match (progress?, &mut changes) {
            (Progress::More, _) => {}
            (Progress::CaughtUp, Some(changes)) => {
                let gone = tokio::select! {
                    alive = changes.changed() => !alive,
                    // A dropped sender means that the container is gone; the next round sees it.
                    _ = source.complete.changed() => false,
                    () = sender.closed() => true,
                };
                if gone {
                    return Ok(());
                }
            }
            (Progress::Done | Progress::CaughtUp, _) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{File, OpenOptions},
        io::Write,
        time::Duration,
    };

    use tokio::{sync::watch, time::timeout};

    use super::*;

    async fn next(chunks: &mut mpsc::Receiver<io::Result<Bytes>>) -> Option<String> {
        let chunk = timeout(Duration::from_secs(10), chunks.recv()).await.expect("in time")?;
        Some(String::from_utf8(chunk.expect("chunk").to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn following_through_rotation_until_the_container_ends() {
        let directory = tempfile::tempdir().expect("dir");
        let path = directory.path().join("0.log");
        let (complete, completed) = watch::channel(false);
        let watcher = LogWatcher::new().expect("watcher");
        let source = LogSource { directory: directory.path().to_owned(), attempt: 0, complete: completed };
        let options = LogOptions { follow: true, ..LogOptions::default() };
        let mut chunks = read(source, options, &watcher).await.expect("read");
        let append = |text: &str| {
            let mut file = OpenOptions::new().create(true).append(true).open(&path).expect("open");
            writeln!(file, "2024-01-01T00:00:00Z stdout F {text}").expect("write");
        };
        append("one");
        assert_eq!(next(&mut chunks).await.as_deref(), Some("one\n"));
        append("two");
        assert_eq!(next(&mut chunks).await.as_deref(), Some("two\n"));
        std::fs::rename(&path, directory.path().join("0.log.20240101-000000")).expect("rename");
        append("three");
        assert_eq!(next(&mut chunks).await.as_deref(), Some("three\n"));
        append("last words");
        complete.send_replace(true);
        let mut rest = String::new();
        while let Some(text) = next(&mut chunks).await {
            rest += &text;
        }
        assert_eq!(rest, "last words\n");
    }

    #[tokio::test]
    async fn a_dropped_container_ends_it_and_a_dropped_client_stops_it() {
        let directory = tempfile::tempdir().expect("dir");
        File::create(directory.path().join("0.log")).expect("create");
        let watcher = LogWatcher::new().expect("watcher");
        let options = LogOptions { follow: true, ..LogOptions::default() };
        let (complete, completed) = watch::channel(false);
        let source = LogSource { directory: directory.path().to_owned(), attempt: 0, complete: completed };
        let mut first = read(source.clone(), options.clone(), &watcher).await.expect("read");
        let second = read(source, options, &watcher).await.expect("read");
        drop(second);
        drop(complete);
        assert_eq!(next(&mut first).await, None);
    }

    #[tokio::test]
    async fn a_missing_directory_is_an_error() {
        let (_complete, completed) = watch::channel(true);
        let watcher = LogWatcher::new().expect("watcher");
        let source = LogSource { directory: "/nonexistent/logs".into(), attempt: 0, complete: completed };
        assert!(read(source, LogOptions::default(), &watcher).await.is_err());
    }
}
