//! The mount option grammar: one comma list to a [`MountOptions`] and back. Pure.
//!
//! The grammar is the kernel's: `,` ends an option, `:` ends a lower, and a backslash takes the
//! meaning from the character after it, once. Every name that kernel overlayfs, fuse-overlayfs or
//! mount(8) accepts has a line in one table: it acts, it is ignored because it would change
//! nothing here, or it is refused because it would.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use std::time::Duration;

use tracing::level_filters::LevelFilter;

use crate::error::{Error, Result};
use crate::idmap::{IdMap, Ids};
use crate::overrides::Form;

/// Most lowers of one mount, the kernel's `OVL_MAX_STACK`.
pub const LOWERS_MAX: usize = 500;
/// Most worker threads that can be asked for.
pub const THREADS_MAX: usize = 256;

/// Files and directories copied at most to rename a directory, unless told otherwise.
const DIR_RENAME_ENTRIES: u64 = 20_000;
/// Bytes copied at most to rename a directory, unless told otherwise.
const DIR_RENAME_SIZE: u64 = 1 << 30;

/// Propagation of the finished mount, mount(8) "shared subtree operations".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Propagation {
    /// Mounts made in it stay in this namespace.
    Private,
    /// Mounts made in it are seen by its peers and the reverse.
    Shared,
    /// Mounts of its master are seen here, not the reverse.
    Slave,
    /// Private, and cannot be bound elsewhere.
    Unbindable,
}

/// Something that a filesystem may be unable to do, and for which an upper has another way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ability {
    /// Unnamed files, `O_TMPFILE`.
    Unnamed,
    /// `RENAME_EXCHANGE`.
    Exchange,
    /// `RENAME_WHITEOUT`.
    RenameWhiteout,
    /// Character devices 0:0.
    Device,
    /// Extended attributes for marks.
    Xattr,
    /// Hard links.
    Link,
    /// Giving files to another owner.
    Chown,
    /// Removing an open file without leaving a name.
    UnlinkOpen,
}

/// Abilities by the names that `upper_lacks` takes.
const ABILITIES: [(&str, Ability); 8] = [
    ("tmpfile", Ability::Unnamed),
    ("exchange", Ability::Exchange),
    ("whiteout", Ability::RenameWhiteout),
    ("chardev", Ability::Device),
    ("xattr", Ability::Xattr),
    ("link", Ability::Link),
    ("chown", Ability::Chown),
    ("unlink_open", Ability::UnlinkOpen),
];

/// What carries the kernel's requests to the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Transport {
    /// Our own, straight from the device.
    #[default]
    Dev,
    /// The `fuser` crate.
    Fuser,
}

/// What a mount does with UUIDs, as the kernel's `uuid=`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Uuid {
    /// The upper keeps its own if it has one.
    #[default]
    Auto,
    /// The upper gets one of its own.
    On,
    /// The upper's own is not used; a FUSE mount shows none in any case.
    Null,
    /// Nor are those of the layers' filesystems.
    Off,
}

/// How files are opened and read, `io=`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoMode {
    /// The kernel opens files and directories by itself and asks for their content only.
    NoOpen,
    /// Each open and its end is a request.
    Open,
    /// As `Open`, and the kernel reads and writes files of the upper, or of a mount without one, by
    /// itself.
    Passthrough,
}

impl IoMode {
    /// Returns the word after `io=`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoOpen => "noopen",
            Self::Open => "open",
            Self::Passthrough => "passthrough",
        }
    }
}

/// `redirect_dir=`, as in kernel overlayfs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RedirectDir {
    /// Redirects are written and followed.
    On,
    /// Not written; followed if only root of the machine can have written them.
    #[default]
    Off,
    /// Not written; followed.
    Follow,
    /// Neither written nor followed.
    NoFollow,
}

impl RedirectDir {
    const ALL: [(Self, &'static str); 4] = [
        (Self::On, "on"),
        (Self::Off, "off"),
        (Self::Follow, "follow"),
        (Self::NoFollow, "nofollow"),
    ];

    fn parse(value: &[u8]) -> Result<Self> {
        let known = Self::ALL.iter().find(|(_, name)| name.as_bytes() == value);
        known.map(|(known, _)| *known).ok_or_else(|| {
            Error::invalid(
                format!("redirect_dir={}", text(value)),
                "is none of on, off, follow, nofollow",
            )
        })
    }

    fn print(self) -> &'static str {
        Self::ALL.iter().find(|(known, _)| *known == self).map_or("off", |(_, name)| name)
    }
}

/// `verity=`, as in kernel overlayfs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Verity {
    /// Digests are not looked at.
    #[default]
    Off,
    /// Digests that metacopies have are checked.
    On,
    /// Every metacopy must have one.
    Require,
}

