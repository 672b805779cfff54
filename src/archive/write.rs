//! Changes to an OCI layer archive: the same bytes for the same tree, every time.
//!
//! The format is ustar, with pax records where that is too small. Names of users and groups are left
//! out, and times have whole seconds unless asked for otherwise, as in the layers of other tools.
//!
//! A file that shrinks while it is read is filled up with zeros to the size it had when its entry
//! began; one that grows is cut there.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::AsFd;

use rustix::fs::FileType;

use super::header::{Header, Kind, fits};
use super::ids::Ids;
use super::path;
use super::pax::{self, Time};
use super::read::Entry;
use super::same::{self, Rules};
use super::view::{Leaf, Object, kind};
use super::walk::{self, Change, Sink};
use crate::error::{Context, Errno, Error, Result};
use crate::marks;
use crate::sys::data;
use crate::sys::stat::{self, Statx};

/// How an archive is written.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    /// Container ids to ids on disk, to be undone; `None` leaves them as they are.
    pub ids: Option<Ids>,
    /// Keep the parts of a second.
    pub subseconds: bool,
}

/// Writes changes as an archive.
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
    options: WriteOptions,
    /// First path of each inode that has several names.
    links: HashMap<(u64, u64), Vec<u8>>,
    /// Size of what was written, padding counted.
    written: u64,
}

impl<W: Write> Writer<W> {
    /// Writes to `output`.
    pub fn new(output: W, options: WriteOptions) -> Self {
        Self { output, options, links: HashMap::new(), written: 0 }
    }

    /// Writes the end and returns the output.
    ///
    /// # Errors
    /// Those of writing.
    pub fn finish(mut self) -> Result<W> {
        self.put(&[0; 1024])?;
        self.output.flush().map_err(|error| output_error(&error))?;
        Ok(self.output)
    }

    fn object(&mut self, path: &[u8], object: &Object) -> Result<()> {
        let Some(mut entry) = self.describe(path, object)? else { return Ok(()) };
        let Object::Leaf(leaf) = object else { return self.header(&entry) };
        let key = (stat::device(&leaf.stat), leaf.stat.stx_ino);
        if leaf.stat.stx_nlink > 1 {
            if let Some(first) = self.links.get(&key) {
                entry.link.clone_from(first);
                entry.kind = Kind::HardLink;
                entry.size = 0;
                entry.xattrs.clear();
                return self.header(&entry);
            }
            self.links.insert(key, path.to_vec());
        }
        if entry.kind != Kind::File {
            return self.header(&entry);
        }
        let file = leaf.open_data()?;
        // What is written must be as long as the header says.
        entry.size = stat::of(&file).at("statx", || leaf.dir.describe(&leaf.name))?.stx_size;
        self.header(&entry)?;
        self.content(leaf, &file, entry.size)
    }

    /// Returns the entry of an object; `None` for a socket, which no archive can have.
    fn describe(&self, path: &[u8], object: &Object) -> Result<Option<Entry>> {
        let stat = object.stat();
        let mut entry = Entry {
            path: path.to_vec(),
            link: Vec::new(),
            kind: Kind::File,
            mode: u32::from(stat.stx_mode) & 0o7777,
            uid: self.unmap(object, stat.stx_uid, false, path)?,
            gid: self.unmap(object, stat.stx_gid, true, path)?,
            size: 0,
            mtime: self.time(stat),
            atime: None,
            xattrs: same::xattrs(object, Rules::Containers)?,
            device: (0, 0),
            map: None,
        };
        let device = (stat.stx_rdev_major.into(), stat.stx_rdev_minor.into());
        match kind(stat) {
            FileType::Directory => entry.kind = Kind::Directory,
            FileType::Symlink => entry.kind = Kind::Symlink,
            FileType::Fifo => entry.kind = Kind::Fifo,
            FileType::CharacterDevice => (entry.kind, entry.device) = (Kind::Char, device),
            FileType::BlockDevice => (entry.kind, entry.device) = (Kind::Block, device),
            FileType::RegularFile => {}
            FileType::Socket | FileType::Unknown => return Ok(None),
        }
        if let (Kind::Symlink, Object::Leaf(leaf)) = (entry.kind, object) {
            entry.link = same::link_target(leaf)?;
        }
        for (name, value) in &mut entry.xattrs {
            if name == b"security.capability" {
                without_namespace(value);
            }
        }
        Ok(Some(entry))
    }

