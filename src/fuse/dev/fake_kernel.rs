//! Tests in which no kernel takes part: requests are made here, also such as no kernel sends.

use super::abi::{self, init, op};
use super::decode::{Request, decode};
use super::handshake::{self, Answer, Offer, Wishes};
use super::notify::Notifier;
use super::passthrough::Passthrough;
use super::pool::{self, Group, Serve, Source};
use super::reply::Reply;
use super::session::Session;
use crate::error::Errno;
use crate::fuse::dispatch::Dispatcher;
use crate::fuse::{RequestCounts, ServeOptions, Transport};
use crate::options::IoMode;
use crate::union::{self, NodeId};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use parking_lot::{Condvar, Mutex};
use proptest::prelude::*;
use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a worker's buffers here.
const BUFFER: usize = 256 << 10;

/// Returns the bytes of a request.
fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let header = abi::InHeader {
        len: u32::try_from(size_of::<abi::InHeader>() + body.len()).unwrap(),
        opcode,
        unique,
        nodeid: node,
        ..Default::default()
    };
    [header.as_bytes(), body].concat()
}

/// Returns a sound body for an opcode.
fn sample(opcode: u32) -> Vec<u8> {
    let with = |fixed: &[u8], rest: &[u8]| [fixed, rest].concat();
    let name = b"name\0";
    match opcode {
        op::LOOKUP | op::UNLINK | op::RMDIR | op::REMOVEXATTR => name.to_vec(),
        op::FORGET => abi::ForgetIn { nlookup: 1 }.as_bytes().to_vec(),
        op::BATCH_FORGET => {
            let count = abi::BatchForgetIn { count: 2, dummy: 0 };
            let one = abi::ForgetOne { nodeid: 77, nlookup: 1 };
            with(count.as_bytes(), [one, one].as_bytes())
        }
        op::SETATTR => {
            let valid = abi::fattr::MODE | abi::fattr::SIZE | abi::fattr::MTIME;
            let raw =
                abi::SetAttrIn { valid, mode: 0o640, size: 5, mtime: -1, ..Default::default() };
            raw.as_bytes().to_vec()
        }
        op::SYMLINK => b"name\0target\0".to_vec(),
        op::MKNOD => with(
            abi::MknodIn { mode: libc::S_IFREG | 0o644, ..Default::default() }.as_bytes(),
            name,
        ),
        op::MKDIR => with(abi::MkdirIn { mode: 0o755, umask: 0o22 }.as_bytes(), name),
        op::RENAME => with(abi::RenameIn { newdir: 1 }.as_bytes(), b"name\0other\0"),
        op::RENAME2 => {
            let raw = abi::Rename2In { newdir: 1, flags: 1, padding: 0 };
            with(raw.as_bytes(), b"name\0other\0")
        }
        op::LINK => with(abi::LinkIn { oldnodeid: 1 }.as_bytes(), name),
        op::OPEN | op::OPENDIR => abi::OpenIn::default().as_bytes().to_vec(),
        op::CREATE | op::TMPFILE => {
            let raw = abi::CreateIn { mode: libc::S_IFREG | 0o644, ..Default::default() };
            with(raw.as_bytes(), name)
        }
        op::READ | op::READDIR | op::READDIRPLUS => {
            abi::ReadIn { size: 4096, ..Default::default() }.as_bytes().to_vec()
        }
        op::WRITE => {
            let raw = abi::WriteIn { size: 4, ..Default::default() };
            with(raw.as_bytes(), b"data")
        }
        op::FSYNC | op::FSYNCDIR => abi::FsyncIn::default().as_bytes().to_vec(),
        op::SETXATTR => {
            let raw = abi::SetXattrIn { size: 5, flags: 0 };
            let more = abi::SetXattrInMore::default();
            [raw.as_bytes(), more.as_bytes(), b"user.a\0value"].concat()
        }
        op::GETXATTR => with(abi::GetXattrIn { size: 100, padding: 0 }.as_bytes(), b"user.a\0"),
        op::LISTXATTR => abi::GetXattrIn { size: 100, padding: 0 }.as_bytes().to_vec(),
        op::IOCTL => {
            let raw = abi::IoctlIn { cmd: 0x8008_6601, out_size: 8, ..Default::default() };
            raw.as_bytes().to_vec()
        }
        op::FALLOCATE => abi::FallocateIn { length: 5, ..Default::default() }.as_bytes().to_vec(),
        op::LSEEK => abi::LseekIn { whence: 3, ..Default::default() }.as_bytes().to_vec(),
        op::COPY_FILE_RANGE | op::COPY_FILE_RANGE_64 => {
            let raw = abi::CopyFileRangeIn { nodeid_out: 1, len: 9, ..Default::default() };
            raw.as_bytes().to_vec()
        }
        op::INTERRUPT => abi::InterruptIn { unique: 2 }.as_bytes().to_vec(),
        _ => vec![0; 64],
    }
}

