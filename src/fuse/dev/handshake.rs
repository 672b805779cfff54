//! INIT: what the kernel offers, what is asked of it, and what both agreed on.
//!
//! Decided by offers alone, never by a version of the kernel. Nothing is asked for that is not
//! served here.

use super::abi::{self, init, op};
use crate::error::Errno;
use zerocopy::FromBytes;

/// Largest READ and WRITE that is asked for, in KiB; also the most that a kernel grants.
const TRANSFER_MAX: u16 = 1024;

/// Largest READ and WRITE of a kernel that has no `MAX_PAGES`, in KiB: 32 pages.
const TRANSFER_OLD: u16 = 128;

/// Returns how many pages of `page_size` bytes make [`TRANSFER_MAX`], and at most 256.
///
/// A READ has up to as many pages, whatever their size, and no other limit.
fn pages_max(page_size: usize) -> u16 {
    let pages = (usize::from(TRANSFER_MAX) << 10) / page_size.max(4 << 10);
    u16::try_from(pages).unwrap_or(u16::MAX).max(1)
}

/// Requests that may be in flight without anybody waiting for them, such as read-ahead.
const BACKGROUND_MAX: u16 = 64;

/// From how many of those on the kernel takes the connection for congested.
const CONGESTED: u16 = 48;

/// What the kernel offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) max_readahead: u32,
    /// `flags`, and `flags2` above them.
    pub(super) flags: u64,
}

/// What a mount wants of the kernel beyond what every mount does.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wishes {
    /// ACLs are checked by the kernel.
    pub(super) posix_acl: bool,
    /// The kernel collects writes.
    pub(super) writeback: bool,
    /// How deep filesystems are stacked on which the kernel takes data straight from beneath; with 0
    /// it does not.
    pub(super) passthrough_depth: u32,
    /// Requests come by io_uring. Once agreed on, none comes before all queues are registered.
    pub(super) uring: bool,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    /// Flags that count: offered and asked for.
    flags: u64,
    /// Largest READ and WRITE, in bytes.
    pub(super) transfer: usize,
}

impl Terms {
    /// Returns whether all of these bits of [`abi::init`] were agreed on.
    pub(super) const fn has(&self, flags: u64) -> bool {
        self.flags & flags == flags
    }
}

/// What every mount asks for.
///
/// Not among them, on purpose: `ATOMIC_O_TRUNC` (truncation must come as SETATTR),
/// `AUTO_INVAL_DATA` (the opposite of what we promise), locks (the kernel's local ones are right),
/// `EXPORT_SUPPORT` (no file handles are given out), `HAS_EXPIRE_ONLY` (no name is ever expired),
/// `CREATE_SUPP_GROUP` (it tells one group, and only of requests that need none: the kernel has
/// checked the permission and taken setgid away), `HAS_RESEND` (nobody takes a mount over),
/// `SECURITY_CTX` and `ALLOW_IDMAP` (not served).
const ALWAYS: u64 = init::ASYNC_READ
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::EXPLICIT_INVAL_DATA
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT
    | init::NO_EXPORT_SUPPORT;

/// Reads an INIT request; the offer and the number to answer it by.
///
/// # Errors
/// `EIO` for anything else.
pub(super) fn decode(bytes: &[u8]) -> Result<(u64, Offer), Errno> {
    let (header, body) = abi::InHeader::read_from_prefix(bytes).map_err(|_short| Errno::IO)?;
    if header.opcode != op::INIT || usize::try_from(header.len) != Ok(bytes.len()) {
        return Err(Errno::IO);
    }
    let (old, more) = abi::InitIn::read_from_prefix(body).map_err(|_short| Errno::IO)?;
    let flags2 = match abi::InitInMore::read_from_prefix(more) {
        Ok((more, _)) if u64::from(old.flags) & init::INIT_EXT != 0 => more.flags2,
        // The short form, up to 7.35.
        _ => 0,
    };
    let offer = Offer {
        major: old.major,
        minor: old.minor,
        max_readahead: old.max_readahead,
        flags: u64::from(old.flags) | u64::from(flags2) << 32,
    };
    Ok((header.unique, offer))
}

/// What to do about an offer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// Accept it on these terms, by this reply.
    Agree(Terms, abi::InitOut),
    /// Name our major version and wait for another INIT that has it.
    Again(abi::InitOut),
}

