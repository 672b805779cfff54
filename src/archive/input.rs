//! What an archive comes in as: its compression found by its first bytes, unpacked and digested
//! in a thread of its own, so that a layer is written meanwhile.
//!
//! Locks: none; the two sides share a bounded channel.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::digest::{Digest, Digester};
use super::read::{Limits, input_error};
use crate::error::{Error, Result};

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, one member or several.
    Gzip,
    /// zstd, one frame or several.
    Zstd,
    /// xz, one stream or several.
    Xz,
    /// bzip2, one stream or several.
    Bzip2,
}

impl Compression {
    /// Tells by the first bytes of an archive; six are enough.
    pub fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or one to be skipped, which may stand before it.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Self::Bzip2,
            _ => Self::None,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Bzip2 => "bzip2",
        })
    }
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// How it was compressed.
    pub compression: Compression,
    /// Digest of the bytes as they came.
    pub blob: Digest,
    /// How many those were.
    pub blob_size: u64,
    /// Digest of the archive within, OCI's diff id.
    pub diff: Digest,
    /// How many bytes the archive has.
    pub diff_size: u64,
}

/// Bytes that are handed over at a time, and how many such parts may wait.
const PART: usize = 256 * 1024;
const PARTS: usize = 8;
/// Most memory for unpacking xz, in bytes; its strongest preset asks for 65 MiB.
const XZ_MEMORY: u64 = 256 << 20;

/// Calls `consume` with the unpacked bytes of `source`, and returns what that returned.
///
/// `consume` must read to the end, else the digests are of nothing.
///
/// # Errors
/// That of `consume`, else that of reading or unpacking.
pub fn unpack<T>(
    source: impl Read + Send,
    limits: Limits,
    consume: impl FnOnce(&mut dyn Read) -> Result<T>,
) -> Result<(T, Source)> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(PARTS);
        let producer = scope.spawn(move || produce(source, limits, &sender));
        let mut parts = Parts { receiver, part: Vec::new(), at: 0 };
        let consumed = consume(&mut parts);
        // Ends the producer, should it wait for room.
        drop(parts);
        let produced = producer.join();
        let consumed = consumed?;
        let Ok(produced) = produced else {
            return Err(Error::Corrupt { what: "unpacking failed".into(), at: "archive".into() });
        };
        Ok((consumed, produced?))
    })
}

/// The receiving side.
struct Parts {
    receiver: Receiver<io::Result<Vec<u8>>>,
    part: Vec<u8>,
    at: usize,
}

impl Read for Parts {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.part.len() {
            match self.receiver.recv() {
                Ok(part) => (self.part, self.at) = (part?, 0),
                // The sender is gone, having sent its error if there was one.
                Err(_) => return Ok(0),
            }
        }
        let mut rest = self.part.get(self.at..).unwrap_or_default();
        let got = rest.read(buffer)?;
        self.at += got;
        Ok(got)
    }
}

fn produce(
    source: impl Read + Send,
    limits: Limits,
    sender: &SyncSender<io::Result<Vec<u8>>>,
) -> Result<Source> {
    match copy(source, limits, sender) {
        Ok(done) => Ok(done),
        Err(error) => {
            let told = Error::clone(&error);
            // Nobody may listen any more.
            drop(sender.send(Err(io::Error::other(error))));
            Err(told)
        }
    }
}

fn copy(
    mut source: impl Read + Send,
    limits: Limits,
    sender: &SyncSender<io::Result<Vec<u8>>>,
) -> Result<Source> {
    let start = start(&mut source)?;
    let compression = Compression::detect(&start);
    let source = Read::chain(&start[..], source);
    if compression == Compression::None {
        let mut archive = Digester::new(source);
        pass_on(&mut archive, limits, sender)?;
        let (digest, size) = archive.finish();
        return Ok(Source {
            compression,
            blob: digest,
            blob_size: size,
            diff: digest,
            diff_size: size,
        });
    }
    let mut raw = BufReader::with_capacity(PART, Digester::new(source));
    let mut archive = Digester::new(decoder(compression, &mut raw).map_err(|e| input_error(&e))?);
    pass_on(&mut archive, limits, sender)?;
    let (diff, diff_size) = archive.finish();
    // What stands behind the compressed data belongs to the blob.
    io::copy(&mut raw, &mut io::sink()).map_err(|error| input_error(&error))?;
    let (blob, blob_size) = raw.into_inner().finish();
    Ok(Source { compression, blob, blob_size, diff, diff_size })
}

/// Reads the bytes that tell the compression; fewer where the input is shorter.
fn start(source: &mut impl Read) -> Result<Vec<u8>> {
    let mut start = Vec::new();
    let read = source.take(6).read_to_end(&mut start);
    read.map_err(|error| input_error(&error))?;
    Ok(start)
}

