//! Bodies of the fuzz targets, as functions of bytes, so that a stable compiler replays what was found.
//!
//! Each returns whatever the bytes are; a panic, or a change outside of the directory it works in, is a fault.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use laminafs::archive::bundle::Bundle;
use laminafs::archive::header::{BLOCK, Header};
use laminafs::archive::input::unpack;
use laminafs::archive::pax::Records;
use laminafs::archive::read::Reader;
use laminafs::archive::sparse::{self, LineReader};
use laminafs::archive::{ApplyOptions, Digest, Limits, Whiteouts, apply, manifest, path};

/// A target: its name and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] =
    &[("parsers", parsers), ("reader", reader), ("apply", apply_archive), ("bundle", bundle)];

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

/// A directory of its own, removed when dropped.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("lamina-fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let parent = std::env::var_os("FUSE_TESTS_DIR").unwrap_or_else(|| "/var/tmp".into());
        let path = Path::new(&parent).join(name);
        std::fs::create_dir(&path).unwrap();
        Place(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
