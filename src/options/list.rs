//! The grammar of a list: where an option ends, where a layer ends, and what a backslash does.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::show_path;
use crate::error::{Error, Result};

/// Names whose value may stand in double quotes and hold commas then.
const QUOTED: &[&[u8]] = &[b"context", b"fscontext", b"defcontext", b"rootcontext"];

/// Splits a list at its commas, leaving out empty items; escapes stay as they are.
pub(super) fn split_items(list: &[u8]) -> Vec<&[u8]> {
    let mut items = Vec::new();
    let mut rest = list;
    while !rest.is_empty() {
        let end = item_end(rest);
        let (item, tail) = rest.split_at(end);
        if !item.is_empty() {
            items.push(item);
        }
        rest = tail.get(1..).unwrap_or_default();
    }
    items
}

/// Returns where the first item of `list` ends: at a comma, or at the end.
fn item_end(list: &[u8]) -> usize {
    for key in QUOTED {
        let Some(value) = list.strip_prefix(*key).and_then(|tail| tail.strip_prefix(b"=\"")) else {
            continue;
        };
        if let Some(quote) = value.iter().position(|&byte| byte == b'"') {
            let end = key.len() + 2 + quote + 1;
            if list.get(end).is_none_or(|&byte| byte == b',') {
                return end;
            }
        }
    }
    let mut escaped = false;
    for (at, &byte) in list.iter().enumerate() {
        if escaped {
            escaped = false;
        } else if byte == b'\\' {
            escaped = true;
        } else if byte == b',' {
            return at;
        }
    }
    list.len()
}

/// Splits `lowerdir` at its colons and takes the escapes away; returns the lowers, and the data-only
/// layers, which follow two colons each.
///
/// A colon at either end is skipped: engines join lists that may be empty.
pub(super) fn parse_lowers(value: &[u8]) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let refuse = |why: &'static str| Err(Error::invalid(format!("lowerdir={}", text(value)), why));
    let (mut lowers, mut data) = (Vec::new(), Vec::new());
    let mut is_data = false;
    let mut current = Vec::new();
    let mut bytes = value.iter().peekable();
    loop {
        let byte = bytes.next();
        match byte {
            Some(b'\\') => {
                current.extend(bytes.next());
                continue;
            }
            Some(b':') | None => {}
            Some(&byte) => {
                current.push(byte);
                continue;
            }
        }
        if !current.is_empty() {
            let list = if is_data { &mut data } else { &mut lowers };
            list.push(PathBuf::from(OsString::from_vec(std::mem::take(&mut current))));
        }
        if byte.is_none() {
            return Ok((lowers, data));
        }
        if bytes.next_if(|byte| **byte == b':').is_some() {
            if lowers.is_empty() {
                return refuse(
                    "begins with a data-only layer (after ::); name a lower layer first",
                );
            }
            is_data = true;
        } else if is_data && bytes.peek().is_some() {
            return refuse("has one colon after ::; data-only layers follow two colons each");
        }
        if bytes.peek() == Some(&&b':') {
            return refuse("has three colons in a row; separate layers by one or two");
        }
    }
}

/// Returns the value of an option that needs one.
pub(super) fn needed<'a>(key: &str, value: Option<&'a [u8]>) -> Result<&'a [u8]> {
    match value {
        Some(value) if !value.is_empty() => Ok(value),
        // An empty list resets the layers, as fsconfig does.
        Some(value) if key == "lowerdir" => Ok(value),
        _ => Err(Error::invalid(key.to_owned(), format!("needs a value; write {key}=VALUE"))),
    }
}

/// Returns the value of an option that names a path, escapes taken away.
pub(super) fn path(key: &str, value: Option<&[u8]>) -> Result<PathBuf> {
    let value = needed(key, value)?;
    let mut plain = Vec::with_capacity(value.len());
    let mut bytes = value.iter();
    while let Some(&byte) = bytes.next() {
        if byte == b'\\' {
            plain.extend(bytes.next());
        } else {
            plain.push(byte);
        }
    }
    if plain.is_empty() {
        return Err(Error::invalid(key.to_owned(), format!("needs a value; write {key}=VALUE")));
    }
    Ok(PathBuf::from(OsString::from_vec(plain)))
}

