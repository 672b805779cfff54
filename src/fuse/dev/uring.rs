//! Requests by io_uring (Linux 6.14): a queue for each CPU, served by threads that run there.
//!
//! A request goes to the queue of the CPU that its caller runs on, so calling and answering wake
//! nobody on another CPU, which may have to be woken itself: most of what a request costs. Each
//! thread has one entry of a queue, with a ring of its own, and one system call gives an answer and
//! takes the next request. The kernel picks the entry that was busy last. What nobody waits for,
//! FORGET and INTERRUPT, still comes by the device.
//!
//! Locks: none. A crash leaves the mount without a server, as with any transport.

use super::REQUEST_EXTRA;
use super::pool::{Group, Serve, Source, WORKERS_MAX};
use super::reply::{HEADER, Reply};
use crate::error::Errno;
use crate::sys::fuse_ring::{self, Arrival, Ring, SLACK};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Most CPUs for which queues are made: each takes threads, used or not.
const CPUS_MAX: u16 = 64;

/// Threads for each CPU, so that a request which takes long does not keep others waiting.
const STANDING: usize = 2;

/// Descriptors that there must be for each ring, which takes one and keeps it.
const DESCRIPTORS_EACH: usize = 32;

/// Tells the CPUs that the kernel may ever run on, as a list of ranges.
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// Returns how many queues there must be, or why there can be none.
pub(super) fn queues() -> Result<u16, String> {
    fuse_ring::probe().map_err(|errno| format!("io_uring_setup: {errno}"))?;
    let list = read(POSSIBLE).map_err(|errno| format!("{POSSIBLE}: {errno}"))?;
    match count(&list) {
        None => Err(format!("{POSSIBLE} makes no sense")),
        Some(cpus) if cpus > CPUS_MAX => {
            Err(format!("there may be {cpus} CPUs, and {CPUS_MAX} is the most it is made for"))
        }
        Some(cpus) => Ok(cpus),
    }
}

fn read(path: &str) -> Result<String, Errno> {
    let file = rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = [0; 4096];
    let len = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut bytes))?;
    Ok(String::from_utf8_lossy(bytes.get(..len).unwrap_or_default()).into_owned())
}

/// Returns how many CPUs are in a list such as `0-3,8`; none if it is no list.
fn count(list: &str) -> Option<u16> {
    list.trim().split(',').try_fold(0_u16, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u16>().ok()?, last.parse::<u16>().ok()?);
        sum.checked_add(last.checked_sub(first)?)?.checked_add(1)
    })
}

/// Returns the workers for `queues` queues, where `threads` were asked for in all, and for what comes
/// by the device nevertheless; `descriptors` is how many the process may have open.
pub(super) fn groups(queues: u16, threads: usize, descriptors: usize) -> Vec<Group> {
    let count = usize::from(queues).max(1);
    let most = (descriptors / DESCRIPTORS_EACH / count).clamp(1, WORKERS_MAX);
    let each = threads.div_ceil(count).max(STANDING.min(threads)).min(most);
    let device = std::iter::once(Group::new(Source::Device, 1, WORKERS_MAX));
    device.chain((0..queues).map(|queue| Group::new(Source::Queue(queue), each, most))).collect()
}

/// One entry of a queue.
pub(super) struct Entry {
    ring: Ring,
    /// For replies to requests that need their buffer to the end.
    reply: Reply,
}

impl Entry {
    /// Binds the calling thread to `cpu` and registers an entry of its queue, for up to `size` bytes.
    ///
    /// # Errors
    /// Those of io_uring_setup(2) and of the kernel's FUSE.
    pub(super) fn register(device: &Arc<OwnedFd>, cpu: u16, size: usize) -> Result<Self, Errno> {
        let mut cpus = CpuSet::new();
        cpus.set(usize::from(cpu));
        if let Err(errno) = sched_setaffinity(None, &cpus) {
            // Not there, or not for us: served from elsewhere then, and slower.
            tracing::debug!(%errno, cpu, "the threads of a queue cannot run on its CPU");
        }
        let ring = Ring::register(Arc::clone(device), cpu, size)?;
        Ok(Self { ring, reply: Reply::new(REQUEST_EXTRA) })
    }

