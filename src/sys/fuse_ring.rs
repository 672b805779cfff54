//! Requests of a FUSE connection by io_uring (`FUSE_OVER_IO_URING`, Linux 6.14): one entry of one of
//! its queues, in a ring of its own, for one thread.
#![allow(unsafe_code, reason = "the kernel writes into memory that a command names")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use rustix::io::Errno;

/// Bytes of a buffer before its payload: the payload begins a page, but for what the allocator has
/// before it.
pub const SLACK: usize = 4096;

/// Bytes of the header of an answer.
pub const ANSWER_HEADER: usize = 16;

/// `FUSE_IO_URING_CMD_REGISTER`.
const REGISTER: u32 = 1;

/// `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`.
const COMMIT_AND_FETCH: u32 = 2;

/// Where a submission has its length, here a number of vectors, for which the crate has no name in
/// this kind of command.
const LEN_AT: usize = 24;

/// Bytes of the header of a request.
const IN_HEADER: usize = 40;

/// Bytes that the kernel has for each of the two parts of a request before its payload.
const PART: usize = 128;

/// `struct fuse_uring_req_header`.
#[repr(C)]
struct Headers {
    /// Begins a request or an answer.
    in_out: [u8; PART],
    /// The rest of a request that is not payload.
    op_in: [u8; PART],
    flags: u64,
    /// What tells a request apart, as in its header.
    commit_id: u64,
    payload_size: u32,
    padding: u32,
    reserved: u64,
}

const _: () = assert!(size_of::<Headers>() == 288, "struct fuse_uring_req_header");

/// `struct fuse_uring_cmd_req`, padded to what a submission has room for.
#[repr(C)]
struct Command {
    flags: u64,
    commit_id: u64,
    queue: u16,
    padding: [u8; 62],
}

/// What of a request comes before its payload.
#[derive(Debug)]
pub struct Head {
    room: [u8; IN_HEADER + PART],
    len: usize,
}

impl Head {
    /// Returns its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.room.get(..self.len).unwrap_or_default()
    }
}

/// A request that came.
#[derive(Debug)]
pub struct Arrival {
    /// Its first bytes.
    pub head: Head,
    /// How many more there are, at [`SLACK`] of the buffer.
    pub payload: usize,
    /// What it is answered by.
    pub unique: u64,
    /// For its payload and that of its answer.
    pub buffer: Box<[u8]>,
}

/// One entry of a queue, which has at most one request at a time.
pub struct Ring {
    ring: IoUring<Entry128, cqueue::Entry>,
    device: Arc<OwnedFd>,
    queue: u16,
    /// Name the two below; read by the kernel at registration.
    vectors: Box<[libc::iovec; 2]>,
    /// From a `Box`.
    headers: *mut Headers,
    /// From a `Box`; none while a request has it.
    buffer: Option<*mut [u8]>,
    /// The kernel may write to both.
    lent: bool,
}

/// Tells whether rings can be had.
///
/// # Errors
/// Those of io_uring_setup(2): `EPERM` where it is forbidden, `EINVAL` before Linux 6.1.
pub fn probe() -> Result<(), Errno> {
    setup().map(drop)
}

fn setup() -> Result<IoUring<Entry128, cqueue::Entry>, Errno> {
    let mut builder = IoUring::<Entry128, cqueue::Entry>::builder();
    // What arrives is dealt with when we wait, without interrupting us before.
    builder.setup_single_issuer().setup_defer_taskrun();
    builder.build(2).map_err(|error| number(&error))
}

impl Ring {
    /// Makes a ring for the calling thread, and registers it as an entry of `queue` with room for
    /// `size` bytes of payload.
    ///
    /// # Errors
    /// Those of io_uring_setup(2) and io_uring_enter(2); `EOPNOTSUPP` where FUSE has no rings;
    /// `EINVAL` if INIT did not ask for them, or allowed requests larger than `size`.
    pub fn register(device: Arc<OwnedFd>, queue: u16, size: usize) -> Result<Self, Errno> {
        let ring = setup()?;
        let mut buffer = vec![0_u8; SLACK + size].into_boxed_slice();
        let payload = buffer.get_mut(SLACK..).unwrap_or_default().as_mut_ptr();
        let headers = Box::into_raw(Box::new(Headers {
            in_out: [0; PART],
            op_in: [0; PART],
            flags: 0,
            commit_id: 0,
            payload_size: 0,
            padding: 0,
            reserved: 0,
        }));
        let vectors = Box::new([
            libc::iovec { iov_base: headers.cast(), iov_len: size_of::<Headers>() },
            libc::iovec { iov_base: payload.cast(), iov_len: size },
        ]);
        let buffer = Some(Box::into_raw(buffer));
        let mut this = Self { ring, device, queue, vectors, headers, buffer, lent: false };
        this.submit(REGISTER, 0)?;
        this.ring.submit().map_err(|error| number(&error))?;
        // Without a refusal by now it stands.
        match this.completed() {
            None => Ok(this),
            Some(result) => Err(refusal(result).unwrap_or(Errno::IO)),
        }
    }

