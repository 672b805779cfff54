//! `lamina layer apply`: archives to layers.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::store::{StorePlace, failure};
use super::{Failure, print};
use crate::archive::ids::Range;
use crate::archive::stage::Stage;
use crate::archive::{Applied, ApplyOptions, Digest, Ids, Limits, Whiteouts, apply};
use crate::error::{Context, Errno, Error, Result};
use crate::store::differ::{Differ, Tar};
use crate::store::{CreateOptions, Filling, LayerId};

/// Form of whiteouts, as `--whiteouts` takes it.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Form {
    /// Character devices and opaque xattrs, as kernel overlayfs
    Overlay,
    /// The same with xattrs of unprivileged mounts (user.overlay.)
    User,
    /// .wh. files, as in the archive
    Files,
    /// None: DIR is a whole tree, may exist, and what is hidden is removed from it
    Flat,
}

/// Arguments of `lamina layer apply`.
#[derive(clap::Args, Debug)]
pub(super) struct ApplyArgs {
    /// The layer's directory; made by this, whole or not at all
    #[arg(long, value_name = "DIR", required_unless_present = "id")]
    to: Option<PathBuf>,
    /// A layer of a store instead; it says how names are hidden, whose errors of owners are passed over,
    /// and which mode all files get
    #[arg(long, value_name = "ID", conflicts_with_all = ["to", "whiteouts", "ignore_chown_errors", "force_mask"])]
    id: Option<String>,
    /// The layer beneath it
    #[arg(long, value_name = "ID", requires = "id")]
    parent: Option<String>,
    #[command(flatten)]
    store: StorePlace,
    /// How names of lower layers are hidden
    #[arg(long, value_name = "FORM", default_value = "overlay")]
    whiteouts: Form,
    #[command(flatten)]
    ids: IdArgs,
    /// Go on where an owner cannot be set
    #[arg(long)]
    ignore_chown_errors: bool,
    /// Give all files this mode (octal, shared, private) and keep the truth in an xattr
    #[arg(long, value_name = "MODE", value_parser = parse_mask)]
    force_mask: Option<u32>,
    /// What the digest of the archive must be
    #[arg(long, value_name = "DIGEST", value_parser = Digest::parse)]
    digest: Option<Digest>,
    /// What the digest of the archive must be once unpacked
    #[arg(long, value_name = "DIGEST", value_parser = Digest::parse)]
    diff_id: Option<Digest>,
    /// What the size of the archive must be, in bytes
    #[arg(long, value_name = "N")]
    size: Option<u64>,
    /// Most bytes that the files may have together [default: 1 TiB]
    #[arg(long, value_name = "N")]
    max_size: Option<u64>,
    /// Make the layer durable before it appears
    #[arg(long)]
    sync: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// The archive: tar, plain or compressed by gzip, zstd, xz or bzip2 [default: stdin]
    file: Option<PathBuf>,
}

/// Id maps, as podman takes them.
#[derive(clap::Args, Debug)]
pub(super) struct IdArgs {
    /// Container, host and number of user ids; may be given more than once
    #[arg(long, value_name = "C:H:N", value_parser = parse_range)]
    uidmap: Vec<Range>,
    /// The same of group ids [default: as --uidmap]
    #[arg(long, value_name = "C:H:N", value_parser = parse_range)]
    gidmap: Vec<Range>,
}

impl IdArgs {
    /// Returns the maps, if any is given.
    pub(super) fn ids(&self) -> Option<Ids> {
        let (uids, gids) = (self.uidmap.clone(), self.gidmap.clone());
        match (uids.is_empty(), gids.is_empty()) {
            (true, true) => None,
            (false, true) => Some(Ids { gids: uids.clone(), uids }),
            (true, false) => Some(Ids { uids: gids.clone(), gids }),
            (false, false) => Some(Ids { uids, gids }),
        }
    }
}

fn parse_range(text: &str) -> std::result::Result<Range, String> {
    let mut numbers = text.split(':').map(|number| number.parse::<u32>());
    match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
        (Some(Ok(container)), Some(Ok(disk)), Some(Ok(length)), None) => {
            Ok(Range { container, disk, length })
        }
        _ => Err("give three numbers, such as 0:100000:65536".to_owned()),
    }
}

fn parse_mask(text: &str) -> std::result::Result<u32, String> {
    match text {
        "shared" => Ok(0o755),
        "private" => Ok(0o700),
        _ => u32::from_str_radix(text, 8)
            .ok()
            .filter(|mode| *mode <= 0o777)
            .ok_or_else(|| "give shared, private or an octal mode such as 0755".to_owned()),
    }
}

/// What is printed of an applied archive.
#[derive(Serialize)]
struct Report {
    digest: String,
    size: u64,
    diff_id: String,
    diff_size: u64,
    compression: String,
    files_size: u64,
    entries: u64,
    left_out: u64,
}

impl From<Applied> for Report {
    fn from(applied: Applied) -> Self {
        let Applied { source, size, entries, left_out } = applied;
        Self {
            digest: source.blob.to_string(),
            size: source.blob_size,
            diff_id: source.diff.to_string(),
            diff_size: source.diff_size,
            compression: source.compression.to_string(),
            files_size: size,
            entries,
            left_out,
        }
    }
}

