//! Rules about the sources that the compiler does not check. Needs no privilege and no mount.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules from the bottom up; a module imports only what stands before it. The first five are leaves.
const ORDER: &[&str] = &[
    "error",
    "idmap",
    "overrides",
    "options",
    "marks",
    "sys",
    "layer",
    "union",
    "archive",
    "fuse",
    "mount",
    "store",
    "image",
    "cli",
];
const LEAVES: usize = 5;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Every file below `dir` with one of the extensions; path relative to the repository, and text.
fn files(dir: &str, extensions: &[&str]) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut todo = vec![root().join(dir)];
    while let Some(dir) = todo.pop() {
        let Ok(children) = fs::read_dir(&dir) else { continue };
        for child in children.map(|child| child.unwrap().path()) {
            if child.is_dir() {
                if !child.ends_with("target") {
                    todo.push(child);
                }
            } else if child.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)) {
                let name = child.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.push((name, fs::read(&child).unwrap()));
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<(String, String)> {
    let found = files("src", &["rs"]);
    assert!(!found.is_empty(), "no sources below {}", root().display());
    found.into_iter().map(|(name, text)| (name, String::from_utf8(text).unwrap())).collect()
}

/// Lines with their number, without comments; a string that holds `//` loses its end, which no rule here minds.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(n, line)| (n + 1, line.split("//").next().unwrap_or_default()))
}

/// The words of a line, and for each what follows it.
fn words(line: &str) -> impl Iterator<Item = (&str, &str)> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut rest = line;
    std::iter::from_fn(move || {
        rest = &rest[rest.find(is_word)?..];
        let (word, after) = rest.split_at(rest.find(|c| !is_word(c)).unwrap_or(rest.len()));
        rest = after;
        Some((word, after))
    })
}

/// `src/union/node.rs` to `union`; none for `lib.rs` and `main.rs`, which see all.
fn module(file: &str) -> Option<&str> {
    let part = file.strip_prefix("src/")?.split('/').next()?;
    let part = part.strip_suffix(".rs").unwrap_or(part);
    (!matches!(part, "lib" | "main")).then_some(part)
}

/// The modules of this crate that a line names.
fn imports(line: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (word, after) in words(line) {
        if word != "crate" || !after.starts_with("::") {
            continue;
        }
        let after = &after[2..];
        match after.strip_prefix('{') {
            // `crate::{error::Error, sys}`: the first word of each part.
            Some(list) => {
                let list = list.split('}').next().unwrap_or_default();
                found.extend(list.split(',').filter_map(|part| Some(words(part).next()?.0)));
            }
            None => found.extend(words(after).next().map(|(word, _)| word)),
        }
    }
    found
}

fn imports_up(file: &str, text: &str) -> Vec<String> {
    let Some(own) = module(file) else { return Vec::new() };
    let rank = |name: &str| ORDER.iter().position(|module| *module == name);
    let Some(own_rank) = rank(own) else {
        return vec![format!("{file}: the module {own} has no place in the order")];
    };
    let mut problems = Vec::new();
    for (number, line) in code(text) {
        for name in imports(line) {
            let fine = match rank(name) {
                _ if name == own => true,
                // A leaf needs at most the error type, and the options have ids.
                Some(other) if own_rank < LEAVES => other == 0 || own == "options" && other < 3,
                Some(other) => other < own_rank,
                None => true,
            };
            if !fine {
                problems.push(format!("{file}:{number}: {own} imports {name}"));
            }
        }
    }
    problems
}

fn fuser_outside(file: &str, text: &str) -> Vec<String> {
    if module(file) == Some("fuse") {
        return Vec::new();
    }
    let uses = |line: &str| {
        words(line).any(|(word, after)| word == "fuser" && after.starts_with("::"))
            || line.trim_start().starts_with("use fuser")
    };
    code(text)
        .filter(|(_, line)| uses(line))
        .map(|(number, line)| format!("{file}:{number}: fuser outside src/fuse: {}", line.trim()))
        .collect()
}

