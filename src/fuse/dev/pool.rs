//! The threads that serve: each takes a request, serves it, gives the answer, and so on.
//!
//! They come in groups, each for one [`Source`] of requests, which no other group can help.
//! A few of each always stand ready. A request that takes long, such as a large copy-up, keeps its
//! thread; when all of a group are kept, one more is started, until one is free again, up to
//! [`WORKERS_MAX`]. Whoever finds more threads idle than need be ends, where that may be. All that this costs a request
//! is two atomic additions: the thread that called [`run`] looks after the rest, and sleeps while
//! not all workers of a group are at work.

use super::pipe::Pipes;
use super::reply::Reply;
use super::uring::Entry;
use super::{DEVICE, read_request};
use crate::error::{Errno, Error, Result};
use crate::sys::fuse_device;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Most threads of a group, unless more were asked for.
pub(super) const WORKERS_MAX: usize = 64;

/// How often the pool looks whether anything moves while all are at work.
const TICK: Duration = Duration::from_millis(2);

/// [`Group::load`] counts requests served above this bit, and those in work below.
const SERVED: u64 = 1 << 16;

/// What the workers do; a test puts something else than a session in its place.
pub(super) trait Serve: Send + Sync + 'static {
    /// Serves the request in `bytes` and returns what to send, if anything. Must not panic.
    fn serve<'a>(&self, bytes: &[u8], reply: &'a mut Reply) -> Option<&'a [u8]>;

    /// Takes back what a reply gave that did not arrive.
    fn take_back(&self, reply: &mut Reply);

    /// Does what nobody waits for, after an answer, while other threads serve. Must not panic.
    fn rest(&self) {}

    /// Ends what another thread does by [`Serve::rest`], as the mount is gone.
    fn end(&self) {}
}

/// Where workers take requests from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The device: read(2) and write(2).
    Device,
    /// A queue of requests by io_uring, that of one CPU. Its workers never end before the mount: a
    /// request may be on its way to any of them.
    Queue(u16),
}

/// The workers of one source.
#[derive(Debug)]
pub(super) struct Group {
    source: Source,
    /// Workers that always stand ready.
    standing: usize,
    /// Workers there may be.
    most: usize,
    /// Workers there are; raised by the keeper alone, read without a lock.
    workers: AtomicUsize,
    /// Workers there ever were.
    started: AtomicUsize,
    /// Requests in work, and requests served times [`SERVED`].
    load: AtomicU64,
}

impl Group {
    /// A group without workers yet, of which `standing` shall always be ready, and `most` may come.
    pub(super) fn new(source: Source, standing: usize, most: usize) -> Self {
        Self {
            source,
            standing,
            most: most.max(standing),
            workers: AtomicUsize::new(0),
            started: AtomicUsize::new(0),
            load: AtomicU64::new(0),
        }
    }

    /// Tells whether all workers are at work; not so when they have all ended.
    fn is_saturated(&self) -> bool {
        let load = self.load.load(Ordering::SeqCst);
        let workers = self.workers.load(Ordering::SeqCst);
        workers > 0 && load % SERVED >= workers as u64
    }

    /// Notes that a request was served; tells whether this thread shall end.
    fn finish(&self) -> bool {
        // One less in work, one more served.
        let busy = (self.load.fetch_add(SERVED - 1, Ordering::SeqCst) % SERVED) - 1;
        let workers = self.workers.load(Ordering::Relaxed);
        if workers <= self.standing || self.source != Source::Device {
            return false;
        }
        let idle = workers.saturating_sub(usize::try_from(busy).unwrap_or(usize::MAX));
        if idle <= self.standing {
            return false;
        }
        // Whoever ends is counted out here, so that no two do for one reason.
        self.workers
            .compare_exchange(workers, workers - 1, Ordering::SeqCst, Ordering::Relaxed)
            .is_ok()
    }
}

