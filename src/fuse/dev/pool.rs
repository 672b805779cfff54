//! The threads that serve: each reads a request, serves it, writes the answer, and so on.
//!
//! A few of them always stand ready. A request that takes long, such as a large copy-up, keeps its
//! thread; when all are kept, one more is started, until one is free again, up to
//! [`WORKERS_MAX`]. Whoever finds more threads idle than need be ends. All that this costs a request
//! is two atomic additions: the thread that called [`run`] looks after the rest, and sleeps while
//! not all workers are at work.

use super::reply::Reply;
use super::{DEVICE, read_request};
use crate::error::{Errno, Error, Result};
use crate::sys::fuse_device;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Most threads that serve one mount, unless more were asked for.
const WORKERS_MAX: usize = 64;

/// How often the pool looks whether anything moves while all are at work.
const TICK: Duration = Duration::from_millis(2);

/// [`Pool::load`] counts requests served above this bit, and those in work below.
const SERVED: u64 = 1 << 16;

/// What the workers do; a test puts something else than a session in its place.
pub(super) trait Serve: Send + Sync + 'static {
    /// Serves the request in `bytes` and returns what to send, if anything. Must not panic.
    fn serve<'a>(&self, bytes: &[u8], reply: &'a mut Reply) -> Option<&'a [u8]>;

    /// Takes back what a reply gave that did not arrive.
    fn take_back(&self, reply: &mut Reply);
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
    /// Workers that always stand ready.
    standing: usize,
    /// Workers there are; changed with `state` locked, read without.
    workers: AtomicUsize,
    /// Requests in work, and requests served times [`SERVED`].
    load: AtomicU64,
    /// The keeper sleeps until somebody finds all workers at work.
    keeper_sleeps: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

/// What the keeper is told of.
#[derive(Default)]
struct State {
    /// Why a worker gave up.
    failed: Option<Errno>,
    /// Number of the next thread.
    next: usize,
}

/// Serves on `device` with `standing` threads or more until the mount is gone; requests and replies
/// have up to `buffer` bytes.
///
/// # Errors
/// The first failure of the device that is not the end of the mount.
pub(super) fn run(
    name: &'static str,
    session: impl Serve,
    buffer: usize,
    device: Arc<OwnedFd>,
    standing: usize,
) -> Result<()> {
    let pool = Arc::new(Pool {
        name,
        session,
        buffer,
        device,
        standing,
        workers: AtomicUsize::new(0),
        load: AtomicU64::new(0),
        keeper_sleeps: AtomicBool::new(false),
        state: Mutex::default(),
        changed: Condvar::new(),
    });
    for _ in 0..standing {
        if let Err(errno) = pool.start_worker() {
            if pool.workers.load(Ordering::Relaxed) == 0 {
                return Err(Error::sys("clone", "worker thread", errno));
            }
            tracing::warn!(%errno, "fewer threads than wanted");
            break;
        }
    }
    pool.keep()
}

