//! Bodies of the fuzz targets, as functions of bytes, so that a stable compiler replays what was found.
//!
//! Each returns whatever the bytes are; a panic, or a change outside of the directory it works in, is a fault.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use laminafs::archive::bundle::Bundle;
use laminafs::archive::header::{BLOCK, Header};
use laminafs::archive::input::unpack;
use laminafs::archive::pax::Records;
use laminafs::archive::read::Reader;
use laminafs::archive::sparse::{self, LineReader};
use laminafs::archive::view::Stack;
use laminafs::archive::{
    ApplyOptions, Digest, Limits, Whiteouts, apply, buildkit, manifest, path, tar_split,
};
use laminafs::fuse::{ServeOptions, replay};
use laminafs::mount::mountinfo;
use laminafs::options::{IoMode, MountOptions, Transport};

use laminafs::overrides::Override;
use laminafs::store::lower;

use crate::unmounted::Place;

/// A target: its name and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("parsers", parsers),
    ("reader", reader),
    ("apply", apply_archive),
    ("bundle", bundle),
    ("record", record),
    ("decoder", decoder),
    ("requests", requests),
    ("options", options),
];

const LIMITS: Limits =
    Limits { size_max: 4 << 20, entries_max: 2000, meta_max: 64 << 10, depth_max: 64 };

/// Every parser of a part of an archive.
pub fn parsers(data: &[u8]) {
    if let Some((block, _)) = data.split_first_chunk::<BLOCK>() {
        let _ = Header::parse(block);
        let mut map = Vec::new();
        let _ = sparse::read_header(block, &mut map);
        let _ = sparse::read_block(block, &mut map);
        let _ = LineReader::default().read_block(block);
        let _ = sparse::check(&map, 1 << 20, 1 << 10);
    }
    let _ = Records::default().read(data);
    let _ = path::clean(data, 64).map(|clean| path::meaning(&clean).map(drop));
    let _ = path::leads_out(data, data);
    let _ = Digest::parse(&String::from_utf8_lossy(data));
    let _ = manifest::with_layers(data, &[]);
    let _ = Override::parse(data);
    let _ = mountinfo::parse(data);
    let _ = lower::parse_lower(data, "lower");
    let _ = lower::parse_lower_layers(data, "lower-layers");
    if let Ok(mounts) = serde_json::from_slice::<Vec<buildkit::Mount>>(data) {
        for at in 0..=mounts.len() {
            let (lower, upper) = mounts.split_at(at);
            let _ = buildkit::layers(lower, upper);
        }
    }
}