    /// Gives the last answer, and waits for a request; `None` when the mount is gone.
    ///
    /// # Errors
    /// Those of io_uring_enter(2); why the kernel did not take the answer.
    pub fn wait(&mut self) -> Result<Option<Arrival>, Errno> {
        let result = loop {
            if let Some(result) = self.completed() {
                break result;
            }
            match self.ring.submit_and_wait(1).map_err(|error| number(&error)) {
                Ok(_) | Err(Errno::INTR) => (),
                Err(errno) => return Err(errno),
            }
        };
        match refusal(result) {
            None => (),
            Some(Errno::NOTCONN | Errno::CONNABORTED | Errno::NODEV) => return Ok(None),
            Some(errno) => return Err(errno),
        }
        let Some(buffer) = self.buffer.take() else { return Err(Errno::IO) };
        // SAFETY: from `Box::into_raw`, taken out of its place, and not the kernel's any more.
        let buffer = unsafe { Box::from_raw(buffer) };
        // SAFETY: from `Box::into_raw`, and not the kernel's any more.
        let headers = unsafe { &*self.headers };
        let mut room = [0; IN_HEADER + PART];
        let (first, rest) = room.split_at_mut(IN_HEADER);
        first.copy_from_slice(headers.in_out.get(..IN_HEADER).unwrap_or_default());
        rest.copy_from_slice(&headers.op_in);
        let len = headers.in_out.first_chunk().copied().map_or(0, u32::from_ne_bytes);
        let head = Head { room, len: len.saturating_sub(headers.payload_size) as usize };
        let payload = headers.payload_size as usize;
        Ok(Some(Arrival { head, payload, unique: headers.commit_id, buffer }))
    }

    /// Makes an answer to request `unique` of `header` and the first `size` bytes at [`SLACK`] of the
    /// buffer that came with it. The next wait gives it.
    ///
    /// # Errors
    /// `EINVAL` for another buffer.
    pub fn commit(
        &mut self,
        mut buffer: Box<[u8]>,
        header: [u8; ANSWER_HEADER],
        size: usize,
        unique: u64,
    ) -> Result<(), Errno> {
        let [_, vector] = &*self.vectors;
        let payload = buffer.get_mut(SLACK..).unwrap_or_default();
        if payload.as_mut_ptr() != vector.iov_base.cast() || size > payload.len() {
            return Err(Errno::INVAL);
        }
        let size = u32::try_from(size).map_err(|_huge| Errno::INVAL)?;
        self.buffer = Some(Box::into_raw(buffer));
        // SAFETY: from `Box::into_raw`, and not the kernel's since the request came.
        let headers = unsafe { &mut *self.headers };
        if let Some(room) = headers.in_out.first_chunk_mut() {
            *room = header;
        }
        headers.payload_size = size;
        self.submit(COMMIT_AND_FETCH, unique)
    }

    /// Puts a command into the ring, and with it the memory into the kernel's hands.
    fn submit(&mut self, command: u32, commit_id: u64) -> Result<(), Errno> {
        let arguments = Command { flags: 0, commit_id, queue: self.queue, padding: [0; 62] };
        // SAFETY: both are 80 bytes without padding between fields, of any value.
        let arguments = unsafe { std::mem::transmute::<Command, [u8; 80]>(arguments) };
        let mut entry = opcode::UringCmd80::new(types::Fd(self.device.as_raw_fd()), command)
            .cmd(arguments)
            .addr(Some(self.vectors.as_ptr() as u64))
            .build();
        // SAFETY: an entry is a `struct io_uring_sqe`, whose `len`, 32 bits wide and aligned, is there.
        unsafe { (&raw mut entry).cast::<u8>().add(LEN_AT).cast::<u32>().write(2) };
        // SAFETY: what the command names is freed by `drop` alone, and then only if the kernel has
        // given it back; the descriptor is ours.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_full| Errno::BUSY)?;
        self.lent = true;
        Ok(())
    }

    /// Returns the result of the command, if it has one yet; the memory is ours again then.
    fn completed(&mut self) -> Option<i32> {
        let result = self.ring.completion().next()?.result();
        self.lent = false;
        Some(result)
    }
}

impl Drop for Ring {
    /// Memory that the kernel may still write to is left to it.
    fn drop(&mut self) {
        if self.lent {
            return;
        }
        // SAFETY: from `Box::into_raw`, and given back by the kernel.
        drop(unsafe { Box::from_raw(self.headers) });
        if let Some(buffer) = self.buffer.take() {
            // SAFETY: as above.
            drop(unsafe { Box::from_raw(buffer) });
        }
    }
}

/// Returns why a command was refused, if it was.
fn refusal(result: i32) -> Option<Errno> {
    (result < 0).then(|| Errno::from_raw_os_error(result.saturating_neg()))
}

fn number(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