/// What the options of one mount ask for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountOptions {
    /// Lower directories, topmost first.
    pub lowers: Vec<PathBuf>,
    /// Upper directory; `None` makes a read-only mount.
    pub upper: Option<PathBuf>,
    /// Work directory, beside the upper.
    pub work: Option<PathBuf>,
    /// Syncs are skipped, and the upper is marked as one that may be incomplete.
    pub volatile: bool,
    /// Syncs are made, unless volatile.
    pub sync: bool,
    /// Marks are kept in `user.overlay.*`.
    pub userxattr: bool,
    /// Redirects of directories, when said.
    pub redirect_dir: Option<RedirectDir>,
    /// A change of attributes alone copies no data, when said.
    pub metacopy: Option<bool>,
    /// Digests of data.
    pub verity: Verity,
    /// Layers that only lend data, topmost first.
    pub data: Vec<PathBuf>,
    /// Names of a lower file stay names of one file, over copy-up and remounts.
    pub index: bool,
    /// What is done with UUIDs.
    pub uuid: Uuid,
    /// Files and directories of lower layers that are copied at most to rename a directory.
    pub dir_rename_entries: u64,
    /// Bytes of lower files that are copied at most to rename a directory.
    pub dir_rename_size: u64,
    /// The mount is read-only whatever the upper.
    pub read_only: bool,
    /// Device nodes work.
    pub dev: bool,
    /// Set-user-id bits work.
    pub suid: bool,
    /// Programs may be executed.
    pub exec: bool,
    /// Propagation of the mount, when one was asked for.
    pub propagation: Option<Propagation>,
    /// Other users may enter; without effect where the mount needs no helper, which always allows it.
    pub allow_other: bool,
    /// POSIX ACLs are honoured.
    pub posix_acl: bool,
    /// Extended attributes are served.
    pub xattrs: bool,
    /// Which ids of the layers are shown as which.
    pub ids: Ids,
    /// Owner, mode and type of upper objects are kept in an xattr of this form.
    pub overrides: Option<Form>,
    /// Every directory shows a link count of 1.
    pub static_nlink: bool,
    /// How long the kernel may keep what it was told; for ever unless given.
    pub timeout: Option<Duration>,
    /// Each request is logged, and the server stays in the foreground.
    pub debug: bool,
    /// Worker threads, when a number was asked for.
    pub threads: Option<usize>,
    /// What carries requests.
    pub transport: Transport,
    /// How files are opened; `None` chooses by what the server may do.
    pub io: Option<IoMode>,
    /// The kernel collects writes.
    pub writeback: bool,
    /// SELinux labels, as given: `context=LABEL` and its kin. They reach the kernel where it has
    /// SELinux, and change nothing elsewhere.
    pub labels: Vec<Vec<u8>>,
    /// What the upper's filesystem is not to be used for.
    pub upper_lacks: Vec<Ability>,
    /// Source shown in the mount table.
    pub fsname: Option<OsString>,
    /// Shown in the mount table as the type `fuse.SUBTYPE`.
    pub subtype: Option<OsString>,
    /// How much is logged.
    pub log_level: Option<LevelFilter>,
    /// Where it is logged to.
    pub log_file: Option<PathBuf>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            lowers: Vec::new(),
            upper: None,
            work: None,
            volatile: false,
            sync: true,
            userxattr: false,
            redirect_dir: None,
            metacopy: None,
            verity: Verity::Off,
            data: Vec::new(),
            index: false,
            uuid: Uuid::Auto,
            dir_rename_entries: DIR_RENAME_ENTRIES,
            dir_rename_size: DIR_RENAME_SIZE,
            read_only: false,
            dev: false,
            suid: true,
            exec: true,
            propagation: None,
            allow_other: false,
            posix_acl: true,
            xattrs: true,
            ids: Ids::default(),
            overrides: None,
            static_nlink: false,
            timeout: None,
            debug: false,
            threads: None,
            transport: Transport::default(),
            io: None,
            writeback: false,
            labels: Vec::new(),
            upper_lacks: Vec::new(),
            fsname: None,
            subtype: None,
            log_level: None,
            log_file: None,
        }
    }
}

/// An option that was accepted and changes nothing, and why not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ignored {
    /// The option as the user wrote it.
    pub option: String,
    /// Why leaving it out is true to its meaning.
    pub why: &'static str,
}

