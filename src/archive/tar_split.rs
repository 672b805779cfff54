//! The original bytes of an archive again, from what it was unpacked to and a tar-split record.
//!
//! The record, which containers/storage keeps as `ID.tar-split.gz`, has everything of the archive
//! but the data of its files. Those are taken from the layer, by path through the layers beneath:
//! the same as its driver's file getter does.
//!
//! # Source
//! vbatts/tar-split, `storage.Entry`: one JSON object a line.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::digest::{Digest, Digester};
use super::path;
use super::read::{broken, input_error};
use super::view::{Object, Stack};
use super::write::output_error;
use crate::error::{Context, Error, Result};
use crate::sys::data;

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: u32,
    #[serde(default)]
    name: String,
    #[serde(default)]
    name_raw: Option<String>,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    payload: Option<String>,
}

const FILE: u32 = 1;
const SEGMENT: u32 = 2;
/// Longest line of a record, in bytes.
const LINE_MAX: u64 = 64 << 20;
const CHUNK: usize = 256 * 1024;

/// Writes the archive that `record` tells of, and returns its digest and size.
///
/// # Errors
/// `EIO` if the record is malformed, or a file is missing or has another size than it had; those of
/// reading and writing.
pub fn rebuild(stack: &Stack, record: impl Read, output: impl Write) -> Result<(Digest, u64)> {
    let mut output = Digester::new(output);
    let mut lines = BufReader::new(record);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = lines.by_ref().take(LINE_MAX).read_until(b'\n', &mut line);
        if read.map_err(|error| input_error(&error))? == 0 {
            break;
        }
        let entry: Entry = serde_json::from_slice(&line)
            .map_err(|error| malformed(&format!("is no tar-split record: {error}")))?;
        match entry.kind {
            SEGMENT => {
                let payload = entry.payload.unwrap_or_default();
                let bytes = STANDARD.decode(payload).map_err(|error| {
                    malformed(&format!("has a segment that is damaged: {error}"))
                })?;
                put(&mut output, &bytes)?;
            }
            // A name without data, such as a directory's.
            FILE if entry.size == 0 => {}
            FILE => file(stack, &entry, &mut output)?,
            other => return Err(malformed(&format!("has an entry of unknown type {other}"))),
        }
    }
    output.flush().map_err(|error| output_error(&error))?;
    Ok(output.finish())
}

fn file(stack: &Stack, entry: &Entry, output: &mut impl Write) -> Result<()> {
    let raw = match &entry.name_raw {
        Some(raw) => STANDARD
            .decode(raw)
            .map_err(|error| malformed(&format!("has a name that is damaged: {error}")))?,
        None => entry.name.clone().into_bytes(),
    };
    let clean = path::clean(&raw, usize::MAX).map_err(|what| broken(&raw, what))?;
    let found = stack.root().map_or(Ok(None), |root| root.walk(&clean))?;
    let Some(Object::Leaf(leaf)) = found else {
        return Err(broken(&raw, "is missing in the layer"));
    };
    let file = leaf.open_data()?;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    loop {
        let got = data::read_at(file.as_fd(), &mut buffer, at)
            .at("pread", || leaf.dir.describe(&leaf.name))?;
        at += got as u64;
        if got == 0 || at > entry.size {
            break;
        }
        put(output, buffer.get(..got).unwrap_or_default())?;
    }
    if at == entry.size { Ok(()) } else { Err(broken(&raw, "has another size than it had")) }
}

fn put(output: &mut impl Write, bytes: &[u8]) -> Result<()> {
    output.write_all(bytes).map_err(|error| output_error(&error))
}

fn malformed(what: &str) -> Error {
    Error::Corrupt { what: what.to_owned().into(), at: "the tar-split record".into() }
}
