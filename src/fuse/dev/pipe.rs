//! Large reads by splice(2): the pages of the file go to the device by reference, through a pipe, and are
//! copied once, where pread(2) and write(2) copy them twice.
//!
//! Where a pipe is not to be had, or a read does not fit, the two copies do. Locks: its own, for moments.

use super::abi;
use super::reply::HEADER;
use crate::error::Errno;
use rustix::io::retry_on_intr;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use zerocopy::IntoBytes;

/// Bytes from which a read goes by a pipe; for fewer, two copies cost less than two more calls.
const LARGE: usize = 32 << 10;

/// Capacity of a pipe, bytes: twice what the kernel reads ahead.
const CAPACITY: usize = 256 << 10;

/// Most pipes of a mount, if it has so many CPUs. What all pipes of a user have is bounded (pipe(7)), and
/// those of others suffer beyond that.
const PIPES_MAX: usize = 4;

/// The pipes of a mount, from files to the device: made when they are needed, lent for one read.
#[derive(Debug)]
pub(super) struct Pipes {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    spare: Vec<Ends>,
    /// Those there are, lent ones with them.
    made: usize,
    /// Those there may be.
    most: usize,
}

#[derive(Debug)]
struct Ends {
    reader: OwnedFd,
    writer: OwnedFd,
}

/// A pipe with an answer in it; if that is not sent, it goes with its pipe.
#[derive(Debug)]
pub(super) struct Filled {
    pipes: Arc<Pipes>,
    /// Gone once it is given back.
    ends: Option<Ends>,
    /// Bytes of the answer.
    size: usize,
}

impl Default for Pipes {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let state = State { spare: Vec::new(), made: 0, most: cpus.min(PIPES_MAX) };
        Self { state: Mutex::new(state) }
    }
}

impl Pipes {
    /// Tells whether a read of `size` bytes may go by a pipe.
    pub(super) fn takes(&self, size: usize) -> bool {
        // The pages of the data, one more if they do not begin with a page, and the header, have a slot each.
        let room = CAPACITY - 2 * rustix::param::page_size().min(CAPACITY / 4);
        (LARGE..=room).contains(&size)
    }

    /// Puts the whole answer to the READ `unique` into a pipe: up to `size` bytes of `file` from `offset`,
    /// fewer where it ends. Nothing if there is no pipe, or it does not pay; the read is then to be done by other
    /// means.
    ///
    /// # Errors
    /// Those of splice(2); other means may do, and tell what is wrong.
    pub(super) fn fill(
        self: &Arc<Self>,
        file: BorrowedFd<'_>,
        offset: u64,
        size: usize,
        unique: u64,
    ) -> Result<Option<Filled>, Errno> {
        let Some(ends) = self.take() else { return Ok(None) };
        // From here on it goes, with what is in it, unless it is given back.
        let mut filled = Filled { pipes: Arc::clone(self), ends: Some(ends), size: 0 };
        // A header comes first, and cannot be mended: how much there is has to be known before.
        let left =
            rustix::fs::fstat(file).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
        let left = usize::try_from(left.saturating_sub(offset)).unwrap_or(usize::MAX);
        let size = size.min(left);
        if size < LARGE {
            filled.give_back();
            return Ok(None);
        }
        let put = filled.put(file, offset, size, unique);
        Ok(put
            .inspect_err(|errno| tracing::debug!(%errno, "large reads of a file are copied twice"))?
            .then_some(filled))
    }

    /// No read goes by a pipe any more: they do not work here.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        state.most = 0;
        state.made -= state.spare.len();
        state.spare.clear();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns an empty pipe, if one is free or may be made.
    fn take(&self) -> Option<Ends> {
        let mut state = self.state();
        if state.most == 0 {
            return None;
        }
        if let Some(ends) = state.spare.pop() {
            return Some(ends);
        }
        if state.made >= state.most {
            return None;
        }
        match Ends::new() {
            Ok(ends) => {
                state.made += 1;
                Some(ends)
            }
            Err(errno) => {
                tracing::debug!(%errno, "no further pipe for large reads");
                // All that the user may have (pipe(7)); others pass.
                if errno == Errno::PERM {
                    state.most = state.made;
                }
                None
            }
        }
    }
}

impl Ends {
    fn new() -> Result<Self, Errno> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setpipe_size(&writer, CAPACITY)?;
        Ok(Self { reader, writer })
    }
}

impl Filled {
    /// Sends the answer.
    ///
    /// # Errors
    /// Those of the device, which did not take it.
    pub(super) fn send(mut self, device: BorrowedFd<'_>) -> Result<(), Errno> {
        let Some(ends) = &self.ends else { return Err(Errno::PIPE) };
        let sent = retry_on_intr(|| {
            splice(&ends.reader, None, device, None, self.size, SpliceFlags::empty())
        })?;
        if sent != self.size {
            return Err(Errno::IO);
        }
        self.give_back();
        Ok(())
    }

    /// Puts the answer; tells by `false` that the file became shorter meanwhile.
    ///
    /// # Errors
    /// Those of splice(2).
    fn put(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        size: usize,
        unique: u64,
    ) -> Result<bool, Errno> {
        let Some(Ends { writer, .. }) = &self.ends else { return Ok(false) };
        self.size = HEADER + size;
        let len = u32::try_from(self.size).map_err(|_too_large| Errno::OVERFLOW)?;
        rustix::io::write(writer, abi::OutHeader { len, error: 0, unique }.as_bytes())?;
        let (mut from, mut left) = (offset, size);
        while left > 0 {
            // Never waits for room: nobody else would make some.
            let flags = SpliceFlags::NONBLOCK;
            match retry_on_intr(|| splice(file, Some(&mut from), writer, None, left, flags))? {
                0 => return Ok(false),
                count => left = left.saturating_sub(count),
            }
        }
        Ok(true)
    }

