//! The driver's options, `--storage-opt KEY=VALUE` and those of storage.conf: names and meanings of
//! containers/storage's overlay driver. Pure.

use std::path::PathBuf;

use crate::error::{Error, Result};

/// Keys that are known, for the message about one that is not.
const KNOWN: &str = "mountopt, size, inodes, imagestore, additionalimagestore, \
     additionallayerstore, use_composefs, mount_program, skip_mount_home, ignore_chown_errors, \
     force_mask, sync, override_kernel_check";

/// Prefixes of the options of other drivers, which one configuration may hold beside ours.
const OTHER_DRIVERS: [&str; 7] =
    ["aufs.", "btrfs.", "devicemapper.", "dm.", "vfs.", "zfs.", "windowsfilter."];

/// Whether what a new layer holds is on disk before the layer is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Sync {
    /// Its own files are; content that others write into it is when they say so.
    #[default]
    Layer,
    /// All of the filesystem is.
    Filesystem,
}

/// A store of read-only layers by digest, `PATH[:ref]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerStore {
    /// Where it is.
    pub path: PathBuf,
    /// Whether the reference of the image is part of the path of a layer.
    pub with_reference: bool,
}

/// What the options say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DriverOptions {
    /// `mountopt`: mount options where a caller gives none.
    pub mount_options: Vec<String>,
    /// `imagestore`, `additionalimagestore`: roots of stores that are only read.
    pub image_stores: Vec<PathBuf>,
    /// `additionallayerstore`.
    pub layer_stores: Vec<LayerStore>,
    /// `mount_program`: another program that mounts.
    pub mount_program: Option<PathBuf>,
    /// `skip_mount_home`: leave the home as it is mounted.
    pub skip_mount_home: bool,
    /// `ignore_chown_errors`: owners that cannot be set are left out when a layer is unpacked.
    pub ignore_chown_errors: bool,
    /// `force_mask`: mode that everything really has; what it should have is kept in an xattr.
    pub force_mask: Option<u32>,
    /// `sync`.
    pub sync: Sync,
}

impl DriverOptions {
    /// Parses `KEY=VALUE` options; keys may begin with `overlay.`, `overlay2.` or `.`.
    ///
    /// # Errors
    /// `Invalid` for an unknown key, a value that cannot be, and what is not built yet.
    pub fn parse<S: AsRef<str>>(items: &[S]) -> Result<Self> {
        let mut options = Self::default();
        for item in items {
            options.apply(item.as_ref().trim())?;
        }
        Ok(options)
    }

    fn apply(&mut self, item: &str) -> Result<()> {
        let Some((key, value)) = item.split_once('=') else {
            return Err(Error::invalid(
                format!("storage option {item:?}"),
                format!("has no value; write KEY=VALUE, known are {KNOWN}"),
            ));
        };
        let (key, value) = (key.trim().to_ascii_lowercase(), value.trim());
        if OTHER_DRIVERS.iter().any(|prefix| key.starts_with(prefix)) {
            return Ok(());
        }
        let name = ["overlay.", "overlay2.", "."]
            .iter()
            .find_map(|prefix| key.strip_prefix(prefix))
            .unwrap_or(&key);
        let bad = |why: &str| Error::invalid(format!("storage option {item}"), why.to_owned());
        match name {
            "override_kernel_check" => (),
            "mountopt" => {
                self.mount_options =
                    value.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect();
            }
            "imagestore" | "additionalimagestore" => {
                for path in value.split(',').filter(|path| !path.is_empty()) {
                    self.image_stores.push(absolute(path).ok_or_else(|| {
                        bad("is not absolute; name each store by a path that begins with /")
                    })?);
                }
            }
            "additionallayerstore" => {
                for store in value.split(',').filter(|store| !store.is_empty()) {
                    self.layer_stores.push(
                        parse_layer_store(store)
                            .ok_or_else(|| bad("is no list of /PATH or /PATH:ref; write it so"))?,
                    );
                }
            }
            "mount_program" => {
                self.mount_program = match value {
                    "" => None,
                    path => Some(absolute(path).ok_or_else(|| {
                        bad("is not absolute; name the program by a path that begins with /")
                    })?),
                };
            }
            "skip_mount_home" => {
                self.skip_mount_home = parse_bool(value).ok_or_else(|| bad(BOOL))?;
            }
            "ignore_chown_errors" => {
                self.ignore_chown_errors = parse_bool(value).ok_or_else(|| bad(BOOL))?;
            }
            "force_mask" => {
                self.force_mask = Some(match value {
                    "shared" => 0o755,
                    "private" => 0o700,
                    octal => u32::from_str_radix(octal, 8)
                        .ok()
                        .filter(|mask| *mask <= 0o7777)
                        .ok_or_else(|| bad("is no mode; use shared, private or octal digits"))?,
                });
            }
            "sync" => {
                self.sync = match value {
                    "none" | "" => Sync::Layer,
                    "filesystem" => Sync::Filesystem,
                    _ => return Err(bad("is not known; use none or filesystem")),
                };
            }
            "use_composefs" => {
                if parse_bool(value).ok_or_else(|| bad(BOOL))? {
                    return Err(bad("composefs is not supported yet; leave the option out"));
                }
            }
            "size" | "inodes" => {
                // Zero is what engines write for "no limit".
                if !value.chars().all(|digit| digit == '0') || value.is_empty() {
                    return Err(bad("limits are not supported yet; leave the option out"));
                }
            }
            _ => {
                return Err(Error::invalid(
                    format!("storage option {key}"),
                    format!("is not known; known are {KNOWN}"),
                ));
            }
        }
        Ok(())
    }
}

