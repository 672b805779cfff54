//! The mount table of this process, proc_pid_mountinfo(5). Parsing is pure.
//!
//! Lines come from the kernel but hold paths that anybody may have chosen: a line that cannot be
//! understood is skipped, none panics.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Errno, Error, Result};

/// One mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountEntry {
    /// Number of the mount, unique while it lives.
    pub id: u64,
    /// Number of the mount it is mounted on.
    pub parent: u64,
    /// Major and minor device number, as in `st_dev`.
    pub device: (u32, u32),
    /// Which directory of its filesystem is mounted.
    pub root: PathBuf,
    /// Where it is mounted, seen from this process's root.
    pub mount_point: PathBuf,
    /// Filesystem type, such as `fuse.lamina`.
    pub fs_type: OsString,
    /// What was mounted.
    pub source: OsString,
}

impl MountEntry {
    /// Returns whether a FUSE server answers for this mount.
    pub fn is_fuse(&self) -> bool {
        let kind = self.fs_type.as_bytes();
        kind == b"fuse" || kind.starts_with(b"fuse.")
    }
}

/// Reads the mount table of this process.
///
/// # Errors
/// Those of reading /proc/self/mountinfo.
pub fn load() -> Result<Vec<MountEntry>> {
    const PATH: &str = "/proc/self/mountinfo";
    let failed = |op| {
        move |error: std::io::Error| {
            Error::sys(op, PATH, Errno::from_io_error(&error).unwrap_or(Errno::IO))
        }
    };
    let mut table = Vec::new();
    File::open(PATH).map_err(failed("open"))?.read_to_end(&mut table).map_err(failed("read"))?;
    Ok(parse(&table))
}

/// Parses a whole table, leaving out lines that cannot be understood.
pub fn parse(table: &[u8]) -> Vec<MountEntry> {
    table.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// Returns the mount that a path walk to `mount_point` ends in: the topmost of those there.
pub fn find_top<'a>(entries: &'a [MountEntry], mount_point: &Path) -> Option<&'a MountEntry> {
    let here: Vec<&MountEntry> =
        entries.iter().filter(|entry| entry.mount_point == mount_point).collect();
    here.iter()
        .rev()
        .find(|entry| !here.iter().any(|other| other.parent == entry.id && other.id != entry.id))
        .copied()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    // 36 35 98:0 /root /mount/point rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    let mut fields = line.split(|&byte| byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = fields.next()?;
    let colon = device.iter().position(|&byte| byte == b':')?;
    let major = u32::try_from(number(device.get(..colon)?)?).ok()?;
    let minor = u32::try_from(number(device.get(colon + 1..)?)?).ok()?;
    let root = unescape(fields.next()?).into();
    let mount_point = unescape(fields.next()?).into();
    let _options = fields.next()?;
    fields.find(|field| *field == b"-")?;
    let fs_type = unescape(fields.next()?);
    let source = unescape(fields.next()?);
    Some(MountEntry { id, parent, device: (major, minor), root, mount_point, fs_type, source })
}

fn number(digits: &[u8]) -> Option<u64> {
    // `parse` alone would take a sign.
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Turns `\ooo` into the byte it stands for; anything else stays.
fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        if let (b'\\', Some(octal)) = (byte, tail.get(..3).and_then(octal)) {
            plain.push(octal);
            rest = tail.get(3..).unwrap_or_default();
        } else {
            plain.push(byte);
            rest = tail;
        }
    }
    OsString::from_vec(plain)
}

fn octal(digits: &[u8]) -> Option<u8> {
    let mut value: u8 = 0;
    for &digit in digits {
        if !(b'0'..=b'7').contains(&digit) {
            return None;
        }
        value = value.checked_mul(8)?.checked_add(digit - b'0')?;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &[u8] = b"21 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
        40 21 0:35 / /mnt/a\\040b\\134c rw,nodev,noatime shared:7 master:2 - fuse.lamina lamina rw,user_id=0\n\
        41 40 0:36 / /mnt/a\\040b\\134c rw - fuse x\\011y rw\n\
        50 21 0:40 /sub /tmp rw propagate_from:3 - tmpfs none rw\n";

    #[test]
    fn fields_are_read_and_unescaped() {
        let entries = parse(TABLE);
        assert_eq!(entries.len(), 4);
        let mount = &entries[1];
        assert_eq!((mount.id, mount.parent, mount.device), (40, 21, (0, 35)));
        assert_eq!(mount.mount_point, Path::new("/mnt/a b\\c"));
        assert_eq!(mount.fs_type, "fuse.lamina");
        assert_eq!(mount.source, "lamina");
        assert!(mount.is_fuse() && entries[2].is_fuse() && !entries[3].is_fuse());
        assert_eq!(entries[2].source, "x\ty");
    }

    #[test]
    fn the_topmost_of_stacked_mounts_is_found() {
        let mut entries = parse(TABLE);
        let at = Path::new("/mnt/a b\\c");
        assert_eq!(find_top(&entries, at).map(|entry| entry.id), Some(41));
        entries.reverse();
        assert_eq!(find_top(&entries, at).map(|entry| entry.id), Some(41));
        assert_eq!(find_top(&entries, Path::new("/nowhere")), None);
        assert_eq!(find_top(&entries, Path::new("/")).map(|entry| entry.id), Some(21));
    }

    #[test]
    fn hostile_lines_are_skipped() {
        for line in [
            "",
            " ",
            "1",
            "1 2",
            "1 2 3",
            "1 2 3:4 / /m",
            "1 2 3:4 / /m rw",
            "1 2 3:4 / /m rw -",
            "1 2 3:4 / /m rw - fuse",
            "x 2 3:4 / /m rw - fuse s",
            "1 2 34 / /m rw - fuse s",
            "+1 2 3:4 / /m rw - fuse s",
            "1 2 99999999999:4 / /m rw - fuse s",
            "1 2 : / /m rw - f s",
            "99999999999999999999999 2 3:4 / /m rw - fuse s",
            "- - - - - - - - -",
        ] {
            assert_eq!(parse(line.as_bytes()), [], "{line}");
        }
    }

    #[test]
    fn broken_escapes_stay_as_they_are() {
        for (field, expected) in [
            ("a\\", "a\\"),
            ("a\\0", "a\\0"),
            ("a\\08z", "a\\08z"),
            ("\\777", "\\777"),
            ("\\\\040", "\\ "),
            ("\\043", "#"),
        ] {
            assert_eq!(unescape(field.as_bytes()), expected, "{field}");
        }
        assert_eq!(unescape(b"\\377").as_bytes(), b"\xff");
    }

    proptest! {
        #[test]
        fn no_table_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn near_misses_do_not_panic(text in r"([0-9]{1,3}|:|-| |/|\\|\\04|\n|fuse){0,30}") {
            let entries = parse(text.as_bytes());
            let _ = find_top(&entries, Path::new("/"));
        }
    }
}
