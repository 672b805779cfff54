//! One 512-byte header block of a tar archive: parse and print.
//!
//! Knows bytes only. Numbers are read as widely as writers spell them (octal with spaces or NULs
//! around it, base 256) and refused when they mean nothing; they are written as the ustar format
//! has them, so what does not fit must go into a pax record.
//!
//! # Source
//! pax(1) of POSIX, "ustar Interchange Format"; the GNU tar manual, "Basic Tar Format".

/// Size of a block, in bytes. Everything in an archive is a multiple of it.
pub const BLOCK: usize = 512;

/// A block of an archive.
pub type Block = [u8; BLOCK];

/// What an entry is, or what its data is to the entry after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File,
    /// Another name of an earlier entry.
    HardLink,
    /// Symbolic link.
    Symlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Directory.
    Directory,
    /// Named pipe.
    Fifo,
    /// Regular file whose holes are listed in the header (GNU).
    GnuSparse,
    /// Data is the name of the next entry (GNU).
    GnuLongName,
    /// Data is the link target of the next entry (GNU).
    GnuLongLink,
    /// Data is pax records for the next entry.
    Pax,
    /// Data is pax records for all entries that follow.
    PaxGlobal,
    /// Anything else.
    Other(u8),
}

impl Kind {
    fn from_flag(flag: u8) -> Self {
        match flag {
            0 | b'0' | b'7' => Self::File,
            b'1' => Self::HardLink,
            b'2' => Self::Symlink,
            b'3' => Self::Char,
            b'4' => Self::Block,
            b'5' => Self::Directory,
            b'6' => Self::Fifo,
            b'S' => Self::GnuSparse,
            b'L' => Self::GnuLongName,
            b'K' => Self::GnuLongLink,
            b'x' => Self::Pax,
            b'g' => Self::PaxGlobal,
            other => Self::Other(other),
        }
    }

    fn flag(self) -> u8 {
        match self {
            Self::File => b'0',
            Self::HardLink => b'1',
            Self::Symlink => b'2',
            Self::Char => b'3',
            Self::Block => b'4',
            Self::Directory => b'5',
            Self::Fifo => b'6',
            Self::GnuSparse => b'S',
            Self::GnuLongName => b'L',
            Self::GnuLongLink => b'K',
            Self::Pax => b'x',
            Self::PaxGlobal => b'g',
            Self::Other(flag) => flag,
        }
    }

    /// Tells whether data follows the header. What the size field of the others says means nothing.
    pub fn has_data(self) -> bool {
        !matches!(
            self,
            Self::HardLink
                | Self::Symlink
                | Self::Char
                | Self::Block
                | Self::Directory
                | Self::Fifo
        )
    }
}

/// What a header block says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Path, as far as it fits.
    pub path: Vec<u8>,
    /// Link target, as far as it fits.
    pub link: Vec<u8>,
    /// Type.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Bytes of data behind the header.
    pub size: u64,
    /// Modification time in seconds since the epoch.
    pub mtime: i64,
    /// Major and minor number of a device.
    pub device: (u64, u64),
}

/// A field: its first byte and its length.
type Field = (usize, usize);

const NAME: Field = (0, 100);
const MODE: Field = (100, 8);
const UID: Field = (108, 8);
const GID: Field = (116, 8);
const SIZE: Field = (124, 12);
const MTIME: Field = (136, 12);
const CHECKSUM: Field = (148, 8);
const FLAG: Field = (156, 1);
const LINK: Field = (157, 100);
const MAGIC: Field = (257, 8);
const MAJOR: Field = (329, 8);
const MINOR: Field = (337, 8);
const PREFIX: Field = (345, 155);
/// The prefix of the star format, which has times behind it and `tar` at the very end.
const STAR_PREFIX: Field = (345, 131);
const STAR_TRAILER: Field = (508, 4);
const USTAR: &[u8] = b"ustar\x0000";

/// Largest number that an octal field of `len` bytes holds.
fn octal_max(len: usize) -> u64 {
    (1 << (3 * (len - 1))) - 1
}