    /// Waits for a request; `None` when the mount is gone.
    ///
    /// # Errors
    /// When the kernel refused the last answer or does not wait.
    pub(super) fn wait(&mut self) -> Result<Option<Arrival>, Errno> {
        self.ring.wait()
    }

    /// Serves a request; its answer goes out with the next wait.
    ///
    /// # Errors
    /// When the ring is full, which it never is.
    pub(super) fn answer(&mut self, arrival: Arrival, session: &impl Serve) -> Result<(), Errno> {
        let Arrival { head, payload, unique, mut buffer } = arrival;
        // A request that is whole without it leaves the buffer to the reply; others, all of whose
        // replies are small, have theirs copied.
        if payload == 0 {
            let mut reply = Reply::over(buffer, SLACK - HEADER);
            let answer = serve(session, head.bytes(), &mut reply, unique);
            let (header, size) = (header_of(answer), answer.len().saturating_sub(HEADER));
            return self.ring.commit(reply.into_buffer(), header, size, unique);
        }
        let request = place(head.bytes(), payload, &mut buffer);
        let answer = serve(session, request, &mut self.reply, unique);
        let header = header_of(answer);
        let body = answer.get(HEADER..).unwrap_or_default();
        if let Some(room) = buffer.get_mut(SLACK..SLACK + body.len()) {
            room.copy_from_slice(body);
        }
        self.ring.commit(buffer, header, body.len(), unique)
    }
}

/// Puts what comes before the payload right before it, and returns the whole request.
fn place<'a>(head: &[u8], payload: usize, buffer: &'a mut [u8]) -> &'a [u8] {
    let start = SLACK.saturating_sub(head.len());
    if let Some(room) = buffer.get_mut(start..SLACK) {
        room.copy_from_slice(head);
    }
    buffer.get(start..SLACK.saturating_add(payload)).unwrap_or_default()
}

/// Serves a request that must be answered, whatever it is.
fn serve<'a>(session: &impl Serve, request: &[u8], reply: &'a mut Reply, unique: u64) -> &'a [u8] {
    if session.serve(request, reply).is_none() {
        return reply.refuse(unique, Errno::IO.raw_os_error());
    }
    reply.bytes()
}

/// Returns the header of an answer.
fn header_of(answer: &[u8]) -> [u8; HEADER] {
    answer.first_chunk().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_counted() {
        for (list, cpus) in [
            ("0\n", Some(1)),
            ("0-1\n", Some(2)),
            ("0-3,8,10-11\n", Some(7)),
            ("", None),
            ("3-1", None),
            ("0-70000", None),
            ("0-65535", None),
            ("a", None),
        ] {
            assert_eq!(count(list), cpus, "{list}");
        }
    }

    #[test]
    fn every_cpu_has_workers() {
        for (queues, threads, limit, each, most) in [
            (2, 4, 1 << 16, 2, 64),
            (2, 1, 1 << 16, 1, 64),
            (1, 1, 1 << 16, 1, 64),
            (8, 8, 1 << 16, 2, 64),
            (2, 64, 1 << 16, 32, 64),
            (2, 4, 1024, 2, 16),
            (2, 4, 64, 1, 1),
            (64, 8, 64, 1, 1),
        ] {
            let groups = groups(queues, threads, limit);
            assert_eq!(groups.len(), usize::from(queues) + 1);
            let expected = format!("{:?}", Group::new(Source::Queue(queues - 1), each, most));
            assert_eq!(format!("{:?}", groups.last().unwrap()), expected);
        }
    }

    #[test]
    fn a_request_is_whole_again() {
        let mut buffer = vec![0; SLACK + 8];
        buffer[SLACK..].copy_from_slice(b"name\0abc");
        assert_eq!(place(b"header", 5, &mut buffer), b"headername\0");
        assert_eq!(place(b"header", 9, &mut buffer), b"", "more than there is");
    }
}
