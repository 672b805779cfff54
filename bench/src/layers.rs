//! Layers to measure on: each made once for a scenario, together with the merged tree as plain files.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::peer::Stack;

/// Layers that are being filled.
pub struct Layers {
    root: PathBuf,
    count: usize,
}

/// Name of a layer's tree in a directory of its own, so that this directory can be a layer as well, with room for other names.
pub const TREE: &str = "tree";

const LAYERS: &str = "layers";
const RUN: &str = "run";

impl Layers {
    /// As many empty layers; number 0 is the topmost.
    pub fn empty(&mut self, count: usize) -> io::Result<()> {
        self.count = count;
        (0..count).try_for_each(|n| fs::create_dir_all(self.lower(n)))
    }

    fn lower(&self, n: usize) -> PathBuf {
        self.root.join(format!("l{n}")).join(TREE)
    }

    fn plain(&self) -> PathBuf {
        self.root.join("plain")
    }

    /// A file of so many bytes that differ from file to file.
    pub fn file(&self, layer: usize, path: &str, size: usize) -> io::Result<()> {
        self.content(layer, path, &bytes(path, size))
    }

    /// A file.
    pub fn content(&self, layer: usize, path: &str, content: &[u8]) -> io::Result<()> {
        for root in [self.lower(layer), self.plain()] {
            let path = root.join(path);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&path, content)?;
        }
        Ok(())
    }

    /// A file of so many bytes in a layer alone; the plain tree has an empty one.
    pub fn lower_file(&self, layer: usize, path: &str, size: usize) -> io::Result<()> {
        fs::write(self.plain().join(path), "")?;
        let mut file = fs::File::create(self.lower(layer).join(path))?;
        // Piece by piece: it may be larger than memory.
        const PIECE: usize = 16 << 20;
        (0..size).step_by(PIECE).try_for_each(|at| {
            file.write_all(&bytes(&format!("{path} {at}"), PIECE.min(size - at)))
        })
    }

    /// A file of so many bytes, of which all but the last are a hole.
    pub fn sparse(&self, layer: usize, path: &str, size: u64) -> io::Result<()> {
        for root in [self.lower(layer), self.plain()] {
            let file = fs::File::create(root.join(path))?;
            file.set_len(size - 1)?;
            std::os::unix::fs::FileExt::write_all_at(&file, b"x", size - 1)?;
        }
        Ok(())
    }

    /// A symbolic link.
    pub fn link(&self, layer: usize, path: &str, target: &str) -> io::Result<()> {
        [self.lower(layer), self.plain()]
            .iter()
            .try_for_each(|root| symlink(target, root.join(path)))
    }

    /// Runs a shell script in the lowest layer, whose result is the plain tree as well.
    pub fn script(&self, script: &str) -> io::Result<()> {
        let lowest = self.lower(self.count - 1);
        shell(&lowest, script)?;
        let (from, to) = (lowest.display(), self.plain());
        fs::create_dir_all(&to)?;
        shell(&to, &format!("cp -a '{from}/.' ."))
    }
}

/// Runs a shell script that must succeed.
pub fn shell(dir: &Path, script: &str) -> io::Result<()> {
    let out = Command::new("sh").args(["-ec", script]).current_dir(dir).output()?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(format!("{script}: {}: {said}", out.status)))
}

/// Bytes that no two paths share, and that do not compress to nothing.
pub fn bytes(path: &str, size: usize) -> Vec<u8> {
    let mut state = path.bytes().fold(0x9e37_79b9_u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut content: Vec<u8> = (0..size.div_ceil(8)).flat_map(|_| next()).collect();
    content.truncate(size);
    content
}

/// The stack of a scenario, filled by `build` unless it is there, with an empty upper of its own.
pub fn stack(
    at: &Path,
    is_changed: bool,
    is_native: bool,
    build: impl FnOnce(&mut Layers) -> io::Result<()>,
) -> io::Result<Stack> {
    let root = at.join(LAYERS);
    let done = root.join("done");
    if !done.exists() {
        remove(&root)?;
        let mut layers = Layers { root: root.clone(), count: 0 };
        fs::create_dir_all(layers.plain())?;
        build(&mut layers)?;
        fs::write(&done, layers.count.to_string())?;
    }
    let count: usize = fs::read_to_string(&done)?.parse().map_err(io::Error::other)?;
    let layers = Layers { root, count };
    let run = at.join(RUN);
    remove(&run)?;
    fs::create_dir_all(run.join("upper"))?;
    let mut plain = layers.plain();
    if is_changed && is_native {
        let copy = run.join("plain");
        fs::create_dir(&copy)?;
        shell(&copy, &format!("cp -a '{}/.' .", plain.display()))?;
        plain = copy;
    }
    Ok(Stack {
        is_changed,
        lowers: (0..count).map(|n| layers.lower(n)).collect(),
        upper: run.join("upper"),
        plain,
    })
}

/// Removes what the last scenario made.
pub fn clear(at: &Path) -> io::Result<()> {
    remove(&at.join(LAYERS))?;
    remove(&at.join(RUN))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            // The workdir of kernel overlay has no permissions.
            shell(Path::new("/"), &format!("chmod -R u+rwx '{0}'; rm -rf '{0}'", path.display()))
        }
        _ => Ok(()),
    }
}
