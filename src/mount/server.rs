//! The life of the server: made ready, reported to whoever started it, ended with its mount.
//!
//! As a daemon it is the child of the process that was started. The two talk over a socket:
//! the child sends `MOUNTED` or `FAILED` and a sentence; the parent then asks the mount
//! itself and sends `ACCEPTED`. A parent that is gone before that has told its caller nothing,
//! so the child unmounts and ends. Descriptors 0 to 2 are let go first thing: callers read the
//! pipe behind 2 to its end.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{CWD, Dir, Mode, OFlags, fstat, fstatfs, openat};
use rustix::process::{
    Pid, Resource, Rlimit, WaitOptions, chdir, getrlimit, setrlimit, setsid, umask, waitpid,
};
use tracing::{debug, error, info, warn};

use super::fuse_mount::{self, Device, Mounted, NewMount};
use super::stack::Stack;
use super::{MountSpec, refuse, unmount};
use crate::error::{Context, Errno, Error, Result};
use crate::fuse::{self, RequestCounts, ServeOptions};
use crate::options::{IoMode, MountOptions, Transport, show_path};
use crate::sys::process::{
    Fork, Heard, Inherited, Signals, fork, is_root_of_the_machine, keep_little_memory,
    overrides_permissions,
};
use crate::union::Union;

/// `statfs` type of a FUSE mount.
const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;
/// Threads beyond which a FUSE connection gains nothing.
const THREADS_USUAL: usize = 8;
/// Threads that are needed for requests to be answered beside long copy-ups.
const THREADS_LEAST: usize = 4;

/// What to do about a missing capability.
const NEEDS_OVERRIDE: &str =
    "needs CAP_DAC_OVERRIDE; be root, also of a user namespace (unshare -Urm), or leave it out";

/// How long a server that was not accepted may take to end by itself.
const UNACCEPTED_WAIT: Duration = Duration::from_secs(1);

/// First byte of a message of the child: the mount is made, ask it.
const MOUNTED: u8 = b'M';
/// First byte of a message of the child: there is no mount, the sentence follows.
const FAILED: u8 = b'E';
/// What the parent sends once the mount has answered.
const ACCEPTED: u8 = b'K';

/// Mounts and serves in this process until the mount is gone.
///
/// The mountpoint stays locked until the process ends: one that goes on keeps a descriptor.
///
/// # Errors
/// Why it could not be mounted or served.
pub fn run(spec: &MountSpec) -> Result<()> {
    serve(spec, Inherited::default(), None)
}

/// Starts a daemon that serves the mount, and returns when the mount answers.
///
/// Returns in the caller's process only. To be called before any thread is started.
///
/// # Errors
/// The sentence that tells why; there is no mount then.
pub fn start(spec: &MountSpec, inherited: Inherited) -> std::result::Result<(), String> {
    let (ours, theirs) =
        UnixStream::pair().map_err(|error| format!("socketpair: {error}; try again"))?;
    match fork().map_err(|error| error.to_string())? {
        Fork::Child => {
            drop(ours);
            let code = run_child(spec, inherited, theirs);
            std::process::exit(code);
        }
        Fork::Parent(child) => {
            drop(theirs);
            await_ready(spec.merged(), ours).map_err(|sentence| give_up(spec, child, sentence))
        }
    }
}

/// Waits in the parent for a child that failed, and returns the sentence to print.
fn give_up(spec: &MountSpec, child: Pid, sentence: Option<String>) -> String {
    let merged = show_path(spec.merged());
    let ended = match waitpid(Some(child), WaitOptions::empty()) {
        Ok(Some((_, status))) => status.terminating_signal(),
        Ok(None) => None,
        Err(errno) => return format!("{merged}: waitpid: {}; try -f", Error::from(errno)),
    };
    if let Some(signal) = ended {
        // Killed, it could not clean up.
        if let Err(error) = unmount::remove_dead(spec.merged()) {
            return format!("{merged}: the server was ended by signal {signal}; {error}");
        }
        return format!(
            "{merged}: the server was ended by signal {signal} before the mount answered; try again"
        );
    }
    sentence.unwrap_or_else(|| {
        format!("{merged}: the server ended before the mount answered; see its log (-f -d)")
    })
}