fn field(block: &[u8], (start, len): Field) -> &[u8] {
    block.get(start..start + len).unwrap_or_default()
}

impl Header {
    /// Returns what a block says, or `None` for one of zeros.
    ///
    /// # Errors
    /// A sentence on what no tar writer produces.
    pub fn parse(block: &Block) -> Result<Option<Self>, &'static str> {
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        check_sum(block)?;
        let flag = field(block, FLAG).first().copied().unwrap_or_default();
        let kind = Kind::from_flag(flag);
        let mut path = text(field(block, NAME)).to_vec();
        let is_posix = field(block, MAGIC).starts_with(b"ustar\0");
        if is_posix {
            let is_star = field(block, STAR_TRAILER) == b"tar\0";
            let prefix = text(field(block, if is_star { STAR_PREFIX } else { PREFIX }));
            if !prefix.is_empty() {
                path = [prefix, b"/", &path].concat();
            }
        }
        let is_device = matches!(kind, Kind::Char | Kind::Block);
        let device = if is_device {
            (count(field(block, MAJOR))?, count(field(block, MINOR))?)
        } else {
            (0, 0)
        };
        // The oldest writers know no type for directories.
        let kind = if flag == 0 && path.ends_with(b"/") { Kind::Directory } else { kind };
        Ok(Some(Self {
            link: text(field(block, LINK)).to_vec(),
            kind,
            mode: u32::try_from(number(field(block, MODE))? & 0o7777).unwrap_or_default(),
            uid: count(field(block, UID))?,
            gid: count(field(block, GID))?,
            size: if kind.has_data() { count(field(block, SIZE))? } else { 0 },
            mtime: number(field(block, MTIME))?,
            device,
            path,
        }))
    }

    /// Returns the block of the ustar format; numbers and texts that do not fit are cut.
    ///
    /// The caller puts those into pax records; see [`fits`].
    pub fn print(&self) -> Block {
        let mut block = [0; BLOCK];
        let (prefix, name) = split(&self.path).unwrap_or((&[], &self.path));
        put(&mut block, NAME, name);
        put(&mut block, PREFIX, prefix);
        put(&mut block, LINK, &self.link);
        put_octal(&mut block, MODE, self.mode.into());
        put_octal(&mut block, UID, self.uid);
        put_octal(&mut block, GID, self.gid);
        put_octal(&mut block, SIZE, self.size);
        put_octal(&mut block, MTIME, u64::try_from(self.mtime).unwrap_or_default());
        put(&mut block, FLAG, &[self.kind.flag()]);
        put(&mut block, MAGIC, USTAR);
        put_octal(&mut block, MAJOR, self.device.0);
        put_octal(&mut block, MINOR, self.device.1);
        let sum = sums(&block).0;
        put(&mut block, CHECKSUM, format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// Whether values fit the ustar format.
pub mod fits {
    use super::{GID, LINK, MAJOR, MTIME, SIZE, octal_max, split};

    /// A path, over name and prefix.
    pub fn path(path: &[u8]) -> bool {
        path.is_ascii() && split(path).is_some()
    }

    /// A link target.
    pub fn link(target: &[u8]) -> bool {
        target.is_ascii() && target.len() <= LINK.1
    }

    /// A user or group number.
    pub fn id(id: u64) -> bool {
        id <= octal_max(GID.1)
    }

    /// A size in bytes.
    pub fn size(size: u64) -> bool {
        size <= octal_max(SIZE.1)
    }

    /// A time in seconds since the epoch.
    pub fn seconds(seconds: i64) -> bool {
        u64::try_from(seconds).is_ok_and(|seconds| seconds <= octal_max(MTIME.1))
    }

    /// A device number, major or minor.
    pub fn device(number: u64) -> bool {
        number <= octal_max(MAJOR.1)
    }
}

/// Splits a path into prefix and name; `None` if there is no place to cut it.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.len() <= NAME.1 {
        return Some((&[], path));
    }
    // The last slash of a directory is no place: the name behind it would be empty.
    let last = path.len() - 1;
    let end = last.min(PREFIX.1 + 1);
    let cut = path.get(..end)?.iter().rposition(|byte| *byte == b'/')?;
    let (prefix, name) = (path.get(..cut)?, path.get(cut + 1..)?);
    (!prefix.is_empty() && name.len() <= NAME.1).then_some((prefix, name))
}