/// A tar-split record, for a layer with a file, a symlink and a pipe.
pub fn record(data: &[u8]) {
    let place = Place::new();
    let layer = place.0.join("layer");
    std::fs::create_dir_all(layer.join("d")).unwrap();
    std::fs::write(layer.join("d/f"), "content").unwrap();
    std::os::unix::fs::symlink("f", layer.join("d/link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        layer.join("d/pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let stack = Stack::new([(OwnedFd::from(File::open(&layer).unwrap()), layer)]).unwrap();
    let _ = tar_split::rebuild(&stack, data, std::io::sink());
}

/// An archive, compressed or not, read to its end.
pub fn reader(data: &[u8]) {
    let _ = unpack(data, LIMITS, |input| {
        let mut reader = Reader::new(input, LIMITS);
        let mut buffer = [0; 1000];
        while reader.next_entry()?.is_some() {
            while reader.read(&mut buffer)? > 0 {}
        }
        reader.drain()
    });
}

/// An archive unpacked to a layer, in each form of whiteouts.
pub fn apply_archive(data: &[u8]) {
    for whiteouts in [Whiteouts::OverlayUser, Whiteouts::Files, Whiteouts::Flat] {
        let place = Place::new();
        let layer = place.0.join("layer");
        std::fs::create_dir(&layer).unwrap();
        std::fs::write(place.0.join("victim"), "untouched").unwrap();
        let options = ApplyOptions {
            whiteouts,
            ignore_chown_errors: true,
            in_user_namespace: true,
            limits: LIMITS,
            ..ApplyOptions::default()
        };
        let root = OwnedFd::from(File::open(&layer).unwrap());
        let _ = apply(root, layer, data, &options);
        assert_eq!(std::fs::read(place.0.join("victim")).unwrap(), b"untouched");
        assert_eq!(std::fs::read_dir(&place.0).unwrap().count(), 2);
    }
}

/// A tar file with an image.
pub fn bundle(data: &[u8]) {
    let place = Place::new();
    let file = place.0.join("image.tar");
    std::fs::write(&file, data).unwrap();
    let spool = || {
        Ok(File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(place.0.join("spool"))
            .unwrap())
    };
    let Ok(bundle) = Bundle::tar(File::open(&file).unwrap(), spool) else { return };
    let _ = manifest::images(&bundle);
    if let Ok(Some(content)) = bundle.find("manifest.json") {
        let _ = content.take(1 << 20).read_to_end(&mut Vec::new());
    }
}

/// A request of the kernel, straight from the device.
pub fn decoder(data: &[u8]) {
    let _ = replay::is_request(data);
    // The same with a length that is true, so that more is looked at than that.
    let mut honest = data.to_vec();
    if let (Ok(len), Some(field)) = (u32::try_from(data.len()), honest.get_mut(..4)) {
        field.copy_from_slice(&len.to_ne_bytes());
        let _ = replay::is_request(&honest);
    }
}

/// A list of mount options: what is accepted prints to the same.
pub fn options(data: &[u8]) {
    use std::os::unix::ffi::OsStrExt;
    let Ok((parsed, _)) = MountOptions::parse(&[std::ffi::OsStr::from_bytes(data)]) else { return };
    let (again, _) = MountOptions::parse(&[parsed.print()]).unwrap();
    assert_eq!(again, parsed);
}

/// Bytes of the header of a request, and of that of an answer.
const REQUEST_HEADER: usize = 40;
const ANSWER_HEADER: usize = 16;
const MKDIR: u8 = 9;

/// Requests to a union in a directory of its own: each that wants an answer gets a sound one, nothing lower changes, and
/// none ends in a panic, after which nothing could be made any more.
///
/// A request is an opcode, the low byte of a node, a length and a body; an odd length takes the answer back. What is
/// forgotten need not have been looked up.
pub fn requests(data: &[u8]) {
    let place = Place::new();
    std::fs::create_dir_all(place.0.join("lower/dir/sub")).unwrap();
    std::fs::write(place.0.join("lower/name"), "content").unwrap();
    std::fs::write(place.0.join("lower/dir/other"), "other").unwrap();
    std::os::unix::fs::symlink("name", place.0.join("lower/link")).unwrap();
    let union = std::sync::Arc::new(place.union("fsync=0,userxattr"));
    let serve = ServeOptions {
        threads: 1,
        posix_acl: true,
        xattrs: true,
        timeout: None,
        allow_other: true,
        io: if data.len().is_multiple_of(2) { IoMode::NoOpen } else { IoMode::Open },
        writeback: false,
        volatile: true,
        transport: Transport::Dev,
        counts: std::sync::Arc::default(),
    };
    let notices = File::options().write(true).open("/dev/null").unwrap().into();
    let mut replay = replay::Replay::new(union, &serve, notices).unwrap();
    let mut rest = data;
    let mut unique = 0;
    while let [opcode, node, len, tail @ ..] = rest {
        let (body, tail) = tail.split_at(usize::from(*len).min(tail.len()));
        rest = tail;
        unique += 2;
        let request = request(*opcode, unique, u64::from(*node), body);
        if let Some(answer) = replay.serve(&request) {
            check_answer(answer, unique);
            if len % 2 == 1 {
                replay.take_back();
            }
        }
    }
    let mut last = vec![0; 8];
    last.extend_from_slice(b"a name that no fuzzer finds, not in 255 bytes\0");
    let answer = replay.serve(&request(MKDIR, 1, 1, &last)).unwrap();
    assert_eq!(answer.get(4..8), Some(&[0; 4][..]), "nothing can be made any more");
    assert_eq!(std::fs::read(place.0.join("lower/name")).unwrap(), b"content");
    assert_eq!(std::fs::read(place.0.join("lower/dir/other")).unwrap(), b"other");
    assert_eq!(std::fs::read_dir(place.0.join("lower")).unwrap().count(), 3);
    assert_eq!(std::fs::read_dir(&place.0).unwrap().count(), 4);
}

/// The bytes of a request of the calling user, without sizes that take much space or time.
fn request(opcode: u8, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(REQUEST_HEADER + body.len()).unwrap();
    let mut bytes = [&len.to_ne_bytes()[..], &u32::from(opcode).to_ne_bytes()].concat();
    bytes.extend_from_slice(&unique.to_ne_bytes());
    bytes.extend_from_slice(&node.to_ne_bytes());
    for id in [rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()] {
        bytes.extend_from_slice(&id.to_ne_bytes());
    }
    bytes.resize(REQUEST_HEADER, 0);
    bytes.extend_from_slice(body);
    // Of SETATTR, WRITE, FALLOCATE and both forms of COPY_FILE_RANGE.
    let sizes: &[usize] = match opcode {
        4 => &[16],
        16 => &[8],
        43 => &[8, 16],
        47 | 53 => &[8, 32, 40],
        _ => &[],
    };
    for at in sizes {
        if let Some(size) = bytes.get_mut(REQUEST_HEADER + at + 2..REQUEST_HEADER + at + 8) {
            size.fill(0);
        }
    }
    bytes
}

fn check_answer(answer: &[u8], unique: u64) {
    let word = |at: usize| u32::from_ne_bytes(answer[at..at + 4].try_into().unwrap());
    assert_eq!(usize::try_from(word(0)), Ok(answer.len()));
    let error = word(4).cast_signed();
    assert!(error <= 0 && error > -512, "{error}");
    assert!(error == 0 || answer.len() == ANSWER_HEADER);
    assert_eq!(answer[8..16], unique.to_ne_bytes());
}
