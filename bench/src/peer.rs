//! Who is compared, and a mount of theirs.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use rustix::mount::UnmountFlags;

use crate::layers::TREE;

/// The name of [`Peer::least`].
pub const LEAST: &str = "least";

/// The name of [`Peer::over_kernel`].
pub const OVER_KERNEL: &str = "over-kernel";

/// One of those compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name in reports.
    pub name: String,
    kind: Kind,
    /// What the names of its scenarios begin with; all, if nothing is said.
    pub only: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// The merged tree as plain files.
    Native,
    Kernel,
    Program {
        program: PathBuf,
        /// What it gets before all else.
        first: Option<&'static str>,
        options: String,
    },
    OverKernel {
        program: PathBuf,
    },
}

impl Peer {
    /// The bare filesystem.
    pub fn native() -> Peer {
        Peer { name: "native".into(), kind: Kind::Native, only: Vec::new() }
    }

    /// Kernel overlayfs.
    pub fn kernel() -> Peer {
        Peer { name: "kernel".into(), kind: Kind::Kernel, only: Vec::new() }
    }

    /// A mount program, and options it always gets.
    pub fn program(name: &str, program: &str, options: &str) -> Peer {
        let kind = Kind::Program { program: program.into(), first: None, options: options.into() };
        Peer { name: name.into(), kind, only: Vec::new() }
    }

    /// The least server there can be, which is in this program.
    pub fn least() -> Result<Peer, String> {
        let program = std::env::current_exe().map_err(|e| format!("/proc/self/exe: {e}"))?;
        let kind = Kind::Program { program, first: Some("--mount-least"), options: String::new() };
        Ok(Peer { name: LEAST.into(), kind, only: Vec::new() })
    }

    /// Kernel overlayfs, as the upper of a union without anything in its lower that `program` serves: what the kernel's own work
    /// takes when it is asked for over FUSE.
    pub fn over_kernel(program: &str) -> Peer {
        let kind = Kind::OverKernel { program: program.into() };
        Peer { name: OVER_KERNEL.into(), kind, only: Vec::new() }
    }

    /// Tells whether it takes part in a scenario.
    pub fn takes_part(&self, scenario: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|word| scenario.starts_with(&**word))
    }

    /// Tells whether a program serves it.
    pub fn has_server(&self) -> bool {
        matches!(self.kind, Kind::Program { .. } | Kind::OverKernel { .. })
    }

    /// Tells whether it needs no mount.
    pub fn is_native(&self) -> bool {
        self.kind == Kind::Native
    }
}

/// The directories of a mount.
#[derive(Clone, Debug)]
pub struct Stack {
    /// Topmost first.
    pub lowers: Vec<PathBuf>,
    /// The writable layer; its workdir and the mountpoint lie beside it.
    pub upper: PathBuf,
    /// The merged tree as plain files, for [`Peer::native`].
    pub plain: PathBuf,
    /// Something is written to it.
    pub is_changed: bool,
}

/// A mount that ends when dropped.
#[derive(Debug)]
pub struct Mounted {
    /// Where the tree is seen.
    pub path: PathBuf,
    server: Option<u32>,
    /// Mounts to end, the topmost first.
    mounts: Vec<PathBuf>,
}

/// What a server has cost since it began.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Processor time.
    pub cpu: Duration,
    /// Most memory at any time, bytes.
    pub memory: u64,
}

impl Mounted {
    /// Mounts `stack` by `peer`.
    pub fn new(peer: &Peer, stack: &Stack) -> Result<Mounted, String> {
        let mut mounted = Mounted { path: stack.plain.clone(), server: None, mounts: Vec::new() };
        if peer.is_native() {
            return Ok(mounted);
        }
        let beside = |name: &str| stack.upper.with_file_name(name);
        let (work, merged, beneath, none) =
            (beside("work"), beside("merged"), beside("beneath"), beside("none"));
        for dir in [&stack.upper, &work, &merged, &beneath, &none] {
            fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        }
        mounted.path = merged.clone();
        let options = |lowers: &[PathBuf], upper: &Path, work: &Path| {
            let lowers: Vec<String> = lowers.iter().map(|l| l.display().to_string()).collect();
            let (lowers, upper, work) = (lowers.join(":"), upper.display(), work.display());
            format!("lowerdir={lowers},upperdir={upper},workdir={work}")
        };
        match &peer.kind {
            Kind::Native => {}
            Kind::Kernel => {
                mount_kernel(&stack.lowers, &stack.upper, &work, &merged)?;
                mounted.mounts.push(merged);
            }
            Kind::OverKernel { program } => {
                // The work directory has to be beneath the same mount as the upper, and beside it.
                let parents: Vec<PathBuf> =
                    stack.lowers.iter().filter_map(|lower| Some(lower.parent()?.into())).collect();
                mount_kernel(&parents, &stack.upper, &work, &beneath)?;
                mounted.mounts.push(beneath.clone());
                let work = beneath.join("work");
                fs::create_dir(&work).map_err(|e| format!("{}: {e}", work.display()))?;
                let list = options(&[none], &beneath.join(TREE), &work);
                mounted.start(program, None, &list)?;
            }
            Kind::Program { program, first, options: more } => {
                let mut list = options(&stack.lowers, &stack.upper, &work);
                if more.contains("io=passthrough") && !stack.is_changed {
                    // Files beneath a mount that can copy them up are not handed to the kernel.
                    list = list.split(",upperdir=").next().unwrap_or_default().into();
                }
                if !more.is_empty() {
                    list = format!("{list},{}", more.replace(';', ","));
                }
                mounted.start(program, *first, &list)?;
            }
        }
        Ok(mounted)
    }