/// What happens to an option that does not act.
enum Rule {
    /// Accepted with any value.
    Ignored(&'static str),
    /// Accepted with one of these values, else refused; the reasons for both.
    Only(&'static str, &'static str, &'static str),
    /// Refused with any value.
    Refused(&'static str),
}

use Rule::{Ignored as Skip, Only, Refused as No};

/// Names that act; [`MountOptions::act`] has the meaning of each.
const ACTING: &str = "index uuid lowerdir lowerdir+ upperdir workdir volatile userxattr redirect_dir metacopy verity datadir+ \
     dir_rename_entries dir_rename_size ro rw dev nodev suid \
     nosuid exec noexec private rprivate shared rshared slave rslave unbindable runbindable \
     user users owner group allow_other noacl debug threads io transport writeback fsname subtype log_level log_file context fscontext defcontext \
     rootcontext uidmapping gidmapping squash_to_root squash_to_uid squash_to_gid static_nlink \
     noxattrs timeout threaded fsync xattr_permissions upper_lacks";

/// Values that turn something off.
const OFF: &str = "0 off no false";
/// Values that turn something on, but for none at all.
const ON: &str = "1 on yes true";
const DEFAULT: &str = "is the default";
const ATIME: &str = "access times are kept by the filesystems of the layers";
const FSTAB: &str = "is a note to mount(8), which has acted on it";
const TUNING: &str = "tunes speed only";

/// Every name that does not act and that other programs accept; names of one rule in one string.
const PASSIVE: &[(&str, Rule)] = &[
    // mount(8)
    ("defaults async nomand noiversion symfollow", Skip(DEFAULT)),
    ("noatime", Skip("is always set")),
    (
        "atime diratime nodiratime relatime norelatime nostrictatime lazytime nolazytime",
        Skip(ATIME),
    ),
    ("auto noauto nofail _netdev comment", Skip(FSTAB)),
    ("nouser nousers noowner nogroup", Skip(FSTAB)),
    ("silent loud", Skip("concerns kernel messages only")),
    ("strictatime", No(ATIME)),
    ("sync dirsync", No("changes are not made synchronous; use fsync(2)")),
    ("mand", No("mandatory locks are gone from the kernel")),
    ("iversion", No("change counters are not kept")),
    ("nosymfollow", No("symbolic links are always followed")),
    ("remount", No("unmount and mount again")),
    ("bind rbind move", No("use mount(8) on the merged directory")),
    // kernel overlayfs
    (
        "nfs_export",
        Only(OFF, DEFAULT, "a FUSE mount gives out no file handles that last; export the layers"),
    ),
    (
        "xino",
        Only("off auto on", "inode numbers are unique and last anyway", "say on, off or auto"),
    ),
    // fuse-overlayfs
    ("ino32_t", Only(OFF, DEFAULT, "inode numbers have 64 bits")),
    ("plugins", Only("", "names no plugin", "layers are plain directories")),
    ("fast_ino", Skip("inode numbers are those of the layers and cost nothing")),
    // libfuse
    ("default_permissions", Skip("is always set")),
    ("max_idle_threads max_threads", Skip("threads= sets the number of threads")),
    ("clone_fd max_read max_write max_readahead max_background", Skip(TUNING)),
    ("congestion_threshold async_read sync_read", Skip(TUNING)),
    ("splice_read splice_write splice_move", Skip(TUNING)),
    ("no_splice_read no_splice_write no_splice_move", Skip(TUNING)),
    ("big_writes nonempty", Skip(DEFAULT)),
    ("allow_root", No("use allow_other")),
    ("auto_unmount", No("the server unmounts when it ends, but not when it is killed")),
    ("blkdev", No("layers are directories")),
];

/// Returns the rule for a name of [`PASSIVE`].
fn rule_for(key: &str) -> Option<&'static Rule> {
    PASSIVE.iter().find(|(names, _)| names.split(' ').any(|name| name == key)).map(|(_, rule)| rule)
}

/// Names whose value may stand in double quotes and hold commas then.
const QUOTED: &[&[u8]] = &[b"context", b"fscontext", b"defcontext", b"rootcontext"];

impl MountOptions {
    /// Parses option lists, as given by one or more `-o`; where two contradict, the later wins.
    ///
    /// Returns the options and those that were ignored, to be said at debug level.
    ///
    /// # Errors
    /// `Invalid`, naming the option: unknown, not supported, or with a value that cannot be used.
    pub fn parse<S: AsRef<OsStr>>(lists: &[S]) -> Result<(Self, Vec<Ignored>)> {
        let mut options = Self::default();
        let mut ignored = Vec::new();
        for list in lists {
            for item in split_items(list.as_ref().as_bytes()) {
                options.apply(item, &mut ignored)?;
            }
        }
        Ok((options, ignored))
    }

    /// Prints the options so that [`MountOptions::parse`] gives them again.
    pub fn print(&self) -> OsString {
        let mut items: Vec<Vec<u8>> = Vec::new();
        let mut flag = |on: bool, name: &str| {
            if on {
                items.push(name.as_bytes().to_vec());
            }
        };
        flag(self.volatile, "volatile");
        flag(self.userxattr, "userxattr");
        flag(self.index, "index=on");
        match self.uuid {
            Uuid::Auto => (),
            Uuid::On => flag(true, "uuid=on"),
            Uuid::Null => flag(true, "uuid=null"),
            Uuid::Off => flag(true, "uuid=off"),
        }
        flag(self.read_only, "ro");
        flag(self.dev, "dev");
        flag(!self.suid, "nosuid");
        flag(!self.exec, "noexec");
        flag(self.allow_other, "allow_other");
        flag(!self.posix_acl, "noacl");
        flag(!self.xattrs, "noxattrs");
        flag(!self.sync, "fsync=0");
        flag(self.static_nlink, "static_nlink");
        flag(self.overrides == Some(Form::Privileged), "xattr_permissions=1");
        flag(self.overrides == Some(Form::Containers), "xattr_permissions=2");
        flag(self.ids.users.squash_to_root, "squash_to_root");
        flag(self.debug, "debug");
        flag(self.writeback, "writeback");
        match self.propagation {
            None => (),
            Some(Propagation::Private) => flag(true, "private"),
            Some(Propagation::Shared) => flag(true, "shared"),
            Some(Propagation::Slave) => flag(true, "slave"),
            Some(Propagation::Unbindable) => flag(true, "unbindable"),
        }
        items.extend(self.labels.iter().cloned());
        if !self.upper_lacks.is_empty() {
            let named = ABILITIES.iter().filter(|(_, ability)| self.upper_lacks.contains(ability));
            let names: Vec<&str> = named.map(|(name, _)| *name).collect();
            items.push(format!("upper_lacks={}", names.join(":")).into_bytes());
        }
        if let Some(threads) = self.threads {
            items.push(format!("threads={threads}").into_bytes());
        }
        if self.transport == Transport::Fuser {
            items.push(b"transport=fuser".to_vec());
        }
        if let Some(timeout) = self.timeout {
            let (whole, rest) = (timeout.as_secs(), timeout.subsec_nanos());
            items.push(format!("timeout={whole}.{rest:09}").into_bytes());
        }
        for (map, ranges, squash) in [
            (&self.ids.users, "uidmapping", "squash_to_uid"),
            (&self.ids.groups, "gidmapping", "squash_to_gid"),
        ] {
            if map.has_ranges() {
                items.push(format!("{ranges}={map}").into_bytes());
            }
            if let Some(all) = map.squash_to {
                items.push(format!("{squash}={all}").into_bytes());
            }
        }
        if let Some(io) = self.io {
            items.push(format!("io={}", io.name()).into_bytes());
        }
        if let Some(level) = self.log_level {
            items.push(format!("log_level={level}").into_bytes());
        }
        if let Some(redirect_dir) = self.redirect_dir {
            items.push(format!("redirect_dir={}", redirect_dir.print()).into_bytes());
        }
        if let Some(metacopy) = self.metacopy {
            items.push(format!("metacopy={}", if metacopy { "on" } else { "off" }).into_bytes());
        }
        match self.verity {
            Verity::Off => {}
            Verity::On => items.push(b"verity=on".to_vec()),
            Verity::Require => items.push(b"verity=require".to_vec()),
        }
        for (name, limit, default) in [
            ("dir_rename_entries", self.dir_rename_entries, DIR_RENAME_ENTRIES),
            ("dir_rename_size", self.dir_rename_size, DIR_RENAME_SIZE),
        ] {
            if limit != default {
                items.push(format!("{name}={limit}").into_bytes());
            }
        }
        let mut value = |name: &str, value: &OsStr| {
            items.push([name.as_bytes(), b"=", &escape(value.as_bytes(), b"\\,")].concat());
        };
        for (name, text) in [("fsname", &self.fsname), ("subtype", &self.subtype)] {
            if let Some(text) = text {
                value(name, text);
            }
        }
        for (name, path) in
            [("log_file", &self.log_file), ("upperdir", &self.upper), ("workdir", &self.work)]
        {
            if let Some(path) = path {
                value(name, path.as_os_str());
            }
        }
        if !self.lowers.is_empty() {
            let lowers: Vec<Vec<u8>> = self
                .lowers
                .iter()
                .map(|path| escape(path.as_os_str().as_bytes(), b"\\,:"))
                .collect();
            items.push([b"lowerdir=".as_slice(), &lowers.join(&b':')].concat());
        }
        for path in &self.data {
            let path = escape(path.as_os_str().as_bytes(), b"\\,");
            items.push([b"datadir+=".as_slice(), &path].concat());
        }
        OsString::from_vec(items.join(&b','))
    }

    /// Takes one option, not empty, into account.
    fn apply(&mut self, item: &[u8], ignored: &mut Vec<Ignored>) -> Result<()> {
        let (key, value) = match item.iter().position(|&byte| byte == b'=') {
            Some(at) => (item.get(..at).unwrap_or_default(), item.get(at + 1..)),
            None => (item, None),
        };
        let Ok(key) = std::str::from_utf8(key) else { return Err(unknown(item)) };
        if ACTING.split(' ').any(|name| name == key) {
            self.act(key, value)
        } else {
            pass(key, value, item, ignored)
        }
    }

    /// Carries out one option of [`ACTING`].
    fn act(&mut self, key: &str, value: Option<&[u8]>) -> Result<()> {
        match key {
            "lowerdir" => (self.lowers, self.data) = parse_lowers(needed(key, value)?)?,
            "datadir+" => self.data.push(path(key, value)?),
            "metacopy" => self.metacopy = Some(parse_switch(key, value)?),
            "verity" => {
                self.verity = match needed(key, value)? {
                    b"off" => Verity::Off,
                    b"on" => Verity::On,
                    b"require" => Verity::Require,
                    other => {
                        return Err(Error::invalid(
                            format!("verity={}", text(other)),
                            "is none of off, on, require",
                        ));
                    }
                }
            }
            "lowerdir+" => self.lowers.push(PathBuf::from(OsStr::from_bytes(needed(key, value)?))),
            "upperdir" => self.upper = Some(path(key, value)?),
            "workdir" => self.work = Some(path(key, value)?),
            "log_file" => self.log_file = Some(path(key, value)?),
            "fsname" => self.fsname = Some(path(key, value)?.into_os_string()),
            "subtype" => self.subtype = Some(path(key, value)?.into_os_string()),
            "context" | "fscontext" | "defcontext" | "rootcontext" => {
                let label = needed(key, value)?;
                self.labels.push([key.as_bytes(), b"=", label].concat());
            }
            "log_level" => self.log_level = Some(parse_level(&text(needed(key, value)?))?),
            "upper_lacks" => self.upper_lacks = parse_abilities(&text(needed(key, value)?))?,
            "transport" => self.transport = parse_transport(&text(needed(key, value)?))?,
            "redirect_dir" => {
                self.redirect_dir = Some(RedirectDir::parse(needed(key, value)?)?);
            }
            "index" => self.index = parse_switch(key, value)?,
            "uuid" => self.uuid = parse_uuid(&text(needed(key, value)?))?,
            "dir_rename_entries" => self.dir_rename_entries = parse_size(key, needed(key, value)?)?,
            "dir_rename_size" => self.dir_rename_size = parse_size(key, needed(key, value)?)?,
            "io" => self.io = parse_io(&text(needed(key, value)?))?,
            "uidmapping" => self.ids.users.take_ranges(parse_ids(key, value)?),
            "gidmapping" => self.ids.groups.take_ranges(parse_ids(key, value)?),
            "squash_to_uid" => self.ids.users.squash_to = Some(parse_id(key, value)?),
            "squash_to_gid" => self.ids.groups.squash_to = Some(parse_id(key, value)?),
            "squash_to_root" => {
                let on = parse_switch(key, value)?;
                (self.ids.users.squash_to_root, self.ids.groups.squash_to_root) = (on, on);
            }
            "xattr_permissions" => {
                self.overrides = match needed(key, value)? {
                    b"0" => None,
                    b"1" => Some(Form::Privileged),
                    b"2" => Some(Form::Containers),
                    other => {
                        let option = format!("{key}={}", text(other));
                        return Err(Error::invalid(option, "is none of 0, 1, 2"));
                    }
                };
            }
            "writeback" => self.writeback = parse_switch(key, value)?,
            "static_nlink" => self.static_nlink = parse_switch(key, value)?,
            "noxattrs" => self.xattrs = !parse_switch(key, value)?,
            "fsync" => self.sync = parse_switch(key, value)?,
            "timeout" => self.timeout = Some(parse_seconds(&text(needed(key, value)?))?),
            "threaded" => match (parse_switch(key, value)?, self.threads) {
                (false, _) => self.threads = Some(1),
                (true, Some(1)) => self.threads = None,
                (true, _) => (),
            },
            "threads" => self.threads = Some(parse_threads(&text(needed(key, value)?))?),
            flag => {
                if let Some(value) = value {
                    return Err(Error::invalid(
                        format!("{flag}={}", text(value)),
                        format!("{flag} takes no value; write just {flag}"),
                    ));
                }
                match flag {
                    "volatile" => self.volatile = true,
                    "userxattr" => self.userxattr = true,
                    "ro" => self.read_only = true,
                    "rw" => self.read_only = false,
                    "dev" => self.dev = true,
                    "nodev" => self.dev = false,
                    "suid" => self.suid = true,
                    "nosuid" => self.suid = false,
                    "exec" => self.exec = true,
                    "noexec" => self.exec = false,
                    // What mount(8) takes them to imply.
                    "owner" | "group" => (self.suid, self.dev) = (false, false),
                    "user" | "users" => {
                        (self.suid, self.dev, self.exec) = (false, false, false);
                    }
                    "private" | "rprivate" => self.propagation = Some(Propagation::Private),
                    "shared" | "rshared" => self.propagation = Some(Propagation::Shared),
                    "slave" | "rslave" => self.propagation = Some(Propagation::Slave),
                    "unbindable" | "runbindable" => {
                        self.propagation = Some(Propagation::Unbindable);
                    }
                    "allow_other" => self.allow_other = true,
                    "noacl" => self.posix_acl = false,
                    "debug" => self.debug = true,
                    other => return Err(unknown(other.as_bytes())),
                }
            }
        }
        Ok(())
    }
}

/// Parses the name of a log level.
///
/// # Errors
/// `Invalid`, listing the names there are.
pub fn parse_level(name: &str) -> Result<LevelFilter> {
    match name {
        "off" => Ok(LevelFilter::OFF),
        "error" => Ok(LevelFilter::ERROR),
        "warn" => Ok(LevelFilter::WARN),
        "info" => Ok(LevelFilter::INFO),
        "debug" => Ok(LevelFilter::DEBUG),
        "trace" => Ok(LevelFilter::TRACE),
        other => Err(Error::invalid(
            format!("log level {other}"),
            "is none of off, error, warn, info, debug, trace",
        )),
    }
}

/// Parses what is done with UUIDs.
fn parse_uuid(name: &str) -> Result<Uuid> {
    match name {
        "auto" => Ok(Uuid::Auto),
        "on" => Ok(Uuid::On),
        "null" => Ok(Uuid::Null),
        "off" => Ok(Uuid::Off),
        other => Err(Error::invalid(format!("uuid={other}"), "is none of auto, on, null, off")),
    }
}

/// Parses an I/O mode; `None` is `auto`.
fn parse_io(name: &str) -> Result<Option<IoMode>> {
    match name {
        "auto" => Ok(None),
        "noopen" => Ok(Some(IoMode::NoOpen)),
        "open" => Ok(Some(IoMode::Open)),
        "passthrough" => Ok(Some(IoMode::Passthrough)),
        other => {
            Err(Error::invalid(format!("io={other}"), "is none of auto, noopen, open, passthrough"))
        }
    }
}

/// Parses a number of worker threads.
///
/// # Errors
/// `Invalid` unless it lies between 1 and [`THREADS_MAX`].
pub fn parse_threads(number: &str) -> Result<usize> {
    match number.parse() {
        Ok(threads) if (1..=THREADS_MAX).contains(&threads) => Ok(threads),
        _ => Err(Error::invalid(
            format!("threads={number}"),
            format!("is no number of threads; use 1 to {THREADS_MAX}"),
        )),
    }
}

/// Parses names of abilities, separated by colons.
///
/// # Errors
/// `Invalid`, listing the names there are.
fn parse_abilities(names: &str) -> Result<Vec<Ability>> {
    let find = |name: &str| ABILITIES.iter().find(|(known, _)| *known == name);
    let parsed = names.split(':').map(|name| find(name).map(|(_, ability)| *ability));
    parsed.collect::<Option<Vec<_>>>().ok_or_else(|| {
        let known: Vec<&str> = ABILITIES.iter().map(|(name, _)| *name).collect();
        Error::invalid(
            format!("upper_lacks={names}"),
            format!("names something that is none of {}", known.join(", ")),
        )
    })
}

/// Parses the name of a transport.
fn parse_transport(name: &str) -> Result<Transport> {
    match name {
        "dev" => Ok(Transport::Dev),
        "fuser" => Ok(Transport::Fuser),
        other => Err(Error::invalid(
            format!("transport={other}"),
            "is no transport; use dev (the default) or fuser",
        )),
    }
}

/// Parses the ranges of an id map.
fn parse_ids(key: &str, value: Option<&[u8]>) -> Result<IdMap> {
    let value = text(needed(key, value)?);
    IdMap::parse(&value).map_err(|why| Error::invalid(format!("{key}={value}"), why))
}

fn parse_id(key: &str, value: Option<&[u8]>) -> Result<u32> {
    let value = text(needed(key, value)?);
    match value.parse() {
        // The last number of all is no id.
        Ok(id) if id < u32::MAX => Ok(id),
        _ => Err(Error::invalid(format!("{key}={value}"), "is no id; use 0 to 4294967294")),
    }
}

/// Parses a flag that other programs take with and without a value.
fn parse_switch(key: &str, value: Option<&[u8]>) -> Result<bool> {
    let Some(value) = value else { return Ok(true) };
    let is_one_of = |list: &str| list.split(' ').any(|known| known.as_bytes() == value);
    match (is_one_of(ON), is_one_of(OFF)) {
        (true, _) => Ok(true),
        (_, true) => Ok(false),
        _ => Err(Error::invalid(format!("{key}={}", text(value)), "is neither 1 nor 0")),
    }
}

/// Parses seconds with decimals.
fn parse_seconds(number: &str) -> Result<Duration> {
    let (whole, rest) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let nanos = format!("{rest:0<9}").get(..9).and_then(|nanos| nanos.parse().ok());
    match (whole.parse(), nanos) {
        (Ok(seconds), Some(nanos)) if digits(whole) && digits(rest) => {
            Ok(Duration::new(seconds, nanos))
        }
        _ => Err(Error::invalid(format!("timeout={number}"), "is no number of seconds")),
    }
}

/// Parses a number that may end in K, M or G, 1,024 times more each.
fn parse_size(key: &str, value: &[u8]) -> Result<u64> {
    let (digits, shift) = match value.split_last() {
        Some((b'K' | b'k', digits)) => (digits, 10),
        Some((b'M' | b'm', digits)) => (digits, 20),
        Some((b'G' | b'g', digits)) => (digits, 30),
        _ => (value, 0),
    };
    let number = std::str::from_utf8(digits).ok().filter(|digits| !digits.starts_with('+'));
    number
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| {
            Error::invalid(
                format!("{key}={}", text(value)),
                "is no number; write digits, with K, M or G behind them if that is shorter",
            )
        })
}

/// Splits a list at its commas, leaving out empty items; escapes stay as they are.
fn split_items(list: &[u8]) -> Vec<&[u8]> {
    let mut items = Vec::new();
    let mut rest = list;
    while !rest.is_empty() {
        let end = item_end(rest);
        let (item, tail) = rest.split_at(end);
        if !item.is_empty() {
            items.push(item);
        }
        rest = tail.get(1..).unwrap_or_default();
    }
    items
}

/// Returns where the first item of `list` ends: at a comma, or at the end.
fn item_end(list: &[u8]) -> usize {
    for key in QUOTED {
        let Some(value) = list.strip_prefix(*key).and_then(|tail| tail.strip_prefix(b"=\"")) else {
            continue;
        };
        if let Some(quote) = value.iter().position(|&byte| byte == b'"') {
            let end = key.len() + 2 + quote + 1;
            if list.get(end).is_none_or(|&byte| byte == b',') {
                return end;
            }
        }
    }
    let mut escaped = false;
    for (at, &byte) in list.iter().enumerate() {
        if escaped {
            escaped = false;
        } else if byte == b'\\' {
            escaped = true;
        } else if byte == b',' {
            return at;
        }
    }
    list.len()
}

/// Splits `lowerdir` at its colons and takes the escapes away; returns the lowers, and the data-only
/// layers, which follow two colons each.
///
/// A colon at either end is skipped: engines join lists that may be empty.
fn parse_lowers(value: &[u8]) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let refuse = |why: &'static str| Err(Error::invalid(format!("lowerdir={}", text(value)), why));
    let (mut lowers, mut data) = (Vec::new(), Vec::new());
    let mut is_data = false;
    let mut current = Vec::new();
    let mut bytes = value.iter().peekable();
    loop {
        let byte = bytes.next();
        match byte {
            Some(b'\\') => {
                current.extend(bytes.next());
                continue;
            }
            Some(b':') | None => {}
            Some(&byte) => {
                current.push(byte);
                continue;
            }
        }
        if !current.is_empty() {
            let list = if is_data { &mut data } else { &mut lowers };
            list.push(PathBuf::from(OsString::from_vec(std::mem::take(&mut current))));
        }
        if byte.is_none() {
            return Ok((lowers, data));
        }
        if bytes.next_if(|byte| **byte == b':').is_some() {
            if lowers.is_empty() {
                return refuse(
                    "begins with a data-only layer (after ::); name a lower layer first",
                );
            }
            is_data = true;
        } else if is_data && bytes.peek().is_some() {
            return refuse("has one colon after ::; data-only layers follow two colons each");
        }
        if bytes.peek() == Some(&&b':') {
            return refuse("has three colons in a row; separate layers by one or two");
        }
    }
}

