//! The least server there can be: it answers from memory, without a system call but those that take requests and give
//! answers. What a union costs beyond it is the union's; what it costs itself is the price of FUSE, which no server can
//! beat.
//!
//! It agrees with the kernel on what lamina agrees on and answers in the same terms, so that the kernel sends both the
//! same requests: the files of lamina's transport that say so are compiled in here. Loads the merged tree of the layers
//! first, which takes as long as it takes. Layers have neither whiteouts nor hard links, as those that are measured on.

// Each has more than is needed here, and links that its own crate resolves.
#[allow(dead_code, rustdoc::broken_intra_doc_links)]
#[path = "../../../src/fuse/dev/abi.rs"]
mod abi;
#[allow(dead_code, rustdoc::broken_intra_doc_links)]
#[path = "../../../src/fuse/dev/decode.rs"]
mod decode;
#[allow(dead_code, rustdoc::broken_intra_doc_links)]
#[path = "../../../src/fuse/dev/handshake.rs"]
mod handshake;
#[allow(dead_code, rustdoc::broken_intra_doc_links)]
#[path = "../../../src/fuse/dev/pipe.rs"]
mod pipe;
#[allow(dead_code, rustdoc::broken_intra_doc_links)]
#[path = "../../../src/fuse/dev/reply.rs"]
mod reply;
mod serve;
mod tree;

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use laminafs::sys::fuse_device;
use laminafs::sys::process::{Fork, fork};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use reply::Reply;
use serve::Answer;
use tree::Tree;

const DEVICE: &str = "/dev/fuse";

/// Bytes that a request may have beside the data of a WRITE.
const REQUEST_EXTRA: usize = 72 << 10;

/// Mounts as a mount program does, by `-o LIST MERGED`, and returns when a daemon serves the mount.
///
/// # Errors
/// Why there is no mount.
pub fn start(mut words: impl Iterator<Item = String>) -> Result<(), String> {
    let (Some("-o"), Some(list), Some(merged)) =
        (words.next().as_deref(), words.next(), words.next())
    else {
        return Err("--mount-least -o lowerdir=A:B,upperdir=C MERGED".into());
    };
    let of = |key: &'static str| {
        let values = list.split(',').filter_map(move |word| word.strip_prefix(key));
        values.flat_map(|value| value.split(':'))
    };
    let layers: Vec<PathBuf> = of("upperdir=").chain(of("lowerdir=")).map(PathBuf::from).collect();
    let (mut ours, mut theirs) = UnixStream::pair().map_err(|e| format!("socketpair: {e}"))?;
    match fork().map_err(|e| e.to_string())? {
        Fork::Child => {
            drop(ours);
            let _ = rustix::process::setsid();
            serve(&layers, Path::new(&merged), || theirs.write_all(b"k").map_err(|e| e.to_string()))
        }
        Fork::Parent(_) => {
            drop(theirs);
            // Otherwise the child has said why.
            ours.read_exact(&mut [0]).map_err(|_| format!("{merged}: not mounted"))
        }
    }
}

/// Serves the merged tree until it is unmounted.
fn serve(
    layers: &[PathBuf],
    merged: &Path,
    on_ready: impl FnOnce() -> Result<(), String>,
) -> Result<(), String> {
    let tree = Tree::load(layers).map_err(|e| format!("{layers:?}: {e}"))?;
    let tree = Mutex::new(tree);
    serve::prepare();
    let device = mount(merged).map_err(|e| format!("mount {}: {e}", merged.display()))?;
    let transfer = shake_hands(&device).map_err(|e| format!("FUSE handshake: {e}"))?;
    // As many as lamina has.
    let threads =
        std::thread::available_parallelism().map_or(2, usize::from).saturating_mul(2).clamp(4, 8);
    let clones: Result<Vec<OwnedFd>, Errno> =
        (1..threads).map(|_| fuse_device::clone(device.as_fd(), DEVICE)).collect();
    let clones = clones.map_err(|e| format!("FUSE_DEV_IOC_CLONE: {e}"))?;
    // A client of a worker that is gone would wait for ever.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("lamina-bench: {panic}");
        std::process::exit(1);
    }));
    std::thread::scope(|scope| {
        let work = |device| work(&tree, device, transfer + REQUEST_EXTRA);
        let workers: Vec<_> = clones
            .iter()
            .chain([&device])
            .map(|device| scope.spawn(move || work(device)))
            .collect();
        on_ready()?;
        workers.into_iter().try_for_each(|worker| {
            let done = worker.join().map_err(|_| String::from("a worker panicked"))?;
            done.map_err(|e| format!("{DEVICE}: {e}"))
        })
    })
}