    /// Gives the pipe, which is empty, to the next read.
    fn give_back(&mut self) {
        let mut state = self.pipes.state();
        if state.most > 0 {
            state.spare.extend(self.ends.take());
        }
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        if self.ends.is_some() {
            self.pipes.state().made -= 1;
        }
    }
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
    fn sent(filled: Filled) -> Vec<u8> {
        let mut bytes = vec![0; filled.size];
        let (mut reader, writer) = std::io::pipe().unwrap();
        fcntl_setpipe_size(&writer, CAPACITY).unwrap();
        filled.send(writer.as_fd()).unwrap();
        reader.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn answer(unique: u64, content: &[u8]) -> Vec<u8> {
        let len = u32::try_from(HEADER + content.len()).unwrap();
        [abi::OutHeader { len, error: 0, unique }.as_bytes(), content].concat()
    }

    fn made(pipes: &Pipes) -> (usize, usize) {
        let state = pipes.state();
        (state.made, state.spare.len())
    }

    #[test]
    fn a_large_read_goes_by_a_pipe() {
        let content: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let file = file(&content);
        let pipes = Arc::new(Pipes::default());
        for (offset, size) in [(0, LARGE), (8, 131_072), (4096, 131_072), (700_000, 131_072)] {
            assert!(pipes.takes(size));
            let filled = pipes.fill(file.as_fd(), offset as u64, size, 7).unwrap().unwrap();
            let end = content.len().min(offset + size);
            assert_eq!(sent(filled), answer(7, &content[offset..end]), "{offset} {size}");
        }
        assert_eq!(made(&pipes), (1, 1));
    }

    #[test]
    fn what_does_not_fit_or_does_not_pay_is_left() {
        let content = vec![1; 1 << 20];
        let file = file(&content);
        let pipes = Arc::new(Pipes::default());
        for size in [0, LARGE - 1, CAPACITY, 1 << 20] {
            assert!(!pipes.takes(size), "{size}");
        }
        for offset in [1 << 20, (1 << 20) - 4096, u64::MAX] {
            assert!(pipes.fill(file.as_fd(), offset, 131_072, 7).unwrap().is_none(), "{offset}");
        }
        // Nothing of what was left is in it.
        assert_eq!(made(&pipes), (1, 1));
        let filled = pipes.fill(file.as_fd(), 0, 131_072, 8).unwrap().unwrap();
        assert_eq!(sent(filled), answer(8, &content[..131_072]));
    }

    #[test]
    fn an_answer_that_cannot_be_sent_does_not_come_later() {
        let file = file(&vec![1; 1 << 20]);
        let pipes = Arc::new(Pipes::default());
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let filled = pipes.fill(file.as_fd(), 0, 131_072, 7).unwrap().unwrap();
        assert_eq!(filled.send(writer.as_fd()), Err(Errno::PIPE));
        assert_eq!(made(&pipes), (0, 0));
        drop(pipes.fill(file.as_fd(), 0, LARGE, 8).unwrap().unwrap());
        assert_eq!(made(&pipes), (0, 0));
        let filled = pipes.fill(file.as_fd(), 0, LARGE, 9).unwrap().unwrap();
        assert_eq!(sent(filled), answer(9, &vec![1; LARGE]));
    }

    #[test]
    fn there_are_no_more_pipes_than_may_be() {
        let file = file(&vec![1; 1 << 20]);
        let pipes = Arc::new(Pipes::default());
        pipes.state().most = 2;
        let read = || pipes.fill(file.as_fd(), 0, LARGE, 7).unwrap();
        let (one, two) = (read().unwrap(), read().unwrap());
        assert!(read().is_none());
        sent(one);
        assert!(read().is_some());
        drop(two);
    }

    #[test]
    fn once_pipes_are_stopped_none_is_kept() {
        let file = file(&vec![1; 1 << 20]);
        let pipes = Arc::new(Pipes::default());
        pipes.state().most = 2;
        let read = || pipes.fill(file.as_fd(), 0, LARGE, 7).unwrap();
        let (one, two) = (read().unwrap(), read().unwrap());
        sent(one);
        pipes.stop();
        sent(two);
        assert_eq!(made(&pipes), (0, 0));
        assert!(read().is_none());
    }

    #[test]
    fn what_cannot_be_spliced_says_so() {
        let pipes = Arc::new(Pipes::default());
        let status = std::fs::File::open("/proc/self/fd").unwrap();
        // Too short by its size, whatever it is.
        assert!(pipes.fill(status.as_fd(), 0, LARGE, 7).unwrap().is_none());
        let (reader, _writer) = std::io::pipe().unwrap();
        let mut filled = Filled { pipes: Arc::clone(&pipes), ends: pipes.take(), size: 0 };
        assert_eq!(filled.put(reader.as_fd(), 0, LARGE, 7), Err(Errno::SPIPE));
        drop(filled);
        assert_eq!(made(&pipes).0, 0);
    }
}
