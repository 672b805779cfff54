//! Trials of what kernel and filesystem can do: each in directories of its own in a temporary one, on
//! mounts that nobody else sees. What fails says why.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{FileType, XattrFlags};

use super::probe::Fact;
use super::stage::TempDir;
use crate::error::{Context, Errno, Error, Result};
use crate::mount::fuse_mount;
use crate::mount::kernel::{self, LayerDir, Overlay};
use crate::sys;
use crate::sys::name::At;
use crate::sys::xattr::Target;

/// Tries everything, and returns the facts in the order of the trials; `magic` and `filesystem` are
/// number and name of what holds `temp`.
pub(super) fn run(
    temp: &TempDir<'_>,
    magic: i64,
    filesystem: &str,
    options: &[String],
) -> Vec<Fact> {
    let lab = Lab { temp, count: std::cell::Cell::new(0) };
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
    let network = is_network_magic(magic) || lab.owners_are_fixed();
    vec![
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
        is("network-filesystem", network, filesystem),
    ]
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
        // As a mount does: layers that lie in a detached tree.
        let tree = sys::mountfd::idmapped(bench.top.as_fd(), namespace.as_fd())
            .at("mount_setattr", || "probe")?;
        let mut lowers = Vec::new();
        for lower in &bench.lowers {
            let name = lower.path.as_os_str().as_encoded_bytes();
            let dir = sys::mountfd::open_inside(tree.as_fd(), name).at("openat2", || "probe")?;
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