fn put(block: &mut Block, (start, len): Field, bytes: &[u8]) {
    let bytes = bytes.get(..bytes.len().min(len)).unwrap_or_default();
    if let Some(place) = block.get_mut(start..start + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn put_octal(block: &mut Block, (start, len): Field, number: u64) {
    let number = number.min(octal_max(len));
    put(block, (start, len), format!("{number:0width$o}", width = len - 1).as_bytes());
}

/// The sum of all bytes, the checksum's own as spaces: unsigned, and as old writers had it, signed.
fn sums(block: &Block) -> (i64, i64) {
    let place = CHECKSUM.0..CHECKSUM.0 + CHECKSUM.1;
    let bytes =
        block.iter().enumerate().map(|(at, byte)| if place.contains(&at) { b' ' } else { *byte });
    bytes.fold((0, 0), |(unsigned, signed), byte| {
        (unsigned + i64::from(byte), signed + i64::from(i8::from_ne_bytes([byte])))
    })
}

fn check_sum(block: &Block) -> Result<(), &'static str> {
    let wanted = number(field(block, CHECKSUM)).map_err(|_what| "is no tar header")?;
    let (unsigned, signed) = sums(block);
    if wanted == unsigned || wanted == signed { Ok(()) } else { Err("has a wrong header checksum") }
}

/// A text field up to its NUL.
pub fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number that cannot be negative.
///
/// # Errors
/// As [`number`].
pub fn count(bytes: &[u8]) -> Result<u64, &'static str> {
    u64::try_from(number(bytes)?).map_err(|_sign| "has a negative number")
}

/// A numeric field: octal, or base 256 if its first bit is set.
///
/// # Errors
/// A sentence if it is neither, or beyond 63 bits.
pub fn number(bytes: &[u8]) -> Result<i64, &'static str> {
    match bytes.first() {
        Some(first) if first & 0x80 != 0 => base_256(bytes),
        _ => octal(bytes),
    }
}

fn octal(bytes: &[u8]) -> Result<i64, &'static str> {
    let is_blank = |byte: &u8| matches!(byte, 0 | b' ');
    let start = bytes.iter().position(|byte| !is_blank(byte)).unwrap_or(bytes.len());
    let end = bytes.iter().rposition(|byte| !is_blank(byte)).map_or(start, |last| last + 1);
    let mut value = 0_i64;
    for digit in bytes.get(start..end).unwrap_or_default() {
        if !(b'0'..=b'7').contains(digit) {
            return Err("has a number that is not octal");
        }
        value = value
            .checked_mul(8)
            .and_then(|value| value.checked_add(i64::from(digit - b'0')))
            .ok_or("has a number that is too large")?;
    }
    Ok(value)
}