/// Decides on an option that does not act.
fn pass(key: &str, value: Option<&[u8]>, item: &[u8], ignored: &mut Vec<Ignored>) -> Result<()> {
    let skip = |why| Ignored { option: text(item), why };
    let refuse = |why: &str| {
        Err(Error::invalid(text(item), format!("not supported by this version: {why}")))
    };
    if key.starts_with("x-") || key.starts_with("X-") {
        ignored.push(skip(FSTAB));
        return Ok(());
    }
    match rule_for(key) {
        Some(Skip(why)) => ignored.push(skip(why)),
        Some(No(why)) => return refuse(why),
        Some(Only(values, why, why_not)) => {
            if values.split(' ').any(|known| known.as_bytes() == value.unwrap_or_default()) {
                ignored.push(skip(why));
            } else {
                return refuse(why_not);
            }
        }
        None => return Err(unknown(item)),
    }
    Ok(())
}

/// Returns the error for an option that nobody knows.
fn unknown(item: &[u8]) -> Error {
    let accepted: Vec<&str> = PASSIVE
        .iter()
        .filter(|(_, rule)| !matches!(rule, No(_)))
        .map(|(names, _)| *names)
        .collect();
    Error::invalid(
        text(item),
        format!(
            "unknown mount option; known are {ACTING}; accepted without effect {}; \
             a comma in a path is written \\,",
            accepted.join(" ")
        ),
    )
}

