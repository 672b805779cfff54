//! A tar archive as a stream of entries: headers, long names, pax records and holes put together.
//!
//! Reads its input once, front to back, and holds no more of it than [`Limits::meta_max`] plus one
//! buffer. Every entry is checked before it is returned; nothing it says is acted on here.

use std::io::{self, Read};

use super::header::{self, BLOCK, Block, Header, Kind};
use super::pax::{Records, Time};
use super::sparse::{self, Extent};
use crate::error::{Errno, Error, Result};

/// Bounds on what an archive may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that a compressed archive may unpack to, and bytes that its files may have in all,
    /// holes counted.
    pub size_max: u64,
    /// Entries.
    pub entries_max: u64,
    /// Bytes of names, pax records and sparse maps of one entry.
    pub meta_max: u64,
    /// Components of one path.
    pub depth_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { size_max: 1 << 40, entries_max: 50_000_000, meta_max: 1 << 20, depth_max: 4096 }
    }
}

/// One entry of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path as the archive spells it.
    pub path: Vec<u8>,
    /// Link target as the archive spells it.
    pub link: Vec<u8>,
    /// Type: never one that only carries data for another entry.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Size of the file with its holes, in bytes.
    pub size: u64,
    /// Modification time.
    pub mtime: Time,
    /// Access time, if given.
    pub atime: Option<Time>,
    /// Extended attributes, by their names in the archive.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Major and minor number of a device.
    pub device: (u64, u64),
    /// The parts that have data; `None` if all of it has.
    pub map: Option<Vec<Extent>>,
}

/// Reads entries from a stream that is not compressed.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    limits: Limits,
    /// Bytes of data of the current entry that were not read yet.
    left: u64,
    /// Bytes behind them up to a whole block.
    padding: u64,
    entries: u64,
    /// Bytes of files announced so far, holes counted.
    total: u64,
    /// For messages: the entry read last.
    last: Vec<u8>,
    done: bool,
}

impl<R: Read> Reader<R> {
    /// Reads from `input`.
    pub fn new(input: R, limits: Limits) -> Self {
        Self {
            input,
            limits,
            left: 0,
            padding: 0,
            entries: 0,
            total: 0,
            last: Vec::new(),
            done: false,
        }
    }

    /// Returns the error that the current entry `what`.
    pub fn broken(&self, what: &'static str) -> Error {
        broken(&self.last, what)
    }

