//! Counts what a server is asked and what it does for it: requests by name, system calls by name.
//!
//! By strace(1) on the server, so the counts hold for any transport: a request is what a read of `/dev/fuse` returns,
//! whose second word is its opcode.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::case::BOUND;
use crate::env::{self, wait_until};

/// Why nothing can be counted here, if so.
pub fn no_strace() -> Option<String> {
    let found = Command::new("strace").arg("-V").stdout(Stdio::null()).status();
    (!found.is_ok_and(|status| status.success())).then(|| "needs strace".to_owned())
}

/// Why requests cannot be counted here, if so.
pub fn no_counts() -> Option<String> {
    let options = env::extra_options();
    if options.contains("transport=uring") {
        return Some("strace sees no requests by io_uring".to_owned());
    }
    no_strace()
}

/// What a server was asked, and did, in a while.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that somebody waits for, by name; FORGET and INTERRUPT are not counted.
    pub requests: BTreeMap<String, usize>,
    /// System calls, by name; not counted is what carries requests, waits, or manages memory.
    pub calls: BTreeMap<String, usize>,
}

impl Counts {
    /// All requests.
    pub fn requests(&self) -> usize {
        self.requests.values().sum()
    }

    /// All system calls.
    pub fn calls(&self) -> usize {
        self.calls.values().sum()
    }

    /// Fails unless these, and no other, requests came.
    ///
    /// # Panics
    /// If they are others.
    #[track_caller]
    pub fn assert_requests(&self, what: &str, expected: &str) {
        let mut wanted = BTreeMap::new();
        for name in expected.split_whitespace() {
            *wanted.entry(name.to_owned()).or_insert(0) += 1;
        }
        assert_eq!(self.requests, wanted, "{what}: requests\n{self:?}");
    }

    /// Fails if there were more system calls.
    ///
    /// # Panics
    /// If there were.
    #[track_caller]
    pub fn assert_calls(&self, what: &str, most: usize) {
        assert!(self.calls() <= most, "{what}: more than {most} system calls\n{self:?}");
    }
}

/// Counts what the server `pid` is asked and does while `work` runs; `log` is a file that may be written.
///
/// # Panics
/// If strace does not run.
pub fn count(pid: Pid, log: &Path, work: impl FnOnce()) -> Counts {
    parse(&watched(pid, log, &[], work))
}

/// Has system calls of the server `pid` fail while `work` runs, as `inject` of strace(1) says; tells how many did.
///
/// # Panics
/// If strace does not run.
pub fn with_faults(pid: Pid, log: &Path, inject: &str, work: impl FnOnce()) -> usize {
    watched(pid, log, &["-e", &format!("inject={inject}")], work).matches("(INJECTED)").count()
}

/// Returns what strace writes to `log` about `pid` while `work` runs.
fn watched(pid: Pid, log: &Path, arguments: &[&str], work: impl FnOnce()) -> String {
    let mut strace = Command::new("strace")
        .args(["-f", "-y", "-xx", "-s", "40", "-o"])
        .arg(log)
        .args(arguments)
        .args(["-p", &pid.to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("strace: {e}"));
    let mut said = BufReader::new(strace.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("attached"), "strace: {line}");
    // A thread may be in a call that began before; only from its next one on is it seen in full.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    wait_until("strace to see all threads", BOUND, || {
        let log = fs::read_to_string(log).unwrap_or_default();
        let seen: BTreeSet<&str> = log.lines().filter_map(|line| line.split(' ').next()).collect();
        seen.len() >= threads
    });
    work();
    kill_process(Pid::from_child(&strace), Signal::INT).unwrap();
    strace.wait().unwrap();
    fs::read_to_string(log).unwrap()
}

/// `/dev/fuse`, as strace shows the path of a descriptor.
const DEVICE: &str = r"<\x2f\x64\x65\x76\x2f\x66\x75\x73\x65>";

/// What the names of workers begin with, as strace shows it.
const WORKER: &str = r"\x77\x6f\x72\x6b\x65\x72";

/// Calls that wait for other threads or signals, get memory, or give back what an earlier one got: the kernel may
/// forget a file, and the server close it, at any time.
const OWN_AFFAIRS: [&str; 14] = [
    "brk",
    "clock_nanosleep",
    "close",
    "exit",
    "futex",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "restart_syscall",
    "rt_sigprocmask",
    "rt_sigtimedwait",
    "sched_yield",
];

