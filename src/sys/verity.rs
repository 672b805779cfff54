//! fs-verity: the digest by which the kernel vouches for a file's data (`FS_IOC_MEASURE_VERITY`).
#![allow(unsafe_code, reason = "ioctl(2) has no safe form")]

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};

/// Longest digest of any algorithm, in bytes.
const DIGEST_MAX: usize = 64;

/// `struct fsverity_digest` with room for the longest digest.
#[repr(C)]
struct Measure {
    algorithm: u16,
    size: u16,
    digest: [u8; DIGEST_MAX],
}

// The number is that of the structure without its digest.
const MEASURE: u32 = opcode::read_write::<[u16; 2]>(b'f', 134);

/// Returns algorithm (`FS_VERITY_HASH_ALG_*`) and digest of a file; `None` if it has none.
///
/// # Errors
/// Those of the ioctl but `ENODATA`, `EOPNOTSUPP`, `ENOTTY` and `ENOSYS`.
pub fn measure(file: BorrowedFd<'_>) -> Result<Option<(u16, Vec<u8>)>, Errno> {
    let room = u16::try_from(DIGEST_MAX).unwrap_or(0);
    let mut measure = Measure { algorithm: 0, size: room, digest: [0; DIGEST_MAX] };
    // SAFETY: the ioctl reads `size` and writes no more than so many bytes behind the header.
    match unsafe { ioctl(file, Updater::<MEASURE, Measure>::new(&mut measure)) } {
        Ok(()) => {
            let digest = measure.digest.get(..usize::from(measure.size)).unwrap_or_default();
            Ok(Some((measure.algorithm, digest.to_vec())))
        }
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) => Ok(None),
        Err(errno) => Err(errno),
    }
}
