//! File data: whole copies by the cheapest way that the two filesystems share.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::fs::SeekFrom;
use rustix::io::{Errno, retry_on_intr};

use super::stat::Statx;

/// Bytes copied at a time where the data must pass through memory.
const CHUNK: usize = 1024 * 1024;
/// Bytes up to which read and write are the faster way.
const SMALL: u64 = 64 * 1024;
/// Fewest and most bytes copied by one copy_file_range(2) of a whole copy.
const CHUNKS_IN_KERNEL: [usize; 2] = [CHUNK / 4, 16 * CHUNK];
/// Processor time that one of them shall take: whoever waits for a processor gets it in between.
const MOMENT: Duration = Duration::from_micros(500);

/// What of a file is copied.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Bytes from the start.
    pub len: u64,
    /// That is all of it: it may be cloned.
    pub whole: bool,
    /// There are no holes to look for.
    pub dense: bool,
}

impl Part {
    /// Returns the first `len` bytes of a file with these attributes.
    pub fn first(len: u64, stat: &Statx) -> Self {
        let dense = stat.stx_blocks.saturating_mul(512) >= stat.stx_size;
        Self { len, whole: len == stat.stx_size, dense }
    }
}

/// Copies a part of `from` to the empty file `to`, holes kept.
///
/// A clone (FICLONE) if it is whole, else copy_file_range(2) of each extent, else read and write;
/// the last at once for what is small, as that is done in two calls. Leaves `to` at exactly `len`
/// bytes, or fewer if `from` is shorter. `is_given_up` is asked now and then whether to stop.
///
/// # Errors
/// `EINTR` if it was given up; `ENOSPC`, `EDQUOT`, `EIO` and whatever else the calls report.
pub fn copy(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    Part { len, whole, dense }: Part,
    is_given_up: &dyn Fn() -> bool,
) -> Result<(), Errno> {
    if len == 0 {
        return Ok(());
    }
    if whole && rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let is_small = dense && len <= SMALL;
    let mut pace = Pace::default();
    let mut offset = 0;
    let mut in_kernel = !is_small;
    while offset < len {
        let (start, end) = if is_small {
            (0, len)
        } else {
            let Some(start) = seek(from, SeekFrom::Data(offset), len)? else { break };
            (start, seek(from, SeekFrom::Hole(start), len)?.unwrap_or(len))
        };
        let mut done = start;
        while done < end {
            if is_given_up() {
                return Err(Errno::INTR);
            }
            let copied = if in_kernel {
                match copy_in_kernel(from, to, done, (end - done).min(pace.chunk as u64)) {
                    Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                        in_kernel = false;
                        continue;
                    }
                    copied => copied?,
                }
            } else {
                copy_through_memory(from, to, done, end - done)?
            };
            if copied == 0 {
                break;
            }
            done += copied;
            if done < end {
                pace.rest();
            }
        }
        if done < end {
            // The source ends here, whatever its size said.
            return retry_on_intr(|| rustix::fs::ftruncate(to, done));
        }
        offset = end;
    }
    // What was written whole has its size.
    if is_small { Ok(()) } else { retry_on_intr(|| rustix::fs::ftruncate(to, len)) }
}

/// How fast a copy goes on beside others who need the processor.
struct Pace {
    /// Bytes for the next call.
    chunk: usize,
    /// Processor time of the thread when the last call began; of the first it is not known: the clock is a system call,
    /// which files of one call need not pay.
    before: Option<Duration>,
}

impl Default for Pace {
    fn default() -> Self {
        Self { chunk: CHUNK, before: None }
    }
}

impl Pace {
    /// Lets others have the processor after a call, and has the next one take a [`MOMENT`]. Where a server copies, or
    /// blocks are shared, a call takes none, and the next is larger.
    fn rest(&mut self) {
        let now = spent();
        if let Some(before) = self.before.replace(now) {
            let last = now.saturating_sub(before);
            let [least, most] = CHUNKS_IN_KERNEL;
            if last > 2 * MOMENT {
                self.chunk = (self.chunk / 2).max(least);
            } else if last < MOMENT / 2 {
                self.chunk = (self.chunk * 2).min(most);
            }
        }
        rustix::thread::sched_yield();
    }
}

/// Processor time of this thread.
fn spent() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap_or_default()
}