fn decoder<'a>(
    compression: Compression,
    raw: &'a mut (impl BufRead + Send),
) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(raw),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(raw)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(raw)?),
        Compression::Xz => {
            use liblzma::stream::{CONCATENATED, Stream};
            let stream = Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(raw, stream))
        }
        Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(raw)),
    })
}

fn pass_on(
    archive: &mut impl Read,
    limits: Limits,
    sender: &SyncSender<io::Result<Vec<u8>>>,
) -> Result<()> {
    let mut total = 0_u64;
    loop {
        let mut part = Vec::with_capacity(PART);
        let read = archive.by_ref().take(PART as u64).read_to_end(&mut part);
        read.map_err(|error| input_error(&error))?;
        if part.is_empty() {
            return Ok(());
        }
        total = total.saturating_add(part.len() as u64);
        // Names and padding may come on top of what the files have.
        if total > limits.size_max.saturating_mul(2).saturating_add(limits.meta_max) {
            return Err(Error::Corrupt {
                what: "unpacks to more than the bound allows".into(),
                at: "archive".into(),
            });
        }
        // The other side may have seen enough, for an error of its own.
        if sender.send(Ok(part)).is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn unpacked(bytes: &[u8]) -> Result<(Vec<u8>, Source)> {
        unpack(bytes, Limits::default(), |input| {
            let mut all = Vec::new();
            input.read_to_end(&mut all).map_err(|error| input_error(&error))?;
            Ok(all)
        })
    }

    fn compressed(compression: Compression, bytes: &[u8]) -> Vec<u8> {
        match compression {
            Compression::None => bytes.to_vec(),
            Compression::Gzip => {
                let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                to.write_all(bytes).unwrap();
                to.finish().unwrap()
            }
            Compression::Zstd => {
                let mut to = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
                to.include_checksum(true).unwrap();
                to.write_all(bytes).unwrap();
                to.finish().unwrap()
            }
            Compression::Xz => {
                let mut to = liblzma::write::XzEncoder::new(Vec::new(), 1);
                to.write_all(bytes).unwrap();
                to.finish().unwrap()
            }
            Compression::Bzip2 => {
                let mut to = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
                to.write_all(bytes).unwrap();
                to.finish().unwrap()
            }
        }
    }

    const ALL: [Compression; 5] = [
        Compression::None,
        Compression::Gzip,
        Compression::Zstd,
        Compression::Xz,
        Compression::Bzip2,
    ];

    #[test]
    fn each_compression_is_found_and_unpacked_member_by_member() {
        let text = b"layer ".repeat(10_000);
        for compression in ALL {
            let blob = compressed(compression, &text);
            let (all, source) = unpacked(&blob).unwrap();
            assert!(all == text, "{compression}");
            assert_eq!(source.compression, compression);
            assert_eq!((source.blob, source.blob_size), (Digest::of(&blob), blob.len() as u64));
            assert_eq!((source.diff, source.diff_size), (Digest::of(&text), text.len() as u64));
            let twice = [&blob[..], &blob[..]].concat();
            assert!(unpacked(&twice).unwrap().0 == text.repeat(2), "{compression}");
        }
    }

    #[test]
    fn what_is_cut_off_or_damaged_is_an_error() {
        let text: Vec<u8> = (0..20_000_u32).flat_map(u32::to_le_bytes).collect();
        for compression in &ALL[1..] {
            let blob = compressed(*compression, &text);
            assert!(unpacked(&blob[..blob.len() / 2]).is_err(), "{compression}");
            let mut damaged = blob;
            let middle = damaged.len() / 2;
            damaged[middle] ^= 0x10;
            damaged[middle + 1] ^= 0xff;
            assert!(unpacked(&damaged).is_err(), "{compression}");
        }
    }

    #[test]
    fn a_bomb_stops_at_the_bound() {
        let limits = Limits { size_max: 1 << 16, meta_max: 0, ..Limits::default() };
        for compression in ALL {
            let bomb = compressed(compression, &vec![0; 4 << 20]);
            let mut seen = 0;
            let result = unpack(&bomb[..], limits, |input| {
                let mut buffer = [0; 4096];
                loop {
                    match input.read(&mut buffer).map_err(|error| input_error(&error))? {
                        0 => return Ok(()),
                        got => seen += got,
                    }
                }
            });
            assert!(result.is_err(), "{compression}");
            assert!(seen <= 1 << 20, "{compression}: {seen}");
        }
    }

    #[test]
    fn a_consumer_that_gives_up_ends_the_producer() {
        let endless = io::repeat(0);
        let result = unpack(endless, Limits::default(), |_| {
            Err::<(), _>(Error::invalid("test", "had enough"))
        });
        assert_eq!(result.unwrap_err().to_string(), "test: had enough");
    }
}
