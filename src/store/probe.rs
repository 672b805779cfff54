//! What kernel and filesystem can do for a store, found by trying it in the store itself.
//!
//! The results are kept in the run home and hold until kernel, filesystem, user namespace,
//! capabilities, the device, program or mount options change. Nothing is concluded from a version.
//! Trials mount nothing that anybody can see, and their files lie in a temporary directory.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, CWD, Mode, OFlags, openat};
use serde::{Deserialize, Serialize};

use super::layout::{Home, io_error, make_dirs, read_small, replace_small};
use super::stage::TempDir;
use super::{Store, fs_name, trials};
use crate::error::{Context, Error, Result};
use crate::options::show_path;
use crate::sys;

/// File in the run home with what was found.
const CACHE: &[u8] = b"lamina-probe.json";

/// What the results depend on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Key {
    program: String,
    kernel: String,
    filesystem: String,
    device: u64,
    user: u32,
    user_namespace: String,
    capabilities: u64,
    has_fuse_device: bool,
    mount_options: String,
}

/// One thing that was tried.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Fact {
    /// What it is called.
    pub name: String,
    /// Whether it works, or is so.
    pub holds: bool,
    /// Why not, or more about it; may be empty.
    pub reason: String,
}

/// All that was found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Probe {
    key: Key,
    /// Name of the filesystem that holds the store.
    pub filesystem: String,
    /// The facts, in the order of the trials.
    pub facts: Vec<Fact>,
}

/// Who serves the mounts of a store.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Kernel overlayfs.
    Kernel,
    /// Our own server over FUSE.
    Fuse,
    /// A mount program that the user names.
    Program(PathBuf),
    /// Nobody: a copy stands in place of the mount.
    Flat,
}

impl Backend {
    /// Returns its name, as options and output have it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Fuse => "fuse",
            Self::Program(_) => "program",
            Self::Flat => "flat",
        }
    }
}

/// A backend, and why it is that one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Who serves; `None` if nobody can.
    pub backend: Option<Backend>,
    /// One sentence.
    pub reason: String,
    /// What to do to get the kernel's; empty if it is chosen.
    pub cure: String,
}

impl Probe {
    /// Returns whether something works.
    pub fn holds(&self, name: &str) -> bool {
        self.facts.iter().any(|fact| fact.name == name && fact.holds)
    }

    fn reason(&self, name: &str) -> &str {
        self.facts.iter().find(|fact| fact.name == name).map_or("", |fact| &fact.reason)
    }
}

/// What decides between the backends beside the facts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Wishes {
    /// A mount program that the options name.
    pub program: Option<PathBuf>,
    /// Whether the store was written through a mount program.
    pub has_program_flag: bool,
    /// Whether modes are masked.
    pub has_force_mask: bool,
    /// Whether the layer is one whole tree, which is no stack to the kernel.
    pub is_tree: bool,
    /// Whether the layers have whiteouts as aufs keeps them.
    pub is_aufs: bool,
    /// Whether other ids are to be shown than the layers have.
    pub has_maps: bool,
    /// A backend that the caller insists on.
    pub forced: Option<Backend>,
}

/// How FUSE comes to work where only copies are left.
const FUSE_CURE: &str = "modprobe fuse; in a container, start it with --device /dev/fuse; as an \
     ordinary user, install fusermount3 (package fuse3) or use podman unshare";