    fn unmap(&self, object: &Object, id: u32, is_group: bool, path: &[u8]) -> Result<u64> {
        // Xattrs that override owners have the container's ids.
        let Some(ids) = self.options.ids.as_ref().filter(|_| object.form().is_none()) else {
            return Ok(id.into());
        };
        let found = if is_group { ids.gid_from_disk(id) } else { ids.uid_from_disk(id) };
        found.map(u64::from).ok_or_else(|| {
            super::read::broken(path, "belongs to somebody who has no id in the container")
        })
    }

    fn time(&self, stat: &Statx) -> Time {
        let nanoseconds = if self.options.subseconds { stat.stx_mtime.tv_nsec } else { 0 };
        Time { seconds: stat.stx_mtime.tv_sec, nanoseconds }
    }

    /// Writes the mark that hides a name, or all of a directory.
    fn mark(&mut self, dir: &[u8], name: &[u8]) -> Result<()> {
        self.header(&Entry {
            path: path::join(dir, name),
            link: Vec::new(),
            kind: Kind::File,
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Time::default(),
            atime: None,
            xattrs: Vec::new(),
            device: (0, 0),
            map: None,
        })
    }

    fn header(&mut self, entry: &Entry) -> Result<()> {
        let mut path = entry.path.clone();
        if entry.kind == Kind::Directory {
            path.push(b'/');
        }
        let mut records = Vec::new();
        let mut record = |key: &str, value: &[u8]| pax::print(&mut records, key.as_bytes(), value);
        if !fits::path(&path) {
            record("path", &path);
        }
        if !fits::link(&entry.link) {
            record("linkpath", &entry.link);
        }
        for (key, number) in [("uid", entry.uid), ("gid", entry.gid)] {
            if !fits::id(number) {
                record(key, number.to_string().as_bytes());
            }
        }
        if !fits::size(entry.size) {
            record("size", entry.size.to_string().as_bytes());
        }
        if entry.mtime.nanoseconds != 0 || !fits::seconds(entry.mtime.seconds) {
            record("mtime", pax::print_time(entry.mtime).as_bytes());
        }
        for (name, value) in &entry.xattrs {
            pax::print_xattr(&mut records, name, value);
        }
        if !fits::device(entry.device.0) || !fits::device(entry.device.1) {
            return Err(super::read::broken(
                &entry.path,
                "has a device number that no archive can hold",
            ));
        }
        if !records.is_empty() {
            let (dir, name) = path::split(&entry.path);
            let named = path::join(&path::join(dir, b"PaxHeaders.0"), name);
            let header = Header {
                path: if fits::path(&named) { named } else { b"PaxHeaders.0/long".to_vec() },
                link: Vec::new(),
                kind: Kind::Pax,
                mode: 0,
                uid: 0,
                gid: 0,
                size: records.len() as u64,
                mtime: 0,
                device: (0, 0),
            };
            self.put(&header.print())?;
            self.put(&records)?;
            self.pad()?;
        }
        let header = Header {
            path,
            link: entry.link.clone(),
            kind: entry.kind,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            size: entry.size,
            mtime: entry.mtime.seconds,
            device: entry.device,
        };
        self.put(&header.print())
    }

    fn content(&mut self, leaf: &Leaf, file: &impl AsFd, size: u64) -> Result<()> {
        let mut buffer = vec![0; usize::try_from(size).unwrap_or(CHUNK).min(CHUNK)];
        let mut at = 0;
        while at < size {
            let want = usize::try_from(size - at).unwrap_or(usize::MAX).min(buffer.len());
            let room = buffer.get_mut(..want).unwrap_or_default();
            let got = data::read_at(file.as_fd(), room, at)
                .at("pread", || leaf.dir.describe(&leaf.name))?;
            if got < want {
                // It was cut meanwhile.
                room.get_mut(got..).unwrap_or_default().fill(0);
            }
            self.output.write_all(room).map_err(|error| output_error(&error))?;
            self.written += want as u64;
            at += want as u64;
        }
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.output.write_all(bytes).map_err(|error| output_error(&error))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self) -> Result<()> {
        let zeros = [0; super::header::BLOCK];
        let short = self.written.next_multiple_of(zeros.len() as u64) - self.written;
        let short = usize::try_from(short).unwrap_or_default();
        self.put(zeros.get(..short).unwrap_or_default())
    }
}

