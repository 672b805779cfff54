//! The FUSE server: carries the kernel's requests to a union and its answers back.
//!
//! In three parts, so that what carries a request and what it means stay apart: a transport (`dev`,
//! our own, or `transport_fuser`) decodes and encodes; `dispatch` calls the union, survives its bugs
//! and decides what the kernel may cache; `convert` has the pure conversions.
//!
//! Knows nothing of layers or of what a union is made of, and neither mounts nor unmounts. Takes no
//! lock. A crash leaves the mount without a server: its users get `ENOTCONN` until it is unmounted.

mod convert;
mod counts;
mod dev;
mod dispatch;
mod transport_fuser;

pub use self::counts::RequestCounts;
pub use self::dev::replay;
use crate::error::Result;
use crate::options::IoMode;
pub use crate::options::Transport;
use crate::union::Union;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// How a union is served.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Worker threads, at least 1.
    pub threads: usize,
    /// Whether POSIX ACLs are negotiated.
    pub posix_acl: bool,
    /// Whether extended attributes are served.
    pub xattrs: bool,
    /// How long the kernel may keep entries, absences and attributes; for ever unless given.
    pub timeout: Option<Duration>,
    /// Whether other users than the one who mounted may use the mount.
    ///
    /// The kernel alone enforces it, from the mount option of that name; told here for the log.
    pub allow_other: bool,
    /// Whether opens are requests.
    pub io: IoMode,
    /// Whether the kernel collects writes, and keeps sizes and modification times meanwhile.
    pub writeback: bool,
    /// Whether the kernel is told not to send syncs, since nobody wants them.
    pub volatile: bool,
    /// What carries the requests.
    pub transport: Transport,
    /// Where requests are counted, by the transport of our own.
    pub counts: Arc<RequestCounts>,
}

/// Answers the kernel's INIT on `device`, which is mounted already, and serves requests until the
/// mount is gone.
///
/// Calls `on_ready` once between the two: from then on no request waits in vain. Blocks; requests
/// are served by `options.threads` threads of their own.
///
/// # Errors
/// When the handshake fails, which it also does if the mount is gone before it; when the device
/// fails otherwise than by the end of the mount.
pub fn serve(
    device: OwnedFd,
    union: Arc<Union>,
    options: &ServeOptions,
    on_ready: impl FnOnce() + Send,
) -> Result<()> {
    match options.transport {
        Transport::Dev | Transport::Uring => dev::serve(device, union, options, on_ready),
        Transport::Fuser => transport_fuser::serve(device, union, options, on_ready),
    }
}
