//! Processes, signals and descriptors that come from outside: what a daemon needs of the system.

#![allow(unsafe_code, reason = "system calls that no crate wraps safely")]

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::unistd::ForkResult;
use rustix::process::{Pid, getpid};
use rustix::thread::{sched_getaffinity, sched_setaffinity};

use crate::error::{Errno, Error, Result};

/// Returns how many CPUs this process may run on, also where the calling thread is bound to one.
pub fn cpus() -> usize {
    let cpus = sched_getaffinity(Some(getpid())).map_or(1, |cpus| cpus.count());
    usize::try_from(cpus).unwrap_or(1).max(1)
}

/// Lets the calling thread run wherever the process may: it began bound to a CPU if whoever started it
/// is.
///
/// # Errors
/// Those of sched_setaffinity(2).
pub fn unbind() -> rustix::io::Result<()> {
    sched_setaffinity(None, &sched_getaffinity(Some(getpid()))?)
}

/// Which of the two processes after a fork this is.
#[derive(Debug)]
pub enum Fork {
    /// The one that called; the pid is the new one's.
    Parent(Pid),
    /// The new one.
    Child,
}

/// Makes a second process, fork(2).
///
/// # Errors
/// `EDEADLK` if this process has more than one thread: the child would inherit locks that nobody
/// unlocks.
pub fn fork() -> Result<Fork> {
    if thread_count().is_some_and(|count| count != 1) {
        return Err(Error::sys("fork", "process with threads", Errno::DEADLK));
    }
    // SAFETY: fork(2) asks that the child of a process with several threads call only
    // async-signal-safe functions; there is one thread.
    match unsafe { nix::unistd::fork() } {
        Ok(ForkResult::Child) => Ok(Fork::Child),
        Ok(ForkResult::Parent { child }) => match Pid::from_raw(child.as_raw()) {
            Some(pid) => Ok(Fork::Parent(pid)),
            None => Err(Error::sys("fork", "process", Errno::INVAL)),
        },
        Err(errno) => Err(from_nix("fork", "process", errno)),
    }
}

/// Returns how many threads the process has, `None` without /proc.
fn thread_count() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: fcntl(2) with F_GETFD takes any number and changes nothing.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

/// Descriptors that this process was started with and does not know.
#[derive(Debug, Default)]
pub struct Inherited(Vec<RawFd>);

impl Inherited {
    /// Notes what is open; to be called once, before anything else opens a descriptor.
    pub fn note() -> Self {
        let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Self::default() };
        let numbers: Vec<RawFd> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|&fd| fd > 2)
            .collect();
        // The listing's own descriptor was among them and is closed by now.
        Self(numbers.into_iter().filter(|&fd| is_open(fd)).collect())
    }

    /// Closes them all.
    pub fn close(self) {
        for fd in self.0 {
            // SAFETY: close(2) of a number that was open before `main` opened anything; no value
            // of this program owns it.
            unsafe { libc::close(fd) };
        }
    }
}

/// Tells whether this process is root of the machine, not of a user namespace.
pub fn is_machine_root() -> bool {
    // Without /proc it is taken for one, which is the more careful answer.
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let inner = map.split_whitespace().ne(["0", "0", "4294967295"]) && !map.is_empty();
    rustix::process::geteuid().is_root() && !inner
}

/// Tells whether this process may open files whose mode forbids it (`CAP_DAC_OVERRIDE`); in a user
/// namespace that means files of ids that are mapped there.
pub fn overrides_permissions() -> bool {
    match rustix::thread::capabilities(None) {
        Ok(sets) => sets.effective.contains(rustix::thread::CapabilitySet::DAC_OVERRIDE),
        Err(_unknown) => false,
    }
}

/// Tells whether the thread `pid` may keep setgid of a file that it changes, by a further group, or by
/// `CAP_FSETID` of the user namespace of this process, where `by_capability` allows for that: what
/// the kernel asks by `in_group_or_capable`.
///
/// Of a thread that cannot be seen the answer is no. The thread must wait for this one meanwhile, or
/// another may have its number.
pub fn may_keep_setgid(pid: u32, gid: u32, by_capability: bool) -> bool {
    read_status(pid).is_some_and(|(groups, capable)| {
        groups.contains(&gid) || by_capability && capable && is_in_our_namespace(pid)
    })
}

/// Tells whether the thread `pid` may keep setuid of a file that it changes (`CAP_FSETID`, as
/// [`may_keep_setgid`] has it); `None` of one that cannot be seen.
pub fn may_keep_setuid(pid: u32) -> Option<bool> {
    read_status(pid).map(|(_, capable)| capable && is_in_our_namespace(pid))
}

fn is_in_our_namespace(pid: u32) -> bool {
    let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/user")).ok();
    let ours = namespace("self");
    ours.is_some() && namespace(&pid.to_string()) == ours
}

/// Tells whether the process or thread `pid` was killed, or ends by another signal that it does not
/// handle, and merely has to notice; `false` where it cannot be seen.
pub fn is_killed(pid: u32) -> bool {
    pid != 0
        && std::fs::read_to_string(format!("/proc/{pid}/status"))
            .is_ok_and(|status| is_kill_pending(&status))
}

/// Tells whether SIGKILL waits for the thread that /proc/PID/status is of. The kernel sends it to
/// each thread of a process that any signal ends.
fn is_kill_pending(status: &str) -> bool {
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:")).unwrap_or_default();
    let pending = u64::from_str_radix(pending.trim(), 16).unwrap_or(0);
    pending & (1 << (libc::SIGKILL - 1)) != 0
}

