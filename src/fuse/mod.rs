//! Stub.
use crate::error::Result;
use crate::union::Union;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// How a union is served.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Worker threads, at least 1.
    pub threads: usize,
    /// Whether POSIX ACLs are negotiated.
    pub posix_acl: bool,
    /// Whether other users than the one who mounted may use the mount.
    pub allow_other: bool,
}

/// Answers the kernel's INIT on `device` and serves requests until the mount is gone.
///
/// # Errors
/// When the handshake fails.
pub fn serve(device: OwnedFd, union: Arc<Union>, options: &ServeOptions) -> Result<()> {
    let _ = (device, union, options);
    Ok(())
}
