//! Connections: who asks, what is asked, and how it is answered.

use std::io;
use std::os::fd::OwnedFd;

use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::unistd::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Answer, Server, Source, io_error, refuse};
use crate::shim::connection::Connection;
use crate::shim::container::ReplyTo;
use crate::shim::journal::note;
use crate::shim::protocol::{ErrorBody, ErrorKind, Event, Hello, Message, PROTOCOL_VERSION, Request, command};
use crate::shim::record::process_start_time;

impl Server {
    pub(super) fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let token = self.key();
            let accepted = Connection::accept(stream, token).and_then(|connection| {
                self.epoll.add(&connection.stream, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
                Ok(connection)
            });
            match accepted {
                Ok(connection) => {
                    self.sources.insert(token, Source::Connection);
                    self.connections.insert(token, connection);
                }
                Err(error) => note!("warning: connection refused: {error}"),
            }
        }
    }

    pub(super) fn on_connection(&mut self, token: u64, flags: EpollFlags) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let mut result = Ok(Vec::new());
        if flags.contains(EpollFlags::EPOLLOUT) {
            result = connection.flush().map(|()| Vec::new());
        }
        if result.is_ok() && flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            result = connection.read();
        }
        match result {
            Ok(requests) => {
                self.update_interest(token);
                for (request, fds) in requests {
                    self.dispatch(ReplyTo { connection: token, id: request.id }, request, fds);
                }
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    note!("warning: connection dropped: {error}");
                }
                self.disconnect(token);
            }
        }
    }

    fn disconnect(&mut self, token: u64) {
        if let Some(connection) = self.connections.remove(&token) {
            self.sources.remove(&token);
            let _gone_already = self.epoll.delete(&connection.stream);
        }
    }

    fn update_interest(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let wants_write = connection.has_unsent();
        if wants_write != connection.wants_write {
            connection.wants_write = wants_write;
            let flags = if wants_write { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
            let _gone_already = self.epoll.modify(&connection.stream, &mut EpollEvent::new(flags, connection.token));
        }
    }

    fn send(&mut self, token: u64, message: &Message, fd: Option<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if let Err(error) = connection.send(message, fd) {
            note!("warning: connection dropped: {error}");
            return self.disconnect(token);
        }
        self.update_interest(token);
    }

    pub(super) fn reply<T: Serialize>(&mut self, to: ReplyTo, answer: Answer<T>) {
        self.reply_with_fd(to, answer, None);
    }

    pub(super) fn reply_with_fd<T: Serialize>(&mut self, to: ReplyTo, answer: Answer<T>, fd: Option<OwnedFd>) {
        let mut message =
            Message { v: PROTOCOL_VERSION, id: Some(to.id), fds: usize::from(fd.is_some()), ..Default::default() };
        match answer.and_then(|ok| serde_json::to_value(ok).map_err(|e| io_error("encode")(e.into()))) {
            Ok(value) => message.ok = Some(value),
            Err(error) => message.error = Some(error),
        }
        self.send(to.connection, &message, fd);
    }

    /// Tells every subscriber, and `also` whether it subscribed or not.
    pub(super) fn publish(&mut self, event: &Event, also: Option<u64>) {
        let Ok(value) = serde_json::to_value(event) else { return };
        let message = Message { v: PROTOCOL_VERSION, event: Some(value), ..Default::default() };
        let tokens: Vec<u64> =
            self.connections.values().filter(|c| c.subscribed || Some(c.token) == also).map(|c| c.token).collect();
        for token in tokens {
            self.send(token, &message, None);
        }
    }

    fn dispatch(&mut self, to: ReplyTo, request: Request, fds: Vec<OwnedFd>) {
        let args = request.args;
        let answer = match request.command.as_str() {
            command::HELLO => to_value(self.hello()),
            command::STATE => to_value(Ok(self.containers.values().map(|c| &c.record).collect::<Vec<_>>())),
            command::SUBSCRIBE => {
                if let Some(connection) = self.connections.get_mut(&to.connection) {
                    connection.subscribed = true;
                }
                Ok(Some(Value::Null))
            }
            command::CREATE => later(parse(args).and_then(|args| self.create(to, args))),
            command::START => later(parse(args).and_then(|args| self.start(to, &args))),
            command::SIGNAL => to_value(parse(args).and_then(|args| self.signal(&args))),
            command::REMOVE => later(parse(args).and_then(|args| self.remove(to, &args))),
            command::EXEC => later(parse(args).and_then(|args| self.exec(to, args, fds))),
            command::EXEC_SIGNAL => to_value(parse(args).and_then(|args| self.exec_signal(&args))),
            command::EXEC_STATE => to_value(parse(args).and_then(|args| self.exec_state(&args))),
            command::ATTACH => to_value(parse(args).and_then(|args| self.attach(&args, fds))),
            command::RESIZE => to_value(parse(args).and_then(|args| self.resize(&args))),
            command::PID_NAMESPACE => to_value(self.pid_namespace()),
            command::SHUTDOWN => later(parse(args).and_then(|args| self.shutdown(to, &args))),
            other => refuse(
                ErrorKind::UnknownCommand,
                format!("this shim (version {}) does not know the command {other:?}", env!("CARGO_PKG_VERSION")),
            ),
        };
        match answer {
            Ok(Some(value)) => self.reply(to, Ok(value)),
            Ok(None) => {}
            Err(error) => self.reply::<()>(to, Err(error)),
        }
    }

    fn hello(&self) -> Answer<Hello> {
        let pid = Pid::this().as_raw();
        let start_time = process_start_time(pid).map_err(io_error("read own start time"))?;
        Ok(Hello { version: env!("CARGO_PKG_VERSION").to_owned(), pid, start_time })
    }
}

fn parse<T: DeserializeOwned>(args: Value) -> Answer<T> {
    serde_json::from_value(args).map_err(|e| ErrorBody { kind: ErrorKind::Invalid, message: e.to_string() })
}

/// An answer that is there.
fn to_value<T: Serialize>(answer: Answer<T>) -> Answer<Option<Value>> {
    answer.and_then(|ok| serde_json::to_value(ok).map(Some).map_err(|e| io_error("encode")(e.into())))
}

/// An answer that comes when the work is done, unless it could not begin.
fn later(begun: Answer<()>) -> Answer<Option<Value>> {
    begun.map(|()| None)
}