fn read_status(pid: u32) -> Option<(Vec<u32>, bool)> {
    // Of another PID namespace it would tell of others.
    static IS_OURS: OnceLock<bool> = OnceLock::new();
    let is_ours = || {
        let own = std::fs::read_link("/proc/self").unwrap_or_default();
        own.as_os_str() == std::process::id().to_string().as_str()
    };
    if pid == 0 || !IS_OURS.get_or_init(is_ours) {
        return None;
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    // A thread of the kernel has all capabilities there, whatever it works with.
    (!status.lines().any(|line| line == "Kthread:\t1")).then(|| parse_status(&status))
}

/// Returns the groups in /proc/PID/status, and whether `CAP_FSETID` is in effect.
fn parse_status(status: &str) -> (Vec<u32>, bool) {
    let field =
        |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    let groups = field("Groups:").split_ascii_whitespace().filter_map(|gid| gid.parse().ok());
    let effective = u64::from_str_radix(field("CapEff:"), 16).unwrap_or(0);
    let fsetid = rustix::thread::CapabilitySet::FSETID.bits();
    (groups.collect(), effective & fsetid != 0)
}

/// Tells whether this process has the rights of root in the first user namespace.
pub fn is_root_of_the_machine() -> bool {
    let administers = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN));
    // Only the first one maps all ids to themselves, and no other can be given that map.
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    administers && map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Gives memory that was freed back to the system, where the allocator keeps it for later.
///
/// Other threads that allocate wait some milliseconds for each 100 MB.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Has the allocator give free memory at the end of its heaps back at once, those of threads too, which
/// [`give_memory_back`] does not reach; by itself it would keep more, the larger the blocks it has seen.
pub fn keep_little_memory() {
    #[cfg(target_env = "gnu")]
    for threshold in [libc::M_TRIM_THRESHOLD, libc::M_MMAP_THRESHOLD] {
        // SAFETY: mallopt(3) may be called at any time from any thread.
        let is_set = unsafe { libc::mallopt(threshold, 1 << 20) } == 1;
        debug_assert!(is_set, "both are known to every version");
    }
}

/// Signals that end the server.
const ENDING: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];

/// The signal that asks the server what it has done so far.
const REPORT: Signal = Signal::SIGUSR1;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The end; with the name of the signal.
    End(&'static str),
    /// A report.
    Report,
}

/// The signals that the server heeds, blocked in this thread and those it starts.
#[derive(Debug)]
pub struct Signals(SigSet);

impl Signals {
    /// Blocks them; to be called before any thread is started.
    ///
    /// # Errors
    /// None known.
    pub fn block() -> Result<Self> {
        let mut set = SigSet::empty();
        for signal in ENDING {
            set.add(signal);
        }
        set.add(REPORT);
        set.thread_block().map_err(|errno| from_nix("pthread_sigmask", "server", errno))?;
        Ok(Self(set))
    }

    /// Waits for the next of them.
    ///
    /// # Errors
    /// None known.
    pub fn wait(&self) -> Result<Heard> {
        loop {
            match self.0.wait() {
                Ok(REPORT) => return Ok(Heard::Report),
                Ok(signal) => return Ok(Heard::End(signal.as_str())),
                Err(nix::errno::Errno::EINTR) => (),
                Err(errno) => return Err(from_nix("sigwait", "server", errno)),
            }
        }
    }
}

/// Receives one descriptor that the peer of `socket` sends, unix(7) `SCM_RIGHTS`.
///
/// Returns `None` if the peer closes without sending one.
///
/// # Errors
/// Those of recvmsg(2).
pub fn receive_descriptor(socket: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    let mut byte = [0u8; 1];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    loop {
        let mut parts = [IoSliceMut::new(&mut byte)];
        let received = match recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Ok(received) => received,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(from_nix("recvmsg", "socket", errno)),
        };
        let messages =
            received.cmsgs().map_err(|errno| from_nix("recvmsg", "control data", errno))?;
        for message in messages {
            if let ControlMessageOwned::ScmRights(fds) = message {
                // SAFETY: the kernel has just installed the descriptor for this message; nothing
                // else knows its number.
                return Ok(fds.first().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        return Ok(None);
    }
}

fn from_nix(op: &'static str, at: &'static str, errno: nix::errno::Errno) -> Error {
    Error::sys(op, at, Errno::from_raw_os_error(errno as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_and_capabilities_of_a_thread() {
        let status =
            "Name:\tGroups: 9\nGid:\t1\t1\t1\t1\nGroups:\t7 2000 \nCapEff:\t0000000000000010\n";
        assert_eq!(parse_status(status), (vec![7, 2000], true));
        assert_eq!(parse_status("Groups:\t \nCapEff:\t00000000000000ef\n"), (vec![], false));
        assert_eq!(parse_status("CapEff:\t\nGroups:\tx"), (vec![], false));
        assert_eq!(parse_status(""), (vec![], false));
    }

    #[test]
    fn who_is_killed_is_told_from_who_has_other_signals_pending() {
        for (status, killed) in [
            ("SigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n", true),
            ("SigPnd:\t0000000000000302\n", true),
            ("SigPnd:\t0000000000000002\nShdPnd:\t0000000000000100\n", false),
            ("SigPnd:\tx\n", false),
            ("", false),
        ] {
            assert_eq!(is_kill_pending(status), killed, "{status}");
        }
        assert!(!is_killed(0) && !is_killed(std::process::id()));
        assert!(!may_keep_setgid(0, 0, true) && !may_keep_setgid(u32::MAX, 0, true));
    }
}