const CHUNK: usize = 256 * 1024;

impl<W: Write> Sink for Writer<W> {
    fn change(&mut self, change: Change<'_>) -> Result<()> {
        // A directory stands before what it holds, also where only that is new.
        for above in &mut *change.above {
            if !above.is_told {
                self.object(&above.path, &above.object)?;
                above.is_told = true;
            }
        }
        let (dir, name) = path::split(change.path);
        let Some(object) = change.object else {
            let hidden = [marks::WHITEOUT_PREFIX, name].concat();
            return self.mark(dir, &hidden);
        };
        self.object(change.path, object)?;
        if change.is_opaque {
            self.mark(change.path, marks::OPAQUE_NAME)?;
        }
        Ok(())
    }

    fn wants_kinds(&self) -> bool {
        false
    }
}

/// One line of a list of changes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line {
    /// Clean path.
    pub path: Vec<u8>,
    /// `A`, `C` or `D`, as `podman diff` has them.
    pub kind: char,
}

/// Collects changes as a list: a directory is listed when itself changed, or when a name in it
/// came or went.
#[derive(Debug, Default)]
pub struct List {
    /// What was collected.
    pub lines: Vec<Line>,
    /// Leave directories out that only hold changes.
    pub without_parents: bool,
}

impl Sink for List {
    fn change(&mut self, change: Change<'_>) -> Result<()> {
        if let Some(above) = change.above.last_mut().filter(|above| !above.is_told)
            && change.kind != walk::Kind::Modify
            && !self.without_parents
        {
            above.is_told = true;
            self.push(above.path.clone(), walk::Kind::Modify);
        }
        self.push(change.path.to_vec(), change.kind);
        Ok(())
    }

    fn wants_kinds(&self) -> bool {
        true
    }
}

impl List {
    fn push(&mut self, path: Vec<u8>, kind: walk::Kind) {
        let kind = match kind {
            walk::Kind::Add => 'A',
            walk::Kind::Modify => 'C',
            walk::Kind::Delete => 'D',
        };
        self.lines.push(Line { path, kind });
    }
}

/// Adds up the sizes of the files that changed, each inode once.
#[derive(Debug, Default)]
pub struct Size {
    /// Bytes so far.
    pub bytes: u64,
    seen: std::collections::HashSet<(u64, u64)>,
}

impl Sink for Size {
    fn change(&mut self, change: Change<'_>) -> Result<()> {
        let Some(Object::Leaf(leaf)) = change.object else { return Ok(()) };
        let is_new = leaf.stat.stx_nlink == 1
            || self.seen.insert((stat::device(&leaf.stat), leaf.stat.stx_ino));
        if is_new {
            self.bytes = self.bytes.saturating_add(leaf.stat.stx_size);
        }
        Ok(())
    }

    fn wants_kinds(&self) -> bool {
        false
    }
}

/// Makes a capability that holds in one user namespace hold as others have them.
///
/// # Source
/// capabilities(7), "File capability extended attribute versioning".
fn without_namespace(value: &mut Vec<u8>) {
    const VERSION_BYTE: usize = 3;
    const VERSION_2_LEN: usize = 20;
    if value.len() > VERSION_2_LEN && value.get(VERSION_BYTE) == Some(&3) {
        value.truncate(VERSION_2_LEN);
        if let Some(version) = value.get_mut(VERSION_BYTE) {
            *version = 2;
        }
    }
}

/// Returns the error for an output that cannot be written.
pub(super) fn output_error(error: &io::Error) -> Error {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    Error::sys("write", "archive", errno)
}
