//! Mounts served by another process: our own server, or a mount program that the user names.
//!
//! Both are started, tell by their end whether the mount is there, and say on stderr why it is not.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::refuse;
use crate::error::{Errno, Error, Result};
use crate::options::show_path;

/// A mount that is wanted of another process, by paths.
#[derive(Debug)]
pub struct Served<'a> {
    /// Layers that are only read, topmost first.
    pub lowers: &'a [PathBuf],
    /// Upper and work directory.
    pub upper: Option<(&'a Path, &'a Path)>,
    /// Mount options.
    pub options: &'a [String],
    /// Where to mount.
    pub target: &'a Path,
    /// Directory that the process is started in.
    pub home: &'a Path,
}

/// Starts our own server, the program of this process.
///
/// # Errors
/// What the server says.
pub fn start_own(served: &Served<'_>) -> Result<()> {
    let mut command = Command::new("/proc/self/exe");
    // The name decides which form of the command line is meant.
    command.arg0("lamina").arg("mount");
    for lower in served.lowers {
        command.arg("--lower").arg(lower);
    }
    if let Some((upper, work)) = served.upper {
        command.arg("--upper").arg(upper).arg("--work").arg(work);
    }
    if !served.options.is_empty() {
        command.arg("-o").arg(served.options.join(","));
    }
    command.arg("--").arg(served.target);
    run(command, Path::new("lamina"), served)
}

/// Words of mount(8) that a mount program is never given.
const FLAG_WORDS: [&str; 40] = [
    "ro",
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "sync",
    "async",
    "dirsync",
    "remount",
    "mand",
    "nomand",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "bind",
    "rbind",
    "unbindable",
    "runbindable",
    "private",
    "rprivate",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "defaults",
    "iversion",
    "noiversion",
    "lazytime",
    "nolazytime",
    "silent",
    "loud",
    "",
];

/// Starts the mount program that a user named, by the command line that engines use.
///
/// # Errors
/// What the program says.
pub fn start_other(program: &Path, served: &Served<'_>) -> Result<()> {
    // All of it is one argument, of 128 KiB at most.
    let is_long = served.lowers.iter().map(|lower| lower.as_os_str().len()).sum::<usize>() > 65_536;
    let short = |path: &PathBuf| match path.strip_prefix(served.home) {
        Ok(inside) if is_long => inside.to_owned(),
        _ => path.clone(),
    };
    let mut data = b"lowerdir=".to_vec();
    for (index, lower) in served.lowers.iter().enumerate() {
        if index > 0 {
            data.push(b':');
        }
        for &byte in short(lower).as_os_str().as_bytes() {
            if matches!(byte, b':' | b'\\') {
                data.push(b'\\');
            }
            data.push(byte);
        }
    }
    if let Some((upper, work)) = served.upper {
        for (key, layer) in [(",upperdir=", upper), (",workdir=", work)] {
            data.extend_from_slice(key.as_bytes());
            data.extend_from_slice(layer.as_os_str().as_bytes());
        }
    }
    for option in served.options.iter().filter(|word| !FLAG_WORDS.contains(&word.as_str())) {
        data.push(b',');
        data.extend_from_slice(option.as_bytes());
    }
    let mut command = Command::new(program);
    command.arg("-o").arg(OsString::from_vec(data)).arg(served.target);
    run(command, program, served)
}

fn run(mut command: Command, program: &Path, served: &Served<'_>) -> Result<()> {
    let shown = || format!("mount program {}", show_path(program));
    let output = command
        .current_dir(served.home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            refuse(shown(), "execve", errno, "name a program that is there and may be run")
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let said = said.strip_prefix("lamina: ").unwrap_or(&said);
    Err(Error::Unsupported {
        feature: match said {
            "" => format!("{}: {}; run it by hand to see why", shown(), output.status),
            said => format!("{}: {said}", shown()),
        }
        .into(),
    })
}
