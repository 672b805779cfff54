//! What an option's value may be: the words it is chosen from, numbers, sizes and times.

use std::time::Duration;

use tracing::level_filters::LevelFilter;

use super::list::{needed, text};
use crate::error::{Error, Result};
use crate::idmap::IdMap;

/// Most worker threads that can be asked for.
pub const THREADS_MAX: usize = 256;

/// Values that turn something off.
pub(super) const OFF: &str = "0 off no false";
/// Values that turn something on, but for none at all.
const ON: &str = "1 on yes true";

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
pub(super) const ABILITIES: [(&str, Ability); 8] = [
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
    /// Our own, by io_uring where the kernel has that, else as `Dev`.
    Uring,
    /// The `fuser` crate.
    Fuser,
}

impl Transport {
    /// Returns the word after `transport=`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Uring => "uring",
            Self::Fuser => "fuser",
        }
    }
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

    pub(super) fn parse(value: &[u8]) -> Result<Self> {
        let known = Self::ALL.iter().find(|(_, name)| name.as_bytes() == value);
        known.map(|(known, _)| *known).ok_or_else(|| {
            Error::invalid(
                format!("redirect_dir={}", text(value)),
                "is none of on, off, follow, nofollow",
            )
        })
    }

    pub(super) fn print(self) -> &'static str {
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
pub(super) fn parse_uuid(name: &str) -> Result<Uuid> {
    match name {
        "auto" => Ok(Uuid::Auto),
        "on" => Ok(Uuid::On),
        "null" => Ok(Uuid::Null),
        "off" => Ok(Uuid::Off),
        other => Err(Error::invalid(format!("uuid={other}"), "is none of auto, on, null, off")),
    }
}

/// Parses an I/O mode; `None` is `auto`.
pub(super) fn parse_io(name: &str) -> Result<Option<IoMode>> {
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
pub(super) fn parse_abilities(names: &str) -> Result<Vec<Ability>> {
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
pub(super) fn parse_transport(name: &str) -> Result<Transport> {
    match name {
        "dev" => Ok(Transport::Dev),
        "uring" => Ok(Transport::Uring),
        "fuser" => Ok(Transport::Fuser),
        other => Err(Error::invalid(
            format!("transport={other}"),
            "is no transport; use dev (the default), uring or fuser",
        )),
    }
}

/// Parses the ranges of an id map.
pub(super) fn parse_ids(key: &str, value: Option<&[u8]>) -> Result<IdMap> {
    let value = text(needed(key, value)?);
    IdMap::parse(&value).map_err(|why| Error::invalid(format!("{key}={value}"), why))
}

pub(super) fn parse_id(key: &str, value: Option<&[u8]>) -> Result<u32> {
    let value = text(needed(key, value)?);
    match value.parse() {
        // The last number of all is no id.
        Ok(id) if id < u32::MAX => Ok(id),
        _ => Err(Error::invalid(format!("{key}={value}"), "is no id; use 0 to 4294967294")),
    }
}

/// Parses a flag that other programs take with and without a value.
pub(super) fn parse_switch(key: &str, value: Option<&[u8]>) -> Result<bool> {
    let Some(value) = value else { return Ok(true) };
    let is_one_of = |list: &str| list.split(' ').any(|known| known.as_bytes() == value);
    match (is_one_of(ON), is_one_of(OFF)) {
        (true, _) => Ok(true),
        (_, true) => Ok(false),
        _ => Err(Error::invalid(format!("{key}={}", text(value)), "is neither 1 nor 0")),
    }
}

/// Parses seconds with decimals.
pub(super) fn parse_seconds(number: &str) -> Result<Duration> {
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
pub(super) fn parse_size(key: &str, value: &[u8]) -> Result<u64> {
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

#[cfg(test)]
mod tests {
    use super::super::MountOptions;
    use super::super::tests::parse;
    use super::*;

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
}