/// Is the daemon; returns its exit code.
fn run_child(spec: &MountSpec, inherited: Inherited, socket: UnixStream) -> i32 {
    let Ok(told) = socket.try_clone() else { return 1 };
    let result = leave_caller().and_then(|()| {
        // What fails before, on the caller's stderr, is said by the parent alone.
        serve(spec, inherited, Some(socket)).inspect_err(|failure| error!("{failure}"))
    });
    match result {
        Ok(()) => 0,
        Err(failure) => {
            let mut message = vec![FAILED];
            message.extend_from_slice(failure.to_string().as_bytes());
            // Nobody listens any more once the mount has been accepted.
            drop((&told).write_all(&message));
            1
        }
    }
}

/// Leaves the caller's session and its standard descriptors.
fn leave_caller() -> Result<()> {
    setsid().at("setsid", || "server")?;
    let null = openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| refuse("/dev/null", "open", errno, "create it, or use -f"))?;
    rustix::stdio::dup2_stdin(&null).at("dup2", || "stdin")?;
    rustix::stdio::dup2_stdout(&null).at("dup2", || "stdout")?;
    rustix::stdio::dup2_stderr(&null).at("dup2", || "stderr")
}

/// Waits in the parent until the mount answers; the sentence is absent if the child left none.
fn await_ready(merged: &Path, mut socket: UnixStream) -> std::result::Result<(), Option<String>> {
    let mut kind = [0u8; 1];
    let mut failure = None;
    if socket.read_exact(&mut kind).is_ok() {
        if kind == [MOUNTED] {
            match check_answers(merged) {
                Ok(()) if socket.write_all(&[ACCEPTED]).is_ok() => return Ok(()),
                Ok(()) => (),
                Err(error) => failure = Some(error.to_string()),
            }
            // Nothing accepted: the child unmounts.
            drop(socket.shutdown(Shutdown::Write));
            if socket.read_exact(&mut kind).is_err() {
                return Err(failure);
            }
        }
        let mut sentence = Vec::new();
        // What the child wrote before it ended is what there is.
        drop(socket.read_to_end(&mut sentence));
        if !sentence.is_empty() {
            failure = Some(String::from_utf8_lossy(&sentence).into_owned());
        }
    }
    Err(failure)
}

/// Asks the mount for its root and the first name in it.
///
/// Whether the caller may read the root does not matter: a refusal is an answer too.
///
/// # Errors
/// What the mount answered instead.
pub fn check_answers(merged: &Path) -> Result<()> {
    let failed = |op: &'static str| {
        move |errno| refuse(show_path(merged), op, errno, "see the server's log")
    };
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, merged, flags | OFlags::PATH, Mode::empty()).map_err(failed("open"))?;
    if fstatfs(&root).map_err(failed("fstatfs"))?.f_type != FUSE_SUPER_MAGIC {
        return Err(Error::invalid(
            show_path(merged),
            "the mount was removed before it answered; try again",
        ));
    }
    fstat(&root).map_err(failed("fstat"))?;
    match openat(CWD, merged, flags | OFlags::RDONLY, Mode::empty()) {
        Ok(root) => {
            let mut dir = Dir::new(root).map_err(failed("open"))?;
            if let Some(entry) = dir.next() {
                entry.map_err(failed("getdents64"))?;
            }
            Ok(())
        }
        Err(Errno::ACCESS | Errno::PERM) => Ok(()),
        Err(errno) => Err(failed("open")(errno)),
    }
}

