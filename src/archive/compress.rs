//! An archive on its way into a file: compressed, with the digests before and after.
//!
//! The bytes of an archive come out the same each time, so its digest does too, as long as the
//! library that compresses is the same.

use std::io::{self, Write};

use super::digest::{Digest, Digester};
use super::write::output_error;
use crate::error::Result;

/// How an archive is compressed when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Packing {
    /// Not at all.
    #[default]
    Plain,
    /// gzip, which every consumer of images reads.
    Gzip,
    /// zstd: smaller in less time, read by Docker 23, podman 2.1, containerd 1.5 and later ones.
    Zstd,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Digest of the archive itself.
    pub diff: Digest,
    /// Digest of the file.
    pub blob: Digest,
    /// Bytes of the file.
    pub size: u64,
}

/// Compresses what is written to it.
pub struct Packer<W: Write> {
    inner: Inner<W>,
}

enum Inner<W: Write> {
    Plain(Digester<W>),
    Gzip(Box<Digester<flate2::write::GzEncoder<Digester<W>>>>),
    Zstd(Digester<zstd::Encoder<'static, Digester<W>>>),
}

impl<W: Write> std::fmt::Debug for Packer<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl<W: Write> Packer<W> {
    /// Writes to `output`.
    ///
    /// # Errors
    /// `ENOMEM`, for tables of zstd.
    pub fn new(output: W, packing: Packing) -> Result<Self> {
        let output = Digester::new(output);
        let inner = match packing {
            Packing::Plain => Inner::Plain(output),
            Packing::Gzip => {
                let level = flate2::Compression::default();
                Inner::Gzip(Box::new(Digester::new(flate2::write::GzEncoder::new(output, level))))
            }
            Packing::Zstd => {
                let encoder = zstd::Encoder::new(output, zstd::DEFAULT_COMPRESSION_LEVEL);
                Inner::Zstd(Digester::new(encoder.map_err(|error| output_error(&error))?))
            }
        };
        Ok(Self { inner })
    }

    /// Writes what is left, and returns what was written.
    ///
    /// # Errors
    /// Those of writing.
    pub fn finish(self) -> Result<Packed> {
        let written = |error: io::Error| output_error(&error);
        let (diff, mut output) = match self.inner {
            Inner::Plain(mut output) => {
                output.flush().map_err(written)?;
                let (blob, size) = output.finish();
                return Ok(Packed { diff: blob, blob, size });
            }
            Inner::Gzip(digester) => {
                let (encoder, diff) = digester.into_parts();
                (diff, encoder.finish().map_err(written)?)
            }
            Inner::Zstd(digester) => {
                let (encoder, diff) = digester.into_parts();
                (diff, encoder.finish().map_err(written)?)
            }
        };
        output.flush().map_err(written)?;
        let (blob, size) = output.finish();
        Ok(Packed { diff, blob, size })
    }
}

impl<W: Write> Write for Packer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.inner {
            Inner::Plain(output) => output.write(bytes),
            Inner::Gzip(output) => output.write(bytes),
            Inner::Zstd(output) => output.write(bytes),
        }
    }

    /// Does nothing: a flush in the middle would make the output larger.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::Limits;
    use crate::archive::input::unpack;

    #[test]
    fn what_is_packed_is_unpacked_with_the_digests_that_were_told() {
        let data: Vec<u8> = (0..1_000_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
            let mut blob = Vec::new();
            let mut packer = Packer::new(&mut blob, packing).unwrap();
            packer.write_all(&data).unwrap();
            let packed = packer.finish().unwrap();
            assert_eq!(packed.blob, Digest::of(&blob), "{packing:?}");
            assert_eq!(packed.size, blob.len() as u64, "{packing:?}");
            assert_eq!(packing == Packing::Plain, packed.blob == packed.diff);
            let mut found = Vec::new();
            let ((), source) = unpack(&blob[..], Limits::default(), |input| {
                input.read_to_end(&mut found).map_err(|error| output_error(&error))?;
                Ok(())
            })
            .unwrap();
            assert!(found == data && source.diff == packed.diff, "{packing:?}");
        }
    }
}