/// Decides what to ask for. Pure: the one place where flags are chosen.
///
/// # Errors
/// `EPROTO` for a protocol that is older than what we speak.
pub(super) fn negotiate(offer: &Offer, wishes: &Wishes) -> Result<Answer, Errno> {
    let version = abi::InitOut { major: abi::MAJOR, minor: abi::MINOR, ..Default::default() };
    if offer.major > abi::MAJOR {
        return Ok(Answer::Again(version));
    }
    if offer.major < abi::MAJOR || offer.minor < abi::MINOR_LEAST {
        return Err(Errno::PROTO);
    }
    let mut wanted = ALWAYS;
    let passthrough = wishes.passthrough_depth > 0;
    for (wish, flag) in [
        (wishes.posix_acl, init::POSIX_ACL),
        (wishes.writeback, init::WRITEBACK_CACHE),
        (passthrough, init::PASSTHROUGH),
        (wishes.uring, init::OVER_IO_URING),
    ] {
        if wish {
            wanted |= flag;
        }
    }
    let flags = offer.flags & wanted;
    let kib = if flags & init::MAX_PAGES != 0 { TRANSFER_MAX } else { TRANSFER_OLD };
    let (low, high) = halves(flags);
    let reply = abi::InitOut {
        minor: abi::MINOR.min(offer.minor),
        max_readahead: offer.max_readahead,
        flags: low,
        flags2: high,
        max_background: BACKGROUND_MAX,
        congestion_threshold: CONGESTED,
        max_write: u32::from(kib) << 10,
        time_gran: 1,
        max_pages: pages_max(rustix::param::page_size()),
        max_stack_depth: if flags & init::PASSTHROUGH == 0 { 0 } else { wishes.passthrough_depth },
        ..version
    };
    Ok(Answer::Agree(Terms { flags, transfer: usize::from(kib) << 10 }, reply))
}

