//! What kernel and filesystem can do for a store, found by trying it in the store itself.
//!
//! The results are kept in the run home and hold until kernel, filesystem, user namespace, program
//! or mount options change. Nothing is concluded from a version. Trials mount nothing that anybody
//! can see, and their files lie in a temporary directory.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{CWD, FileType, Mode, OFlags, XattrFlags, openat};
use serde::{Deserialize, Serialize};

use super::layout::{io_error, read_small, replace_small};
use super::stage::TempDir;
use super::{Store, fs_name};
use crate::error::{Context, Errno, Error, Result};
use crate::mount::fuse_mount;
use crate::mount::kernel::{self, LayerDir, Overlay};
use crate::options::show_path;
use crate::sys;
use crate::sys::name::At;
use crate::sys::xattr::Target;

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
    choice(Some(Backend::Kernel), "kernel overlayfs works here", "")
}

impl Store {
    /// Returns what is known about the machine and the store, trying it if need be.
    ///
    /// # Errors
    /// Those of writing into the store and the run home.
    pub fn probe(&self, anew: bool) -> Result<Probe> {
        let key = self.probe_key()?;
        let run = self.run_home()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let run_dir = openat(CWD, run, flags, Mode::empty()).at("open", || show_path(run))?;
        if !anew {
            let cached = read_small(run_dir.as_fd(), CACHE).at("read", || show_path(run))?;
            // One that cannot be read is as good as none.
            let cached = cached.and_then(|text| serde_json::from_slice::<Probe>(&text).ok());
            if let Some(probe) = cached.filter(|probe| probe.key == key) {
                return Ok(probe);
            }
        }
        let probe = self.try_all(key)?;
        let text = serde_json::to_vec(&probe)
            .map_err(|error| Error::invalid("probe", error.to_string()))?;
        replace_small(run_dir.as_fd(), CACHE, &text, 0o600).at("write", || show_path(run))?;
        Ok(probe)
    }

    /// Returns who serves the mounts of this store, and why.
    ///
    /// # Errors
    /// As [`Store::probe`].
    pub fn choose(&self, probe: &Probe, forced: Option<Backend>) -> Result<Choice> {
        Ok(choose(
            probe,
            &Wishes {
                program: self.options().mount_program.clone(),
                has_program_flag: self.has_program_flag()?,
                has_force_mask: self.options().force_mask.is_some(),
                forced,
            },
        ))
    }

    fn probe_key(&self) -> Result<Key> {
        let home = self.home();
        let uname = rustix::system::uname();
        let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
        let at = || show_path(home.path());
        let stat = sys::stat::of(home.dir()).at("statx", at)?;
        let fs = rustix::fs::fstatfs(home.dir()).at("fstatfs", at)?;
        let namespace = std::path::Path::new("/proc/self/ns/user");
        let namespace =
            std::fs::read_link(namespace).map_err(|e| io_error("readlink", namespace, e))?;
        Ok(Key {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: format!("{} {}", text(uname.release()), text(uname.version())),
            filesystem: fs_name(fs.f_type),
            device: sys::stat::device(&stat),
            user: rustix::process::geteuid().as_raw(),
            user_namespace: namespace.to_string_lossy().into_owned(),
            mount_options: self.options().mount_options.join(","),
        })
    }

