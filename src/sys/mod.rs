//! Typed system calls: what the layers above use instead of raw descriptors and paths.
//!
//! Every wrapper takes a directory handle and one name, follows no symlink, retries `EINTR` and
//! returns the bare errno; context is added above, where the layer is known. `unsafe` code stands
//! below this module only.

pub mod data;
pub mod fuse_device;
pub mod fuse_ring;
pub mod handle;
pub mod inode_flags;
pub mod lockfile;
pub mod mountfd;
pub mod name;
pub mod open;
pub mod process;
pub mod stat;
pub mod tree;
pub mod userns;
pub mod verity;
pub mod xattr;

/// What a call without a wrapper failed with.
fn last_errno() -> rustix::io::Errno {
    let error = std::io::Error::last_os_error();
    rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO)
}