impl<S: Serve> Pool<S> {
    /// Starts one more thread.
    fn start_worker(self: &Arc<Self>) -> std::result::Result<(), Errno> {
        let mut state = self.state.lock();
        let number = state.next;
        let pool = Arc::clone(self);
        // Counted before it runs, so that the pool never looks empty too early.
        self.workers.fetch_add(1, Ordering::SeqCst);
        let work = move || {
            let mut end = End { pool: &pool, retired: false, failed: None };
            // The first one has the mount's own descriptor.
            let channel = if number == 0 { None } else { pool.clone_device() };
            let channel = channel.unwrap_or_else(|| Arc::clone(&pool.device));
            match pool.work(&channel) {
                Ok(retired) => end.retired = retired,
                Err(errno) => end.failed = Some(errno),
            }
        };
        match std::thread::Builder::new().name(format!("{}-{number}", self.name)).spawn(work) {
            Ok(_detached) => {
                state.next += 1;
                Ok(())
            }
            Err(error) => {
                self.workers.fetch_sub(1, Ordering::SeqCst);
                Err(Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
            }
        }
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
    fn work(&self, channel: &OwnedFd) -> std::result::Result<bool, Errno> {
        // Zeroed by the system when first touched: what is never used costs nothing.
        let mut request = vec![0; self.buffer];
        let mut reply = Reply::new(self.buffer);
        while let Some(len) = read_request(channel, &mut request)? {
            self.begin();
            let bytes = request.get(..len).unwrap_or_default();
            let sent = match self.session.serve(bytes, &mut reply) {
                Some(answer) => send(channel, answer),
                None => Ok(()),
            };
            if let Err(errno) = sent {
                self.undelivered(channel, bytes, &mut reply, errno);
            }
            if self.finish() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Deals with an answer that the device did not take.
    fn undelivered(&self, channel: &OwnedFd, request: &[u8], reply: &mut Reply, errno: Errno) {
        self.session.take_back(reply);
        // The connection has ended, and nobody waits.
        if matches!(errno, Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) {
            return;
        }
        tracing::error!(%errno, "the device refused an answer");
        if let Some(refusal) = reply.refuse_request(request)
            && let Err(errno) = send(channel, refusal)
        {
            tracing::error!(%errno, "the device refused a refusal too; somebody waits for ever");
        }
    }

    /// Notes that a request was taken up.
    fn begin(&self) {
        let busy = (self.load.fetch_add(1, Ordering::SeqCst) % SERVED) + 1;
        let all = busy >= self.workers.load(Ordering::SeqCst) as u64;
        if all && self.keeper_sleeps.load(Ordering::SeqCst) {
            // Locked, so that the keeper either waits or has yet to look.
            drop(self.state.lock());
            self.changed.notify_one();
        }
    }

    /// Notes that a request was served; tells whether this thread shall end.
    fn finish(&self) -> bool {
        // One less in work, one more served.
        let busy = (self.load.fetch_add(SERVED - 1, Ordering::SeqCst) % SERVED) - 1;
        let workers = self.workers.load(Ordering::Relaxed);
        if workers <= self.standing {
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

    /// Looks after the workers until there are none, or one failed.
    fn keep(self: &Arc<Self>) -> Result<()> {
        let mut state = self.state.lock();
        let mut sleeps = true;
        loop {
            if let Some(errno) = state.failed {
                return Err(Error::sys("read", DEVICE, errno));
            }
            if self.workers.load(Ordering::SeqCst) == 0 {
                return Ok(());
            }
            if sleeps {
                self.keeper_sleeps.store(true, Ordering::SeqCst);
                // All may be at work since before they could know that somebody sleeps.
                if !self.is_saturated(self.load.load(Ordering::SeqCst)) {
                    self.changed.wait(&mut state);
                }
                self.keeper_sleeps.store(false, Ordering::SeqCst);
            }
            let before = self.load.load(Ordering::SeqCst);
            // Awake for a while at least, so that a busy mount does not wake it for each request.
            self.changed.wait_for(&mut state, TICK);
            let after = self.load.load(Ordering::SeqCst);
            sleeps = !self.is_saturated(after);
            // Nothing was begun and nothing served meanwhile: all of them wait for something.
            if !sleeps && before == after {
                MutexGuard::unlocked(&mut state, || self.grow());
            }
        }
    }

    /// Tells whether all workers are at work; not so when they have all ended.
    fn is_saturated(&self, load: u64) -> bool {
        let workers = self.workers.load(Ordering::SeqCst);
        workers > 0 && load % SERVED >= workers as u64
    }

    /// Starts one more worker, if there may be one.
    fn grow(self: &Arc<Self>) {
        let workers = self.workers.load(Ordering::SeqCst);
        if workers >= self.standing.max(WORKERS_MAX) {
            return;
        }
        match self.start_worker() {
            Ok(()) => tracing::debug!(workers, "all workers wait; one more"),
            Err(errno) => tracing::warn!(%errno, "no further thread; requests may have to wait"),
        }
    }
}

/// Sends one answer.
fn send(channel: &OwnedFd, answer: &[u8]) -> std::result::Result<(), Errno> {
    rustix::io::retry_on_intr(|| rustix::io::write(channel, answer)).map(|_all| ())
}

/// Tells the keeper that a thread has ended, however it did.
struct End<'a, S> {
    pool: &'a Pool<S>,
    /// Counted out already.
    retired: bool,
    failed: Option<Errno>,
}

impl<S> Drop for End<'_, S> {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        if !self.retired {
            self.pool.workers.fetch_sub(1, Ordering::SeqCst);
        }
        state.failed = state.failed.or(self.failed);
        self.pool.changed.notify_one();
    }
}