/// Decides who serves. Pure.
pub fn choose(probe: &Probe, wishes: &Wishes) -> Choice {
    let choice = |backend, reason: &str, cure: &str| Choice {
        backend,
        reason: reason.to_owned(),
        cure: cure.to_owned(),
    };
    if let Some(backend) = &wishes.forced {
        return choice(Some(backend.clone()), "it was asked for", "");
    }
    if let Some(program) = &wishes.program {
        let backend = Some(Backend::Program(program.clone()));
        return choice(backend, "mount_program names it", "leave mount_program out");
    }
    let fuse = |reason: &str, cure: &str| {
        if probe.holds("fuse") {
            return choice(Some(Backend::Fuse), reason, cure);
        }
        let reason = format!("{reason}, and FUSE does not work: {}", probe.reason("fuse"));
        // Only a server can show other modes than those of the files.
        let backend = (!wishes.has_force_mask).then_some(Backend::Flat);
        choice(backend, &reason, FUSE_CURE)
    };
    if wishes.has_program_flag {
        return fuse(
            ".has-mount-program says that a mount program wrote into the store, which the kernel \
             may not understand",
            "export the images and import them into a new store",
        );
    }
    if wishes.is_aufs {
        return fuse(
            "aufs keeps whiteouts as files, which the kernel does not know and does not write",
            "migrate the store to the driver overlay or overlay2 (lamina store migrate)",
        );
    }
    if wishes.is_tree {
        return fuse("one tree alone is no stack to the kernel", "mount a layer made on it");
    }
    if wishes.has_force_mask {
        return fuse("force_mask needs a server that knows the masked modes", "leave it out");
    }
    if probe.holds("network-filesystem") && probe.holds("user-namespace") {
        return fuse(
            "the store is on a network filesystem, where user namespaces have no say over owners",
            "keep the store on a local disk",
        );
    }
    if !probe.holds("overlay") {
        let reason = format!("kernel overlayfs does not work here: {}", probe.reason("overlay"));
        return fuse(
            &reason,
            "keep the store on ext4, xfs (ftype=1), btrfs or tmpfs, with Linux 5.11 or newer",
        );
    }
    if wishes.has_maps && !probe.holds("idmapped-lowers") {
        let reason = format!(
            "the kernel cannot map the ids of layers here: {}",
            probe.reason("idmapped-lowers")
        );
        return fuse(
            &reason,
            "be root of the machine, with Linux 6.15 or newer and a filesystem with idmapped mounts \
             (ext4, xfs, btrfs, tmpfs)",
        );
    }
    choice(Some(Backend::Kernel), "kernel overlayfs works here", "")
}

impl Store {
    /// Returns what is known about the machine and the store, trying it if need be.
    ///
    /// # Errors
    /// Those of writing into the store and the run home.
    pub fn probe(&self, anew: bool) -> Result<Probe> {
        probe(self.home(), self.run_home()?, &self.options().mount_options, anew)
    }

    /// Returns who serves the mounts of this store, and why.
    ///
    /// # Errors
    /// As [`Store::probe`].
    pub fn choose(&self, probe: &Probe, has_maps: bool, forced: Option<Backend>) -> Result<Choice> {
        Ok(choose(
            probe,
            &Wishes {
                program: self.options().mount_program.clone(),
                has_program_flag: self.has_program_flag()?,
                has_force_mask: self.options().force_mask.is_some(),
                has_maps,
                forced,
                ..Wishes::default()
            },
        ))
    }
}

/// Returns what is known about the machine and a store, trying it if need be.
///
/// # Errors
/// Those of writing into the store and the run home.
pub(super) fn probe(
    home: &Home,
    run_home: &Path,
    mount_options: &[String],
    anew: bool,
) -> Result<Probe> {
    let key = probe_key(home, mount_options)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let run_dir = openat(CWD, run_home, flags, Mode::empty()).at("open", || show_path(run_home))?;
    if !anew {
        let cached = read_small(run_dir.as_fd(), CACHE).at("read", || show_path(run_home))?;
        // One that cannot be read is as good as none.
        let cached = cached.and_then(|text| serde_json::from_slice::<Probe>(&text).ok());
        if let Some(probe) = cached.filter(|probe| probe.key == key) {
            return Ok(probe);
        }
    }
    let probe = try_all(home, mount_options, key)?;
    let text =
        serde_json::to_vec(&probe).map_err(|error| Error::invalid("probe", error.to_string()))?;
    replace_small(run_dir.as_fd(), CACHE, &text, 0o600).at("write", || show_path(run_home))?;
    Ok(probe)
}

/// Returns who serves a mount in a store of old, whose run home is made where it is missing.
///
/// # Errors
/// `Unsupported` if nobody can; as [`probe`].
pub(super) fn pick(home: &Home, run_home: &Path, wishes: &Wishes) -> Result<Backend> {
    if let Some(forced) = &wishes.forced {
        return Ok(forced.clone());
    }
    let (_, choice) = try_machine(home, run_home, wishes, false)?;
    choice.backend.ok_or_else(|| Error::Unsupported {
        feature: format!("cannot be mounted: {}; {}", choice.reason, choice.cure).into(),
    })
}

/// Returns what is known about the machine and a store of old, and who serves its mounts.
///
/// # Errors
/// As [`probe`].
pub(super) fn try_machine(
    home: &Home,
    run_home: &Path,
    wishes: &Wishes,
    anew: bool,
) -> Result<(Probe, Choice)> {
    make_dirs(run_home, 0o700)?;
    let probe = probe(home, run_home, &[], anew)?;
    let choice = choose(&probe, wishes);
    Ok((probe, choice))
}