/// Returns `flags` and `flags2`.
#[expect(clippy::cast_possible_truncation, reason = "halves of a number, one by one")]
const fn halves(flags: u64) -> (u32, u32) {
    (flags as u32, (flags >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL_6_18: Offer =
        Offer { major: 7, minor: 45, max_readahead: 128 << 10, flags: 0x7fd_73ff_fffb };

    const ACL: Wishes =
        Wishes { posix_acl: true, writeback: false, passthrough_depth: 0, uring: false };

    fn agree(offer: &Offer, wishes: &Wishes) -> (Terms, abi::InitOut) {
        match negotiate(offer, wishes) {
            Ok(Answer::Agree(terms, reply)) => (terms, reply),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_is_asked_for_that_is_not_offered() {
        for shift in 0..64 {
            let offer = Offer { flags: 1 << shift, ..KERNEL_6_18 };
            let (terms, reply) = agree(&offer, &ACL);
            let asked = u64::from(reply.flags) | u64::from(reply.flags2) << 32;
            assert_eq!(asked & !offer.flags, 0, "bit {shift}");
            assert_eq!(terms.flags, asked);
        }
    }

    #[test]
    fn dangerous_flags_are_never_asked_for() {
        let offer = Offer { flags: u64::MAX, ..KERNEL_6_18 };
        let (terms, _) = agree(&offer, &ACL);
        // ATOMIC_O_TRUNC, locks, EXPORT_SUPPORT, AUTO_INVAL_DATA, WRITEBACK_CACHE, the first
        // HANDLE_KILLPRIV, SECURITY_CTX, ALLOW_IDMAP, OVER_IO_URING, CREATE_SUPP_GROUP,
        // HAS_EXPIRE_ONLY, HAS_RESEND.
        for bit in [3, 1, 10, 4, 12, 16, 19, 32, 40, 41, 34, 35, 39] {
            assert!(!terms.has(1 << bit), "bit {bit}");
        }
    }

    // With a fixed number of pages, reads where pages have 64 KiB were larger than any buffer here.
    #[test]
    fn reads_fit_the_buffer_whatever_the_size_of_pages() {
        for (page_size, pages) in [(4 << 10, 256), (16 << 10, 64), (64 << 10, 16), (2 << 20, 1)] {
            assert_eq!(pages_max(page_size), pages, "{page_size}");
        }
    }

    #[test]
    fn wishes_are_asked_for() {
        let wishes = |posix_acl, writeback| Wishes { posix_acl, writeback, ..Wishes::default() };
        for (posix_acl, writeback) in [(false, false), (true, false), (false, true), (true, true)] {
            let (terms, _) = agree(&KERNEL_6_18, &wishes(posix_acl, writeback));
            assert_eq!(terms.has(init::POSIX_ACL), posix_acl);
            assert_eq!(terms.has(init::WRITEBACK_CACHE), writeback);
        }
    }

    #[test]
    fn passthrough_comes_with_its_depth() {
        let wishes = Wishes { passthrough_depth: 2, ..Wishes::default() };
        let (terms, reply) = agree(&KERNEL_6_18, &wishes);
        assert!(terms.has(init::PASSTHROUGH));
        assert_eq!(reply.max_stack_depth, 2);
        // Before Linux 6.9.
        let offer = Offer { flags: KERNEL_6_18.flags & !init::PASSTHROUGH, ..KERNEL_6_18 };
        let (terms, reply) = agree(&offer, &wishes);
        assert!(!terms.has(init::PASSTHROUGH));
        assert_eq!(reply.max_stack_depth, 0);
    }

    #[test]
    fn rings_are_asked_for_when_wished_and_offered() {
        let wishes = Wishes { uring: true, ..Wishes::default() };
        // Unless the administrator says so.
        let offer = Offer { flags: KERNEL_6_18.flags & !init::OVER_IO_URING, ..KERNEL_6_18 };
        let (terms, reply) = agree(&offer, &wishes);
        assert!(!terms.has(init::OVER_IO_URING));
        assert_eq!(reply.flags2 & 1 << 9, 0);
        let (terms, reply) = agree(&KERNEL_6_18, &wishes);
        assert!(terms.has(init::OVER_IO_URING));
        assert_eq!(reply.flags2 & 1 << 9, 1 << 9);
    }

    #[test]
    fn the_older_minor_version_counts() {
        for (theirs, ours) in [(31, 31), (38, 38), (45, 45), (60, 45)] {
            let (_, reply) = agree(&Offer { minor: theirs, ..KERNEL_6_18 }, &Wishes::default());
            assert_eq!((reply.major, reply.minor), (7, ours));
        }
    }

    #[test]
    fn other_protocols() {
        let newer = Offer { major: 8, ..KERNEL_6_18 };
        assert!(matches!(
            negotiate(&newer, &Wishes::default()),
            Ok(Answer::Again(reply)) if reply.major == 7
        ));
        for (major, minor) in [(6, 45), (7, 30), (0, 0)] {
            let offer = Offer { major, minor, ..KERNEL_6_18 };
            assert_eq!(negotiate(&offer, &Wishes::default()).err(), Some(Errno::PROTO));
        }
    }

    /// An INIT request with `len` bytes of body, all bits of which are set but for the version.
    fn request(len: usize) -> Vec<u8> {
        use zerocopy::IntoBytes;
        let header = abi::InHeader {
            len: u32::try_from(40 + len).unwrap(),
            opcode: op::INIT,
            unique: 2,
            ..Default::default()
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend([7_u32, 32, 4096].as_bytes());
        bytes.resize(40 + len, 0xff);
        bytes
    }

    #[test]
    fn short_and_long_requests() {
        let (unique, offer) = decode(&request(64)).unwrap();
        assert_eq!((unique, offer.minor, offer.max_readahead), (2, 32, 4096));
        assert_eq!(offer.flags, u64::MAX);
        // Linux 5.10: no second word of flags.
        assert_eq!(decode(&request(16)).unwrap().1.flags, u64::from(u32::MAX));
        // Longer than known.
        assert_eq!(decode(&request(200)).unwrap().1.flags, u64::MAX);
        assert_eq!(decode(&request(15)).err(), Some(Errno::IO));
        assert_eq!(decode(&request(64)[..80]).err(), Some(Errno::IO));
        assert_eq!(decode(&[]).err(), Some(Errno::IO));
    }

    #[test]
    fn the_second_word_counts_only_if_the_first_says_so() {
        let mut bytes = request(64);
        bytes[52..56].copy_from_slice(&0x0fff_ffff_u32.to_ne_bytes());
        assert_eq!(decode(&bytes).unwrap().1.flags, 0x0fff_ffff);
    }
}