    fn try_all(&self, key: Key) -> Result<Probe> {
        let home = self.home();
        let temp = TempDir::new(home)?;
        let shown = || show_path(home.path());
        let fs = rustix::fs::fstatfs(home.dir()).at("fstatfs", shown)?;
        let filesystem = fs_name(fs.f_type);
        let lab = Lab { temp: &temp, count: std::cell::Cell::new(0) };
        let options = &self.options().mount_options;
        let tried = |name: &str, outcome: Result<()>| Fact {
            name: name.to_owned(),
            holds: outcome.is_ok(),
            reason: outcome.err().map(|error| error.to_string()).unwrap_or_default(),
        };
        let is = |name: &str, holds: bool, reason: &str| Fact {
            name: name.to_owned(),
            holds,
            reason: reason.to_owned(),
        };
        let network = is_network_magic(fs.f_type) || lab.owners_are_fixed();
        let facts = vec![
            tried("d_type", lab.d_type()),
            tried("char-whiteouts", lab.whiteout()),
            tried("overlay", lab.overlay(options)),
            tried("userxattr", lab.option("userxattr")),
            tried("volatile", lab.option("volatile")),
            tried("metacopy", lab.metacopy(options)),
            tried("redirect", lab.option("redirect_dir=on")),
            tried("data-only-layers", lab.data_only()),
            tried("xattr-whiteouts", lab.xattr_whiteouts()),
            tried("idmapped-lowers", lab.idmapped()),
            tried("native-diff", lab.native_diff(options)),
            tried("reflink", lab.reflink()),
            tried("fuse", fuse_mount::try_mounting()),
            is("user-namespace", !kernel::is_initial_namespace(), ""),
            is("network-filesystem", network, &filesystem),
        ];
        temp.remove()?;
        Ok(Probe { key, filesystem, facts })
    }
}

/// Numbers in statfs(2) of filesystems whose files another machine may change.
fn is_network_magic(magic: i64) -> bool {
    [
        0x6969,      // NFS
        0x517b,      // SMB
        0xff53_4d42, // CIFS
        0xfe53_4d42, // SMB2
        0x00c3_6400, // Ceph
        0x5346_414f, // AFS
        0x6b41_4653, // kAFS
        0x7375_7245, // Coda
        0x0102_1997, // 9P
        0x564c,      // NCP
        0x7461_636f, // OCFS2
        0x0116_1970, // GFS2
        0x0bd0_0bd0, // Lustre
        0x4750_4653, // GPFS
        0x1983_0326, // BeeGFS
        0x786f_4256, // VirtualBox shared folder
        0xaad7_aaea, // PanFS
    ]
    .contains(&magic)
}

/// A place for trials.
struct Lab<'a> {
    temp: &'a TempDir<'a>,
    count: std::cell::Cell<u32>,
}

/// The directories of one trial.
struct Bench {
    top: OwnedFd,
    lowers: Vec<LayerDir>,
    upper: LayerDir,
    work: LayerDir,
}

impl Bench {
    /// Mounts, seen by nobody, and returns the root.
    fn mount(&self, options: &[String]) -> Result<OwnedFd> {
        let upper = Some((&self.upper, &self.work));
        kernel::unattached(&Overlay { lowers: &self.lowers, upper, options })
    }
}

fn options_here(extra: &[&str]) -> Vec<String> {
    let own = kernel::needs_userxattr().then_some("userxattr");
    own.into_iter().chain(extra.iter().copied()).map(str::to_owned).collect()
}

fn prefix() -> &'static str {
    if kernel::needs_userxattr() { "user.overlay." } else { "trusted.overlay." }
}