fn base_256(bytes: &[u8]) -> Result<i64, &'static str> {
    let mut bytes = bytes.iter();
    let first = bytes.next().copied().unwrap_or_default();
    // Seven bits of two's complement in the first byte.
    let mut value = i64::from(first & 0x3f) - i64::from(first & 0x40);
    for byte in bytes {
        value = value
            .checked_mul(256)
            .and_then(|value| value.checked_add(i64::from(*byte)))
            .ok_or("has a number that is too large")?;
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(path: &[u8]) -> Header {
        Header {
            path: path.to_vec(),
            link: Vec::new(),
            kind: Kind::File,
            mode: 0o644,
            uid: 1000,
            gid: 100,
            size: 5,
            mtime: 1_700_000_000,
            device: (0, 0),
        }
    }

    #[test]
    fn numbers() {
        for (bytes, value) in [
            (&b"0000644\0"[..], Ok(0o644)),
            (b"   644 \0", Ok(0o644)),
            (b"\0\0\0\0\0\0\0\0", Ok(0)),
            (b"", Ok(0)),
            (b"777777777777", Ok(0o777_777_777_777)),
            (b"\x80\0\0\0\0\0\x01\0", Ok(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Ok(-1)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Ok(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", Err("has a number that is too large")),
            (b"0000089\0", Err("has a number that is not octal")),
            (b"-000001\0", Err("has a number that is not octal")),
            (b"12 34\0\0\0", Err("has a number that is not octal")),
        ] {
            assert_eq!(number(bytes), value, "{bytes:?}");
        }
        assert_eq!(count(b"\xff\xff\xff\xff\xff\xff\xff\xff"), Err("has a negative number"));
    }

    #[test]
    fn long_paths_are_split_where_there_is_a_place() {
        let dirs = "d/".repeat(60);
        for (path, fits) in [
            ("a".to_owned(), true),
            ("a".repeat(100), true),
            ("a".repeat(101), false),
            (format!("{dirs}{}", "a".repeat(100)), true),
            (format!("{dirs}{}", "a".repeat(101)), false),
            (format!("{}/a", "p".repeat(155)), true),
            (format!("{}/a", "p".repeat(156)), false),
            (format!("{}/", "d".repeat(99)), true),
            (format!("{}/", "d".repeat(100)), false),
            ("\u{fc}".to_owned(), false),
        ] {
            assert_eq!(fits::path(path.as_bytes()), fits, "{path}");
            if fits {
                let printed = header(path.as_bytes()).print();
                let parsed = Header::parse(&printed).unwrap().unwrap();
                assert_eq!(parsed.path, path.as_bytes(), "{path}");
            }
        }
    }

    #[test]
    fn broken_blocks() {
        let good = header(b"a").print();
        assert_eq!(Header::parse(&good), Ok(Some(header(b"a"))));
        assert_eq!(Header::parse(&[0; BLOCK]), Ok(None));
        let mut broken = good;
        broken[0] = b'b';
        assert_eq!(Header::parse(&broken), Err("has a wrong header checksum"));
        assert_eq!(Header::parse(&[b'x'; BLOCK]), Err("is no tar header"));
    }

    #[test]
    fn the_sum_of_old_writers_is_signed() {
        let mut block = header(b"\xfc").print();
        let (unsigned, signed) = sums(&block);
        assert_ne!(unsigned, signed);
        put(&mut block, CHECKSUM, format!("{signed:06o}\0 ").as_bytes());
        assert!(Header::parse(&block).is_ok());
    }

    #[test]
    fn a_slash_makes_a_directory_of_the_oldest_type_only() {
        for (flag, kind) in [(0, Kind::Directory), (b'0', Kind::File)] {
            let mut block = header(b"d/").print();
            block[FLAG.0] = flag;
            let sum = sums(&block).0;
            put(&mut block, CHECKSUM, format!("{sum:06o}\0 ").as_bytes());
            assert_eq!(Header::parse(&block).unwrap().unwrap().kind, kind);
        }
    }

    proptest! {
        #[test]
        fn any_block_is_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), BLOCK)) {
            let mut block = [0; BLOCK];
            block.copy_from_slice(&bytes);
            drop(Header::parse(&block));
            // The same with a sum that is right, so that the fields are looked at.
            let sum = sums(&block).0;
            put(&mut block, CHECKSUM, format!("{sum:06o}\0 ").as_bytes());
            drop(Header::parse(&block));
        }

        #[test]
        fn what_fits_is_read_back(
            path in "[a-z/]{1,120}", link in "[a-z/]{0,100}", mode in 0..=0o7777_u32,
            uid in 0..=0o7_777_777_u64, size in 0..=0o77_777_777_777_u64, mtime in 0..=0o77_777_777_777_i64,
        ) {
            prop_assume!(fits::path(path.as_bytes()));
            let mut wanted = header(path.as_bytes());
            wanted.link = link.into_bytes();
            (wanted.mode, wanted.uid, wanted.gid) = (mode, uid, uid);
            (wanted.size, wanted.mtime) = (size, mtime);
            prop_assert_eq!(Header::parse(&wanted.print()), Ok(Some(wanted)));
        }
    }
}
