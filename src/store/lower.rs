//! The files that name what lies beneath a layer: `lower` and `lower-layers`. Pure.
//!
//! `lower` is `l/LINK:l/LINK...`, the parent first; `lower-layers` is `ID:ID...` in the same order.

use crate::error::{Error, Result};
use crate::store::layout::{LINK_DIR, LayerId, LinkId};

/// Parses `lower`.
///
/// # Errors
/// `Corrupt` if an item is not `l/` and a link id; a file cut short by a crash is that.
pub fn parse_lower(text: &[u8], at: &str) -> Result<Vec<LinkId>> {
    let items = text.trim_ascii_end().split(|&byte| byte == b':');
    items
        .map(|item| {
            item.strip_prefix(b"l/").and_then(LinkId::parse).ok_or_else(|| Error::Corrupt {
                what: "is no list of l/LINK; lamina store check --repair may mend it".into(),
                at: format!("{at}/lower").into(),
            })
        })
        .collect()
}

/// Parses `lower-layers`.
///
/// # Errors
/// `Corrupt` if an item is no layer id.
pub fn parse_lower_layers(text: &[u8], at: &str) -> Result<Vec<LayerId>> {
    let items = text.trim_ascii_end().split(|&byte| byte == b':');
    items
        .map(|item| {
            LayerId::from_bytes(item).ok_or_else(|| Error::Corrupt {
                what: "is no list of layers; lamina store check --repair may mend it".into(),
                at: format!("{at}/lower-layers").into(),
            })
        })
        .collect()
}

/// Prints `lower` for a child of the layer that has `parent`, beneath which `rest` lies.
pub fn print_lower(parent: &LinkId, rest: &[LinkId]) -> Vec<u8> {
    let items = std::iter::once(parent).chain(rest);
    join(items.map(|link| format!("{LINK_DIR}/{link}")))
}

/// Prints `lower-layers` for a child of `parent`, beneath which `rest` lies.
pub fn print_lower_layers(parent: &LayerId, rest: &[LayerId]) -> Vec<u8> {
    join(std::iter::once(parent).chain(rest).map(ToString::to_string))
}

fn join(items: impl Iterator<Item = String>) -> Vec<u8> {
    items.collect::<Vec<_>>().join(":").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAA";
    const B: &str = "2345672345672345672345672B";

    #[test]
    fn a_child_names_its_parent_and_then_what_the_parent_names() {
        let links = parse_lower(format!("l/{A}:l/{B}").as_bytes(), "x").unwrap();
        assert_eq!(links.len(), 2);
        let parent = LinkId::parse(B.as_bytes()).unwrap();
        let text = print_lower(&parent, &links);
        assert_eq!(text, format!("l/{B}:l/{A}:l/{B}").into_bytes());
        assert_eq!(parse_lower(&text, "x").unwrap().len(), 3);
    }

    #[test]
    fn what_a_crash_leaves_is_named() {
        for text in ["", ":", "l/", "l/short", &format!("l/{A}:"), A, "l/../../../x"] {
            let message = parse_lower(text.as_bytes(), "ID").unwrap_err().to_string();
            assert!(message.starts_with("ID/lower: is no list"), "{text}: {message}");
        }
        for text in ["", "a::b", "../x", "l", "a/b"] {
            assert!(parse_lower_layers(text.as_bytes(), "ID").is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            drop(parse_lower(&bytes, "x"));
            drop(parse_lower_layers(&bytes, "x"));
        }

        #[test]
        fn printed_lists_are_read_back(ids in proptest::collection::vec("[a-z0-9]{2,9}", 1..9)) {
            let ids: Vec<LayerId> =
                ids.iter().map(|id| LayerId::from_bytes(id.as_bytes()).unwrap()).collect();
            let (parent, rest) = ids.split_first().unwrap();
            let text = print_lower_layers(parent, rest);
            prop_assert_eq!(parse_lower_layers(&text, "x").unwrap(), ids);
        }
    }
}