/// Reads the log of strace.
fn parse(log: &str) -> Counts {
    let mut counts = Counts::default();
    // Threads that are reading the device.
    let mut reading: BTreeMap<&str, bool> = BTreeMap::new();
    // Threads that began meanwhile and have not come to the device, and what they have called.
    let mut beginning: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
    for line in log.lines() {
        let Some((thread, event)) = line.split_once(' ') else { continue };
        let event = event.trim_start();
        let resumed = event.strip_prefix("<... ");
        if resumed.is_none() {
            let Some((name, arguments)) = event.split_once('(') else { continue };
            let name = match name {
                // Before strace 6.14.
                "syscall_0x1d0" => "getxattrat",
                "syscall_0x1d1" => "listxattrat",
                name => name,
            };
            let first = arguments.split(',').next().unwrap_or_default();
            let device = first.contains(DEVICE);
            let carries = device && matches!(name, "read" | "readv" | "write" | "writev");
            // The beginning of a worker, which no request is to blame for: all others were waiting somewhere.
            if name == "rseq" {
                beginning.insert(thread, Vec::new());
            }
            if carries {
                beginning.remove(thread);
            }
            reading.insert(thread, carries && name.starts_with("read"));
            if !carries && !OWN_AFFAIRS.contains(&name) {
                match beginning.get_mut(thread) {
                    Some(held) => held.push((name, arguments)),
                    None => *counts.calls.entry(name.to_owned()).or_default() += 1,
                }
            }
        }
        if reading.get(thread) == Some(&true)
            && let Some(opcode) = opcode(event)
            && !matches!(opcode, FORGET | INTERRUPT | BATCH_FORGET)
        {
            *counts.requests.entry(name_of(opcode)).or_default() += 1;
        }
    }
    // Those that never come to it work for a request, and have another name.
    let is_worker =
        |(name, arguments): &(&str, &str)| *name == "prctl" && arguments.contains(WORKER);
    for held in beginning.values().filter(|held| !held.iter().any(is_worker)) {
        for (name, _) in held {
            *counts.calls.entry((*name).to_owned()).or_default() += 1;
        }
    }
    counts
}

/// The second 32-bit word of what a read of the device returned.
fn opcode(event: &str) -> Option<u32> {
    let (_, result) = event.rsplit_once(" = ")?;
    let returned: usize = result.split(' ').next()?.parse().ok()?;
    let (_, bytes) = event.split_once("\"\\x")?;
    let mut words = bytes.split('"').next()?.split("\\x").map(|hex| u8::from_str_radix(hex, 16));
    let mut word = || {
        Some(u32::from_ne_bytes(std::array::from_fn(|_| {
            words.next().and_then(Result::ok).unwrap_or(0)
        })))
    };
    let (len, opcode) = (word()?, word()?);
    (usize::try_from(len).ok()? == returned).then_some(opcode)
}

const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// Names of requests, as in `linux/fuse.h`.
fn name_of(opcode: u32) -> String {
    let name = match opcode {
        1 => "LOOKUP",
        3 => "GETATTR",
        4 => "SETATTR",
        5 => "READLINK",
        6 => "SYMLINK",
        8 => "MKNOD",
        9 => "MKDIR",
        10 => "UNLINK",
        11 => "RMDIR",
        12 => "RENAME",
        13 => "LINK",
        14 => "OPEN",
        15 => "READ",
        16 => "WRITE",
        17 => "STATFS",
        18 => "RELEASE",
        20 => "FSYNC",
        21 => "SETXATTR",
        22 => "GETXATTR",
        23 => "LISTXATTR",
        25 => "FLUSH",
        27 => "OPENDIR",
        28 => "READDIR",
        29 => "RELEASEDIR",
        30 => "FSYNCDIR",
        34 => "ACCESS",
        35 => "CREATE",
        39 => "IOCTL",
        43 => "FALLOCATE",
        44 => "READDIRPLUS",
        45 => "RENAME2",
        46 => "LSEEK",
        47 => "COPY_FILE_RANGE",
        51 => "TMPFILE",
        52 => "STATX",
        other => return format!("opcode-{other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_counted() {
        let log = r#"
7 read(11<\x2f\x64\x65\x76\x2f\x66\x75\x73\x65>,  <unfinished ...>
8 futex(0x7f0d539f5990, FUTEX_WAIT_BITSET|FUTEX_CLOCK_REALTIME, 19235, NULL <unfinished ...>
7 <... read resumed>"\x30\x00\x00\x00\x0e\x00\x00\x00\x0c\x00"..., 16781312) = 48
7 writev(11<\x2f\x64\x65\x76\x2f\x66\x75\x73\x65>, [{iov_base="\x10\x00", iov_len=16}], 1) = 16
7 read(11<\x2f\x64\x65\x76\x2f\x66\x75\x73\x65>, "\x2c\x00\x00\x00\x01\x00\x00\x00\x12\x00"..., 4096) = 44
7 statx(6<\x2f>, "\x66", AT_SYMLINK_NOFOLLOW, STATX_ALL <unfinished ...>
9 read(12<\x2f\x66>, "\x2c\x00\x00\x00\x01\x00\x00\x00", 44) = 44
7 <... statx resumed>{stx_mask=STATX_ALL}) = 0
7 read(11<\x2f\x64\x65\x76\x2f\x66\x75\x73\x65>, "\x28\x00\x00\x00\x02\x00\x00\x00\x12\x00"..., 4096) = 40
7 read(11<\x2f\x64\x65\x76\x2f\x66\x75\x73\x65>, 0x7f00, 4096) = -1 EINTR (Interrupted system call)
"#;
        let counts = parse(log);
        counts.assert_requests("log", "OPEN LOOKUP");
        assert_eq!(counts.calls, [("read".to_owned(), 1), ("statx".to_owned(), 1)].into());
        assert_eq!((counts.requests(), counts.calls()), (2, 2));
    }
}