    /// Returns the next entry, skipping what is left of the one before; `None` at the end.
    ///
    /// # Errors
    /// `EIO` for what no writer of archives produces or goes beyond a bound; those of reading.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        let mut long_path = None;
        let mut long_link = None;
        let mut records = Records::default();
        let mut meta = 0;
        while let Some((header, block)) = self.next_header()? {
            self.entries += 1;
            if self.entries > self.limits.entries_max {
                return Err(self.broken("is one entry more than the bound allows"));
            }
            match header.kind {
                Kind::GnuLongName => long_path = Some(self.long_text(&header, &mut meta)?),
                Kind::GnuLongLink => long_link = Some(self.long_text(&header, &mut meta)?),
                Kind::Pax => {
                    let data = self.meta(header.size, &mut meta)?;
                    records.read(&data).map_err(|what| self.broken(what))?;
                }
                // Meant for all that follows; no writer of layers makes them, readers pass over.
                Kind::PaxGlobal => {
                    self.meta(header.size, &mut meta)?;
                }
                Kind::File
                | Kind::HardLink
                | Kind::Symlink
                | Kind::Char
                | Kind::Block
                | Kind::Directory
                | Kind::Fifo
                | Kind::GnuSparse
                | Kind::Other(_) => {
                    let path = records.path.take().or(long_path).unwrap_or(header.path);
                    let link = records.link.take().or(long_link).unwrap_or(header.link);
                    let header = Header { path, link, ..header };
                    return self.entry(header, &block, records, meta).map(Some);
                }
            }
        }
        let has_more = long_path.is_some() || long_link.is_some() || records != Records::default();
        if has_more {
            return Err(self.broken("has a name or records for an entry that does not come"));
        }
        Ok(None)
    }

    /// Reads data of the current entry; 0 at its end. Holes are not in it.
    ///
    /// # Errors
    /// Those of reading; `EIO` if the archive ends before.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let Some(part) = buffer.get_mut(..want).filter(|part| !part.is_empty()) else {
            return Ok(0);
        };
        let got = read_some(&mut self.input, part)?;
        if got == 0 {
            return Err(self.broken("is cut off"));
        }
        self.left -= got as u64;
        Ok(got)
    }

    /// Returns the input, which stands where the data of the current entry goes on.
    pub fn input(&self) -> &R {
        &self.input
    }

    /// Passes over the data of the current entry by moving the input forward.
    pub fn jump(&mut self, forward: impl FnOnce(&mut R, u64)) {
        let bytes = std::mem::take(&mut self.left) + std::mem::take(&mut self.padding);
        forward(&mut self.input, bytes);
    }

    /// Reads the input to its end, past the end of the archive.
    ///
    /// # Errors
    /// Those of reading.
    pub fn drain(&mut self) -> Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        while read_some(&mut self.input, &mut buffer)? > 0 {}
        Ok(())
    }

    fn next_header(&mut self) -> Result<Option<(Header, Block)>> {
        self.skip_data()?;
        let mut seen_zeros = false;
        while !self.done {
            let mut block = [0; BLOCK];
            // Some writers leave the end out.
            if !self.block(&mut block, true)? {
                self.done = true;
                break;
            }
            match Header::parse(&block).map_err(|what| self.broken_after(what))? {
                Some(_) if seen_zeros => {
                    return Err(self.broken_after("is more than padding"));
                }
                Some(header) => {
                    self.left = header.size;
                    self.padding = padding(header.size);
                    self.last.clone_from(&header.path);
                    return Ok(Some((header, block)));
                }
                None if seen_zeros => self.done = true,
                None => seen_zeros = true,
            }
        }
        Ok(None)
    }

    fn entry(
        &mut self,
        header: Header,
        block: &Block,
        records: Records,
        mut meta: u64,
    ) -> Result<Entry> {
        self.last.clone_from(&header.path);
        let Records { mut sparse, .. } = records;
        if let Some(stored) = records.size.filter(|_| header.kind.has_data()) {
            self.left = stored;
            self.padding = padding(stored);
        }
        let mut entry = Entry {
            path: header.path,
            link: header.link,
            kind: header.kind,
            mode: header.mode,
            uid: records.uid.unwrap_or(header.uid),
            gid: records.gid.unwrap_or(header.gid),
            size: self.left,
            mtime: records.mtime.unwrap_or(Time { seconds: header.mtime, nanoseconds: 0 }),
            atime: records.atime,
            xattrs: records.xattrs,
            device: header.device,
            map: None,
        };
        if header.kind == Kind::GnuSparse {
            self.gnu_map(&mut entry, block, &mut meta)?;
            entry.kind = Kind::File;
        } else if header.kind == Kind::File {
            if sparse.map_in_data {
                sparse.map = Some(self.map_before_data(&mut meta)?);
            }
            if let Some(map) = sparse.map {
                entry.size = sparse.size.ok_or_else(|| self.broken("has holes but no size"))?;
                entry.map = Some(map);
                if let Some(name) = sparse.name {
                    self.last.clone_from(&name);
                    entry.path = name;
                }
            }
        }
        if let Some(map) = &entry.map {
            sparse::check(map, entry.size, self.left).map_err(|what| self.broken(what))?;
        }
        if entry.path.is_empty() {
            return Err(self.broken("has no name"));
        }
        self.total = self.total.saturating_add(entry.size);
        if i64::try_from(entry.size).is_err() || self.total > self.limits.size_max {
            return Err(self.broken("makes the files larger than the bound allows"));
        }
        Ok(entry)
    }

    fn gnu_map(&mut self, entry: &mut Entry, block: &Block, meta: &mut u64) -> Result<()> {
        let mut map = Vec::new();
        let (size, mut more) =
            sparse::read_header(block, &mut map).map_err(|what| self.broken(what))?;
        while more {
            let mut block = [0; BLOCK];
            self.count_meta(BLOCK as u64, meta)?;
            self.block(&mut block, false)?;
            more = sparse::read_block(&block, &mut map).map_err(|what| self.broken(what))?;
        }
        entry.size = size;
        entry.map = Some(map);
        Ok(())
    }

    fn map_before_data(&mut self, meta: &mut u64) -> Result<Vec<Extent>> {
        let mut reader = sparse::LineReader::default();
        loop {
            let mut block = [0; BLOCK];
            self.count_meta(BLOCK as u64, meta)?;
            self.left = self
                .left
                .checked_sub(BLOCK as u64)
                .ok_or_else(|| self.broken("has a malformed sparse map"))?;
            self.block(&mut block, false)?;
            if reader.read_block(&block).map_err(|what| self.broken(what))? {
                return Ok(reader.map);
            }
        }
    }

    fn long_text(&mut self, header: &Header, meta: &mut u64) -> Result<Vec<u8>> {
        let data = self.meta(header.size, meta)?;
        Ok(header::text(&data).to_vec())
    }

    /// Reads data that describes an entry.
    fn meta(&mut self, size: u64, meta: &mut u64) -> Result<Vec<u8>> {
        self.count_meta(size, meta)?;
        let mut data = Vec::new();
        let mut buffer = [0; 4096];
        // Grown as it comes: the size is the archive's word.
        loop {
            let got = self.read(&mut buffer)?;
            if got == 0 {
                return Ok(data);
            }
            data.extend_from_slice(buffer.get(..got).unwrap_or_default());
        }
    }

    fn count_meta(&self, size: u64, meta: &mut u64) -> Result<()> {
        *meta = meta.saturating_add(size);
        if *meta > self.limits.meta_max {
            return Err(self.broken("has a header larger than the bound allows"));
        }
        Ok(())
    }

    fn skip_data(&mut self) -> Result<()> {
        let mut buffer = [0; 16 * 1024];
        while self.read(&mut buffer)? > 0 {}
        self.left = std::mem::take(&mut self.padding);
        while self.read(&mut buffer)? > 0 {}
        Ok(())
    }

    /// Reads one block; `false` at the end of the input if that is allowed.
    fn block(&mut self, block: &mut Block, may_end: bool) -> Result<bool> {
        let mut done = 0;
        while let Some(rest) = block.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match read_some(&mut self.input, rest)? {
                0 if done == 0 && may_end => return Ok(false),
                0 => return Err(self.broken_after("is cut off")),
                got => done += got,
            }
        }
        Ok(true)
    }

    fn broken_after(&self, what: &'static str) -> Error {
        if self.last.is_empty() {
            return Error::Corrupt { what: what.into(), at: "the beginning of the archive".into() };
        }
        let at = format!("what follows {} in the archive", show(&self.last));
        Error::Corrupt { what: what.into(), at: at.into() }
    }
}

/// Returns the error that the entry `path` of an archive `what`.
pub fn broken(path: &[u8], what: &'static str) -> Error {
    Error::Corrupt { what: what.into(), at: format!("archive entry {}", show(path)).into() }
}

/// A name of an archive, fit for a message.
pub fn show(path: &[u8]) -> String {
    let end = path.len().min(200);
    let shown = path.get(..end).unwrap_or_default().escape_ascii().to_string();
    if path.len() > end { format!("{shown}...") } else { shown }
}

fn padding(size: u64) -> u64 {
    size.next_multiple_of(BLOCK as u64) - size
}

/// Reads once, again after an interrupt.
fn read_some(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    loop {
        match input.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read.map_err(|error| input_error(&error)),
        }
    }
}

/// Returns the error for an input that cannot be read, or that cannot be unpacked.
pub fn input_error(error: &io::Error) -> Error {
    if let Some(inner) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        return inner.clone();
    }
    match Errno::from_io_error(error) {
        Some(errno) => Error::sys("read", "archive", errno),
        None => Error::Corrupt { what: error.to_string().into(), at: "archive".into() },
    }
}