/// Runs `lamina layer apply`.
///
/// # Errors
/// The sentence to print.
pub(super) fn run_apply(args: ApplyArgs) -> std::result::Result<(), Failure> {
    let limits = Limits::default();
    let options = ApplyOptions {
        whiteouts: match args.whiteouts {
            Form::Overlay => Whiteouts::Overlay,
            Form::User => Whiteouts::OverlayUser,
            Form::Files => Whiteouts::Files,
            Form::Flat => Whiteouts::Flat,
        },
        ids: args.ids.ids(),
        ignore_chown_errors: args.ignore_chown_errors,
        force_mask: args.force_mask,
        root_mode: None,
        in_user_namespace: in_user_namespace(),
        limits: Limits { size_max: args.max_size.unwrap_or(limits.size_max), ..limits },
        blob: args.digest,
        blob_size: args.size,
        diff: args.diff_id,
    };
    let applied = match (&args.id, &args.to) {
        (Some(id), _) => apply_to_store(&args, id, options)?,
        (None, Some(to)) => apply_file(&args, to, &options).map_err(Failure::run)?,
        // The arguments say that one of them is there.
        (None, None) => return Err(Failure::sentence("give --to DIR or --id ID".into())),
    };
    let report = Report::from(applied);
    if args.json {
        return print_json(&report);
    }
    let left_out = match report.left_out {
        0 => String::new(),
        n => format!("{n} devices, owners or xattrs left out\n"),
    };
    print(&format!(
        "{}\n{} entries, {} bytes\n{left_out}",
        report.diff_id, report.entries, report.files_size
    ))
}

/// Makes a layer of a store; it appears whole or not at all.
fn apply_to_store(
    args: &ApplyArgs,
    id: &str,
    options: ApplyOptions,
) -> std::result::Result<Applied, Failure> {
    let parse = |id: &str| LayerId::parse(id).map_err(Failure::usage);
    let (layer, parent) = (parse(id)?, args.parent.as_deref().map(parse).transpose()?);
    let store = args.store.driver()?;
    let new = CreateOptions { parent: parent.as_ref(), read_write: false, owner: None };
    let mut applied = None;
    let mut fill = |target: Filling| {
        let archive = Some(open_input(args.file.as_deref())?);
        let mut tar = Tar { archive, options: options.clone(), shown: PathBuf::from(id) };
        applied = Some(tar.fill(target)?);
        Ok(())
    };
    store.make(&layer, new, Some(&mut fill)).map_err(failure)?;
    // A layer that was made was filled.
    applied.ok_or_else(Failure::silent)
}

fn apply_file(args: &ApplyArgs, to: &Path, options: &ApplyOptions) -> Result<Applied> {
    let input = open_input(args.file.as_deref())?;
    if options.whiteouts == Whiteouts::Flat && open_directory(to).is_ok() {
        let root = open_directory(to)?;
        return apply(root, to.to_owned(), input, options);
    }
    // As other tools make layers that say nothing of their root.
    let options = &ApplyOptions { root_mode: Some(0o755), ..options.clone() };
    let (parent, name) = split(to)?;
    let stage = Stage::new(open_directory(parent)?, to)?;
    let applied = apply(stage.open()?, to.to_owned(), input, options)?;
    stage.publish(name.as_bytes(), args.sync)?;
    Ok(applied)
}

/// Splits a path into the directory and the name to be made in it.
pub(super) fn split(path: &Path) -> Result<(&Path, &std::ffi::OsStr)> {
    let name = path.file_name().ok_or_else(|| {
        Error::invalid(path.display().to_string(), "names no directory that could be made")
    })?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    Ok((parent.unwrap_or(Path::new(".")), name))
}

/// Opens a directory that the user named.
pub(super) fn open_directory(path: &Path) -> Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).at("open", || path.display().to_string())
}

/// Opens what the user named, or stdin; shows on a terminal how far it was read.
fn open_input(path: Option<&Path>) -> Result<Box<dyn Read + Send>> {
    let Some(path) = path.filter(|path| path.as_os_str() != "-") else {
        return Ok(Box::new(std::io::stdin()));
    };
    let named = |error: std::io::Error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        Error::sys("open", path.display().to_string(), errno)
    };
    let file = File::open(path).map_err(named)?;
    if !std::io::stderr().is_terminal() {
        return Ok(Box::new(file));
    }
    let size = file.metadata().map_err(named)?.len();
    Ok(Box::new(bar(size).wrap_read(file)))
}

/// A progress bar over `size` bytes on stderr.
pub(super) fn bar(size: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}");
    let bar = ProgressBar::new(size);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Tells whether ids are those of a user namespace below the first.
pub(super) fn in_user_namespace() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| {
        let numbers: Vec<&str> = map.split_whitespace().collect();
        numbers != ["0", "0", "4294967295"]
    })
}

/// Prints one value as a line of JSON.
pub(super) fn print_json(value: &impl Serialize) -> std::result::Result<(), Failure> {
    let text = serde_json::to_string(value)
        .map_err(|error| Failure::sentence(format!("stdout: {error}")))?;
    print(&format!("{text}\n"))
}