/// Opcodes that are answered with `ENOSYS` unread.
const UNSERVED: [u32; 10] = [
    op::INIT,
    op::GETLK,
    op::SETLK,
    op::SETLKW,
    op::ACCESS,
    op::BMAP,
    op::POLL,
    op::NOTIFY_REPLY,
    op::SETUPMAPPING,
    op::REMOVEMAPPING,
];

#[test]
fn every_opcode_is_decoded() {
    for &opcode in op::ALL {
        let bytes = request(opcode, 9, 5, &sample(opcode));
        let (header, decoded) = decode(&bytes, true).unwrap();
        assert_eq!((header.opcode, header.unique, header.node), (opcode, 9, NodeId(5)));
        let unserved = matches!(decoded, Request::Unserved);
        assert_eq!(unserved, UNSERVED.contains(&opcode), "{}", op::name(opcode));
    }
}

#[test]
fn a_request_cut_short_is_malformed_or_complete() {
    for &opcode in op::ALL {
        let body = sample(opcode);
        for len in 0..body.len() {
            // Whatever it is, nothing lies outside of it.
            decode(&request(opcode, 9, 5, &body[..len]), true).ok();
        }
        let whole = request(opcode, 9, 5, &body);
        for len in 0..whole.len() {
            assert!(decode(&whole[..len], true).is_err(), "{} of {len}", op::name(opcode));
        }
    }
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for name in [&b"\0"[..], b".\0", b"..\0", b"a/b\0", b"/\0", b"no end"] {
        for (opcode, fixed) in [
            (op::LOOKUP, 0),
            (op::UNLINK, 0),
            (op::RMDIR, 0),
            (op::SYMLINK, 0),
            (op::MKDIR, size_of::<abi::MkdirIn>()),
            (op::MKNOD, size_of::<abi::MknodIn>()),
            (op::CREATE, size_of::<abi::CreateIn>()),
            (op::LINK, size_of::<abi::LinkIn>()),
            (op::RENAME, size_of::<abi::RenameIn>()),
        ] {
            let body = [&vec![0; fixed][..], name].concat();
            assert!(decode(&request(opcode, 1, 1, &body), true).is_err(), "{}", op::name(opcode));
        }
        let body = [&[0; 8][..], b"good\0", name].concat();
        assert!(decode(&request(op::RENAME, 1, 1, &body), true).is_err());
    }
}

#[test]
fn extensions_are_no_part_of_the_body() {
    let mut bytes = request(op::LOOKUP, 1, 1, b"name\0\0\0\0extended");
    let mut header = abi::InHeader::read_from_prefix(&bytes).unwrap().0;
    for (extlen, sound) in [(1, true), (2, false), (3, false), (u16::MAX, false)] {
        header.total_extlen = extlen;
        bytes[..40].copy_from_slice(header.as_bytes());
        assert_eq!(decode(&bytes, true).is_ok(), sound, "{extlen}");
    }
}