/// Returns the value of an option that needs one.
fn needed<'a>(key: &str, value: Option<&'a [u8]>) -> Result<&'a [u8]> {
    match value {
        Some(value) if !value.is_empty() => Ok(value),
        // An empty list resets the layers, as fsconfig does.
        Some(value) if key == "lowerdir" => Ok(value),
        _ => Err(Error::invalid(key.to_owned(), format!("needs a value; write {key}=VALUE"))),
    }
}

/// Returns the value of an option that names a path, escapes taken away.
fn path(key: &str, value: Option<&[u8]>) -> Result<PathBuf> {
    let value = needed(key, value)?;
    let mut plain = Vec::with_capacity(value.len());
    let mut bytes = value.iter();
    while let Some(&byte) = bytes.next() {
        if byte == b'\\' {
            plain.extend(bytes.next());
        } else {
            plain.push(byte);
        }
    }
    if plain.is_empty() {
        return Err(Error::invalid(key.to_owned(), format!("needs a value; write {key}=VALUE")));
    }
    Ok(PathBuf::from(OsString::from_vec(plain)))
}

/// Puts a backslash before each of `special`.
fn escape(value: &[u8], special: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(value.len());
    for &byte in value {
        if special.contains(&byte) {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    escaped
}

/// Returns bytes as one line for a message.
fn text(bytes: &[u8]) -> String {
    show_path(Path::new(OsStr::from_bytes(bytes)))
}

/// Returns a path for a message: one line, whatever bytes it holds.
pub fn show_path(path: &Path) -> String {
    let mut shown = String::new();
    for c in path.to_string_lossy().chars() {
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(list: &str) -> MountOptions {
        MountOptions::parse(&[list]).unwrap().0
    }

    fn refusal(list: &str) -> String {
        MountOptions::parse(&[list]).unwrap_err().to_string()
    }

    fn paths(list: &[&str]) -> Vec<PathBuf> {
        list.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn limits_of_directory_renames() {
        let options = parse("dir_rename_entries=5,dir_rename_size=2M");
        assert_eq!((options.dir_rename_entries, options.dir_rename_size), (5, 2 << 20));
        assert_eq!(parse("dir_rename_entries=0").dir_rename_entries, 0);
        for bad in ["", "x", "-1", "+1", "1T", "K", "99999999999999999999", "17179869184G"] {
            let list = format!("dir_rename_size={bad}");
            MountOptions::parse(&[&list]).unwrap_err();
        }
    }

    #[test]
    fn lowerdir_follows_the_kernels_escapes() {
        for (value, expected) in [
            ("/a", &["/a"][..]),
            ("/a:/b:c", &["/a", "/b", "c"]),
            (r"/a\:b:/c", &["/a:b", "/c"]),
            (r"/a\\:/b", &[r"/a\", "/b"]),
            (r"/a\,b:/c", &["/a,b", "/c"]),
            (r"/a\b", &["/ab"]),
            (r"/a\:\:b", &["/a::b"]),
            (":/a:", &["/a"]),
            ("/l/LINK/../diff1:/l/X", &["/l/LINK/../diff1", "/l/X"]),
            ("/a=b", &["/a=b"]),
            ("/a\\", &["/a"]),
            ("", &[]),
        ] {
            assert_eq!(parse(&format!("lowerdir={value}")).lowers, paths(expected), "{value}");
        }
        assert_eq!(parse("lowerdir=/a,lowerdir+=/b:c").lowers, paths(&["/a", "/b:c"]));
        assert_eq!(parse("lowerdir=/a,lowerdir=/b").lowers, paths(&["/b"]));
    }

    #[test]
    fn data_only_layers_follow_two_colons_each() {
        for (list, lowers, data) in [
            ("lowerdir=/a::/d", &["/a"][..], &["/d"][..]),
            ("lowerdir=/a:/b::/d::/e", &["/a", "/b"], &["/d", "/e"]),
            (r"lowerdir=/a\:::/d\:\:e", &["/a:"], &["/d::e"]),
            ("lowerdir=/a::/d:", &["/a"], &["/d"]),
            ("lowerdir=/a,datadir+=/d,datadir+=/e:f", &["/a"], &["/d", "/e:f"]),
            ("datadir+=/d,lowerdir=/a", &["/a"], &[]),
        ] {
            let options = parse(list);
            assert_eq!((options.lowers, options.data), (paths(lowers), paths(data)), "{list}");
        }
        for list in ["lowerdir=::/d", "lowerdir=/a::/d:/e", "lowerdir=/a:::/d"] {
            let message = refusal(list);
            assert!(message.starts_with(list) && message.contains("; "), "{message}");
        }
    }

    #[test]
    fn redirects_and_what_depends_on_them() {
        let options = parse("redirect_dir=follow,metacopy=off,verity=require");
        assert_eq!(options.redirect_dir, Some(RedirectDir::Follow));
        assert_eq!((options.metacopy, options.verity), (Some(false), Verity::Require));
        for list in ["redirect_dir=yes", "redirect_dir", "metacopy=x", "verity=1", "verity"] {
            let message = refusal(list);
            assert!(message.starts_with(list.split_once('=').map_or(list, |(key, _)| key)));
        }
    }

    #[test]
    fn lines_of_real_engines_are_accepted() {
        for tail in [
            "",
            ",",
            ",,volatile",
            ",volatile",
            ",nodev,volatile",
            ",private",
            ",dev,suid",
            ",ro,dev,suid",
            ",rw,relatime,defaults",
            ",xino=off,metacopy=off,redirect_dir=nofollow",
            ",index=off,userxattr",
            ",fsync=0,timeout=3600,threaded=1,fast_ino=1,writeback=0",
            ",static_nlink,plugins=,noxattrs=0,squash_to_root=0,x-gvfs-hide",
        ] {
            let options = parse(&format!("lowerdir=/l/A:/l/B,upperdir=/u,workdir=/w{tail}"));
            assert_eq!(options.lowers, paths(&["/l/A", "/l/B"]), "{tail}");
            assert_eq!(options.upper, Some("/u".into()));
            assert_eq!(options.work, Some("/w".into()));
            assert_eq!(options.volatile, tail.contains("volatile"));
        }
    }

    #[test]
    fn what_would_change_the_result_is_refused() {
        let options = "xino=maybe nfs_export=on ino32_t=1 plugins=a.so sync \
             strictatime allow_root auto_unmount remount";
        for option in options.split_whitespace() {
            let list = format!("lowerdir=/a,{option},volatile");
            let message = refusal(&list);
            assert!(
                message.starts_with(&format!("{option}: not supported by this version: ")),
                "{message}"
            );
            assert_eq!(message.lines().count(), 1);
        }
    }

    #[test]
    fn quoted_context_holds_its_commas() {
        let list = r#"lowerdir=/a,context="system_u:object_r:x:s0:c1,c2",volatile"#;
        let (options, _) = MountOptions::parse(&[list]).unwrap();
        assert_eq!(options.labels, [br#"context="system_u:object_r:x:s0:c1,c2""#]);
        assert!(options.volatile);
        // An unclosed quote does not swallow the list.
        assert!(refusal("context=\"a,b").contains("b: unknown"));
    }

    #[test]
    fn ignored_options_are_reported_with_a_reason() {
        let (_, ignored) = MountOptions::parse(&["rw,xino=auto,defaults", "fast_ino=9"]).unwrap();
        let names: Vec<&str> = ignored.iter().map(|ignored| ignored.option.as_str()).collect();
        assert_eq!(names, ["xino=auto", "defaults", "fast_ino=9"]);
    }

    #[test]
    fn unknown_options_are_named_on_one_line() {
        for (list, name) in
            [("lowerdir=/a,frobnicate=7", "frobnicate=7"), ("low\ner", "low\\ner"), ("=x", "=x")]
        {
            let message = refusal(list);
            assert!(message.starts_with(&format!("{name}: unknown mount option")), "{message}");
            assert!(message.contains("lowerdir"));
            assert_eq!(message.lines().count(), 1);
        }
        let message = MountOptions::parse(&[OsStr::from_bytes(b"\xff\xfe=1")]).unwrap_err();
        assert!(message.to_string().contains("unknown mount option"));
    }

    #[test]
    fn values_are_checked() {
        let lists = "index=maybe uuid=new uuid upperdir= upperdir workdir= threads=0 threads=x threads=100000 log_level=loud io=fast io= writeback=maybe \
             volatile=1 ro= lowerdir lowerdir+= upperdir=\\ uidmapping= uidmapping=0:1 \
             gidmapping=0:1:0 squash_to_uid squash_to_gid=-1 squash_to_uid=4294967295 \
             squash_to_root=2 xattr_permissions xattr_permissions=3 static_nlink=x noxattrs= timeout= timeout=x timeout=-1 timeout=1. \
             timeout=.5 timeout=1e3 threaded=9 fsync=maybe";
        for list in lists.split_whitespace() {
            assert!(MountOptions::parse(&[list]).is_err(), "{list}");
        }
        assert_eq!(parse("threads=3,log_level=debug").threads, Some(3));
        assert_eq!(parse("io=open").io, Some(IoMode::Open));
        assert_eq!(parse("io=open,io=auto").io, None);
        assert!(parse("writeback").writeback && parse("writeback=1").writeback);
        assert!(!parse("writeback,writeback=0").writeback && !parse("").writeback);
    }

    #[test]
    fn what_fuse_overlayfs_takes_has_its_meaning() {
        let list = ":0:1:1500:1500:0:1,uidmapping=:0:100000:65536,gidmapping=0:7:1,squash_to_gid=9";
        let options = parse(&format!("uidmapping={list}"));
        assert_eq!(options.ids.users.to_string(), "0:100000:65536");
        assert_eq!(options.ids.groups.to_string(), "0:7:1");
        assert_eq!(options.ids.groups.squash_to, Some(9));
        assert!(parse("squash_to_root,squash_to_root=0").ids.is_identity());
        assert!(parse("squash_to_root=1,gidmapping=0:1:1").ids.groups.squash_to_root);
        assert_eq!(parse("xattr_permissions=1").overrides, Some(Form::Privileged));
        assert_eq!(
            parse("xattr_permissions=1,xattr_permissions=2").overrides,
            Some(Form::Containers)
        );
        assert_eq!(parse("xattr_permissions=2,xattr_permissions=0").overrides, None);
        let options = parse("static_nlink,noxattrs=1,fsync=0,threaded=0,timeout=1.25");
        assert!(options.static_nlink && !options.xattrs && !options.sync);
        assert_eq!(options.threads, Some(1));
        assert_eq!(options.timeout, Some(Duration::from_millis(1250)));
        let options = parse("static_nlink=0,noxattrs=0,fsync=1,threaded=0,threaded=1,timeout=0");
        let expected = MountOptions { timeout: Some(Duration::ZERO), ..Default::default() };
        assert_eq!(options, expected);
    }

    #[test]
    fn later_flags_win() {
        let options = parse("ro,nosuid,noexec,dev,rw,suid,exec,nodev,private,rshared");
        let expected =
            MountOptions { propagation: Some(Propagation::Shared), ..Default::default() };
        assert_eq!(options, expected);
    }

    #[test]
    fn no_name_is_in_both_tables_or_twice() {
        let passive = PASSIVE.iter().flat_map(|(names, _)| names.split(' '));
        let mut names: Vec<&str> = passive.chain(ACTING.split(' ')).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    fn any_path() -> impl Strategy<Value = PathBuf> {
        let byte = prop_oneof![
            Just(b','),
            Just(b':'),
            Just(b'\\'),
            Just(b'"'),
            Just(b'='),
            Just(b'/'),
            1u8..=255
        ];
        proptest::collection::vec(byte, 1..12).prop_map(|bytes| OsString::from_vec(bytes).into())
    }

    fn any_options() -> impl Strategy<Value = MountOptions> {
        let paths = (
            proptest::collection::vec(any_path(), 0..4),
            proptest::option::of(any_path()),
            proptest::option::of(any_path()),
            proptest::option::of(any_path()),
            proptest::option::of(any_path()),
            proptest::option::of(any_path()),
        );
        let levels = proptest::option::of(prop_oneof![
            Just(LevelFilter::OFF),
            Just(LevelFilter::WARN),
            Just(LevelFilter::TRACE)
        ]);
        let propagation = proptest::option::of(prop_oneof![
            Just(Propagation::Private),
            Just(Propagation::Shared),
            Just(Propagation::Slave),
            Just(Propagation::Unbindable)
        ]);
        let transport = prop_oneof![Just(Transport::Dev), Just(Transport::Fuser)];
        let io = proptest::option::of(prop_oneof![
            Just(IoMode::NoOpen),
            Just(IoMode::Open),
            Just(IoMode::Passthrough)
        ]);
        let redirect = proptest::option::of(prop_oneof![
            Just(RedirectDir::On),
            Just(RedirectDir::Off),
            Just(RedirectDir::Follow),
            Just(RedirectDir::NoFollow)
        ]);
        let redirect = (redirect, proptest::option::of(any::<bool>()));
        let limits = (any::<u64>(), any::<u64>(), redirect);
        let rest =
            (proptest::option::of(1..=THREADS_MAX), levels, propagation, io, limits, transport);
        let ids = (
            prop_oneof![Just("0:100000:65536"), Just("0:1:1500:1500:0:1"), Just("")],
            proptest::option::of(0..u32::MAX),
            any::<[bool; 5]>(),
            proptest::option::of((any::<u64>(), 0..1_000_000_000_u32)),
            proptest::option::of(prop_oneof![Just(Form::Privileged), Just(Form::Containers)]),
        );
        let all = (paths, proptest::array::uniform10(any::<bool>()), rest, ids);
        all.prop_map(|(paths, flags, rest, ids)| {
            let [
                volatile,
                userxattr,
                index,
                read_only,
                dev,
                suid,
                exec,
                allow_other,
                posix_acl,
                debug,
            ] = flags;
            let (lowers, upper, work, log_file, fsname, subtype) = paths;
            let (threads, log_level, propagation, io, limits, transport) = rest;
            let (ranges, squash, more_flags, timeout, overrides) = ids;
            let [xattrs, sync, static_nlink, squash_to_root, writeback] = more_flags;
            let mut ids = Ids::default();
            ids.users.take_ranges(IdMap::parse(ranges).unwrap_or_default());
            ids.groups.squash_to = squash;
            (ids.users.squash_to_root, ids.groups.squash_to_root) =
                (squash_to_root, squash_to_root);
            MountOptions {
                lowers,
                upper,
                work,
                volatile,
                sync,
                xattrs,
                static_nlink,
                overrides,
                ids,
                timeout: timeout.map(|(secs, nanos)| Duration::new(secs, nanos)),
                userxattr,
                redirect_dir: limits.2.0,
                metacopy: limits.2.1,
                verity: if limits.0 % 2 == 0 { Verity::Off } else { Verity::Require },
                data: log_file.clone().into_iter().collect(),
                index,
                uuid: if index { Uuid::On } else { Uuid::Off },
                dir_rename_entries: limits.0,
                dir_rename_size: limits.1,
                read_only,
                dev,
                suid,
                exec,
                propagation,
                allow_other,
                posix_acl,
                debug,
                threads,
                transport,
                io,
                writeback,
                log_level,
                log_file,
                labels: Vec::new(),
                upper_lacks: Vec::new(),
                fsname: fsname.map(PathBuf::into_os_string),
                subtype: subtype.map(PathBuf::into_os_string),
            }
        })
    }

    proptest! {
        #[test]
        fn printed_options_parse_to_the_same(options in any_options()) {
            let printed = options.print();
            let (parsed, ignored) = MountOptions::parse(&[&printed]).unwrap();
            prop_assert_eq!(parsed, options);
            prop_assert!(ignored.is_empty());
        }

        #[test]
        fn no_list_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            drop(MountOptions::parse(&[OsString::from_vec(bytes)]));
        }

        #[test]
        fn near_misses_do_not_panic(list in r#"(lowerdir=|context="|,|:|\\|"|a|=|ro){0,20}"#) {
            drop(MountOptions::parse(&[list]));
        }
    }
}
