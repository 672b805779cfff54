//! Which layer a pair of BuildKit's mount descriptions differs by. Pure, but for [`check`].
//!
//! # Source
//! BuildKit, util/overlay: mounts whose difference cannot be told from one upper directory are for
//! its walking differ, and whatever is not known to be harmless makes them so.

use serde::Deserialize;

use super::target::is_directory;
use super::view::{self, Stack};
use crate::error::Result;

/// A mount as containerd describes it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    #[serde(rename = "type", alias = "Type")]
    pub kind: String,
    /// Where it comes from.
    #[serde(default, alias = "Source")]
    pub source: String,
    /// Its options.
    #[serde(default, alias = "Options")]
    pub options: Vec<String>,
}

/// Returns the layers of `upper`, topmost first: the first is what it has more than `lower`.
///
/// # Errors
/// A sentence on why the difference is not one layer.
pub fn layers(lower: &[Mount], upper: &[Mount]) -> std::result::Result<Vec<String>, String> {
    match (lower, upper) {
        ([], [upper]) => match upper.kind.as_str() {
            "bind" if !upper.source.is_empty() => Ok(vec![upper.source.clone()]),
            "bind" => Err("the bind mount has no source".to_owned()),
            other => Err(format!("a layer without parent is of type {other}, not bind")),
        },
        ([lower], [upper]) => {
            let beneath = match lower.kind.as_str() {
                "bind" => vec![lower.source.clone()],
                "overlay" => overlay(&lower.options)?,
                other => return Err(format!("the parent is of type {other}")),
            };
            if upper.kind != "overlay" {
                return Err(format!("the layer is of type {}, not overlay", upper.kind));
            }
            let layers = overlay(&upper.options)?;
            match layers.split_first() {
                Some((_, rest)) if rest == beneath => Ok(layers),
                Some((_, rest)) if rest.len() == beneath.len() => {
                    Err("the two are not over the same layers".to_owned())
                }
                _ => Err("the layer does not have one layer more than its parent".to_owned()),
            }
        }
        _ => Err("more than one mount on a side".to_owned()),
    }
}

/// Returns the layers that options of an overlay mount name, topmost first.
fn overlay(options: &[String]) -> std::result::Result<Vec<String>, String> {
    let mut upper = None;
    let mut lowers = Vec::new();
    for option in options {
        if let Some(dir) = option.strip_prefix("upperdir=") {
            upper = Some(dir.to_owned());
        } else if let Some(dirs) = option.strip_prefix("lowerdir=") {
            lowers = dirs.split(':').map(str::to_owned).collect();
        } else if !(option.starts_with("workdir=")
            || option.starts_with("redirect_dir=")
            || matches!(option.as_str(), "index=off" | "userxattr"))
        {
            return Err(format!("option {option} is not known"));
        }
    }
    Ok(upper.into_iter().chain(lowers).collect())
}

/// Looks for directories of the layer whose lower part lies elsewhere.
///
/// # Errors
/// Those of the system calls; within, a sentence if there is one.
pub fn check(stack: &Stack) -> Result<std::result::Result<(), String>> {
    let Some(top) = stack.top() else { return Ok(Ok(())) };
    let mut todo = vec![std::sync::Arc::clone(top)];
    while let Some(dir) = todo.pop() {
        if view::dir_marks(&dir)?.redirect.is_some_and(|redirect| !redirect.is_empty()) {
            return Ok(Err(format!("{}: has a redirect", dir.describe(b""))));
        }
        let mut names = Vec::new();
        dir.list(|name, _, kind| {
            use rustix::fs::FileType;
            if matches!(kind, FileType::Directory | FileType::Unknown) {
                names.push(name.to_vec());
            }
            Ok(())
        })?;
        for name in names {
            if let Some(stat) = dir.find(&name)?.filter(is_directory) {
                todo.push(dir.child(&name, &stat));
            }
        }
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            kind: kind.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        }
    }

    #[test]
    fn table() {
        let bind = mount("bind", "/1", &["rbind", "ro"]);
        let over = |options: &[&str]| mount("overlay", "overlay", options);
        let two = over(&["index=off", "workdir=/w", "upperdir=/2", "lowerdir=/1"]);
        let three = over(&["userxattr", "redirect_dir=off", "upperdir=/3", "lowerdir=/2:/1"]);
        let ok = |layers: &[&str]| Ok(layers.iter().map(|&layer| layer.to_owned()).collect());
        for (lower, upper, expected) in [
            (vec![], vec![bind.clone()], ok(&["/1"])),
            (vec![bind.clone()], vec![two.clone()], ok(&["/2", "/1"])),
            (vec![over(&["lowerdir=/2:/1"])], vec![three.clone()], ok(&["/3", "/2", "/1"])),
            (vec![two.clone()], vec![three.clone()], ok(&["/3", "/2", "/1"])),
            (vec![], vec![two.clone()], Err(())),
            (vec![bind.clone()], vec![bind.clone()], Err(())),
            (vec![bind.clone()], vec![three.clone()], Err(())),
            (vec![bind.clone()], vec![over(&["upperdir=/2", "lowerdir=/9"])], Err(())),
            (vec![bind.clone()], vec![over(&["upperdir=/2", "lowerdir=/1", "xino=on"])], Err(())),
            (vec![mount("fuse3.fuse-overlayfs", "", &[])], vec![two.clone()], Err(())),
            (vec![bind.clone(), bind.clone()], vec![two.clone()], Err(())),
            (vec![], vec![], Err(())),
        ] {
            let found = layers(&lower, &upper);
            assert_eq!(found.clone().map_err(drop), expected, "{lower:?} {upper:?} {found:?}");
        }
    }
}
