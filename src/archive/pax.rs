//! pax records: what an entry has that does not fit into its header. Pure.
//!
//! # Source
//! pax(1) of POSIX, "pax Extended Header"; the GNU tar manual, "Storing Sparse Files";
//! `SCHILY.xattr.` as star, GNU tar and the container tools have it.

use super::sparse::Extent;

/// Seconds and nanoseconds since the epoch; the nanoseconds count forward, below 1e9.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Whole seconds, negative before 1970.
    pub seconds: i64,
    /// Nanoseconds added to them.
    pub nanoseconds: u32,
}

/// Prefix of the keys that carry xattrs.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What the records before one entry say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// Path in place of the header's.
    pub path: Option<Vec<u8>>,
    /// Link target in place of the header's.
    pub link: Option<Vec<u8>>,
    /// Bytes of data in place of the header's.
    pub size: Option<u64>,
    /// Owner in place of the header's.
    pub uid: Option<u64>,
    /// Group in place of the header's.
    pub gid: Option<u64>,
    /// Modification time in place of the header's.
    pub mtime: Option<Time>,
    /// Access time.
    pub atime: Option<Time>,
    /// Extended attributes by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// What they say of holes.
    pub sparse: Sparse,
}

/// What records say of the holes of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sparse {
    /// `GNU.sparse.major` and `minor` are 1 and 0: the map stands before the data.
    pub map_in_data: bool,
    major: Option<u64>,
    minor: Option<u64>,
    /// The file's name; the header has one made up.
    pub name: Option<Vec<u8>>,
    /// The file's size with its holes.
    pub size: Option<u64>,
    /// The parts that have data (formats 0.0 and 0.1).
    pub map: Option<Vec<Extent>>,
    /// Offset of a part whose length comes in the next record (format 0.0).
    offset: Option<u64>,
}

impl Records {
    /// Takes in the data of one pax header; what it says wins over what was known.
    ///
    /// # Errors
    /// A sentence on what is malformed.
    pub fn read(&mut self, mut data: &[u8]) -> Result<(), &'static str> {
        while !data.is_empty() {
            let (key, value, rest) = split(data)?;
            self.record(key, value)?;
            data = rest;
        }
        self.sparse.map_in_data = match (self.sparse.major, self.sparse.minor) {
            (Some(1), Some(0)) => true,
            (None | Some(0), _) => false,
            _ => return Err("has a sparse format that is not known"),
        };
        if self.sparse.offset.is_some() {
            return Err("has a sparse part without a length");
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if let Some(name) = key.strip_prefix(XATTR) {
            self.xattrs.retain(|(known, _)| known != name);
            if name.is_empty() {
                return Err("has an xattr without a name");
            }
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        match key {
            b"path" => self.path = text(value)?,
            b"linkpath" => self.link = text(value)?,
            b"size" => self.size = count(value)?,
            b"uid" => self.uid = count(value)?,
            b"gid" => self.gid = count(value)?,
            b"mtime" => self.mtime = time(value)?,
            b"atime" => self.atime = time(value)?,
            b"GNU.sparse.name" => self.sparse.name = text(value)?,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size = count(value)?,
            b"GNU.sparse.major" => self.sparse.major = count(value)?,
            b"GNU.sparse.minor" => self.sparse.minor = count(value)?,
            b"GNU.sparse.map" => self.sparse.map = Some(map(value)?),
            b"GNU.sparse.numblocks" => {
                // Only tells how many are to come; with none, all of the file is a hole.
                count(value)?;
                self.sparse.map.get_or_insert_default();
            }
            b"GNU.sparse.offset" => {
                if self.sparse.offset.is_some() {
                    return Err("has a sparse part without a length");
                }
                self.sparse.offset = count(value)?;
            }
            b"GNU.sparse.numbytes" => {
                let offset =
                    self.sparse.offset.take().ok_or("has a sparse part without a place")?;
                let length = count(value)?.ok_or("has a sparse part without a length")?;
                self.sparse.map.get_or_insert_default().push(Extent { offset, length });
            }
            _ => {}
        }
        Ok(())
    }
}

/// Key and value of a record, and what follows it.
type Split<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Splits the first record off: key, value, and what follows it.
fn split(data: &[u8]) -> Result<Split<'_>, &'static str> {
    const BROKEN: &str = "has a malformed pax record";
    let space = data.iter().take(20).position(|byte| *byte == b' ').ok_or(BROKEN)?;
    let length = decimal(data.get(..space).unwrap_or_default()).ok_or(BROKEN)?;
    let length = usize::try_from(length).map_err(|_large| BROKEN)?;
    let (record, rest) = data.split_at_checked(length).ok_or(BROKEN)?;
    let record = record.get(space + 1..).and_then(|record| record.strip_suffix(b"\n"));
    let record = record.ok_or(BROKEN)?;
    let equals = record.iter().position(|byte| *byte == b'=').ok_or(BROKEN)?;
    let (key, value) = record.split_at_checked(equals).ok_or(BROKEN)?;
    if key.is_empty() || key.contains(&0) {
        return Err(BROKEN);
    }
    Ok((key, value.get(1..).unwrap_or_default(), rest))
}

/// A decimal number without sign, at least one digit.
pub fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

/// A value without NULs; an empty one takes back what was said before.
fn text(value: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
    if value.contains(&0) {
        return Err("has a name with a NUL in it");
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn count(value: &[u8]) -> Result<Option<u64>, &'static str> {
    if value.is_empty() {
        return Ok(None);
    }
    let number = decimal(value).filter(|number| i64::try_from(*number).is_ok());
    number.map(Some).ok_or("has a pax number that is none, or too large")
}

fn time(value: &[u8]) -> Result<Option<Time>, &'static str> {
    const BROKEN: &str = "has a pax time that is none";
    if value.is_empty() {
        return Ok(None);
    }
    let (is_negative, digits) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = digits.splitn(2, |byte| *byte == b'.');
    let whole = decimal(parts.next().unwrap_or_default()).ok_or(BROKEN)?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(BROKEN);
    }
    // Digits beyond the ninth are cut.
    let nine = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = nine.fold(0_u32, |value, digit| value * 10 + u32::from(digit - b'0'));
    let mut seconds = i64::try_from(whole).map_err(|_large| BROKEN)?;
    if !is_negative {
        return Ok(Some(Time { seconds, nanoseconds }));
    }
    seconds = -seconds;
    if nanoseconds == 0 {
        return Ok(Some(Time { seconds, nanoseconds }));
    }
    Ok(Some(Time { seconds: seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds }))
}

