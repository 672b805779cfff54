//! Names under which some filesystems keep a file that was removed while it was open. Pure.

/// Returns whether `name` is one that an NFS client (`.nfs`) or libfuse (`.fuse_hidden`) makes up.
pub fn is_name(name: &[u8]) -> bool {
    [(&b".nfs"[..], 24), (b".fuse_hidden", 16)].into_iter().any(|(prefix, digits)| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| rest.len() >= digits && rest.iter().all(u8::is_ascii_hexdigit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, expected) in [
            (&b".nfs000000000000a1b200000001"[..], true),
            (b".nfs00000000000a1b2c0000000a1", true),
            (b".fuse_hidden0000000400000001", true),
            (b".nfs", false),
            (b".nfsd", false),
            (b".nfs00000000", false),
            (b".nfs000000000000a1b20000000g", false),
            (b".fuse_hidden", false),
            (b"nfs000000000000a1b200000001", false),
        ] {
            assert_eq!(is_name(name), expected, "{}", String::from_utf8_lossy(name));
        }
    }
}
