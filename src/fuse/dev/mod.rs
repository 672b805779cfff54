//! The transport of our own: requests straight from `/dev/fuse`, one read(2) and one write(2) each.
//!
//! [`abi`] has the protocol's numbers and structures, [`decode`] turns bytes into requests and
//! [`reply`] answers into bytes, [`handshake`] agrees with the kernel on what to use, [`session`]
//! carries a request to the dispatcher and its answer back, [`notify`] tells the kernel what it did
//! not ask, [`passthrough`] knows which files the kernel serves by itself, and [`pool`] has the
//! threads, to which [`uring`] brings requests by io_uring where that is asked for, and for whose large reads
//! there are pipes ([`pipe`]). Only the last five touch the device. [`replay`] takes the place of the threads for
//! requests that come from elsewhere.
//!
//! The least server of the benchmark compiles [`abi`], [`decode`], [`handshake`] and [`reply`] in, with the
//! [`pipe`] that the last names, so that the kernel sends it the same requests.
//!
//! Locks: the pool's own and that of the pipes, held for moments and over no request. A crash leaves the mount without a
//! server, as with any transport.

mod abi;
mod decode;
#[cfg(test)]
mod fake_kernel;
mod handshake;
mod notify;
mod passthrough;
mod pipe;
mod pool;
pub mod replay;
mod reply;
mod session;
mod uring;

use self::handshake::{Terms, Wishes};
use self::notify::Notifier;
use self::passthrough::Passthrough;
use self::pool::{Group, Source, WORKERS_MAX};
use self::session::Session;
use super::ServeOptions;
use super::dispatch::Dispatcher;
use crate::error::{Errno, Error, Result};
use crate::options::{IoMode, Transport};
use crate::union::{Union, descriptor_limit};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Bytes that a request may have beside the data of a WRITE: headers, names, an xattr.
const REQUEST_EXTRA: usize = 72 << 10;

/// What an error of the device is about.
const DEVICE: &str = "/dev/fuse";

/// Returns the name of an opcode.
pub(super) const fn opcode_name(opcode: u32) -> &'static str {
    abi::op::name(opcode)
}

/// Answers INIT on `device`, calls `on_ready`, and serves until the mount is gone.
///
/// # Errors
/// When the handshake fails, or the device fails otherwise than by the end of the mount.
pub(super) fn serve(
    device: OwnedFd,
    union: Arc<Union>,
    options: &ServeOptions,
    on_ready: impl FnOnce() + Send,
) -> Result<()> {
    let device = Arc::new(device);
    let queues = (options.transport == Transport::Uring).then(uring::queues);
    let wishes = Wishes {
        posix_acl: options.posix_acl,
        writeback: options.writeback,
        passthrough_depth: match options.io {
            // No more than need be: an overlay on this mount adds one to it.
            IoMode::Passthrough if union.is_on_overlay() => 2,
            IoMode::Passthrough => 1,
            IoMode::Open | IoMode::NoOpen => 0,
        },
        uring: matches!(queues, Some(Ok(_))),
    };
    let terms = shake_hands(&device, &wishes)?;
    let passthrough = terms.has(abi::init::PASSTHROUGH);
    if wishes.passthrough_depth > 0 && !passthrough {
        tracing::warn!("this kernel has no passthrough; the server reads and writes all files");
    }
    if options.posix_acl && !terms.has(abi::init::POSIX_ACL) {
        tracing::warn!("this kernel does not check POSIX ACLs on FUSE mounts");
    }
    let session = Session {
        dispatch: Dispatcher::new(union, options),
        terms,
        notifier: Notifier::new(Arc::clone(&device)),
        passthrough: passthrough.then(|| Passthrough::new(Arc::clone(&device))),
        counts: Arc::clone(&options.counts),
    };
    tracing::debug!(?terms, ?options, "serving");
    let threads = options.threads.max(1);
    let groups = match queues {
        Some(Ok(queues)) if terms.has(abi::init::OVER_IO_URING) => {
            uring::groups(queues, threads, descriptor_limit())
        }
        refused => {
            if let Some(refused) = refused {
                let why = refused.err().unwrap_or_else(|| {
                    "the kernel does not offer it: it takes Linux 6.14 and enable_uring of fuse"
                        .into()
                });
                tracing::warn!("transport=uring: {why}; requests are carried by transport=dev");
            }
            vec![Group::new(Source::Device, threads, WORKERS_MAX)]
        }
    };
    let buffer = terms.transfer + REQUEST_EXTRA;
    pool::run("worker", session, buffer, device, groups, on_ready)
}

/// Answers INIT and returns what was agreed on.
fn shake_hands(device: &OwnedFd, wishes: &Wishes) -> Result<Terms> {
    let failed = |op, errno| Error::sys(op, DEVICE, errno);
    let mut buffer = vec![0; REQUEST_EXTRA];
    loop {
        let len = match read_request(device, &mut buffer) {
            Ok(Some(len)) => len,
            Ok(None) => return Err(failed("read", Errno::NODEV)),
            Err(errno) => return Err(failed("read", errno)),
        };
        let bytes = buffer.get(..len).unwrap_or_default();
        let (unique, offer) =
            handshake::decode(bytes).map_err(|errno| failed("FUSE handshake", errno))?;
        let send = |error, body: &[u8]| {
            let size = size_of::<abi::OutHeader>() + body.len();
            let len = u32::try_from(size).unwrap_or(u32::MAX);
            let header = abi::OutHeader { len, error, unique };
            let message = [header.as_bytes(), body].concat();
            rustix::io::retry_on_intr(|| rustix::io::write(device, &message))
                .map_err(|errno| failed("write", errno))
        };
        match handshake::negotiate(&offer, wishes) {
            Ok(handshake::Answer::Agree(terms, reply)) => {
                tracing::debug!(?offer, ?reply, "handshake");
                send(0, reply.as_bytes())?;
                return Ok(terms);
            }
            Ok(handshake::Answer::Again(reply)) => send(0, reply.as_bytes())?,
            Err(errno) => {
                tracing::error!(?offer, "the kernel's FUSE protocol is too old: 7.31 is needed");
                send(-errno.raw_os_error(), &[])?;
                return Err(failed("FUSE handshake", errno));
            }
        };
    }
}

/// Reads one request; `None` when the mount is gone.
///
/// # Errors
/// Those of read(2) but for interruptions, of the caller or of the request.
fn read_request(device: &OwnedFd, buffer: &mut [u8]) -> std::result::Result<Option<usize>, Errno> {
    loop {
        match rustix::io::read(device, &mut *buffer) {
            Ok(0) | Err(Errno::NODEV | Errno::CONNABORTED) => return Ok(None),
            Ok(len) => return Ok(Some(len)),
            // ENOENT: taken back before it was read.
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => (),
            Err(errno) => return Err(errno),
        }
    }
}
