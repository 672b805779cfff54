//! Commands that are killed at one of the system calls they make.
//!
//! strace(1) counts each call by its name, also where it is given a class of them; so a command is traced first, and then
//! killed at the nth call of a name.

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
    let log = Base::get().unique("calls");
    let options = ["-e", "trace=%file,%desc", "-o", log.to_str().unwrap()];
    let out = traced(command, &options).output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", said(&out));
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(&log).unwrap();
    let mut calls: Vec<Call> = Vec::new();
    for name in text.lines().filter_map(|line| Some(line.split_once('(')?.0)) {
        // Of the program that is started, not of strace.
        if name == "execve"
            || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        {
            continue;
        }
        let nth = calls.iter().filter(|call| call.name == name).count() + 1;
        calls.push(Call { name: name.to_owned(), nth });
    }
    assert!(calls.len() > 60, "{command:?}: only {} calls", calls.len());
    let all = std::env::var_os("FUSE_TESTS_EVERY_CALL").is_some();
    calls.into_iter().step_by(if all { 1 } else { stride }).collect()
}

/// Runs a command that is killed at a call of its first thread; `false` if it came to its end. What it starts goes on.
pub fn at(command: &Command, call: &Call) -> bool {
    let inject = format!("inject={}:signal=KILL:when={}", call.name, call.nth);
    let out = traced(command, &["-o", "/dev/null", "-e", &inject]).output().unwrap();
    !out.status.success()
}