/// Mounts with the options of lamina's mounts, and returns what to serve it by.
fn mount(merged: &Path) -> Result<OwnedFd, Errno> {
    let device = openat(CWD, DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = context.as_fd();
    for (key, value) in [
        ("source", "least"),
        ("fd", &device.as_raw_fd().to_string()),
        ("rootmode", "40000"),
        ("user_id", &rustix::process::geteuid().as_raw().to_string()),
        ("group_id", &rustix::process::getegid().as_raw().to_string()),
    ] {
        fsconfig_set_string(context, key, value)?;
    }
    for flag in ["default_permissions", "allow_other"] {
        fsconfig_set_flag(context, flag)?;
    }
    fsconfig_create(context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOATIME
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let mount = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(mount, "", CWD, merged, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(device)
}

/// Answers INIT; returns the size of the largest READ and WRITE.
fn shake_hands(device: &OwnedFd) -> Result<usize, Errno> {
    let mut buffer = vec![0; REQUEST_EXTRA];
    let len = read_request(device, &mut buffer)?.ok_or(Errno::NODEV)?;
    let (unique, offer) = handshake::decode(buffer.get(..len).unwrap_or_default())?;
    let wishes = handshake::Wishes { posix_acl: true, ..Default::default() };
    let handshake::Answer::Agree(terms, out) = handshake::negotiate(&offer, &wishes)? else {
        return Err(Errno::PROTO);
    };
    let mut reply = Reply::new(size_of_val(&out));
    reply.put(&out);
    rustix::io::write(device, reply.finish(unique))?;
    Ok(terms.transfer)
}

/// Serves one request after the other until the mount is gone.
fn work(tree: &Mutex<Tree>, device: &OwnedFd, buffer: usize) -> Result<(), Errno> {
    let mut request = vec![0; buffer];
    let mut reply = Reply::new(buffer);
    while let Some(len) = read_request(device, &mut request)? {
        reply.clear();
        let bytes = request.get(..len).unwrap_or_default();
        let (header, request) = match decode::decode(bytes, true) {
            Ok(decoded) => decoded,
            Err(malformed) => return Err(malformed.errno),
        };
        let sent = match serve::answer(tree, &header, &request, &mut reply) {
            Ok(Answer::Nothing) => continue,
            Ok(Answer::Reply) => rustix::io::write(device, reply.finish(header.unique)),
            Ok(Answer::Data(file, range)) => {
                // Straight from the file: there is no copy that need not be.
                let file = file.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                let data = file.get(range.start..range.end.min(file.len())).unwrap_or_default();
                let head = abi::OutHeader {
                    len: u32::try_from(reply::HEADER + data.len()).unwrap_or(u32::MAX),
                    error: 0,
                    unique: header.unique,
                };
                let head = zerocopy::IntoBytes::as_bytes(&head);
                rustix::io::writev(device, &[IoSlice::new(head), IoSlice::new(data)])
            }
            Err(errno) => {
                rustix::io::write(device, reply.refuse(header.unique, errno.raw_os_error()))
            }
        };
        match sent {
            // Nobody waits any more.
            Ok(_) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Reads one request; `None` when the mount is gone.
fn read_request(device: &OwnedFd, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
    loop {
        match rustix::io::read(device, &mut *buffer) {
            Ok(len) => return Ok(Some(len)),
            Err(Errno::NODEV | Errno::CONNABORTED) => return Ok(None),
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
}
