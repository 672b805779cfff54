//! Paths in archives, made plain and kept beneath the layer's root. Pure.

use crate::marks;

/// Returns a path without empty and `.` components, `..` resolved, and no slash at either end.
/// The layer's root is the empty path; one slash in front of a path means nothing.
///
/// # Errors
/// A sentence if it leads out of the layer, has a NUL, or more than `depth_max` components.
pub fn clean(path: &[u8], depth_max: usize) -> Result<Vec<u8>, &'static str> {
    let mut components: Vec<&[u8]> = Vec::new();
    if path.contains(&0) {
        return Err("has a name with a NUL in it");
    }
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop().ok_or("leads out of the layer")?;
            }
            name => components.push(name),
        }
    }
    if components.len() > depth_max {
        return Err("lies deeper than the bound allows");
    }
    Ok(components.join(&b'/'))
}

/// Tells whether the target of the symlink at `path`, a clean one, names something above the root
/// of the layer. An absolute target begins at the directory of the link here, as podman has it.
pub fn leads_out(path: &[u8], target: &[u8]) -> bool {
    let mut depth = components(parent(path)).count();
    for component in target.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if depth == 0 => return true,
            b".." => depth -= 1,
            _ => depth += 1,
        }
    }
    false
}

/// Splits a clean path into directory and name; both empty for the root.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
        None => (b"", path),
    }
}

/// The directory that a clean path lies in.
pub fn parent(path: &[u8]) -> &[u8] {
    split(path).0
}

/// The components of a clean path; none for the root.
pub fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty())
}

/// Joins a clean path and a name.
pub fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}

/// What an entry with a clean path does to a layer, going by its name alone.
#[derive(Debug, PartialEq, Eq)]
pub enum Meaning<'a> {
    /// Puts an object there.
    Object,
    /// Hides the name in this directory in lower layers.
    Whiteout(&'a [u8], &'a [u8]),
    /// Hides all that lower layers have in this directory.
    Opaque(&'a [u8]),
    /// Nothing: what AUFS kept for itself.
    Private,
}

/// Tells what an entry means.
///
/// # Errors
/// A sentence for a reserved name that means nothing.
pub fn meaning(path: &[u8]) -> Result<Meaning<'_>, &'static str> {
    const PRIVATE: &[u8] = b".wh..wh.";
    let (dir, name) = split(path);
    let above = components(dir).find(|name| marks::is_reserved_name(name));
    if let Some(above) = above {
        let is_private = above.starts_with(PRIVATE);
        return if is_private { Ok(Meaning::Private) } else { Err("lies in a whiteout") };
    }
    if name == marks::OPAQUE_NAME {
        return Ok(Meaning::Opaque(dir));
    }
    if name.starts_with(PRIVATE) {
        return Ok(Meaning::Private);
    }
    if !marks::is_reserved_name(name) {
        return Ok(Meaning::Object);
    }
    let hidden = marks::whiteout_target(name).ok_or("is a whiteout of no name")?;
    Ok(Meaning::Whiteout(dir, hidden))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_are_made_plain() {
        for (path, plain) in [
            ("a", Ok("a")),
            ("", Ok("")),
            ("/", Ok("")),
            ("./", Ok("")),
            ("./a//b/./c/", Ok("a/b/c")),
            ("/a", Ok("a")),
            ("a/../b", Ok("b")),
            ("a/b/../../c", Ok("c")),
            ("..", Err("leads out of the layer")),
            ("/..", Err("leads out of the layer")),
            ("a/../../b", Err("leads out of the layer")),
            ("...", Ok("...")),
            ("a\0b", Err("has a name with a NUL in it")),
            ("a/b/c/d/e", Err("lies deeper than the bound allows")),
        ] {
            let found = clean(path.as_bytes(), 4);
            assert_eq!(found, plain.map(|plain| plain.as_bytes().to_vec()), "{path}");
        }
    }

    #[test]
    fn link_targets() {
        for (path, target, out) in [
            ("a", "b", false),
            ("a", "../b", true),
            ("d/a", "../b", false),
            ("d/a", "../../b", true),
            ("d/a", "x/../../b", false),
            ("a", "/etc/passwd", false),
            ("a", "/../etc", true),
            ("a", "", false),
        ] {
            assert_eq!(leads_out(path.as_bytes(), target.as_bytes()), out, "{path} {target}");
        }
    }

    #[test]
    fn meanings() {
        use Meaning::{Object, Opaque, Private, Whiteout};
        for (path, expected) in [
            ("a", Ok(Object)),
            ("a/.wh.b", Ok(Whiteout(b"a", b"b"))),
            (".wh.b", Ok(Whiteout(b"", b"b"))),
            (".wh..b", Ok(Whiteout(b"", b".b"))),
            (".wh.", Err("is a whiteout of no name")),
            (".wh..", Err("is a whiteout of no name")),
            (".wh...", Err("is a whiteout of no name")),
            ("a/.wh..wh..opq", Ok(Opaque(b"a"))),
            (".wh..wh..opq", Ok(Opaque(b""))),
            (".wh..wh.plnk", Ok(Private)),
            (".wh..wh.plnk/7.8", Ok(Private)),
            (".wh..wh.orph/x/y", Ok(Private)),
            (".wh..wh..opq/x", Ok(Private)),
            (".wh.a/b", Err("lies in a whiteout")),
        ] {
            assert_eq!(meaning(path.as_bytes()), expected, "{path}");
        }
    }

    proptest! {
        #[test]
        fn nothing_clean_leads_out(path in "([a.]{0,3}/?){0,8}") {
            if let Ok(plain) = clean(path.as_bytes(), 100) {
                prop_assert!(!plain.starts_with(b"/") && !plain.ends_with(b"/"));
                for name in components(&plain) {
                    prop_assert!(!matches!(name, b"" | b"." | b".."));
                }
                let joined = join(split(&plain).0, split(&plain).1);
                prop_assert_eq!(clean(&plain, 100), Ok(joined));
            }
        }
    }
}