#[test]
fn setxattr_has_two_forms() {
    let long = request(op::SETXATTR, 1, 1, &sample(op::SETXATTR));
    let short = request(op::SETXATTR, 1, 1, b"\x05\0\0\0\x01\0\0\0user.a\0value");
    for (bytes, ext, expected_flags, expected_kill) in
        [(long, true, 0, Some(false)), (short, false, 1, None)]
    {
        let Ok((_, Request::SetXattr { name, value, flags, kills_setgid })) = decode(&bytes, ext)
        else {
            panic!("no SETXATTR");
        };
        assert_eq!((name, value), (&b"user.a"[..], &b"value"[..]));
        assert_eq!((flags, kills_setgid), (expected_flags, expected_kill));
    }
}

/// Requests of every kind, sound and with bytes changed, cut off or added.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let opcode = prop_oneof![20 => proptest::sample::select(op::ALL), 1 => any::<u32>()];
    let node = prop_oneof![5 => Just(1), 5 => 2..200_u64, 1 => any::<u64>()];
    let changes = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..6);
    let tail = proptest::collection::vec(any::<u8>(), 0..64);
    let honest = proptest::bool::weighted(0.9);
    (opcode, node, changes, tail, 0..40_usize, honest).prop_map(
        |(opcode, node, changes, tail, cut, honest)| {
            let mut body = sample(opcode);
            body.truncate(body.len().saturating_sub(cut.saturating_sub(20)));
            if cut % 3 == 0 {
                body.extend(tail);
            }
            for (at, byte) in changes {
                if !body.is_empty() {
                    let at = at.index(body.len());
                    body[at] = byte;
                }
            }
            let mut bytes = request(opcode, 9, node, &body);
            if !honest {
                bytes[0] ^= 0x11;
                bytes[36] ^= 1;
            }
            bytes
        },
    )
}

/// A union in a directory of its own, for requests that may do with it what they like.
struct Served {
    session: Session,
    _dir: tempfile::TempDir,
    /// Takes the notifications.
    _kernel: OwnedFd,
}

