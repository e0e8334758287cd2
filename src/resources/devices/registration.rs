//! The socket on which plugins announce themselves.
//!
//! Source: `pkg/kubelet/cm/devicemanager/plugin/v1beta1/server.go`.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use tokio::net::UnixListener;

use super::api::{Empty, RegisterRequest, VERSION};
use super::error::RegisterError;
use super::manager::DeviceManager;
use super::name::is_extended_resource;
use crate::stream::grpc::{self, Status};

/// Name of the socket in the plugins' directory.
const SOCKET: &str = "kubelet.sock";

/// Begins to serve. Sockets that an earlier life left are removed, those of plugins as well: they watch ours, and
/// register again when it is new.
///
/// # Errors
/// The directory cannot be made, or the socket not be bound.
pub(super) fn serve(manager: &Arc<DeviceManager>) -> io::Result<()> {
    let dir = manager.dir();
    DirBuilder::new().recursive(true).mode(0o750).create(dir)?;
    clean(dir)?;
    let served = manager.clone();
    listen(&dir.join(SOCKET), move |path: String, message: Bytes| {
        let manager = served.clone();
        async move { answer(&manager, &path, message).await }
    })
}

/// Serves calls on a socket, for ever.
pub(super) fn listen<H, F>(socket: &Path, handler: H) -> io::Result<()>
where
    H: Fn(String, Bytes) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Bytes, Status>> + Send + 'static,
{
    let listener = UnixListener::bind(socket)?;
    let handler = Arc::new(handler);
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(grpc::serve(stream, handler.clone()));
                }
                Err(error) => {
                    // no descriptor is free: whoever has them has to let go first
                    tracing::error!(%error, "a connection to one of the node's gRPC sockets is not taken");
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                }
            }
        }
    });
    Ok(())
}

fn clean(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_socket() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

async fn answer(manager: &Arc<DeviceManager>, path: &str, message: Bytes) -> Result<Bytes, Status> {
    if path != "/v1beta1.Registration/Register" {
        return Err(Status::new(Status::UNIMPLEMENTED, format!("unknown method {path}")));
    }
    let request = RegisterRequest::decode(message).map_err(|error| Status::new(Status::INTERNAL, error))?;
    match register(manager, &request).await {
        Ok(()) => Ok(Empty {}.encode_to_vec().into()),
        Err(error) => {
            tracing::error!(resource = request.resource_name, %error, "a device plugin is not taken");
            Err(Status::new(Status::UNKNOWN, error))
        }
    }
}

async fn register(manager: &Arc<DeviceManager>, request: &RegisterRequest) -> Result<(), RegisterError> {
    let RegisterRequest { version, endpoint, resource_name } = request;
    if version != VERSION {
        return Err(RegisterError::Version(version.clone()));
    }
    if !is_extended_resource(resource_name) {
        return Err(RegisterError::Name(resource_name.clone()));
    }
    let socket = manager.dir().join(endpoint.trim_start_matches('/'));
    manager.connect(resource_name, &socket).await.map(|_| ())
}