/// Mounts and serves until the mount is gone.
fn serve(spec: &MountSpec, inherited: Inherited, parent: Option<UnixStream>) -> Result<()> {
    // Before anything is mounted, so that no signal leaves a mount without its server.
    let signals = Signals::block()?;
    raise_descriptor_limit();
    keep_little_memory();
    umask(Mode::empty());
    let stack = Stack::open(spec)?;
    inherited.close();
    chdir("/").at("chdir", || "/")?;
    let locks = stack.lock()?;
    let device = Device::open()?;
    let options = spec.options();
    let io = io_mode(options)?;
    let (config, merged) = stack.into_config(spec);
    let union = Arc::new(Union::open(config).map_err(with_cure)?);
    let NewMount { device, mounted, allow_other } = fuse_mount::mount(device, &merged.path, spec)?;
    let mounted = Arc::new(mounted);
    let guard = UnmountGuard(Some(Arc::clone(&mounted)));
    let counts = Arc::new(RequestCounts::default());
    heed_signals(signals, Arc::clone(&mounted), Arc::clone(&counts))?;
    if let Some(parent) = parent {
        report(parent, Arc::clone(&mounted))?;
    }
    info!("{}: mounted", show_path(mounted.path()));
    let serve_options = ServeOptions {
        threads: options.threads.unwrap_or_else(usual_threads),
        posix_acl: options.posix_acl && options.xattrs,
        xattrs: options.xattrs,
        timeout: options.timeout,
        allow_other,
        io,
        writeback: options.writeback,
        volatile: options.volatile || !options.sync,
        transport: options.transport,
        counts: Arc::clone(&counts),
    };
    let on_ready = || info!("{}: serving", show_path(mounted.path()));
    let served = fuse::serve(device, Arc::clone(&union), &serve_options, on_ready);
    match &served {
        Ok(()) => guard.disarm(),
        Err(_) => drop(guard),
    }
    if let Err(error) = union.close() {
        warn!("{error}");
    }
    match &served {
        // From here on another server may have the upper; syncing it harms nobody.
        Ok(()) => drop(locks),
        // Other workers may be in the midst of a request: theirs until the process ends.
        Err(_) => std::mem::forget(locks),
    }
    let synced = union.sync_all();
    debug!("{}: requests: {counts}", show_path(mounted.path()));
    info!("{}: ended", show_path(mounted.path()));
    // Not given back before the process ends, which comes a while after this: `lamina unmount` waits
    // for this lock as for the end of the server, so that its caller may remove the layers, or the
    // program, at once.
    std::mem::forget(merged);
    served.and(synced)
}

/// Unmounts when dropped: neither an error nor a panic leaves a mount that nobody answers for.
#[derive(Debug)]
struct UnmountGuard(Option<Arc<Mounted>>);

impl UnmountGuard {
    /// Ends the guard after the kernel said that the mount is gone.
    fn disarm(mut self) {
        if let Some(mounted) = self.0.take()
            && let Err(error) = mounted.remove_if_dead()
        {
            warn!("{error}");
        }
    }
}

impl Drop for UnmountGuard {
    fn drop(&mut self) {
        if let Some(mounted) = &self.0
            && let Err(error) = mounted.unmount(true)
        {
            warn!("{error}");
        }
    }
}

/// Starts the thread that unmounts when a signal asks for the end, and logs the counts of requests
/// when one asks for those.
fn heed_signals(signals: Signals, mounted: Arc<Mounted>, counts: Arc<RequestCounts>) -> Result<()> {
    spawn("signals", move || {
        let path = show_path(mounted.path());
        let mut asked = false;
        loop {
            match signals.wait() {
                Ok(Heard::Report) => info!("{path}: requests: {counts}"),
                Ok(Heard::End(name)) if !asked => {
                    asked = true;
                    info!("{path}: {name}, unmounting");
                    if let Err(error) = mounted.unmount(false) {
                        warn!("{error}; detaching it, the server ends with the last open file");
                        if let Err(error) = mounted.unmount(true) {
                            error!("{error}");
                        }
                    }
                }
                Ok(Heard::End(name)) => {
                    warn!("{path}: {name} again, ending at once");
                    drop(mounted.unmount(true));
                    std::process::exit(1);
                }
                Err(error) => return error!("{error}"),
            }
        }
    })
}