/// Returns the label of an option that names one, in its quotes if it has them, without a backslash at
/// its end that takes the meaning from nothing.
///
/// # Errors
/// `Invalid` for a quote that does not end: more options may have been meant to be in it.
pub(super) fn label<'a>(key: &str, value: &'a [u8]) -> Result<&'a [u8]> {
    if let Some(quoted) = value.strip_prefix(b"\"") {
        return match quoted.ends_with(b"\"") {
            true => Ok(value),
            false => Err(Error::invalid(
                format!("{key}={}", text(value)),
                "has a quote that does not end; close it, or leave it out",
            )),
        };
    }
    let backslashes = value.iter().rev().take_while(|byte| **byte == b'\\').count();
    needed(key, value.get(..value.len() - backslashes % 2))
}

/// Puts a backslash before each of `special`.
pub(super) fn escape(value: &[u8], special: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(value.len());
    for &byte in value {
        if special.contains(&byte) {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    escaped
}

/// Returns bytes as one line for a message.
pub(super) fn text(bytes: &[u8]) -> String {
    show_path(Path::new(OsStr::from_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::super::MountOptions;
    use super::super::tests::{parse, paths, refusal};

    #[test]
    fn lowerdir_follows_the_kernels_escapes() {
        for (value, expected) in [
            ("/a", &["/a"][..]),
            ("/a:/b:c", &["/a", "/b", "c"]),
            (r"/a\:b:/c", &["/a:b", "/c"]),
            (r"/a\\:/b", &[r"/a\", "/b"]),
            (r"/a\,b:/c", &["/a,b", "/c"]),
            (r"/a\b", &["/ab"]),
            (r"/a\:\:b", &["/a::b"]),
            (":/a:", &["/a"]),
            ("/l/LINK/../diff1:/l/X", &["/l/LINK/../diff1", "/l/X"]),
            ("/a=b", &["/a=b"]),
            ("/a\\", &["/a"]),
            ("", &[]),
        ] {
            assert_eq!(parse(&format!("lowerdir={value}")).lowers, paths(expected), "{value}");
        }
        assert_eq!(parse("lowerdir=/a,lowerdir+=/b:c").lowers, paths(&["/a", "/b:c"]));
        assert_eq!(parse("lowerdir=/a,lowerdir=/b").lowers, paths(&["/b"]));
    }

    #[test]
    fn data_only_layers_follow_two_colons_each() {
        for (list, lowers, data) in [
            ("lowerdir=/a::/d", &["/a"][..], &["/d"][..]),
            ("lowerdir=/a:/b::/d::/e", &["/a", "/b"], &["/d", "/e"]),
            (r"lowerdir=/a\:::/d\:\:e", &["/a:"], &["/d::e"]),
            ("lowerdir=/a::/d:", &["/a"], &["/d"]),
            ("lowerdir=/a,datadir+=/d,datadir+=/e:f", &["/a"], &["/d", "/e:f"]),
            ("datadir+=/d,lowerdir=/a", &["/a"], &[]),
        ] {
            let options = parse(list);
            assert_eq!((options.lowers, options.data), (paths(lowers), paths(data)), "{list}");
        }
        for list in ["lowerdir=::/d", "lowerdir=/a::/d:/e", "lowerdir=/a:::/d"] {
            let message = refusal(list);
            assert!(message.starts_with(list) && message.contains("; "), "{message}");
        }
    }

    #[test]
    fn quoted_context_holds_its_commas() {
        let list = r#"lowerdir=/a,context="system_u:object_r:x:s0:c1,c2",volatile"#;
        let (options, _) = MountOptions::parse(&[list]).unwrap();
        assert_eq!(options.labels, [br#"context="system_u:object_r:x:s0:c1,c2""#]);
        assert!(options.volatile);
        // An unclosed quote does not swallow the list, nor what is printed after it.
        assert!(refusal("context=\"a,b").starts_with("context=\"a: has a quote"));
        assert!(refusal("context=\"").starts_with("context=\": has a quote"));
        for (list, label) in [(r"context=a\", "context=a"), (r"context=a\\", r"context=a\\")] {
            assert_eq!(parse(list).labels, [label.as_bytes()], "{list}");
        }
    }
}