fn probe_key(home: &Home, mount_options: &[String]) -> Result<Key> {
    let uname = rustix::system::uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    let at = || show_path(home.path());
    let stat = sys::stat::of(home.dir()).at("statx", at)?;
    let fs = rustix::fs::fstatfs(home.dir()).at("fstatfs", at)?;
    let namespace = Path::new("/proc/self/ns/user");
    let namespace =
        std::fs::read_link(namespace).map_err(|e| io_error("readlink", namespace, e))?;
    let capabilities =
        rustix::thread::capabilities(None).at("capget", || "this process".to_owned())?;
    Ok(Key {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: format!("{} {}", text(uname.release()), text(uname.version())),
        filesystem: fs_name(fs.f_type),
        device: sys::stat::device(&stat),
        user: rustix::process::geteuid().as_raw(),
        user_namespace: namespace.to_string_lossy().into_owned(),
        capabilities: capabilities.effective.bits(),
        has_fuse_device: rustix::fs::access("/dev/fuse", Access::READ_OK | Access::WRITE_OK)
            .is_ok(),
        mount_options: mount_options.join(","),
    })
}

fn try_all(home: &Home, mount_options: &[String], key: Key) -> Result<Probe> {
    let temp = TempDir::new(home)?;
    let shown = || show_path(home.path());
    let fs = rustix::fs::fstatfs(home.dir()).at("fstatfs", shown)?;
    let filesystem = fs_name(fs.f_type);
    let facts = trials::run(&temp, fs.f_type, &filesystem, mount_options);
    temp.remove()?;
    Ok(Probe { key, filesystem, facts })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(facts: &[(&str, bool)]) -> Probe {
        let key = Key {
            program: String::new(),
            kernel: String::new(),
            filesystem: String::new(),
            device: 0,
            user: 0,
            user_namespace: String::new(),
            capabilities: 0,
            has_fuse_device: true,
            mount_options: String::new(),
        };
        let fact = |(name, holds): &(&str, bool)| Fact {
            name: (*name).to_owned(),
            holds: *holds,
            reason: format!("because of {name}"),
        };
        Probe { key, filesystem: String::new(), facts: facts.iter().map(fact).collect() }
    }

    #[test]
    fn the_kernel_serves_unless_something_speaks_against_it() {
        let all = probe(&[("overlay", true), ("fuse", true)]);
        let none = Wishes::default();
        assert_eq!(choose(&all, &none).backend, Some(Backend::Kernel));
        let flagged = Wishes { has_program_flag: true, ..none.clone() };
        assert_eq!(choose(&all, &flagged).backend, Some(Backend::Fuse));
        let masked = Wishes { has_force_mask: true, ..none.clone() };
        assert_eq!(choose(&all, &masked).backend, Some(Backend::Fuse));
        let named = Wishes { program: Some("/p".into()), ..none.clone() };
        assert_eq!(choose(&all, &named).backend, Some(Backend::Program("/p".into())));
        let forced = Wishes { forced: Some(Backend::Fuse), ..named };
        assert_eq!(choose(&all, &forced).backend, Some(Backend::Fuse));
        let mapped = Wishes { has_maps: true, ..none.clone() };
        assert_eq!(choose(&all, &mapped).backend, Some(Backend::Fuse));
        let shifting = probe(&[("overlay", true), ("fuse", true), ("idmapped-lowers", true)]);
        assert_eq!(choose(&shifting, &mapped).backend, Some(Backend::Kernel));
        let remote = [("overlay", true), ("fuse", true), ("network-filesystem", true)];
        assert_eq!(choose(&probe(&remote), &none).backend, Some(Backend::Kernel));
        let remote = probe(&[&remote[..], &[("user-namespace", true)]].concat());
        assert_eq!(choose(&remote, &none).backend, Some(Backend::Fuse));
    }

    #[test]
    fn each_choice_has_a_reason_and_a_cure() {
        let no_kernel = probe(&[("overlay", false), ("fuse", true)]);
        let choice = choose(&no_kernel, &Wishes::default());
        assert_eq!(choice.backend, Some(Backend::Fuse));
        assert!(choice.reason.ends_with("because of overlay") && !choice.cure.is_empty());
        let nothing = probe(&[("overlay", false), ("fuse", false)]);
        let choice = choose(&nothing, &Wishes::default());
        assert_eq!(choice.backend, Some(Backend::Flat));
        let masked = Wishes { has_force_mask: true, ..Wishes::default() };
        assert_eq!(choose(&nothing, &masked).backend, None);
        assert!(choice.reason.contains("because of overlay"));
        assert!(choice.reason.ends_with("because of fuse") && choice.cure.contains("/dev/fuse"));
    }
}
