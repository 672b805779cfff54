//! Requests that come as bytes from somewhere else than the device: what a fuzzer makes, or a log has.

use super::decode;
use super::handshake::{self, Answer, Offer, Wishes};
use super::notify::Notifier;
use super::pool::Serve;
use super::reply::Reply;
use super::session::Session;
use super::{DEVICE, REQUEST_EXTRA};
use crate::error::{Errno, Error, Result};
use crate::fuse::ServeOptions;
use crate::fuse::dispatch::Dispatcher;
use crate::union::Union;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Tells whether `bytes` are a request, with extended attributes in either form.
pub fn is_request(bytes: &[u8]) -> bool {
    let decoded = [true, false].map(|ext| match decode::decode(bytes, ext) {
        Ok((_, decode::Request::BatchForget(forgets))) => forgets.count() < usize::MAX,
        decoded => decoded.is_ok(),
    });
    decoded.contains(&true)
}

/// A union that is served without a kernel.
pub struct Replay {
    session: Session,
    reply: Reply,
}

impl Replay {
    /// Serves `union` as to a kernel that offers everything. What the kernel is told without asking
    /// goes to `notices`.
    ///
    /// # Errors
    /// None that a test should expect.
    pub fn new(union: Arc<Union>, options: &ServeOptions, notices: OwnedFd) -> Result<Self> {
        let offer = Offer { major: 7, minor: 45, max_readahead: 0, flags: u64::MAX };
        let wishes = Wishes { posix_acl: options.posix_acl, ..Wishes::default() };
        let Ok(Answer::Agree(terms, _)) = handshake::negotiate(&offer, &wishes) else {
            return Err(Error::sys("FUSE handshake", DEVICE, Errno::PROTO));
        };
        let reply = Reply::new(terms.transfer + REQUEST_EXTRA);
        let session = Session {
            dispatch: Dispatcher::new(union, options),
            terms,
            notifier: Notifier::new(Arc::new(notices)),
            passthrough: None,
            counts: Arc::clone(&options.counts),
        };
        Ok(Self { session, reply })
    }

    /// Serves one request; returns the answer, header and all, if the request wants one.
    pub fn serve(&mut self, request: &[u8]) -> Option<&[u8]> {
        self.session.serve(request, &mut self.reply)
    }

    /// Takes back what the last answer gave, as if it had not arrived.
    pub fn take_back(&mut self) {
        self.session.take_back(&mut self.reply);
    }
}

impl std::fmt::Debug for Replay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replay").finish_non_exhaustive()
    }
}