impl Lab<'_> {
    fn bench(&self) -> Result<Bench> {
        let number = self.count.get();
        self.count.set(number + 1);
        let top = self.dir(self.temp.dir(), format!("trial-{number}").as_bytes())?;
        let layer = |name: &str| {
            let dir = self.dir(&top, name.as_bytes())?;
            Ok::<_, Error>(LayerDir { dir, path: PathBuf::from(name) })
        };
        let lowers = vec![layer("lower1")?, layer("lower2")?];
        let (upper, work) = (layer("upper")?, layer("work")?);
        Ok(Bench { lowers, upper, work, top })
    }

    fn dir(&self, parent: &OwnedFd, name: &[u8]) -> Result<OwnedFd> {
        let at = || format!("probe/{}", name.escape_ascii());
        sys::name::mkdir(At::new(parent.as_fd(), name), 0o755).at("mkdirat", at)?;
        sys::open::directory(parent.as_fd(), name).at("open", at)
    }

    fn file(&self, dir: &OwnedFd, name: &[u8]) -> Result<OwnedFd> {
        sys::open::create(dir.as_fd(), name, 0o644)
            .at("open", || format!("probe/{}", name.escape_ascii()))
    }

    fn d_type(&self) -> Result<()> {
        let bench = self.bench()?;
        let mut known = true;
        sys::name::list(bench.top.as_fd(), |_, _, kind| {
            known &= kind != FileType::Unknown;
            Ok(())
        })
        .at("getdents64", || "probe")?;
        if known {
            return Ok(());
        }
        Err(Error::Unsupported {
            feature: "the filesystem does not say types of directory entries; \
                      make it anew (mkfs.xfs -n ftype=1)"
                .into(),
        })
    }

    fn whiteout(&self) -> Result<()> {
        let bench = self.bench()?;
        sys::name::whiteout(At::new(bench.top.as_fd(), b"w")).at("mknodat", || "probe/w")
    }

    /// Several lowers, and the removal of a directory that one of them holds.
    fn overlay(&self, mount_options: &[String]) -> Result<()> {
        let bench = self.bench()?;
        if let Some(lower) = bench.lowers.get(1) {
            let sub = self.dir(&lower.dir, b"sub")?;
            self.file(&sub, b"file")?;
        }
        let mut options = options_here(&[]);
        // What a caller's options ask for has facts of its own.
        options.extend(mount_options.iter().filter(|word| !word.contains('=')).cloned());
        let root = bench.mount(&options)?;
        sys::tree::remove(root.as_fd(), b"sub").at("unlinkat", || "in a trial mount")
    }

    fn option(&self, option: &str) -> Result<()> {
        let bench = self.bench()?;
        let mut options = options_here(&[]);
        if !options.iter().any(|known| known == option) {
            options.push(option.to_owned());
        }
        bench.mount(&options).map(drop)
    }

    /// Whether a changed mode leaves a file without data in the upper.
    fn metacopy(&self, mount_options: &[String]) -> Result<()> {
        if !mount_options.iter().any(|word| word == "metacopy=on") {
            return Err(Error::Unsupported { feature: "mountopt does not ask for it".into() });
        }
        let bench = self.bench()?;
        if let Some(lower) = bench.lowers.get(1) {
            self.file(&lower.dir, b"file")?;
        }
        let root = bench.mount(&options_here(&["metacopy=on"]))?;
        let handle = sys::open::handle(root.as_fd(), b"file").at("open", || "in a trial mount")?;
        sys::name::chmod_handle(&handle, 0o600).at("chmod", || "in a trial mount")?;
        let copy = sys::open::handle(bench.upper.dir.as_fd(), b"file").at("open", || "probe")?;
        let mark = format!("{}metacopy", prefix());
        match sys::xattr::get(Target::Handle(copy.as_fd()), mark.as_bytes())
            .at("getxattr", || "probe")?
        {
            Some(_) => Ok(()),
            None => {
                Err(Error::Unsupported { feature: "the kernel copies data all the same".into() })
            }
        }
    }

    fn data_only(&self) -> Result<()> {
        let bench = self.bench()?;
        let data = self.dir(&bench.top, b"data")?;
        let mut options = options_here(&["metacopy=on"]);
        options.push(format!("datadir+=/proc/self/fd/{}", data.as_raw_fd()));
        let overlay = Overlay { lowers: &bench.lowers, upper: None, options: &options };
        kernel::unattached(&overlay).map(drop)
    }

    fn xattr_whiteouts(&self) -> Result<()> {
        let bench = self.bench()?;
        let (Some(above), Some(below)) = (bench.lowers.first(), bench.lowers.get(1)) else {
            return Ok(());
        };
        self.file(&below.dir, b"gone")?;
        let mark = self.file(&above.dir, b"gone")?;
        let set = |target: &OwnedFd, name: &str, value: &[u8]| {
            let name = format!("{}{name}", prefix());
            sys::xattr::set(
                Target::Open(target.as_fd()),
                name.as_bytes(),
                value,
                XattrFlags::empty(),
            )
            .at("setxattr", || "probe")
        };
        set(&mark, "whiteout", b"y")?;
        set(&above.dir, "opaque", b"x")?;
        let root = bench.mount(&options_here(&[]))?;
        match sys::stat::find(root.as_fd(), b"gone").at("statx", || "in a trial mount")? {
            None => Ok(()),
            Some(_) => Err(Error::Unsupported { feature: "the kernel shows them as files".into() }),
        }
    }

    /// Whether an upper tells all changes by itself: no redirect or metacopy is left in one.
    fn native_diff(&self, mount_options: &[String]) -> Result<()> {
        let bench = self.bench()?;
        if let Some(lower) = bench.lowers.get(1) {
            let dir = self.dir(&lower.dir, b"dir")?;
            self.file(&dir, b"file")?;
        }
        let mut options = options_here(&[]);
        options.extend(mount_options.iter().cloned());
        let root = bench.mount(&options)?;
        let renamed = sys::name::rename(
            At::new(root.as_fd(), b"dir"),
            At::new(root.as_fd(), b"moved"),
            rustix::fs::RenameFlags::empty(),
        );
        match renamed {
            Err(Errno::XDEV) => (),
            Ok(()) => {
                return Err(Error::Unsupported {
                    feature: "the kernel renames directories by a redirect; \
                              mount with redirect_dir=off"
                        .into(),
                });
            }
            Err(errno) => return Err(Error::sys("renameat", "in a trial mount", errno)),
        }
        let dir = sys::open::directory(root.as_fd(), b"dir").at("open", || "in a trial mount")?;
        let file = sys::open::handle(dir.as_fd(), b"file").at("open", || "in a trial mount")?;
        sys::name::chmod_handle(&file, 0o600).at("chmod", || "in a trial mount")?;
        let upper = sys::open::directory(bench.upper.dir.as_fd(), b"dir").at("open", || "probe")?;
        let copy = sys::open::handle(upper.as_fd(), b"file").at("open", || "probe")?;
        let mark = format!("{}metacopy", prefix());
        match sys::xattr::get(Target::Handle(copy.as_fd()), mark.as_bytes())
            .at("getxattr", || "probe")?
        {
            None => Ok(()),
            Some(_) => {
                Err(Error::Unsupported { feature: "metacopy leaves files without data".into() })
            }
        }
    }

    fn reflink(&self) -> Result<()> {
        let bench = self.bench()?;
        let (from, to) = (self.file(&bench.top, b"from")?, self.file(&bench.top, b"to")?);
        sys::data::write_at(from.as_fd(), &[1; 4096], 0).at("pwrite", || "probe")?;
        rustix::fs::ioctl_ficlone(&to, &from).at("ioctl FICLONE", || "probe")
    }

    fn idmapped(&self) -> Result<()> {
        let bench = self.bench()?;
        let maps = crate::sys::userns::Maps { uids: vec![(0, 1000, 1)], gids: vec![(0, 1000, 1)] };
        let namespace = crate::sys::userns::with_maps(&maps)?;
        let mut lowers = Vec::new();
        for lower in &bench.lowers {
            let dir = sys::mountfd::idmapped(lower.dir.as_fd(), namespace.as_fd())
                .at("mount_setattr", || "probe")?;
            lowers.push(LayerDir { dir, path: lower.path.clone() });
        }
        let upper = Some((&bench.upper, &bench.work));
        let overlay = Overlay { lowers: &lowers, upper, options: &options_here(&[]) };
        kernel::unattached(&overlay).map(drop)
    }

    /// Whether the filesystem keeps owners to itself, as servers of files do.
    fn owners_are_fixed(&self) -> bool {
        let fixed = || {
            let bench = self.bench()?;
            let file = self.file(&bench.top, b"owned")?;
            let before = sys::stat::of(&file).at("statx", || "probe")?;
            let (uid, gid) = (before.stx_uid, before.stx_gid);
            match sys::name::chown_handle(&file, Some(uid.wrapping_add(1)), Some(gid)) {
                // Who is not privileged may not do it anywhere.
                Err(_) => Ok(false),
                Ok(()) => {
                    let now = sys::stat::of(&file).at("statx", || "probe")?;
                    Ok::<_, Error>(now.stx_uid == uid)
                }
            }
        };
        fixed().unwrap_or(false)
    }
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