fn sockets() -> (OwnedFd, OwnedFd) {
    // Messages keep their bounds, as on the device.
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn served() -> Served {
    served_union().0
}

/// The union as well.
fn served_union() -> (Served, Arc<union::Union>) {
    let dir = tempfile::tempdir().unwrap();
    let union = Arc::new(union::open_in(dir.path(), |_| ()));
    let offer = Offer { major: 7, minor: 45, max_readahead: 0, flags: u64::MAX };
    let Ok(Answer::Agree(terms, _)) = handshake::negotiate(&offer, &Wishes::default()) else {
        panic!("a kernel that offers all");
    };
    let (device, kernel) = sockets();
    let session = Session {
        dispatch: Dispatcher::new(Arc::clone(&union), &options()),
        terms,
        passthrough: None,
        notifier: Notifier::new(Arc::new(device)),
        counts: Arc::new(RequestCounts::default()),
    };
    (Served { session, _dir: dir, _kernel: kernel }, union)
}

/// Returns header and body of a reply, whose length must be what it says.
fn parse(reply: &[u8]) -> (abi::OutHeader, &[u8]) {
    let (header, body) = abi::OutHeader::read_from_prefix(reply).unwrap();
    assert_eq!(usize::try_from(header.len).unwrap(), reply.len());
    (header, body)
}

proptest! {
    #[test]
    fn any_bytes_decode_to_something(bytes in proptest::collection::vec(any::<u8>(), 0..300), ext: bool) {
        decode(&bytes, ext).ok();
    }

    #[test]
    fn mutated_requests_decode_to_something(bytes in mutated(), ext: bool) {
        if let Ok((_, Request::BatchForget(forgets))) = decode(&bytes, ext) {
            prop_assert!(forgets.count() <= bytes.len() / 16);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against a real union: every request that wants an answer gets a sound one, and none ends in
    /// a panic, after which nothing could be made any more.
    #[test]
    fn mutated_requests_are_answered(requests in proptest::collection::vec(mutated(), 1..60)) {
        let served = served();
        let mut reply = Reply::new(BUFFER);
        for mut bytes in requests {
            // It would take the space that it asks for.
            if bytes[4..8] == op::FALLOCATE.to_ne_bytes() {
                bytes[4..8].copy_from_slice(&op::LOOKUP.to_ne_bytes());
            }
            if let Some(answer) = served.session.serve(&bytes, &mut reply) {
                let (header, body) = parse(answer);
                prop_assert_eq!(header.unique, 9);
                prop_assert!(header.error <= 0 && header.error > -512);
                prop_assert!(header.error == 0 || body.is_empty());
            }
        }
        let mkdir = request(op::MKDIR, 3, 1, &[&[0_u8; 8][..], b"last one\0"].concat());
        let (header, _) = parse(served.session.serve(&mkdir, &mut reply).unwrap());
        prop_assert_eq!(header.error, 0);
    }
}

#[test]
fn replies_are_as_large_as_their_structures() {
    let served = served();
    let mut reply = Reply::new(BUFFER);
    let mut ask = |opcode, node, body: &[u8]| {
        let answer = served.session.serve(&request(opcode, 4, node, body), &mut reply).unwrap();
        let (header, body) = parse(answer);
        assert_eq!(header.error, 0, "{}", op::name(opcode));
        body.to_vec()
    };
    let entry = ask(op::LOOKUP, 1, b"name\0");
    assert_eq!(entry.len(), 128);
    let entry = abi::EntryOut::read_from_bytes(&entry).unwrap();
    assert!(entry.nodeid > 1);
    let file = entry.nodeid;
    for (opcode, node, len) in [
        (op::GETATTR, 1, 104),
        (op::SETATTR, file, 104),
        (op::STATX, file, 288),
        (op::OPEN, file, 16),
        (op::WRITE, file, 8),
        (op::LSEEK, file, 8),
        (op::STATFS, 1, 80),
        (op::MKDIR, entry_of(&ask(op::LOOKUP, 1, b"dir\0")), 128),
        (op::CREATE, entry_of(&ask(op::LOOKUP, 1, b"dir\0")), 144),
        (op::TMPFILE, 1, 144),
        (op::RELEASE, file, 0),
        (op::SYNCFS, 1, 0),
    ] {
        // The directory has one name that MKDIR and CREATE agree on: removed between them.
        if opcode == op::CREATE {
            ask(op::RMDIR, node, b"name\0");
        }
        if opcode == op::SYNCFS {
            continue;
        }
        assert_eq!(ask(opcode, node, &sample(opcode)).len(), len, "{}", op::name(opcode));
    }
    let absent = abi::EntryOut::read_from_bytes(&ask(op::LOOKUP, 1, b"absent\0")).unwrap();
    assert_eq!((absent.nodeid, absent.entry_valid), (0, u64::from(u32::MAX)));
}

/// The node at the head of a reply that may have more.
fn entry_of_many(body: &[u8]) -> u64 {
    abi::EntryOut::read_from_prefix(body).unwrap().0.nodeid
}

fn entry_of(body: &[u8]) -> u64 {
    abi::EntryOut::read_from_bytes(body).unwrap().nodeid
}

#[test]
fn what_was_forgotten_before_its_release_is_not_kept() {
    let mut served = served();
    let (device, _kernel) = sockets();
    served.session.passthrough = Some(Passthrough::new(Arc::new(device)));
    let mut reply = Reply::new(BUFFER);
    for (order, kept) in [([op::RELEASE, op::FORGET], 1), ([op::FORGET, op::RELEASE], 0)] {
        let lookup = request(op::LOOKUP, 2, 1, b"name\0");
        let (_, body) = parse(served.session.serve(&lookup, &mut reply).unwrap());
        let node = entry_of(body);
        let passthrough = served.session.passthrough.as_ref().unwrap();
        passthrough.pretend_open(NodeId(node));
        for (opcode, left) in order.into_iter().zip([kept, 0]) {
            served.session.serve(&request(opcode, 4, node, &sample(opcode)), &mut reply);
            assert_eq!(passthrough.idle(), left, "{}", op::name(opcode));
        }
    }
}

/// Opens and lookups in answers that did not arrive are given back.
#[test]
fn what_did_not_arrive_is_taken_back() {
    let (served, union) = served_union();
    let mut reply = Reply::new(BUFFER);
    let lookup = request(op::LOOKUP, 2, 1, b"name\0");
    let file = entry_of(parse(served.session.serve(&lookup, &mut reply).unwrap()).1);
    for (opcode, node) in [
        (op::OPEN, file),
        (op::OPENDIR, 1),
        (op::CREATE, 1),
        (op::TMPFILE, 1),
        (op::LOOKUP, 1),
        (op::MKDIR, 1),
    ] {
        let mut body = sample(opcode);
        if matches!(opcode, op::CREATE | op::MKDIR) {
            body.splice(body.len() - 5.., *b"fresh\0");
        }
        let bytes = request(opcode, 4, node, &body);
        let (header, body) = parse(served.session.serve(&bytes, &mut reply).unwrap());
        assert_eq!(header.error, 0, "{}", op::name(opcode));
        let opens = matches!(opcode, op::OPEN | op::OPENDIR | op::CREATE | op::TMPFILE);
        let given =
            if matches!(opcode, op::OPEN | op::OPENDIR) { node } else { entry_of_many(body) };
        assert_eq!(union.opens(NodeId(given)), u64::from(opens), "{}", op::name(opcode));
        served.session.take_back(&mut reply);
        assert_eq!(union.opens(NodeId(given)), 0, "{}", op::name(opcode));
        let known = opcode == op::LOOKUP || given == node;
        assert_eq!(served.session.dispatch.is_known(NodeId(given)), known, "{}", op::name(opcode));
        // Once is enough.
        served.session.take_back(&mut reply);
        if opcode == op::CREATE {
            let unlink = request(op::UNLINK, 5, 1, b"fresh\0");
            assert_eq!(parse(served.session.serve(&unlink, &mut reply).unwrap()).0.error, 0);
        }
    }
}

/// Each name of a listing with entries counts as looked up, so it is given back as well.
#[test]
fn a_listing_that_did_not_arrive_is_taken_back() {
    let (served, _union) = served_union();
    let mut reply = Reply::new(BUFFER);
    let lookup = request(op::LOOKUP, 2, 1, b"name\0");
    let file = entry_of(parse(served.session.serve(&lookup, &mut reply).unwrap()).1);
    for size in [4096, 200] {
        let body = abi::ReadIn { offset: 2, size, ..Default::default() };
        let bytes = request(op::READDIRPLUS, 4, 1, body.as_bytes());
        let (header, body) = parse(served.session.serve(&bytes, &mut reply).unwrap());
        assert_eq!((header.error, body.is_empty()), (0, false));
        let listed: Vec<NodeId> = reply.listed().collect();
        assert_eq!(listed.len(), if size == 200 { 1 } else { 2 });
        let is_known = |node: &NodeId| served.session.dispatch.is_known(*node);
        assert!(listed.iter().all(is_known));
        served.session.take_back(&mut reply);
        served.session.take_back(&mut reply);
        let left: Vec<NodeId> = listed.into_iter().filter(is_known).collect();
        assert!(left.iter().all(|node| node.0 == file), "{left:?}");
    }
    // One count is left, which was none of a listing's.
    assert!(served.session.dispatch.is_known(NodeId(file)));
    served.session.serve(&request(op::FORGET, 5, file, &sample(op::FORGET)), &mut reply);
    assert!(!served.session.dispatch.is_known(NodeId(file)));
}

/// A kernel that gives back what it never got: the rest of the mount goes on as before.
#[test]
fn what_is_given_back_too_often_is_nobody_elses() {
    let served = served();
    let mut reply = Reply::new(BUFFER);
    let mut ask = |opcode, node, body: &[u8]| {
        let answer = served.session.serve(&request(opcode, 4, node, body), &mut reply)?;
        let (header, body) = parse(answer);
        Some((header.error, body.to_vec()))
    };
    let dir = entry_of(&ask(op::LOOKUP, 1, b"dir\0").unwrap().1);
    let child = entry_of_many(&ask(op::CREATE, dir, &sample(op::CREATE)).unwrap().1);
    let much = abi::ForgetIn { nlookup: u64::MAX };
    let many = abi::BatchForgetIn { count: 2, dummy: 0 };
    let one = abi::ForgetOne { nodeid: dir, nlookup: 5 };
    let many = [many.as_bytes(), [one, one].as_bytes()].concat();
    for (opcode, node, body) in [
        (op::FORGET, dir, much.as_bytes()),
        (op::FORGET, dir, much.as_bytes()),
        (op::BATCH_FORGET, 0, &many),
        (op::FORGET, 1, much.as_bytes()),
        (op::FORGET, 999, much.as_bytes()),
    ] {
        assert_eq!(ask(opcode, node, body), None);
    }
    // The child still needs it, so it is the same node.
    assert_eq!(entry_of(&ask(op::LOOKUP, 1, b"dir\0").unwrap().1), dir);
    ask(op::FORGET, child, much.as_bytes());
    assert_eq!(ask(op::GETATTR, child, &sample(op::GETATTR)).unwrap().0, -libc::ESTALE);
    ask(op::FORGET, dir, much.as_bytes());
    assert_eq!(ask(op::GETATTR, dir, &sample(op::GETATTR)).unwrap().0, -libc::ESTALE);
    assert_eq!(ask(op::LOOKUP, 1, b"dir\0").unwrap().0, 0);
}

/// The same of opens: one that was made afterwards still counts.
#[test]
fn what_is_closed_too_often_counts_once() {
    let (served, union) = served_union();
    let mut reply = Reply::new(BUFFER);
    let lookup = request(op::LOOKUP, 2, 1, b"name\0");
    let file = entry_of(parse(served.session.serve(&lookup, &mut reply).unwrap()).1);
    for (open, close, node) in [(op::OPEN, op::RELEASE, file), (op::OPENDIR, op::RELEASEDIR, 1)] {
        for (opcode, left) in [(close, 0), (open, 1), (close, 0), (close, 0), (open, 1), (close, 0)]
        {
            let bytes = request(opcode, 4, node, &sample(opcode));
            assert_eq!(parse(served.session.serve(&bytes, &mut reply).unwrap()).0.error, 0);
            assert_eq!(union.opens(NodeId(node)), left);
        }
    }
}

/// INTERRUPT has no answer, and a request whose caller goes on is finished.
#[test]
fn interrupted_requests_are_finished() {
    let served = served();
    let mut reply = Reply::new(BUFFER);
    let lookup = request(op::LOOKUP, 2, 1, b"name\0");
    let file = entry_of(parse(served.session.serve(&lookup, &mut reply).unwrap()).1);
    let interrupt = abi::InterruptIn { unique: 4 };
    for unique in [5, 7] {
        let bytes = request(op::INTERRUPT, unique, 0, interrupt.as_bytes());
        assert_eq!(served.session.serve(&bytes, &mut reply), None);
    }
    let write = request(op::WRITE, 4, file, &sample(op::WRITE));
    assert_eq!(parse(served.session.serve(&write, &mut reply).unwrap()).0.error, 0);
}

#[test]
fn copies_are_reported_in_either_form() {
    let served = served();
    let mut reply = Reply::new(BUFFER);
    let lookup = request(op::LOOKUP, 4, 1, b"name\0");
    let file = entry_of(parse(served.session.serve(&lookup, &mut reply).unwrap()).1);
    for opcode in [op::COPY_FILE_RANGE, op::COPY_FILE_RANGE_64] {
        let range =
            abi::CopyFileRangeIn { nodeid_out: file, off_out: 100, len: 7, ..Default::default() };
        let bytes = request(opcode, 4, file, range.as_bytes());
        let (header, body) = parse(served.session.serve(&bytes, &mut reply).unwrap());
        assert_eq!(header.error, 0);
        let copied = if opcode == op::COPY_FILE_RANGE {
            u64::from(abi::WriteOut::read_from_bytes(body).unwrap().size)
        } else {
            abi::CopyFileRangeOut::read_from_bytes(body).unwrap().bytes_copied
        };
        assert_eq!(copied, 7);
    }
}

/// The kernel's end of a socket on which the transport serves.
struct Kernel(OwnedFd);

impl Kernel {
    fn send(&self, bytes: &[u8]) {
        rustix::io::write(&self.0, bytes).unwrap();
    }

    fn receive(&self) -> Vec<u8> {
        let mut buffer = vec![0; BUFFER];
        let len = rustix::io::read(&self.0, &mut buffer).unwrap();
        buffer.truncate(len);
        buffer
    }

    fn ask(&self, bytes: &[u8]) -> (i32, Vec<u8>) {
        self.send(bytes);
        let answer = self.receive();
        let (header, body) = parse(&answer);
        (header.error, body.to_vec())
    }
}

fn options() -> ServeOptions {
    ServeOptions {
        threads: 3,
        posix_acl: true,
        xattrs: true,
        timeout: None,
        allow_other: true,
        io: IoMode::Open,
        writeback: false,
        volatile: true,
        transport: Transport::Dev,
        counts: Arc::default(),
    }
}

/// From the first INIT to the end of the mount, as kernels of several ages speak.
#[test]
fn a_whole_session_over_a_socket() {
    // The short INIT of 5.10, and one of today.
    for (minor, flags, words) in [(32_u32, 0x03ff_ffff_u32, 0), (45, 0x73ff_fffb, 12)] {
        let dir = tempfile::tempdir().unwrap();
        let union = Arc::new(union::open_in(dir.path(), |_| ()));
        let (device, kernel) = sockets();
        let kernel = Kernel(kernel);
        let options = options();
        let counts = Arc::clone(&options.counts);
        let server =
            std::thread::spawn(move || super::serve(device, union, &options, || ()).map(|()| 1));
        // A protocol that does not exist yet is asked to come down to ours.
        let mut init = [8, 1, 0, 0].to_vec();
        let (error, body) = kernel.ask(&request(op::INIT, 1, 0, init.as_bytes()));
        assert_eq!((error, &body[..4]), (0, &7_u32.to_ne_bytes()[..]));
        init = [7, minor, 1 << 17, flags].to_vec();
        init.resize(4 + words, 0xffff_ffff);
        let (error, body) = kernel.ask(&request(op::INIT, 2, 0, init.as_bytes()));
        let out = abi::InitOut::read_from_bytes(&body[..]).unwrap();
        assert_eq!((error, out.major, out.minor, out.max_readahead), (0, 7, minor, 1 << 17));
        assert_eq!(u64::from(out.flags) & init::INIT_EXT != 0, words != 0);
        assert_eq!(out.flags2 != 0, words != 0);

        let mut wanted = HashSet::new();
        for unique in 10..40 {
            kernel.send(&request(op::LOOKUP, unique, 1, b"name\0"));
            wanted.insert(unique);
        }
        while !wanted.is_empty() {
            let answer = kernel.receive();
            let (header, _) = parse(&answer);
            assert!(header.error == 0 && wanted.remove(&header.unique), "{header:?}");
        }
        kernel.send(&request(op::FORGET, 41, 1, 30_u64.as_bytes()));
        assert_eq!(kernel.ask(&request(999, 42, 1, &[])).0, -libc::ENOSYS);
        assert_eq!(kernel.ask(&request(op::MKDIR, 43, 1, &[0; 3])).0, -libc::EIO);
        drop(kernel);
        assert_eq!(server.join().unwrap().unwrap(), 1);
        assert_eq!(counts.to_string(), "UNKNOWN=1 LOOKUP=30 FORGET=1");
    }
}

#[test]
fn a_kernel_that_is_too_old_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let union = Arc::new(union::open_in(dir.path(), |_| ()));
    let (device, kernel) = sockets();
    let kernel = Kernel(kernel);
    kernel.send(&request(op::INIT, 2, 0, [7_u32, 30, 0, 0].as_bytes()));
    let error = super::serve(device, union, &options(), || panic!("ready")).unwrap_err();
    assert_eq!(error.errno(), Errno::PROTO);
    assert_eq!(parse(&kernel.receive()).0.error, -libc::EPROTO);
}

/// Requests that wait for each other: all of them must be in work at once.
#[derive(Default)]
struct Barrier {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Serve for Arc<Barrier> {
    fn serve<'a>(&self, bytes: &[u8], reply: &'a mut Reply) -> Option<&'a [u8]> {
        let (header, _) = decode(bytes, true).unwrap();
        reply.clear();
        let mut open = self.open.lock();
        if header.opcode == op::SYNCFS {
            while !*open {
                self.opened.wait(&mut open);
            }
        }
        Some(reply.finish(header.unique))
    }

    fn take_back(&self, _reply: &mut Reply) {}
}

fn threads_of(name: &str) -> usize {
    let comm = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| comm(task.ok()?).ok())
        .filter(|comm| comm.starts_with(name))
        .count()
}

