//! The mount option grammar: one comma list to a [`MountOptions`] and back. Pure.
//!
//! The grammar is the kernel's: `,` ends an option, `:` ends a lower, and a backslash takes the
//! meaning from the character after it, once. Every name that kernel overlayfs, fuse-overlayfs or
//! mount(8) accepts has a line in one table: it acts, it is ignored because it would change
//! nothing here, or it is refused because it would.

mod act;
mod list;
mod passive;
mod print;
mod values;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::level_filters::LevelFilter;

use list::split_items;
use passive::{pass, unknown};
pub use values::{
    Ability, IoMode, Propagation, RedirectDir, THREADS_MAX, Transport, Uuid, Verity, parse_level,
    parse_threads,
};

use crate::error::Result;
use crate::idmap::Ids;
use crate::overrides::Form;

/// Most lowers of one mount, the kernel's `OVL_MAX_STACK`.
pub const LOWERS_MAX: usize = 500;

/// Files and directories copied at most to rename a directory, unless told otherwise.
const DIR_RENAME_ENTRIES: u64 = 20_000;
/// Bytes copied at most to rename a directory, unless told otherwise.
const DIR_RENAME_SIZE: u64 = 1 << 30;

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
    /// Inode numbers have 32 bits.
    pub ino32: bool,
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
            ino32: false,
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

    /// Takes one option, not empty, into account.
    fn apply(&mut self, item: &[u8], ignored: &mut Vec<Ignored>) -> Result<()> {
        let (key, value) = match item.iter().position(|&byte| byte == b'=') {
            Some(at) => (item.get(..at).unwrap_or_default(), item.get(at + 1..)),
            None => (item, None),
        };
        let Ok(key) = std::str::from_utf8(key) else { return Err(unknown(item)) };
        if act::ACTING.split(' ').any(|name| name == key) {
            self.act(key, value)
        } else {
            pass(key, value, item, ignored)
        }
    }
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

    /// Parses a list that is right.
    pub(super) fn parse(list: &str) -> MountOptions {
        MountOptions::parse(&[list]).unwrap().0
    }

    /// Returns what is said of a list that is wrong.
    pub(super) fn refusal(list: &str) -> String {
        MountOptions::parse(&[list]).unwrap_err().to_string()
    }

    pub(super) fn paths(list: &[&str]) -> Vec<PathBuf> {
        list.iter().map(PathBuf::from).collect()
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
}
