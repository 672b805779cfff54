//! Large reads by splice(2): the pages of the file go to the device by reference, through a pipe that each
//! worker has, and are copied once, where pread(2) and write(2) copy them twice.
//!
//! Where a pipe is not to be had, or a read does not fit, the two copies do. Takes no lock.

use super::abi;
use super::reply::HEADER;
use crate::error::Errno;
use rustix::io::retry_on_intr;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use std::os::fd::{BorrowedFd, OwnedFd};
use zerocopy::IntoBytes;

/// Bytes from which a read goes by a pipe; for fewer, two copies cost less than two more calls.
const LARGE: usize = 32 << 10;

/// Capacity of a pipe, bytes: twice what the kernel reads ahead. An ordinary user may have 64 MiB in all
/// pipes together (pipe(7)).
const CAPACITY: usize = 256 << 10;

/// A pipe from files to the device, made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    ends: Ends,
    /// Bytes of the answer in it.
    filled: usize,
}

#[derive(Debug, Default)]
enum Ends {
    #[default]
    NotYet,
    Made {
        reader: OwnedFd,
        writer: OwnedFd,
    },
    /// Not to be had; not asked for again.
    Refused,
}

impl Pipe {
    /// Tells whether an answer is in it.
    pub(super) const fn is_filled(&self) -> bool {
        self.filled != 0
    }

    /// Tells whether a read of `size` bytes may go by a pipe.
    pub(super) fn takes(&self, size: usize) -> bool {
        // The pages of the data, one more if they do not begin with a page, and the header, have a slot each.
        let room = CAPACITY - 2 * rustix::param::page_size().min(CAPACITY / 4);
        (LARGE..=room).contains(&size) && !matches!(self.ends, Ends::Refused)
    }

    /// Puts the whole answer to the READ `unique` into the pipe: up to `size` bytes of `file` from `offset`,
    /// fewer where it ends. Tells by `false` that nothing was put, and that the read is to be done by other means,
    /// which also tell what is wrong.
    pub(super) fn fill(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        size: usize,
        unique: u64,
    ) -> bool {
        if !self.takes(size) || !self.is_made() {
            return false;
        }
        // A header comes first, and cannot be mended: how much there is has to be known before.
        let Ok(stat) = rustix::fs::fstat(file) else { return false };
        let left = u64::try_from(stat.st_size).unwrap_or(0).saturating_sub(offset);
        let size = size.min(usize::try_from(left).unwrap_or(usize::MAX));
        if size < LARGE {
            return false;
        }
        if self.put(file, offset, size, unique).is_some() {
            self.filled = HEADER + size;
            return true;
        }
        // A part of an answer is in it, and nobody wants that.
        self.ends = Ends::NotYet;
        false
    }

    /// Sends the answer.
    ///
    /// # Errors
    /// Those of the device, which did not take it.
    pub(super) fn send(&mut self, device: BorrowedFd<'_>) -> Result<(), Errno> {
        let size = std::mem::take(&mut self.filled);
        let Ends::Made { reader, .. } = &self.ends else { return Err(Errno::PIPE) };
        let flags = SpliceFlags::empty();
        let sent = retry_on_intr(|| splice(reader, None, device, None, size, flags));
        match sent {
            Ok(count) if count == size => Ok(()),
            unsent => {
                self.ends = Ends::NotYet;
                Err(unsent.err().unwrap_or(Errno::IO))
            }
        }
    }

    fn is_made(&mut self) -> bool {
        if let Ends::NotYet = self.ends {
            self.ends = make().unwrap_or_else(|errno| {
                tracing::debug!(%errno, "no pipe for large reads; they are copied twice");
                Ends::Refused
            });
        }
        matches!(self.ends, Ends::Made { .. })
    }

    /// Returns nothing if less was put than wanted: the file became shorter, or cannot be read.
    fn put(&self, file: BorrowedFd<'_>, offset: u64, size: usize, unique: u64) -> Option<()> {
        let Ends::Made { writer, .. } = &self.ends else { return None };
        let len = u32::try_from(HEADER + size).ok()?;
        rustix::io::write(writer, abi::OutHeader { len, error: 0, unique }.as_bytes()).ok()?;
        let (mut from, mut left) = (offset, size);
        while left > 0 {
            // Never waits for room: nobody else would make some.
            let flags = SpliceFlags::NONBLOCK;
            match retry_on_intr(|| splice(file, Some(&mut from), writer, None, left, flags)) {
                Ok(0) | Err(_) => return None,
                Ok(count) => left = left.saturating_sub(count),
            }
        }
        Some(())
    }
}

fn make() -> Result<Ends, Errno> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setpipe_size(&writer, CAPACITY)?;
    Ok(Ends::Made { reader, writer })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    fn file(content: &[u8]) -> std::fs::File {
        let file = rustix::fs::memfd_create("read", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = std::fs::File::from(file);
        file.write_all(content).unwrap();
        file
    }

    /// What a device would get.
    fn sent(pipe: &mut Pipe) -> Vec<u8> {
        let size = pipe.filled;
        let (mut reader, writer) = std::io::pipe().unwrap();
        fcntl_setpipe_size(&writer, CAPACITY).unwrap();
        pipe.send(writer.as_fd()).unwrap();
        assert!(!pipe.is_filled());
        let mut bytes = vec![0; size];
        reader.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn answer(unique: u64, content: &[u8]) -> Vec<u8> {
        let len = u32::try_from(HEADER + content.len()).unwrap();
        [abi::OutHeader { len, error: 0, unique }.as_bytes(), content].concat()
    }

    #[test]
    fn a_large_read_goes_by_the_pipe() {
        let content: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let file = file(&content);
        let mut pipe = Pipe::default();
        for (offset, size) in [(0, LARGE), (8, 131_072), (4096, 131_072), (700_000, 131_072)] {
            assert!(pipe.fill(file.as_fd(), offset as u64, size, 7), "{offset} {size}");
            let end = content.len().min(offset + size);
            assert_eq!(sent(&mut pipe), answer(7, &content[offset..end]), "{offset} {size}");
        }
    }

    #[test]
    fn what_does_not_fit_or_does_not_pay_is_left() {
        let content = vec![1; 1 << 20];
        let file = file(&content);
        let mut pipe = Pipe::default();
        for (offset, size) in [
            (0, LARGE - 1),
            (0, CAPACITY),
            (0, 1 << 20),
            (1 << 20, 131_072),
            ((1 << 20) - 4096, 131_072),
        ] {
            assert!(!pipe.fill(file.as_fd(), offset, size, 7), "{offset} {size}");
            assert!(!pipe.is_filled());
        }
        // Nothing of what was left is in it.
        assert!(pipe.fill(file.as_fd(), 0, 131_072, 8));
        assert_eq!(sent(&mut pipe), answer(8, &content[..131_072]));
    }

    #[test]
    fn an_answer_that_cannot_be_sent_does_not_come_later() {
        let file = file(&vec![1; 1 << 20]);
        let mut pipe = Pipe::default();
        assert!(pipe.fill(file.as_fd(), 0, 131_072, 7));
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(pipe.send(writer.as_fd()), Err(Errno::PIPE));
        assert!(pipe.fill(file.as_fd(), 0, LARGE, 8));
        assert_eq!(sent(&mut pipe), answer(8, &vec![1; LARGE]));
    }
}
