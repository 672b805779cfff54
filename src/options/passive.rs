//! Options of other programs that do not act: each is ignored because it would change nothing here,
//! or refused because it would.

use super::Ignored;
use super::act::ACTING;
use super::list::text;
use super::values::OFF;
use crate::error::{Error, Result};

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

/// Decides on an option that does not act.
pub(super) fn pass(
    key: &str,
    value: Option<&[u8]>,
    item: &[u8],
    ignored: &mut Vec<Ignored>,
) -> Result<()> {
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
pub(super) fn unknown(item: &[u8]) -> Error {
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

#[cfg(test)]
mod tests {
    use super::super::MountOptions;
    use super::super::tests::refusal;
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn what_would_change_the_result_is_refused() {
        let options = "xino=maybe nfs_export=on plugins=a.so sync \
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
    fn no_name_is_in_both_tables_or_twice() {
        let passive = PASSIVE.iter().flat_map(|(names, _)| names.split(' '));
        let mut names: Vec<&str> = passive.chain(ACTING.split(' ')).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
