//! SHA-256 digests as OCI spells them, and readers and writers that compute one on the way.

use std::fmt;
use std::io::{self, Read, Write};

use sha2::Digest as _;

use crate::error::{Error, Result};

/// A SHA-256 digest; printed as `sha256:HEX`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Returns the digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// Reads `sha256:HEX`; the prefix may be missing.
    ///
    /// # Errors
    /// `EINVAL` for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text).as_bytes();
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let mut digest = [0; 32];
        let (pairs, rest) = hex.as_chunks::<2>();
        let is_whole = pairs.len() == digest.len() && rest.is_empty();
        for (byte, [high, low]) in digest.iter_mut().zip(pairs.iter().copied()).filter(|_| is_whole)
        {
            let (Some(high), Some(low)) = (digit(high), digit(low)) else { return Err(not(text)) };
            *byte = high << 4 | low;
        }
        if is_whole { Ok(Self(digest)) } else { Err(not(text)) }
    }

    /// Returns the 64 hexadecimal digits alone.
    pub fn hex(&self) -> String {
        let digit = |value: u8| char::from_digit(value.into(), 16);
        self.0.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).flatten().collect()
    }
}

fn not(text: &str) -> Error {
    let shown: String = text.chars().take(100).collect();
    Error::invalid(
        shown.escape_debug().to_string(),
        "is no digest; give sha256: and 64 hexadecimal digits",
    )
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A reader or writer that knows digest and size of what went through it.
pub struct Digester<T> {
    inner: T,
    hash: sha2::Sha256,
    size: u64,
}

impl<T> fmt::Debug for Digester<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Digester").field("size", &self.size).finish_non_exhaustive()
    }
}

impl<T> Digester<T> {
    /// Puts itself before `inner`.
    pub fn new(inner: T) -> Self {
        Self { inner, hash: sha2::Sha256::new(), size: 0 }
    }

    /// Returns the digest and the bytes that went through.
    pub fn finish(self) -> (Digest, u64) {
        (Digest(self.hash.finalize().into()), self.size)
    }

    /// Returns what it stood before, and the digest of what went through.
    pub fn into_parts(self) -> (T, Digest) {
        (self.inner, Digest(self.hash.finalize().into()))
    }

    /// Returns what it stood before.
    pub fn inner(&mut self) -> &mut T {
        &mut self.inner
    }

    fn count(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
    }
}

impl<T: Read> Read for Digester<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.count(buffer.get(..got).unwrap_or_default());
        Ok(got)
    }
}

impl<T: Write> Write for Digester<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let put = self.inner.write(bytes)?;
        self.count(bytes.get(..put).unwrap_or_default());
        Ok(put)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spelling() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), empty);
        assert_eq!(Digest::parse(empty).unwrap(), Digest::of(b""));
        assert_eq!(Digest::parse(&empty[7..]).unwrap(), Digest::of(b""));
        for wrong in
            ["", "sha256:", &empty[..70], &empty.to_uppercase(), "sha512:00", &format!("{empty}00")]
        {
            assert!(Digest::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_goes_through_is_counted() {
        let mut digester = Digester::new(&b"abc"[..]);
        let mut text = String::new();
        digester.read_to_string(&mut text).unwrap();
        assert_eq!(digester.finish(), (Digest::of(b"abc"), 3));
    }
}
