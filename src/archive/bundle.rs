//! Files of an image: an OCI layout or a `docker save` archive, in a directory or in one tar file.
//!
//! Paths are looked up beneath the directory's handle, no symlink followed; in a tar file they are
//! found by one pass over its headers, and read where they lie.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::header::Kind;
use super::input::{Compression, unpack};
use super::path;
use super::read::{Limits, Reader, input_error, show};
use crate::error::{Context, Errno, Error, Result};
use crate::sys::{open, stat};

/// Where the files are.
#[derive(Debug)]
pub enum Bundle {
    /// In a directory.
    Directory(OwnedFd),
    /// In a tar file that is not compressed.
    Tar {
        /// The file.
        file: Arc<File>,
        /// What it holds, by clean path.
        members: HashMap<Vec<u8>, Member>,
    },
}

/// A member of a tar file.
#[derive(Debug)]
pub enum Member {
    /// Data: where it begins, and how long it is.
    File(u64, u64),
    /// A link to another member, by clean path.
    Link(Vec<u8>),
}

/// How often links may lead on.
const HOPS: usize = 8;

/// One file of a bundle, read from its beginning.
#[derive(Debug)]
pub struct Content {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Content {
    /// Returns how many bytes are still to come.
    pub fn size(&self) -> u64 {
        self.left
    }
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let got = self.file.read_at(buffer.get_mut(..want).unwrap_or_default(), self.at)?;
        self.at += got as u64;
        self.left -= got as u64;
        Ok(got)
    }
}

impl Bundle {
    /// Takes an open directory.
    pub fn directory(handle: OwnedFd) -> Self {
        Self::Directory(handle)
    }

    /// Takes a tar file. One that is compressed, or no file, is unpacked to `spool` first: an empty
    /// file that the caller made.
    ///
    /// # Errors
    /// `EIO` for what is no tar archive; those of reading, and of writing to the spool.
    pub fn tar(mut input: File, spool: impl FnOnce() -> Result<File>) -> Result<Self> {
        let mut start = [0; 6];
        let read = input.read_at(&mut start, 0);
        let is_plain = read.is_ok() && Compression::detect(&start) == Compression::None;
        if !is_plain {
            let file = spool()?;
            unpack(&mut input, Limits::default(), |archive| {
                io::copy(archive, &mut &file).map(drop).map_err(|error| input_error(&error))
            })?;
            input = file;
        }
        let file = Arc::new(input);
        let members = index(&file)?;
        Ok(Self::Tar { file, members })
    }

    /// Opens a file by its path in the bundle; `None` if there is none.
    ///
    /// # Errors
    /// Those of the system calls but `ENOENT`; `EIO` for a path that leads out.
    pub fn find(&self, name: &str) -> Result<Option<Content>> {
        let broken = |what: &'static str| Error::Corrupt {
            what: what.into(),
            at: show(name.as_bytes()).into(),
        };
        let clean = path::clean(name.as_bytes(), 64).map_err(broken)?;
        match self {
            Self::Directory(root) => {
                let Some(file) = find_file(root, &clean).at("openat", || show(&clean))? else {
                    return Ok(None);
                };
                let size = stat::of(&file).at("statx", || show(&clean))?.stx_size;
                Ok(Some(Content { file: Arc::new(File::from(file)), at: 0, left: size }))
            }
            Self::Tar { file, members } => {
                let mut clean = clean;
                for _ in 0..HOPS {
                    match members.get(&clean) {
                        None => return Ok(None),
                        Some(Member::Link(target)) => clean.clone_from(target),
                        Some(Member::File(at, left)) => {
                            let file = Arc::clone(file);
                            return Ok(Some(Content { file, at: *at, left: *left }));
                        }
                    }
                }
                Err(broken("is a link that leads on and on"))
            }
        }
    }

    /// Reads a whole file, at most `max` bytes; `None` if there is none.
    ///
    /// # Errors
    /// As [`Bundle::find`]; `EIO` for a larger file.
    pub fn read(&self, name: &str, max: u64) -> Result<Option<Vec<u8>>> {
        let Some(content) = self.find(name)? else { return Ok(None) };
        if content.size() > max {
            return Err(Error::Corrupt {
                what: "is larger than the bound allows".into(),
                at: show(name.as_bytes()).into(),
            });
        }
        let mut bytes = Vec::new();
        content.take(max).read_to_end(&mut bytes).map_err(|error| input_error(&error))?;
        Ok(Some(bytes))
    }
}

fn find_file(root: &OwnedFd, clean: &[u8]) -> std::result::Result<Option<OwnedFd>, Errno> {
    let (dir, name) = path::split(clean);
    let mut at = root.try_clone().map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    for component in path::components(dir) {
        at = match open::directory(at.as_fd(), component) {
            Err(Errno::NOENT) => return Ok(None),
            opened => opened?,
        };
    }
    match open::reader(at.as_fd(), name) {
        Err(Errno::NOENT) => Ok(None),
        opened => opened.map(Some),
    }
}

/// Reads with the offset kept here, so that members can be found again.
struct Counted<'a> {
    file: &'a File,
    at: u64,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read_at(buffer, self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

fn index(file: &File) -> Result<HashMap<Vec<u8>, Member>> {
    let mut reader = Reader::new(Counted { file, at: 0 }, Limits::default());
    let mut members = HashMap::new();
    while let Some(entry) = reader.next_entry()? {
        let broken = |what| super::read::broken(&entry.path, what);
        let clean = path::clean(&entry.path, 64).map_err(broken)?;
        let member = match entry.kind {
            Kind::File if entry.map.is_none() => {
                let at = reader.input().at;
                reader.jump(|input, bytes| input.at += bytes);
                Member::File(at, entry.size)
            }
            Kind::Symlink => {
                let beside = path::join(path::parent(&clean), &entry.link);
                Member::Link(path::clean(&beside, 64).map_err(broken)?)
            }
            Kind::HardLink => Member::Link(path::clean(&entry.link, 64).map_err(broken)?),
            Kind::File
            | Kind::Char
            | Kind::Block
            | Kind::Directory
            | Kind::Fifo
            | Kind::GnuSparse
            | Kind::GnuLongName
            | Kind::GnuLongLink
            | Kind::Pax
            | Kind::PaxGlobal
            | Kind::Other(_) => continue,
        };
        members.insert(clean, member);
    }
    Ok(members)
}