const BOOL: &str = "is neither true nor false; use one of them";

/// Parses what Go's `ParseBool` takes, which wrote the configurations there are.
fn parse_bool(value: &str) -> Option<bool> {
    match value {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

fn absolute(path: &str) -> Option<PathBuf> {
    path.starts_with('/').then(|| PathBuf::from(path))
}

fn parse_layer_store(text: &str) -> Option<LayerStore> {
    let mut words = text.split(':');
    let path = absolute(words.next()?)?;
    let with_reference = match (words.next(), words.next()) {
        (None, _) => false,
        (Some("ref"), None) => true,
        _ => return None,
    };
    Some(LayerStore { path, with_reference })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(item: &str) -> String {
        DriverOptions::parse(&[item]).unwrap_err().to_string()
    }

    #[test]
    fn every_prefix_is_the_same_option() {
        for prefix in ["", "overlay.", "overlay2.", ".", "OVERLAY."] {
            let options = DriverOptions::parse(&[format!("{prefix}mountopt=nodev,metacopy=on")]);
            assert_eq!(options.unwrap().mount_options, ["nodev", "metacopy=on"], "{prefix}");
        }
    }

    #[test]
    fn values_are_taken() {
        let options = DriverOptions::parse(&[
            "overlay.imagestore=/a,/b",
            "overlay.additionalimagestore=/c",
            "overlay.additionallayerstore=/d:ref,/e",
            "overlay.mount_program=/usr/bin/lamina",
            "overlay.skip_mount_home=true",
            "overlay.ignore_chown_errors=1",
            "overlay.force_mask=shared",
            "overlay.sync=filesystem",
            "overlay.override_kernel_check=1",
            "overlay.use_composefs=false",
            "overlay.size=0",
            "vfs.ignore_chown_errors=false",
        ])
        .unwrap();
        assert_eq!(options.image_stores, ["/a", "/b", "/c"].map(PathBuf::from));
        assert!(options.layer_stores[0].with_reference && !options.layer_stores[1].with_reference);
        assert_eq!(options.mount_program, Some("/usr/bin/lamina".into()));
        assert!(options.skip_mount_home && options.ignore_chown_errors);
        assert_eq!(options.force_mask, Some(0o755));
        assert_eq!(options.sync, Sync::Filesystem);
        assert_eq!(DriverOptions::parse(&["force_mask=0750"]).unwrap().force_mask, Some(0o750));
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_cure() {
        for (item, part) in [
            ("overlay.mountoptt=x", "overlay.mountoptt: is not known; known are mountopt, size"),
            ("mountopt", "has no value"),
            ("overlay.imagestore=rel", "is not absolute"),
            ("additionallayerstore=/a:x", "is no list"),
            ("mount_program=lamina", "is not absolute"),
            ("skip_mount_home=yes", "neither true nor false"),
            ("force_mask=999", "is no mode"),
            ("force_mask=77777", "is no mode"),
            ("sync=always", "is not known"),
            ("use_composefs=true", "composefs is not supported yet"),
            ("size=10G", "limits are not supported yet"),
            ("inodes=5", "limits are not supported yet"),
        ] {
            let message = refusal(item);
            assert!(message.contains(part) && message.contains("; "), "{item}: {message}");
        }
    }
}