    /// Starts a mount program for `self.path`.
    fn start(&mut self, program: &Path, first: Option<&str>, options: &str) -> Result<(), String> {
        let out = Command::new(program)
            .args(first)
            .args(["-o", options])
            .arg(&self.path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // A daemon may keep a pipe open.
            .stderr(Stdio::null())
            .status();
        match out {
            Ok(status) if status.success() => {}
            other => return Err(format!("{}: {other:?}", program.display())),
        }
        self.mounts.insert(0, self.path.clone());
        self.server = find_server(&self.path);
        Ok(())
    }

    /// Device number of the mount, if a server answers it.
    pub fn connection(&self) -> Option<u64> {
        self.server?;
        fs::metadata(&self.path).ok().map(|meta| meta.dev())
    }

    /// What the server has cost; nothing if there is none.
    pub fn cost(&self) -> Cost {
        let Some(pid) = self.server else { return Cost::default() };
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak = peak.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
        // /proc has it in hundredths of a second, more than many a step takes.
        let cpu =
            clock_getcpuclockid(Pid::from_raw(pid.cast_signed())).and_then(|clock| clock.now());
        let cpu = cpu.map_or(Duration::ZERO, Duration::from);
        Cost { cpu, memory: peak.unwrap_or(0) * 1024 }
    }

    /// Unmounts, and waits for the server to end.
    pub fn end(mut self) -> Result<(), String> {
        self.unmount()
    }

    fn unmount(&mut self) -> Result<(), String> {
        let until = Instant::now() + Duration::from_secs(30);
        while let Some(mount) = self.mounts.first() {
            match rustix::mount::unmount(mount, UnmountFlags::empty()) {
                Ok(()) => _ = self.mounts.remove(0),
                // The server above it may not have ended yet.
                Err(rustix::io::Errno::BUSY) if Instant::now() < until => pause(),
                Err(e) => return Err(format!("unmount {}: {e}", mount.display())),
            }
        }
        while self.server.is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
            if Instant::now() > until {
                return Err(format!("the server of {} does not end", self.path.display()));
            }
            pause();
        }
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(text) = self.unmount() {
            eprintln!("{text}");
            for mount in &self.mounts {
                let _ = rustix::mount::unmount(mount, UnmountFlags::DETACH);
            }
        }
    }
}

fn pause() {
    std::thread::sleep(Duration::from_millis(2));
}

/// By fsconfig(2), which takes as many layers as there may be.
fn mount_kernel(
    lowers: &[PathBuf],
    upper: &Path,
    work: &Path,
    merged: &Path,
) -> Result<(), String> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    };
    let make = || -> rustix::io::Result<()> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let context = std::os::fd::AsFd::as_fd(&context);
        for lower in lowers {
            fsconfig_set_string(context, "lowerdir+", lower)?;
        }
        fsconfig_set_string(context, "upperdir", upper)?;
        fsconfig_set_string(context, "workdir", work)?;
        if !in_initial_namespace() {
            fsconfig_set_flag(context, "userxattr")?;
        }
        fsconfig_create(context)?;
        let mount = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        move_mount(mount, "", rustix::fs::CWD, merged, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    };
    make().map_err(|e| format!("kernel overlay: {e}"))
}

fn in_initial_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().collect::<Vec<_>>() == ["0", "0", "4294967295"])
}

/// The process that has the mountpoint among its arguments.
fn find_server(merged: &Path) -> Option<u32> {
    let wanted = merged.as_os_str().as_encoded_bytes();
    let has = |pid: u32| -> io::Result<bool> {
        let line = fs::read(format!("/proc/{pid}/cmdline"))?;
        Ok(line.split(|byte| *byte == 0).any(|word| word == wanted))
    };
    let pids = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid| *pid != std::process::id() && has(*pid).unwrap_or(false))
}