/// The map of format 0.1: `offset,length,offset,length,...`.
fn map(value: &[u8]) -> Result<Vec<Extent>, &'static str> {
    const BROKEN: &str = "has a malformed sparse map";
    if value.is_empty() {
        return Ok(Vec::new());
    }
    let mut numbers = value.split(|byte| *byte == b',').map(|digits| decimal(digits).ok_or(BROKEN));
    let mut map = Vec::new();
    while let Some(offset) = numbers.next() {
        let length = numbers.next().ok_or(BROKEN)??;
        map.push(Extent { offset: offset?, length });
    }
    Ok(map)
}

/// Appends one record: its own length in decimal, a space, `key=value`, a newline.
pub fn print(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    // The length counts its own digits.
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// Appends the record of an xattr. A name with `=` cannot be told from its value and is left out.
pub fn print_xattr(records: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    if !name.contains(&b'=') {
        print(records, &[XATTR, name].concat(), value);
    }
}

/// Spells a time as a record's value.
pub fn print_time(time: Time) -> String {
    let Time { seconds, nanoseconds } = time;
    let (sign, whole, fraction) = if seconds < 0 && nanoseconds > 0 {
        ("-", seconds.saturating_add(1).unsigned_abs(), 1_000_000_000 - nanoseconds)
    } else {
        (if seconds < 0 { "-" } else { "" }, seconds.unsigned_abs(), nanoseconds)
    };
    if fraction == 0 {
        return format!("{sign}{whole}");
    }
    let fraction = format!("{fraction:09}");
    format!("{sign}{whole}.{}", fraction.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(data: &[u8]) -> Result<Records, &'static str> {
        let mut records = Records::default();
        records.read(data).map(|()| records)
    }

    #[test]
    fn lengths_count_themselves() {
        for value_len in [0, 1, 86, 87, 88, 89, 90, 91, 985, 986, 987, 988, 989, 990, 991, 9999] {
            let value = vec![b'v'; value_len];
            let mut printed = Vec::new();
            print(&mut printed, b"path", &value);
            let length = printed.split(|byte| *byte == b' ').next().and_then(decimal);
            assert_eq!(length, Some(printed.len() as u64), "{value_len}");
            let expected = (value_len > 0).then_some(value);
            assert_eq!(read(&printed).unwrap().path, expected);
        }
    }

    #[test]
    fn malformed_records() {
        for data in [
            &b"5 a=b"[..],
            b"7 a=b\n",
            b"6 =bb\n",
            b"x a=b\n",
            b" a=b\n",
            b"6 abb\n",
            b"1 a=b\n",
            b"99999999999999999999 a=b\n",
            b"6 a=bb",
            b"0 a=b\n",
            b"2 \n",
            b"10 size=-1\n",
            b"10 size=1x\n",
            b"12 mtime=1.x\n",
            b"11 mtime=.5\n",
            b"12 path=a\0b\n",
            b"28 size=9223372036854775808\n",
            b"18 SCHILY.xattr.=\n",
            b"22 GNU.sparse.offset=1\n",
            b"24 GNU.sparse.numbytes=1\n",
            b"22 GNU.sparse.major=2\n",
            b"20 GNU.sparse.map=1\n",
        ] {
            assert!(read(data).is_err(), "{}", String::from_utf8_lossy(data));
        }
    }

    #[test]
    fn times() {
        for (value, seconds, nanoseconds) in [
            ("0", 0, 0),
            ("1.5", 1, 500_000_000),
            ("1.", 1, 0),
            ("-1", -1, 0),
            ("-1.25", -2, 750_000_000),
            ("1.0000000019", 1, 1),
            ("-0.5", -1, 500_000_000),
        ] {
            let parsed = time(value.as_bytes()).unwrap().unwrap();
            assert_eq!(parsed, Time { seconds, nanoseconds }, "{value}");
        }
        assert_eq!(print_time(Time { seconds: -2, nanoseconds: 750_000_000 }), "-1.25");
        assert_eq!(print_time(Time { seconds: 7, nanoseconds: 0 }), "7");
    }

    #[test]
    fn the_last_record_of_a_key_wins_and_an_empty_one_takes_it_back() {
        let mut data = Vec::new();
        print(&mut data, b"path", b"a");
        print(&mut data, b"path", b"b");
        print(&mut data, b"uid", b"5");
        print(&mut data, b"uid", b"");
        print_xattr(&mut data, b"user.a", b"1\n2");
        print_xattr(&mut data, b"user.a", b"\0=\n");
        let records = read(&data).unwrap();
        assert_eq!(records.path.as_deref(), Some(&b"b"[..]));
        assert_eq!(records.uid, None);
        assert_eq!(records.xattrs, [(b"user.a".to_vec(), b"\0=\n".to_vec())]);
    }

    #[test]
    fn sparse_maps() {
        let mut zero = Vec::new();
        print(&mut zero, b"GNU.sparse.size", b"100");
        print(&mut zero, b"GNU.sparse.numblocks", b"2");
        for (offset, length) in [("0", "5"), ("50", "5")] {
            print(&mut zero, b"GNU.sparse.offset", offset.as_bytes());
            print(&mut zero, b"GNU.sparse.numbytes", length.as_bytes());
        }
        let mut one = Vec::new();
        print(&mut one, b"GNU.sparse.size", b"100");
        print(&mut one, b"GNU.sparse.map", b"0,5,50,5");
        let wanted = [Extent { offset: 0, length: 5 }, Extent { offset: 50, length: 5 }];
        for data in [zero, one] {
            let sparse = read(&data).unwrap().sparse;
            assert_eq!(sparse.map.as_deref(), Some(&wanted[..]));
            assert_eq!((sparse.size, sparse.map_in_data), (Some(100), false));
        }
    }

    proptest! {
        #[test]
        fn any_data_is_read_or_refused(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(read(&data));
        }

        #[test]
        fn near_misses_are_read_or_refused(
            data in "([0-9]{0,3} ?(path|size|mtime|GNU.sparse.(map|offset|numbytes)|SCHILY.xattr.a)=[0-9,.-]{0,6}\n?){0,4}"
        ) {
            drop(read(data.as_bytes()));
        }

        #[test]
        fn times_are_read_back(seconds in -1_i64 << 40..1_i64 << 40, nanoseconds in 0..1_000_000_000_u32) {
            let wanted = Time { seconds, nanoseconds };
            prop_assert_eq!(time(print_time(wanted).as_bytes()), Ok(Some(wanted)));
        }
    }
}
