//! Commands that are killed at one of the system calls they make.
//!
//! strace(1) counts each call by its name, also where it is given a class of them; so a command is traced first, and then
//! killed at the nth call of a name.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use crate::case::said;
use crate::env::Base;

/// A call that a command made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// How many of that name were made until then, with this one.
    pub nth: usize,
}

fn traced(command: &Command, options: &[&str]) -> Command {
    let mut strace = Command::new("strace");
    strace.arg("-qq").args(options).arg(command.get_program()).args(command.get_args());
    strace.current_dir(command.get_current_dir().unwrap_or("/".as_ref())).stdin(Stdio::null());
    strace
}

/// Runs a command, which must succeed, and returns the calls of its first thread that have to do with files and descriptors,
/// in order, every `stride`th; with `FUSE_TESTS_EVERY_CALL=1` all of them.
///
/// # Panics
/// If it fails.
#[track_caller]
pub fn calls(command: &Command, stride: usize) -> Vec<Call> {
    trace(command, &[], stride)
}

/// The same, of all threads and of all programs that it starts: the nth of whoever makes it first.
///
/// # Panics
/// If it fails.
#[track_caller]
pub fn calls_of_all(command: &Command, stride: usize) -> Vec<Call> {
    trace(command, &["-ff"], stride)
}

#[track_caller]
fn trace(command: &Command, follow: &[&str], stride: usize) -> Vec<Call> {
    let dir = Base::get().unique("calls");
    std::fs::create_dir(&dir).unwrap();
    // With -ff each has a file of its own, with its number behind.
    let log = dir.join("log");
    let options = [follow, &["-e", "trace=%file,%desc", "-o", log.to_str().unwrap()]].concat();
    let out = traced(command, &options).output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", said(&out));
    let mut logs: Vec<_> =
        std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    logs.sort();
    let mut calls: Vec<Call> = Vec::new();
    for log in logs {
        let text = std::fs::read_to_string(log).unwrap();
        let mut made: BTreeMap<&str, usize> = BTreeMap::new();
        for name in text.lines().filter_map(|line| Some(line.split_once('(')?.0)) {
            // Of the program that is started, not of strace.
            if name == "execve"
                || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            {
                continue;
            }
            let nth = made.entry(name).or_default();
            *nth += 1;
            let call = Call { name: name.to_owned(), nth: *nth };
            if follow.is_empty() || !calls.contains(&call) {
                calls.push(call);
            }
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(calls.len() > 60, "{command:?}: only {} calls", calls.len());
    let all = std::env::var_os("FUSE_TESTS_EVERY_CALL").is_some();
    calls.into_iter().step_by(if all { 1 } else { stride }).collect()
}

/// Runs a command that is killed at a call of its first thread; `false` if it came to its end. What it starts goes on.
pub fn at(command: &Command, call: &Call) -> bool {
    kill(command, &[], call)
}

/// Runs a command that is killed at a call of whichever thread makes it first; `false` if it came to its end.
pub fn at_any(command: &Command, call: &Call) -> bool {
    kill(command, &["-f"], call)
}

fn kill(command: &Command, follow: &[&str], call: &Call) -> bool {
    let inject = format!("inject={}:signal=KILL:when={}", call.name, call.nth);
    let options = [follow, &["-o", "/dev/null", "-e", &inject]].concat();
    let out = traced(command, &options).output().unwrap();
    !out.status.success()
}