/// However many requests wait for something, the next one is answered; and when they are done, the
/// threads that it took end.
#[test]
fn the_pool_grows_while_all_wait_and_shrinks_again() {
    const WAITING: u64 = 20;
    let (device, kernel) = sockets();
    let kernel = Kernel(kernel);
    let barrier = Arc::new(Barrier::default());
    let session = Arc::clone(&barrier);
    let server = std::thread::spawn(move || {
        let groups = vec![Group::new(Source::Device, 2, 64)];
        pool::run("grow", session, BUFFER, Arc::new(device), groups, || ())
    });
    for unique in 0..WAITING {
        kernel.send(&request(op::SYNCFS, unique, 1, &sample(op::SYNCFS)));
    }
    kernel.send(&request(op::GETATTR, 100, 1, &sample(op::GETATTR)));
    assert_eq!(parse(&kernel.receive()).0.unique, 100, "answered while all others wait");
    assert!(threads_of("grow") >= 21);
    *barrier.open.lock() = true;
    barrier.opened.notify_all();
    let mut wanted: HashSet<u64> = (0..WAITING).collect();
    while !wanted.is_empty() {
        assert!(wanted.remove(&parse(&kernel.receive()).0.unique));
    }
    // Those that read already end after the next request that they take.
    let end = Instant::now() + Duration::from_secs(10);
    while threads_of("grow") > 3 {
        assert!(Instant::now() < end, "{} threads", threads_of("grow"));
        kernel.ask(&request(op::GETATTR, 101, 1, &sample(op::GETATTR)));
    }
    drop(kernel);
    server.join().unwrap().unwrap();
}

