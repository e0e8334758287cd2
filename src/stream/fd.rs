//! Pipes and terminals received from a shim, as async readers and writers.
//!
//! The descriptor is switched to non-blocking mode. That flag belongs to the open file description: for a pipe
//! the other end keeps its own, a duplicate of *this* end (a terminal's master sent over a socket) shares it.

use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustix::{fs::OFlags, io::Errno, termios::Winsize};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

use super::remotecommand::TerminalSize;

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
    }
    Ok(())
}

/// An [`OwnedFd`] stays open and the same as long as it exists, which is what the unsafe successor of this
/// function asks its callers to promise.
#[allow(deprecated, reason = "the successor is unsafe for types that are not I/O-safe; OwnedFd is")]
fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}

/// The readable end of a pipe, socket or terminal. `EIO`, which a terminal's master reports once the last
/// process closed its side, is the end of the data.
#[derive(Debug)]
pub struct FdReader(AsyncFd<OwnedFd>);

impl FdReader {
    /// Takes over `fd`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the descriptor cannot be made non-blocking or cannot be polled (a regular file).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        nonblocking(&fd)?;
        register(fd, Interest::READABLE).map(Self)
    }
}

impl AsyncRead for FdReader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let outcome =
                guard.try_io(|fd| rustix::io::read(fd.get_ref(), buf.initialize_unfilled()).map_err(io::Error::from));
            match outcome {
                Ok(Ok(count)) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => return Poll::Ready(Ok(())),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

/// The writable end of a pipe, socket or terminal. Dropping it closes the descriptor.
#[derive(Debug)]
pub struct FdWriter(AsyncFd<OwnedFd>);

impl FdWriter {
    /// Takes over `fd`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the descriptor cannot be made non-blocking or cannot be polled (a regular file).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        nonblocking(&fd)?;
        register(fd, Interest::WRITABLE).map(Self)
    }
}

impl AsyncWrite for FdWriter {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            match guard.try_io(|fd| rustix::io::write(fd.get_ref(), data).map_err(io::Error::from)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(outcome) => return Poll::Ready(outcome),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The master side of a pseudo-terminal.
#[derive(Debug)]
pub struct Terminal {
    /// What the terminal shows.
    pub reader: FdReader,
    /// What is typed.
    pub writer: FdWriter,
    /// Changes the window size.
    pub resizer: Resizer,
}

impl Terminal {
    /// Takes over the master of a pseudo-terminal.
    ///
    /// # Errors
    /// If the descriptor cannot be duplicated or polled.
    pub fn new(master: OwnedFd) -> io::Result<Self> {
        let resizer = Resizer(Arc::new(master.try_clone()?));
        let reader = FdReader::new(master.try_clone()?)?;
        Ok(Self { reader, writer: FdWriter::new(master)?, resizer })
    }
}

/// Changes the window size of a terminal; the kernel sends `SIGWINCH` to its foreground processes.
#[derive(Clone, Debug)]
pub struct Resizer(Arc<OwnedFd>);

impl Resizer {
    /// Sets the window size.
    ///
    /// # Errors
    /// The error of `TIOCSWINSZ`.
    pub fn resize(&self, size: TerminalSize) -> io::Result<()> {
        let window = Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(&self.0, window)?)
    }
}

#[cfg(test)]
mod tests {
    use nix::pty::openpty;
    use rustix::pipe::pipe;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn pipe_carries_more_than_it_holds_and_ends() {
        let (read, write) = pipe().expect("pipe");
        let (mut reader, mut writer) = (FdReader::new(read).expect("reader"), FdWriter::new(write).expect("writer"));
        let sent: Vec<u8> = (0..1_000_000_u32).map(|n| u8::try_from(n % 251).unwrap_or(0)).collect();
        let copy = sent.clone();
        let task = tokio::spawn(async move {
            writer.write_all(&copy).await.expect("write");
            drop(writer);
        });
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.expect("read");
        task.await.expect("join");
        assert_eq!(received, sent);
    }

    #[tokio::test]
    async fn terminal_ends_when_its_last_user_leaves() {
        let pty = openpty(None, None).expect("openpty");
        let mut terminal = Terminal::new(pty.master).expect("terminal");
        terminal.resizer.resize(TerminalSize { width: 91, height: 33 }).expect("resize");
        let size = rustix::termios::tcgetwinsize(&pty.slave).expect("size");
        assert_eq!((size.ws_col, size.ws_row), (91, 33));
        rustix::io::write(&pty.slave, b"hello").expect("write");
        drop(pty.slave);
        let mut text = String::new();
        terminal.reader.read_to_string(&mut text).await.expect("read");
        assert_eq!(text, "hello");
    }
}
