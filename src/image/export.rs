//! Images of a store to a bundle: an OCI layout as directory or tar file, or a `docker save` archive.
//!
//! Layers are written anew from what they change, so that the image has other digests than the one
//! it may have come as. All is made aside and renamed.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::RenameFlags;

use super::Record;
use crate::archive::Digest;
use crate::archive::compress::{Packed, Packer, Packing};
use crate::archive::manifest;
use crate::archive::naive;
use crate::archive::same::Rules;
use crate::archive::stage::Stage;
use crate::archive::view::Stack;
use crate::archive::walk::{self, Differ};
use crate::archive::write::{WriteOptions, Writer};
use crate::error::{Context, Error, Result};
use crate::store::LayerId;
use crate::store::driver::Driver;
use crate::sys::name::{self, At};
use crate::sys::{data, open};

/// What a bundle looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OCI image layout, a directory.
    OciDirectory,
    /// The same in one tar file.
    OciTar,
    /// As `docker save` and `podman save` write.
    Docker,
}

/// Writes an image to `name` in `parent`, and returns its new id.
///
/// # Errors
/// `EINVAL` for packed layers in a `docker save` archive, where they are plain; `EEXIST` if the name is taken; those of reading the layers and of writing.
pub fn export(
    store: &dyn Driver,
    record: &Record,
    format: Format,
    packing: Packing,
    parent: OwnedFd,
    target: &Path,
    name: &[u8],
) -> Result<Digest> {
    if format == Format::Docker && packing != Packing::Plain {
        return Err(Error::invalid("--compression", "is for --format oci and oci-tar"));
    }
    let place = parent.try_clone().map_err(|error| io_error(&error, target))?;
    let stage = Stage::new(parent, target)?;
    let root = stage.open()?;
    let writing = Writing { root: &root, target };
    let blobs = match format {
        Format::Docker => writing.directory(b"files")?,
        Format::OciDirectory | Format::OciTar => {
            let files = writing.directory(b"files")?;
            let inner = Writing { root: &files, target };
            let blobs = inner.directory(b"blobs")?;
            Writing { root: &blobs, target }.directory(b"sha256")?
        }
    };
    let files = open::directory(root.as_fd(), b"files").at("openat", || show(target))?;
    let files = Writing { root: &files, target };
    let mut layers = Vec::new();
    let mut beneath = None;
    for id in &record.layers {
        let suffix = if format == Format::Docker { ".tar" } else { "" };
        let blobs = Writing { root: &blobs, target };
        let id = LayerId::parse(id)?;
        layers.push(layer(store, &id, beneath.as_ref(), packing, &blobs, suffix)?);
        beneath = Some(id);
    }
    let diffs: Vec<Digest> = layers.iter().map(|layer| layer.diff).collect();
    let config = manifest::with_layers(record.config.as_bytes(), &diffs)?;
    let id = Digest::of(&config);
    if format == Format::Docker {
        files.file(format!("{}.json", id.hex()).as_bytes(), &config)?;
        let manifest = manifest::docker_manifest(&id, &record.names, &layers);
        files.file(b"manifest.json", &manifest)?;
    } else {
        let inner = Writing { root: &blobs, target };
        inner.file(id.hex().as_bytes(), &config)?;
        let manifest = manifest::oci_manifest(&config, &layers, packing);
        inner.file(Digest::of(&manifest).hex().as_bytes(), &manifest)?;
        let name = record.names.first().map(String::as_str);
        files.file(b"index.json", &manifest::oci_index(&manifest, name))?;
        files.file(b"oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    }
    let from: &[u8] = if format == Format::OciDirectory {
        b"files"
    } else {
        writing.tar(&files)?;
        b"tar"
    };
    name::rename(At::new(root.as_fd(), from), At::new(place.as_fd(), name), RenameFlags::NOREPLACE)
        .at("renameat2", || show(target))?;
    Ok(id)
}

/// A directory of the bundle while that is written.
struct Writing<'a> {
    root: &'a OwnedFd,
    target: &'a Path,
}

impl Writing<'_> {
    fn directory(&self, name: &[u8]) -> Result<OwnedFd> {
        name::mkdir(At::new(self.root.as_fd(), name), 0o755).at("mkdirat", || show(self.target))?;
        open::directory(self.root.as_fd(), name).at("openat", || show(self.target))
    }

    fn create(&self, name: &[u8]) -> Result<File> {
        open::create(self.root.as_fd(), name, 0o644)
            .at("openat", || show(self.target))
            .map(File::from)
    }

    fn file(&self, name: &[u8], bytes: &[u8]) -> Result<()> {
        let mut file = self.create(name)?;
        file.write_all(bytes).map_err(|error| io_error(&error, self.target))
    }

    /// Writes all files of a directory as a tar file beside it.
    fn tar(&self, files: &Writing<'_>) -> Result<()> {
        let handle = files.root.try_clone().map_err(|error| io_error(&error, self.target))?;
        let stack = Stack::new([(handle, PathBuf::from(self.target))])?;
        let output = BufWriter::with_capacity(256 * 1024, self.create(b"tar")?);
        let mut writer = Writer::new(output, WriteOptions::default());
        if let Some(root) = stack.root() {
            naive::changes(None, &root, Rules::Containers, &mut writer)?;
        }
        writer.finish().map(drop)
    }
}

/// Writes the archive of one layer under its digest.
fn layer(
    store: &dyn Driver,
    id: &LayerId,
    parent: Option<&LayerId>,
    packing: Packing,
    blobs: &Writing<'_>,
    suffix: &str,
) -> Result<Packed> {
    const TEMPORARY: &[u8] = b"layer";
    let parts = store.parts(id)?;
    let is_one_layer = parts.is_one_layer();
    // Where images are whole trees, one says nothing of what it changes.
    let below = parent.filter(|_| parts.lowers.is_empty());
    let stack = parts.stack()?.as_meant()?;
    let output = BufWriter::with_capacity(256 * 1024, blobs.create(TEMPORARY)?);
    let mut writer = Writer::new(Packer::new(output, packing)?, WriteOptions::default());
    if let (Some(below), Some(root)) = (below, stack.root()) {
        let beneath = store.parts(below)?.stack()?.as_meant()?.root();
        naive::changes(beneath.as_ref(), &root, Rules::Containers, &mut writer)?;
    } else if is_one_layer {
        walk::changes(&stack, Differ::Containers, &mut writer)?;
    } else if let Some(root) = stack.root() {
        let beneath = store.parts(id)?.beneath()?.as_meant()?.root();
        naive::changes(beneath.as_ref(), &root, Rules::Containers, &mut writer)?;
    }
    let packed = writer.finish()?.finish()?;
    let dir = blobs.root.as_fd();
    let name = format!("{}{suffix}", packed.blob.hex());
    // Two layers may change the same, as those that change nothing do.
    name::rename(At::new(dir, TEMPORARY), At::new(dir, name.as_bytes()), RenameFlags::empty())
        .at("renameat", || show(blobs.target))?;
    data::sync(dir, false).at("fsync", || show(blobs.target))?;
    Ok(packed)
}

fn show(path: &Path) -> String {
    crate::options::show_path(path)
}

fn io_error(error: &std::io::Error, path: &Path) -> Error {
    use crate::error::Errno;
    Error::sys("write", show(path), Errno::from_io_error(error).unwrap_or(Errno::IO))
}