/// How long it rests when nobody tells it that the mount is gone.
const RESTS: Duration = Duration::from_secs(20);

/// A session that rests until the mount is gone.
#[derive(Default)]
struct Resting {
    ended: Mutex<bool>,
    changed: Condvar,
}

impl Serve for Arc<Resting> {
    fn serve<'a>(&self, bytes: &[u8], reply: &'a mut Reply) -> Option<&'a [u8]> {
        let (header, _) = decode(bytes, true).unwrap();
        reply.clear();
        Some(reply.finish(header.unique))
    }

    fn take_back(&self, _reply: &mut Reply) {}

    fn rest(&self) {
        let mut ended = self.ended.lock();
        self.changed.wait_while_for(&mut ended, |ended| !*ended, RESTS);
    }

    fn end(&self) {
        *self.ended.lock() = true;
        self.changed.notify_all();
    }
}

/// Who rests is told that the mount is gone, by another thread that finds it so.
#[test]
fn nobody_rests_longer_than_the_mount_is_there() {
    let (device, kernel) = sockets();
    let kernel = Kernel(kernel);
    let session = Arc::new(Resting::default());
    let resting = Arc::clone(&session);
    let server = std::thread::spawn(move || {
        let groups = vec![Group::new(Source::Device, 2, 2)];
        pool::run("rest", resting, BUFFER, Arc::new(device), groups, || ())
    });
    kernel.ask(&request(op::GETATTR, 1, 1, &sample(op::GETATTR)));
    let before = Instant::now();
    drop(kernel);
    server.join().unwrap().unwrap();
    assert!(before.elapsed() < RESTS, "nobody was told");
}