/// The workers of one mount.
struct Pool<S> {
    /// What its threads are called, before their number.
    name: &'static str,
    session: S,
    /// Bytes of the buffers of a worker.
    buffer: usize,
    /// What the mount was made with; clones of it serve the same mount.
    device: Arc<OwnedFd>,
    groups: Vec<Group>,
    pipes: Arc<Pipes>,
    /// The keeper sleeps until somebody finds all workers of a group at work.
    keeper_sleeps: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

/// What the keeper is told of.
#[derive(Default)]
struct State {
    /// Why a worker gave up, and in what.
    failed: Option<(&'static str, Errno)>,
    /// Workers that take requests, or have.
    ready: usize,
}

/// Serves on `device` until the mount is gone; requests and replies have up to `buffer` bytes. Calls
/// `on_ready` once there is a worker for all sources.
///
/// # Errors
/// The first failure of the device that is not the end of the mount.
pub(super) fn run(
    name: &'static str,
    session: impl Serve,
    buffer: usize,
    device: Arc<OwnedFd>,
    groups: Vec<Group>,
    on_ready: impl FnOnce(),
) -> Result<()> {
    let pool = Arc::new(Pool {
        name,
        session,
        buffer,
        device,
        groups,
        pipes: Arc::default(),
        keeper_sleeps: AtomicBool::new(false),
        state: Mutex::default(),
        changed: Condvar::new(),
    });
    let mut started = 0;
    for (index, group) in pool.groups.iter().enumerate() {
        for _ in 0..group.standing {
            if let Err(errno) = pool.start_worker(index) {
                if group.workers.load(Ordering::Relaxed) == 0 {
                    return Err(Error::sys("clone", "worker thread", errno));
                }
                tracing::warn!(%errno, "fewer threads than wanted");
                break;
            }
            started += 1;
        }
    }
    pool.await_ready(started)?;
    on_ready();
    pool.keep()
}

impl<S: Serve> Pool<S> {
    /// Starts one more thread of a group.
    fn start_worker(self: &Arc<Self>, index: usize) -> std::result::Result<(), Errno> {
        let Some(group) = self.groups.get(index) else { return Err(Errno::INVAL) };
        let number = group.started.load(Ordering::Relaxed);
        let pool = Arc::clone(self);
        // Counted before it runs, so that the pool never looks empty too early.
        group.workers.fetch_add(1, Ordering::SeqCst);
        let name = match group.source {
            Source::Device => format!("{}-{number}", self.name),
            Source::Queue(cpu) => format!("{}-{cpu}/{number}", self.name),
        };
        let work = move || {
            let Some(group) = pool.groups.get(index) else { return };
            let mut end = End { pool: &pool, group, retired: false, failed: None };
            let worked = match group.source {
                Source::Device => {
                    // The first one has the mount's own descriptor.
                    let channel = if number == 0 { None } else { pool.clone_device() };
                    let channel = channel.unwrap_or_else(|| Arc::clone(&pool.device));
                    pool.work(group, &channel).map_err(|errno| ("read", errno))
                }
                Source::Queue(cpu) => pool.work_queue(group, cpu, number),
            };
            match worked {
                Ok(retired) => end.retired = retired,
                Err(failure) => end.failed = Some(failure),
            }
        };
        match std::thread::Builder::new().name(name).spawn(work) {
            Ok(_detached) => {
                group.started.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                group.workers.fetch_sub(1, Ordering::SeqCst);
                Err(Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
            }
        }
    }

    /// Waits until `count` workers take requests, or one failed.
    fn await_ready(&self, count: usize) -> Result<()> {
        let mut state = self.state.lock();
        while state.ready < count && state.failed.is_none() {
            self.changed.wait(&mut state);
        }
        state.failed.map_or(Ok(()), |(op, errno)| Err(Error::sys(op, DEVICE, errno)))
    }

    /// Notes that a worker takes requests.
    fn note_ready(&self) {
        self.state.lock().ready += 1;
        self.changed.notify_one();
    }

    /// Returns a descriptor of its own for a thread, so that threads do not wait for each other in
    /// the kernel; `None` where the device cannot be opened again.
    fn clone_device(&self) -> Option<Arc<OwnedFd>> {
        match fuse_device::clone(self.device.as_fd(), DEVICE) {
            Ok(clone) => Some(Arc::new(clone)),
            Err(error) => {
                tracing::debug!(%error, "the device cannot be cloned; a worker shares its descriptor");
                None
            }
        }
    }

    /// Serves until the mount is gone, or until this thread is not needed any more: tells which by
    /// `true` for the latter, and is counted out then.
    fn work(&self, group: &Group, channel: &OwnedFd) -> std::result::Result<bool, Errno> {
        self.note_ready();
        // Zeroed by the system when first touched: what is never used costs nothing.
        let mut request = vec![0; self.buffer];
        let mut reply = Reply::new(self.buffer).with_pipes(Arc::clone(&self.pipes));
        while let Some(len) = read_request(channel, &mut request)? {
            self.begin(group);
            let bytes = request.get(..len).unwrap_or_default();
            let answers = self.session.serve(bytes, &mut reply).is_some();
            let sent = match reply.take_filled() {
                _ if !answers => Ok(()),
                Some(filled) => filled
                    .send(channel.as_fd())
                    .or_else(|errno| self.send_copied(channel, bytes, &mut reply, errno)),
                None => send(channel, reply.bytes()),
            };
            if let Err(errno) = sent {
                self.undelivered(channel, bytes, &mut reply, errno);
            }
            if group.standing > 1 && group.workers.load(Ordering::Relaxed) > 1 {
                self.session.rest();
            }
            if group.finish() {
                return Ok(true);
            }
        }
        self.session.end();
        Ok(false)
    }

    /// Serves one entry of the queue of `cpu` until the mount is gone; never tells `true`.
    fn work_queue(
        &self,
        group: &Group,
        cpu: u16,
        number: usize,
    ) -> std::result::Result<bool, (&'static str, Errno)> {
        let mut entry = match Entry::register(&self.device, cpu, self.buffer) {
            Ok(entry) => entry,
            // The mount was gone before it was served: nobody waits.
            Err(Errno::NOTCONN | Errno::CONNABORTED | Errno::NODEV) => {
                self.note_ready();
                return Ok(false);
            }
            Err(errno) if number >= group.standing => {
                tracing::warn!(%errno, "no further entry of a queue; requests may have to wait");
                return Ok(false);
            }
            Err(errno) => return Err(("FUSE_IO_URING_CMD_REGISTER", errno)),
        };
        self.note_ready();
        let failed = |errno| ("FUSE_IO_URING_CMD_COMMIT_AND_FETCH", errno);
        while let Some(arrival) = entry.wait().map_err(failed)? {
            self.begin(group);
            entry.answer(arrival, &self.session).map_err(failed)?;
            group.finish();
        }
        Ok(false)
    }

    /// Sends the answer to a READ again, copied, that the device did not take out of a pipe: no other does any more.
    fn send_copied(
        &self,
        channel: &OwnedFd,
        request: &[u8],
        reply: &mut Reply,
        errno: Errno,
    ) -> std::result::Result<(), Errno> {
        if is_over(errno) {
            return Err(errno);
        }
        tracing::warn!(%errno, "the device takes nothing out of a pipe; large reads are copied twice");
        self.pipes.stop();
        match self.session.serve(request, reply) {
            Some(_) => send(channel, reply.bytes()),
            None => Err(errno),
        }
    }

    /// Deals with an answer that the device did not take.
    fn undelivered(&self, channel: &OwnedFd, request: &[u8], reply: &mut Reply, errno: Errno) {
        self.session.take_back(reply);
        if is_over(errno) {
            return;
        }
        tracing::error!(%errno, "the device refused an answer");
        if let Some(refusal) = reply.refuse_request(request)
            && let Err(errno) = send(channel, refusal)
            // The kernel ended it itself, as it could not read what we sent.
            && errno != Errno::NOENT
        {
            tracing::error!(%errno, "the device refused a refusal too; somebody waits for ever");
        }
    }

    /// Notes that a request was taken up.
    fn begin(&self, group: &Group) {
        let busy = (group.load.fetch_add(1, Ordering::SeqCst) % SERVED) + 1;
        let all = busy >= group.workers.load(Ordering::SeqCst) as u64;
        if all && self.keeper_sleeps.load(Ordering::SeqCst) {
            // Locked, so that the keeper either waits or has yet to look.
            drop(self.state.lock());
            self.changed.notify_one();
        }
    }

    /// Looks after the workers until there are none, or one failed.
    fn keep(self: &Arc<Self>) -> Result<()> {
        let mut state = self.state.lock();
        let mut sleeps = true;
        let mut before = Vec::with_capacity(self.groups.len());
        loop {
            if let Some((op, errno)) = state.failed {
                return Err(Error::sys(op, DEVICE, errno));
            }
            if self.groups.iter().all(|group| group.workers.load(Ordering::SeqCst) == 0) {
                return Ok(());
            }
            if sleeps {
                self.keeper_sleeps.store(true, Ordering::SeqCst);
                // All may be at work since before they could know that somebody sleeps.
                if !self.groups.iter().any(Group::is_saturated) {
                    self.changed.wait(&mut state);
                }
                self.keeper_sleeps.store(false, Ordering::SeqCst);
            }
            before.clear();
            before.extend(self.groups.iter().map(|group| group.load.load(Ordering::SeqCst)));
            // Awake for a while at least, so that a busy mount does not wake it for each request.
            self.changed.wait_for(&mut state, TICK);
            sleeps = true;
            for (index, (group, before)) in self.groups.iter().zip(&before).enumerate() {
                if !group.is_saturated() {
                    continue;
                }
                sleeps = false;
                // Nothing was begun and nothing served meanwhile: all of them wait for something.
                if group.load.load(Ordering::SeqCst) == *before {
                    MutexGuard::unlocked(&mut state, || self.grow(index, group));
                }
            }
        }
    }

    /// Starts one more worker of a group, if there may be one.
    fn grow(self: &Arc<Self>, index: usize, group: &Group) {
        let workers = group.workers.load(Ordering::SeqCst);
        if workers >= group.most {
            return;
        }
        match self.start_worker(index) {
            Ok(()) => tracing::debug!(workers, "all workers wait; one more"),
            Err(errno) => tracing::warn!(%errno, "no further thread; requests may have to wait"),
        }
    }
}

/// Tells that nobody waits for an answer: the request or the connection has ended.
fn is_over(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::NODEV | Errno::CONNABORTED)
}

/// Sends one answer.
fn send(channel: &OwnedFd, answer: &[u8]) -> std::result::Result<(), Errno> {
    rustix::io::retry_on_intr(|| rustix::io::write(channel, answer)).map(|_all| ())
}

/// Tells the keeper that a thread has ended, however it did.
struct End<'a, S> {
    pool: &'a Pool<S>,
    group: &'a Group,
    /// Counted out already.
    retired: bool,
    failed: Option<(&'static str, Errno)>,
}

impl<S> Drop for End<'_, S> {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        if !self.retired {
            self.group.workers.fetch_sub(1, Ordering::SeqCst);
        }
        state.failed = state.failed.or(self.failed);
        self.pool.changed.notify_one();
    }
}
