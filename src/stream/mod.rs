//! Streaming protocols: SPDY/3.1, WebSocket channels, and exec, attach and port-forward on top of them; gRPC.
//!
//! Nothing here knows Kubernetes types: the server hands over an upgraded connection, what the request asked
//! for, and a way to start the process or to reach the port.
//!
//! | module | what it does |
//! |---|---|
//! | [`upgrade`] | the HTTP side: which protocol a request asks for, the `101` answer or the refusal |
//! | [`spdy`] | SPDY/3.1 frames and connections, as `moby/spdystream` speaks them |
//! | [`websocket`] | numbered channels (`v4.channel.k8s.io`, ...) and the SPDY tunnel over WebSocket |
//! | [`mux`] | the two ends of a multiplexed stream, the same for both transports |
//! | [`remotecommand`] | exec and attach: streams, terminal size, exit status |
//! | [`grpc`] | gRPC over HTTP/2: unary calls and streams of messages |
//! | [`portforward`] | pairs of data and error streams, one TCP connection each |
//! | [`fd`] | pipes and terminals received from a shim, as async readers and writers |

pub mod fd;
pub mod grpc;
pub mod mux;
pub mod portforward;
pub mod remotecommand;
pub mod spdy;
mod status;
pub mod upgrade;
pub mod websocket;

use std::time::Duration;

/// Bounds on one streaming connection. The defaults are the kubelet's where it has the bound at all.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections on which nothing moves for so long are closed (`streamingConnectionIdleTimeout`).
    pub idle_timeout: Duration,
    /// How long a client may take to create the streams it asked for.
    pub stream_creation_timeout: Duration,
    /// Streams open at once on one connection; more are refused one by one.
    pub max_streams: usize,
    /// Bytes received for all streams of the connection and not consumed yet. When they are used up the
    /// connection is not read any more: the client feels it as TCP back-pressure.
    pub max_buffered_bytes: usize,
    /// Largest control frame, and largest inflated header block, in bytes.
    pub max_header_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(4 * 3600),
            stream_creation_timeout: Duration::from_secs(30),
            max_streams: 1024,
            max_buffered_bytes: 4 << 20,
            max_header_bytes: 64 << 10,
        }
    }
}

/// How long a peer may take to take note that a finished connection is being closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
