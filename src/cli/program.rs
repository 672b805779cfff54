//! The command line of a mount program, `PROG [-f] [-d] -o OPTS... [SOURCE] TARGET`, as container
//! engines, mount.fuse3 and mount(8) write it: options anywhere, bundled or not. Pure.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::error::{Error, Result};
use crate::options::show_path;

/// What the command line asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// To be told how to use it.
    Help,
    /// To be told the version.
    Version,
    /// To mount.
    Mount(Arguments),
}

/// Arguments of a mount.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Arguments {
    /// `-f`: stay in the foreground.
    pub foreground: bool,
    /// `-d`: log each request.
    pub debug: bool,
    /// `-s`: one thread.
    pub single_thread: bool,
    /// Each `-o`.
    pub lists: Vec<OsString>,
    /// What mount(8) calls the device; shown in the mount table.
    pub source: Option<OsString>,
    /// Where to mount.
    pub target: OsString,
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// `Invalid`: an unknown flag, `-o` without a value, no target, or too many.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Request> {
    let mut parsed = Arguments::default();
    let mut positional = Vec::new();
    let mut arguments = arguments.into_iter();
    let mut only_positional = false;
    while let Some(argument) = arguments.next() {
        let bytes = argument.as_bytes();
        if only_positional || bytes == b"-" || !bytes.starts_with(b"-") {
            positional.push(argument);
            continue;
        }
        match bytes {
            b"--" => only_positional = true,
            b"--help" => return Ok(Request::Help),
            b"--version" => return Ok(Request::Version),
            _ if bytes.starts_with(b"--") => return Err(unknown(&argument)),
            _ => {
                let flags = bytes.iter().enumerate().skip(1);
                for (at, flag) in flags {
                    match flag {
                        b'f' => parsed.foreground = true,
                        b'd' => parsed.debug = true,
                        b's' => parsed.single_thread = true,
                        b'h' => return Ok(Request::Help),
                        b'V' => return Ok(Request::Version),
                        b'o' => {
                            let rest = bytes.get(at + 1..).unwrap_or_default();
                            let list = if rest.is_empty() {
                                arguments.next().ok_or_else(|| {
                                    Error::invalid("-o", "needs options; write -o OPT[,OPT...]")
                                })?
                            } else {
                                OsString::from_vec(rest.to_vec())
                            };
                            parsed.lists.push(list);
                            break;
                        }
                        _ => return Err(unknown(&argument)),
                    }
                }
            }
        }
    }
    let mut positional = positional.into_iter();
    match (positional.next(), positional.next(), positional.next()) {
        (Some(target), None, None) => parsed.target = target,
        (Some(source), Some(target), None) => {
            parsed.source = Some(source).filter(|source| !source.is_empty());
            parsed.target = target;
        }
        (None, ..) => {
            return Err(Error::invalid(
                "MERGED",
                "no mountpoint given; name it as the last argument",
            ));
        }
        (_, _, Some(extra)) => {
            return Err(Error::invalid(
                show_path(extra.as_ref()),
                "one argument too many; at most a source and the mountpoint are taken",
            ));
        }
    }
    Ok(Request::Mount(parsed))
}

fn unknown(argument: &OsStr) -> Error {
    Error::invalid(
        show_path(argument.as_ref()),
        "unknown flag; known are -f -d -s -o OPTS -h --help -V --version",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(line: &str) -> Result<Request> {
        parse(line.split(' ').filter(|word| !word.is_empty()).map(OsString::from))
    }

    fn mount(line: &str) -> Arguments {
        match request(line).unwrap() {
            Request::Mount(arguments) => arguments,
            other @ (Request::Help | Request::Version) => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_way_to_write_the_same_mount_is_the_same() {
        let expected = Arguments {
            foreground: true,
            debug: true,
            lists: vec!["lowerdir=/a".into()],
            target: "/m".into(),
            ..Default::default()
        };
        for line in [
            "-f -d -o lowerdir=/a /m",
            "-fd -olowerdir=/a /m",
            "-fdo lowerdir=/a /m",
            "-dfolowerdir=/a /m",
            "/m -o lowerdir=/a -f -d",
            "-f /m -d -o lowerdir=/a",
            "-fd -o lowerdir=/a -- /m",
        ] {
            assert_eq!(mount(line), expected, "{line}");
        }
    }

    #[test]
    fn lines_of_real_callers_are_understood() {
        let podman = mount("-o lowerdir=/l/A:/l/B,upperdir=/u,workdir=/w,,volatile /merged");
        assert_eq!(podman.lists, ["lowerdir=/l/A:/l/B,upperdir=/u,workdir=/w,,volatile"]);
        assert!(!podman.foreground && podman.source.is_none());
        let mount_fuse3 = mount("overlay /t -o lowerdir=/a,upperdir=/u,workdir=/w,dev,suid");
        assert_eq!(mount_fuse3.source, Some("overlay".into()));
        assert_eq!(mount_fuse3.target, "/t");
        let repeated = mount("-o lowerdir=/a -o ro,, -oprivate /m");
        assert_eq!(repeated.lists, ["lowerdir=/a", "ro,,", "private"]);
    }

    #[test]
    fn questions_are_answered_before_anything_is_missing() {
        for line in ["--version", "-V", "-f -V", "--version /m"] {
            assert_eq!(request(line).unwrap(), Request::Version, "{line}");
        }
        for line in ["--help", "-h", "-fh"] {
            assert_eq!(request(line).unwrap(), Request::Help, "{line}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (line, start) in [
            ("", "MERGED: no mountpoint"),
            ("-o lowerdir=/a", "MERGED: no mountpoint"),
            ("-o", "-o: needs options"),
            ("/m -fo", "-o: needs options"),
            ("-x /m", "-x: unknown flag"),
            ("--foo /m", "--foo: unknown flag"),
            ("a b c", "c: one argument too many"),
            ("a -- b -f", "-f: one argument too many"),
        ] {
            let message = request(line).unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        }
    }

    proptest! {
        #[test]
        fn no_line_panics(words in proptest::collection::vec("(-|--|f|o|d|h|V|=|/m){0,5}", 0..6)) {
            drop(parse(words.into_iter().map(OsString::from)));
        }
    }
}