/// Tells the parent that there is a mount, and starts the thread that waits for its verdict.
fn report(mut parent: UnixStream, mounted: Arc<Mounted>) -> Result<()> {
    spawn("report", move || {
        let mut verdict = [0u8; 1];
        let accepted = parent.write_all(&[MOUNTED]).is_ok()
            && parent.read_exact(&mut verdict).is_ok()
            && verdict == [ACCEPTED];
        if accepted {
            debug!("{}: answers", show_path(mounted.path()));
        } else {
            error!("{}: not accepted by whoever started it, unmounting", show_path(mounted.path()));
            if let Err(error) = mounted.unmount(true) {
                error!("{error}");
            }
            // The connection may live on in a copy of the mount elsewhere, and the parent waits.
            std::thread::sleep(UNACCEPTED_WAIT);
            std::process::exit(1);
        }
    })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    match std::thread::Builder::new().name(name.to_owned()).spawn(work) {
        Ok(_detached) => Ok(()),
        Err(error) => {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
            Err(Error::sys("clone", format!("thread {name}"), errno))
        }
    }
}

/// Adds what to do about it to the error of a system call on a layer.
fn with_cure(error: Error) -> Error {
    let Error::Sys { op, at, errno } = error else { return error };
    let cure = match errno {
        Errno::NOSPC | Errno::DQUOT => "free space and inodes on the filesystem of upperdir",
        Errno::ROFS => "use an upperdir and workdir that can be written, or mount with ro",
        Errno::PERM | Errno::ACCESS => {
            "use layers of your own, or be root, also of a user namespace (unshare -Urm)"
        }
        Errno::NOENT => {
            "keep the layers where they are, and mount /proc (mount -t proc proc /proc)"
        }
        _ => "see the kernel log (dmesg)",
    };
    refuse(at, op, errno, cure)
}

/// Chooses the I/O mode: without opens the server must be able to open a file again at any time,
/// whatever its mode has become; and to read one that is only written, where the kernel fills pages.
/// Passthrough is for root of the machine, by the transport of our own.
///
/// # Errors
/// `Invalid` where that was asked for and cannot be.
fn io_mode(options: &MountOptions) -> Result<IoMode> {
    let may = overrides_permissions();
    let missing = match options.io {
        Some(IoMode::Passthrough) if !is_root_of_the_machine() => {
            Some(("io=passthrough", "needs root of the machine; leave it out"))
        }
        Some(IoMode::Passthrough) if options.transport == Transport::Fuser => {
            Some(("io=passthrough", "needs transport=dev, the default"))
        }
        Some(IoMode::Passthrough) if options.writeback => {
            Some(("io=passthrough", "leaves no writes to collect; leave writeback out"))
        }
        _ if may => None,
        Some(IoMode::NoOpen) => Some(("io=noopen", NEEDS_OVERRIDE)),
        _ => options.writeback.then_some(("writeback", NEEDS_OVERRIDE)),
    };
    match missing {
        Some((option, why)) => Err(Error::invalid(option, why)),
        None => Ok(options.io.unwrap_or(if may { IoMode::NoOpen } else { IoMode::Open })),
    }
}

fn usual_threads() -> usize {
    let cpus = std::thread::available_parallelism().map_or(2, usize::from);
    cpus.saturating_mul(2).clamp(THREADS_LEAST, THREADS_USUAL)
}

/// Allows as many descriptors as this process may have; layers are held open by them.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(errno) = setrlimit(Resource::Nofile, raised) {
        warn!("setrlimit RLIMIT_NOFILE: {}", Error::from(errno));
    }
}
