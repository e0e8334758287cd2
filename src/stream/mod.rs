//! Streaming protocols: SPDY/3.1, WebSocket channels, and exec, attach and port-forward on top of them.