/// Returns the next data or hole before `end`; `None` past the last data.
fn seek(file: BorrowedFd<'_>, to: SeekFrom, end: u64) -> Result<Option<u64>, Errno> {
    match rustix::fs::seek(file, to) {
        Ok(at) => Ok((at < end).then_some(at)),
        Err(Errno::NXIO) => Ok(None),
        // No notion of holes: all of it is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => {
            Ok(if let SeekFrom::Data(at) = to { Some(at) } else { None })
        }
        Err(errno) => Err(errno),
    }
}

fn copy_in_kernel(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    offset: u64,
    len: u64,
) -> Result<u64, Errno> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    in_kernel((from, offset), (to, offset), len).map(|copied| copied as u64)
}

/// copy_file_range(2) between two (file, offset) pairs.
fn in_kernel(
    from: (BorrowedFd<'_>, u64),
    to: (BorrowedFd<'_>, u64),
    len: usize,
) -> Result<usize, Errno> {
    let (mut source, mut target) = (from.1, to.1);
    retry_on_intr(|| {
        rustix::fs::copy_file_range(from.0, Some(&mut source), to.0, Some(&mut target), len)
    })
}

/// Copies up to `len` bytes between two (file, offset) pairs; returns how many, 0 at the end.
///
/// # Errors
/// Those of copy_file_range(2), or of reading and writing where that has no way.
pub fn copy_range(
    from: (BorrowedFd<'_>, u64),
    to: (BorrowedFd<'_>, u64),
    len: usize,
) -> Result<usize, Errno> {
    match in_kernel(from, to, len) {
        Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS) => {
            let mut buffer = vec![0; len.min(CHUNK)];
            let got = read_at(from.0, &mut buffer, from.1)?;
            write_at(to.0, buffer.get(..got).unwrap_or_default(), to.1)
        }
        copied => copied,
    }
}

fn copy_through_memory(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    offset: u64,
    len: u64,
) -> Result<u64, Errno> {
    let want = usize::try_from(len).unwrap_or(usize::MAX).min(CHUNK);
    let mut buffer = vec![0; want];
    let got = read_at(from, &mut buffer, offset)?;
    let put = write_at(to, buffer.get(..got).unwrap_or_default(), offset)?;
    Ok(put as u64)
}

/// Reads until `buffer` is full or the file ends; returns the bytes read.
///
/// # Errors
/// Those of pread(2), if nothing was read before.
pub fn read_at(file: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match retry_on_intr(|| rustix::io::pread(file, &mut *rest, offset + done as u64)) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(_) if done > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// Writes all of `data`; returns the bytes written, fewer only where the next one failed.
///
/// # Errors
/// Those of pwrite(2), if nothing was written before.
pub fn write_at(file: BorrowedFd<'_>, data: &[u8], offset: u64) -> Result<usize, Errno> {
    let mut done = 0;
    while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
        match retry_on_intr(|| rustix::io::pwrite(file, rest, offset + done as u64)) {
            Ok(0) => break,
            Ok(put) => done += put,
            Err(_) if done > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// ftruncate(2).
///
/// # Errors
/// Those of the call.
pub fn truncate(file: BorrowedFd<'_>, size: u64) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::ftruncate(file, size))
}

/// fsync(2), or fdatasync(2).
///
/// # Errors
/// Those of the call.
pub fn sync(file: BorrowedFd<'_>, data_only: bool) -> Result<(), Errno> {
    if data_only {
        return retry_on_intr(|| rustix::fs::fdatasync(file));
    }
    retry_on_intr(|| rustix::fs::fsync(file))
}

/// syncfs(2): makes all of the filesystem that holds `file` durable.
///
/// # Errors
/// Those of the call.
pub fn sync_filesystem(file: BorrowedFd<'_>) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::syncfs(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_that_take_no_time_become_larger_and_long_ones_smaller() {
        let [least, most] = CHUNKS_IN_KERNEL;
        let mut pace = Pace::default();
        (0..10).for_each(|_| pace.rest());
        assert_eq!(pace.chunk, most);
        for _ in 0..10 {
            let before = spent();
            while spent() - before < 3 * MOMENT {}
            pace.rest();
        }
        assert_eq!(pace.chunk, least);
    }
}