fn unsafe_outside(file: &str, text: &str) -> Vec<String> {
    if module(file) == Some("sys") {
        return Vec::new();
    }
    code(text)
        .filter(|(_, line)| words(line).any(|(word, _)| word == "unsafe"))
        .map(|(number, line)| format!("{file}:{number}: unsafe outside src/sys: {}", line.trim()))
        .collect()
}

fn not_ascii(file: &str, text: &[u8]) -> Vec<String> {
    text.split(|b| *b == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_ascii())
        .map(|(n, _)| format!("{file}:{}: not ASCII", n + 1))
        .collect()
}

#[track_caller]
fn none(problems: Vec<String>) {
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn imports_point_down() {
    none(sources().iter().flat_map(|(file, text)| imports_up(file, text)).collect());
}

#[test]
fn fuser_is_used_in_fuse_only() {
    none(sources().iter().flat_map(|(file, text)| fuser_outside(file, text)).collect());
}

#[test]
fn unsafe_is_used_in_sys_only() {
    none(sources().iter().flat_map(|(file, text)| unsafe_outside(file, text)).collect());
}

#[test]
fn sources_are_ascii() {
    let mut all = files("src", &["rs"]);
    all.extend(files("fuse-tests", &["rs", "md", "toml"]));
    all.extend(files("scripts", &["sh"]));
    none(all.iter().flat_map(|(file, text)| not_ascii(file, text)).collect());
}

/// Each rule finds what it is there to find.
#[test]
fn the_rules_can_fail() {
    let found = |problems: Vec<String>| problems.len();
    assert_eq!(found(imports_up("src/sys/open.rs", "use crate::union::Node;")), 1);
    assert_eq!(found(imports_up("src/layer/mod.rs", "use crate::{sys, union::Node, fuse};")), 2);
    assert_eq!(found(imports_up("src/marks.rs", "use crate::sys::open;")), 1);
    assert_eq!(found(imports_up("src/new/mod.rs", "")), 1);
    assert_eq!(
        found(imports_up("src/union/mod.rs", "use crate::{error::Error, sys}; // crate::cli")),
        0
    );
    assert_eq!(found(fuser_outside("src/mount/mod.rs", "let s = fuser::Session::new();")), 1);
    assert_eq!(found(fuser_outside("src/mount/mod.rs", "// fuser::Session is not for us")), 0);
    assert_eq!(found(unsafe_outside("src/layer/dir.rs", "    unsafe { close(fd) }")), 1);
    assert_eq!(found(unsafe_outside("src/layer/dir.rs", "#![deny(unsafe_code)]")), 0);
    assert_eq!(found(not_ascii("src/lib.rs", "a\n\u{e9}\n".as_bytes())), 1);
}

// Of whoever runs the suites PATH may lead to one that other users cannot run.
#[test]
fn python_is_the_one_of_the_system() {
    for (name, text) in files("fuse-tests", &["rs"]) {
        let text = String::from_utf8(text).unwrap();
        for (n, line) in code(&text).filter(|_| !name.ends_with("tidy.rs")) {
            for (at, _) in line.match_indices("python3 ").chain(line.match_indices("\"python3\"")) {
                assert!(line[..at].ends_with("/usr/bin/"), "{name}:{n}: {line}");
            }
        }
    }
}

// Whoever makes a mount namespace copies every mount there is: unless they follow the originals, or are let go at once, the copies
// keep the servers of suites that run at the same time from ending.
#[test]
fn mount_namespaces_hold_no_copies_of_others() {
    let scripts = files("scripts", &["sh"]).into_iter().filter(|(name, _)| {
        // One lets go; the other is over in a moment.
        !name.ends_with("lib/frame.sh") && !name.ends_with("demo.sh")
    });
    for (name, text) in scripts.chain(files("fuse-tests", &["rs"])) {
        let text = String::from_utf8(text).unwrap();
        // Within a user namespace of its own nothing lives that others have mounted.
        let kept = |line: &&str| line.contains("--propagation") && line.contains("private");
        for line in text.lines().filter(kept).filter(|_| !name.ends_with("tidy.rs")) {
            assert!(line.contains("nsenter --user"), "{name}: {line}");
        }
    }
}
