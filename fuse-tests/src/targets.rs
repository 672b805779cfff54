//! Bodies of the fuzz targets, as functions of bytes, so that a stable compiler replays what was found.
//!
//! Each returns whatever the bytes are; a panic, or a change outside of the directory it works in, is a fault.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

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
use laminafs::idmap::{IdMap, InnerId};
use laminafs::mount::mountinfo;
use laminafs::options::{IoMode, MountOptions, Transport};

use laminafs::overrides::Override;
use laminafs::store::config::{Surroundings, load};
use laminafs::store::layout::Variant;
use laminafs::store::options::DriverOptions;
use laminafs::store::{Store, StoreConfig, lower};

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
    ("maps", maps),
    ("storage_conf", storage_conf),
    ("store", store),
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
    let Ok((parsed, _)) = MountOptions::parse(&[std::ffi::OsStr::from_bytes(data)]) else { return };
    let (again, _) = MountOptions::parse(&[parsed.print()]).unwrap();
    assert_eq!(again, parsed);
}

/// An id map: what is accepted prints to the same, and an id comes back from where it went.
pub fn maps(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(map) = IdMap::parse(text) else { return };
    let printed = map.to_string();
    assert_eq!(IdMap::parse(&printed).as_ref(), Ok(&map), "{printed}");
    let numbers = printed.split(':').filter_map(|number| number.parse::<u32>().ok());
    for id in numbers.flat_map(|n| [n, n.wrapping_sub(1), n.wrapping_add(1)]) {
        let shown = map.show(InnerId::stored(id));
        let stored = map.store(shown).map(InnerId::to_store);
        assert!(stored.is_none_or(|stored| stored == id), "{printed}: {id}: {shown:?}");
    }
}

/// A storage.conf, as the file of the machine, of a user, a drop-in, and the one that is named; and
/// its options of the driver.
pub fn storage_conf(data: &[u8]) {
    let place = Place::new();
    let home = place.0.join("home");
    for dir in [place.0.join("etc/containers"), home.join(".config/containers")] {
        std::fs::create_dir_all(dir.join("storage.conf.d")).unwrap();
        std::fs::write(dir.join("storage.conf"), data).unwrap();
        std::fs::write(dir.join("storage.conf.d/10-more.conf"), data).unwrap();
    }
    let named = place.0.join("etc/containers/storage.conf");
    for uid in [0, 1000] {
        let mut variables = std::collections::BTreeMap::from([("HOME", home.clone().into())]);
        for name in [None, Some("CONTAINERS_STORAGE_CONF")] {
            variables.extend(name.map(|name| (name, named.clone().into_os_string())));
            let around = Surroundings { uid, variables: variables.clone(), top: place.0.clone() };
            let Ok(config) = load(&around) else { continue };
            let _ = DriverOptions::parse(&config.options);
        }
    }
}

/// Files in a store with two layers, and in what lies beside it: `== PATH` begins a file, `-> PATH`
/// a symlink, `root/` and `run/` are the roots. It is looked at, mended, and looked at again; nothing
/// outside of it changes, nor what a layer holds.
pub fn store(data: &[u8]) {
    let place = Place::new();
    let (root, run_root) = (place.0.join("root"), place.0.join("run"));
    let outside = place.0.join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("kept"), "untouched").unwrap();
    let options = vec!["overlay.skip_mount_home=true".to_owned()];
    let (variant, image_store) = (Variant::Containers, None);
    let config = StoreConfig { root, run_root, image_store, variant, options };
    let Ok(made) = Store::init(&config) else { panic!("no store can be made") };
    drop(made);
    let home = config.root.join("overlay");
    for (id, link, lower) in [
        ("base", "AAAAAAAAAAAAAAAAAAAAAAAAAA", None),
        ("top", "BBBBBBBBBBBBBBBBBBBBBBBBBB", Some("l/AAAAAAAAAAAAAAAAAAAAAAAAAA")),
    ] {
        let layer = home.join(id);
        for part in ["diff", "work", "merged"] {
            std::fs::create_dir_all(layer.join(part)).unwrap();
        }
        std::fs::write(layer.join("diff/file"), id).unwrap();
        std::fs::write(layer.join("link"), link).unwrap();
        if let Some(lower) = lower {
            std::fs::write(layer.join("lower"), lower).unwrap();
        }
        std::os::unix::fs::symlink(format!("../{id}/diff"), home.join("l").join(link)).unwrap();
    }
    for (is_link, path, content) in parts(data) {
        let path = place.0.join(path);
        let _ = std::fs::create_dir_all(path.parent().unwrap_or(&place.0));
        let _ = std::fs::remove_file(&path);
        if is_link {
            let _ = std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(content), &path);
        } else {
            let _ = std::fs::write(&path, content);
        }
    }
    for mends in [false, true, false] {
        let Ok(store) = Store::open(&config) else { continue };
        let _ = store.known_layers();
        let _ = store.image_layers();
        for id in store.list().unwrap_or_default() {
            let _ = store.metadata(&id);
        }
        let _ = if mends { store.repair() } else { store.check() };
    }
    assert_eq!(std::fs::read(outside.join("kept")).unwrap(), b"untouched");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    for id in ["base", "top"] {
        assert_eq!(std::fs::read(home.join(id).join("diff/file")).unwrap(), id.as_bytes());
    }
}

/// The files that [`store`] is to make: whether it is a symlink, where, and what it holds. Never
/// what layers hold, nor outside of the roots.
fn parts(data: &[u8]) -> Vec<(bool, PathBuf, &[u8])> {
    let mut parts: Vec<(bool, PathBuf, &[u8])> = Vec::new();
    let mut rest = data;
    while !rest.is_empty() {
        let len = rest.iter().position(|byte| *byte == b'\n').map_or(rest.len(), |at| at + 1);
        let (line, tail) = rest.split_at(len);
        let header = [(&b"== "[..], false), (b"-> ", true)].into_iter();
        let mut header = header.filter_map(|(mark, is_link)| {
            Some((line.trim_ascii_end().strip_prefix(mark)?, is_link))
        });
        if let Some((name, is_link)) = header.next() {
            parts.push((is_link, PathBuf::from(std::ffi::OsStr::from_bytes(name)), b""));
        } else if let Some((is_link, _, content)) = parts.last_mut() {
            // The parts are slices of one buffer, one after the other.
            let begin = data.len() - rest.len() - content.len();
            let end = data.len() - tail.len();
            *content = &data[begin..end];
            if *is_link {
                *content = content.trim_ascii_end();
            }
        }
        rest = tail;
    }
    parts.retain(|(is_link, path, content)| {
        let is_inside = path.starts_with("root") || path.starts_with("run");
        let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        // A fault is to be found, not to be suffered: symlinks lead no further than the directory of the case.
        let target = Path::new(std::ffi::OsStr::from_bytes(content));
        let ups = target.components().filter(|part| *part == Component::ParentDir).count();
        let is_harmless = !*is_link || target.is_relative() && ups < path.components().count();
        let is_content = path.components().any(|part| part.as_os_str() == "diff");
        is_inside && is_plain && is_harmless && !is_content
    });
    parts
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
