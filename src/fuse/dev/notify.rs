//! What the kernel is told without asking.
//!
//! Sent before a reply as well as from a thread of its own: dropping attributes waits for no other
//! request, and what waits for one (pages, names) is not dropped here.

use super::abi::{self, notify};
use crate::error::Errno;
use crate::union::NodeId;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Sends notifications.
#[derive(Debug)]
pub(super) struct Notifier {
    device: Arc<OwnedFd>,
}

impl Notifier {
    pub(super) const fn new(device: Arc<OwnedFd>) -> Self {
        Self { device }
    }

    /// Makes the kernel ask for the attributes of `node` again before it uses them.
    pub(super) fn forget_attributes(&self, node: NodeId) {
        let message = abi::InvalInode {
            len: abi::InvalInode::LEN,
            code: notify::INVAL_INODE,
            unique: 0,
            nodeid: node.0,
            // No range of pages: attributes alone.
            off: -1,
            range: 0,
        };
        match rustix::io::retry_on_intr(|| rustix::io::write(&*self.device, message.as_bytes())) {
            // Nobody knows the node: then nobody remembers anything of it.
            Ok(_) | Err(Errno::NOENT) => (),
            Err(error) => {
                tracing::warn!(node = node.0, %error, "the kernel may remember an old mode");
            }
        }
    }
}
