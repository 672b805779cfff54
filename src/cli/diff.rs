//! `lamina diff`, `lamina layer diff|changes|diff-size`: layers to archives and lists.
//!
//! Exit codes: 0 done, also when nothing differs; 1 failed; 2 called wrongly; 3 the mounts given
//! are not such that their difference is one layer: walk them instead (BuildKit's rules).

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::apply::{IdArgs, open_directory, print_json};
use super::store::{StorePlace, failure};
use super::{Failure, print};
use crate::archive::buildkit::{self, Mount};
use crate::archive::input::unpack;
use crate::archive::same::Rules;
use crate::archive::view::Stack;
use crate::archive::walk::{self, Differ, Sink};
use crate::archive::write::{Line, List, Size, WriteOptions, Writer};
use crate::archive::{Digest, Limits, naive, tar_split};
use crate::error::{Errno, Error, Result};
use crate::store::{LayerId, Parts};

/// Shown below the help of `lamina diff`.
pub const EXAMPLES: &str = "\
examples:
  lamina diff /base /top                  what layer /top changes over /base
  lamina diff --tar -O top.tar /base /top the same as a layer archive
  lamina diff --walk /tree1 /tree2        two trees of whatever origin
  lamina diff --lower-mounts JSON --upper-mounts JSON

exit codes: 0 done, 1 failed, 2 called wrongly, 3 the mounts do not differ by one layer";

/// A layer and those beneath it.
#[derive(clap::Args, Debug)]
pub struct LayerArgs {
    /// A layer beneath, topmost first; may be given more than once
    #[arg(long, value_name = "DIR")]
    lower: Vec<PathBuf>,
    /// The layer of a store, over those that it has there, instead of directories
    #[arg(long, value_name = "ID", conflicts_with_all = ["layer", "lower"])]
    id: Option<String>,
    /// Another layer of the store to compare that one with, instead of those that it lies on
    #[arg(long, value_name = "ID", requires = "id")]
    over: Option<String>,
    #[command(flatten)]
    store: StorePlace,
    /// The layer
    #[arg(required_unless_present = "id")]
    layer: Option<PathBuf>,
}

impl LayerArgs {
    /// Opens the layer and those beneath it.
    fn open(&self) -> std::result::Result<Stack, Failure> {
        let Some(id) = &self.id else {
            return open_stack(self.layer.iter().chain(&self.lower).cloned()).map_err(Failure::run);
        };
        let id = LayerId::parse(id).map_err(Failure::usage)?;
        self.store
            .driver()?
            .parts(&id)
            .and_then(Parts::stack)
            .and_then(Stack::as_meant)
            .map_err(failure)
    }

    /// Opens what is to be told of: the layer, or two whole trees where it does not say by itself what
    /// it changes.
    fn source(&self) -> std::result::Result<Source, Failure> {
        let Some(id) = &self.id else { return Ok(Source::Layer(self.open()?, Differ::Containers)) };
        let parse = |id: &String| LayerId::parse(id).map_err(Failure::usage);
        let (id, over) = (parse(id)?, self.over.as_ref().map(parse).transpose()?);
        let store = self.store.driver()?;
        let open = || {
            let parts = store.parts(&id)?;
            let is_one_layer = parts.is_one_layer();
            let stack = parts.stack()?.as_meant()?;
            let beneath = match &over {
                Some(over) => store.parts(over)?.stack()?.as_meant()?,
                None if is_one_layer => return Ok(Source::Layer(stack, Differ::Containers)),
                None => store.parts(&id)?.beneath()?.as_meant()?,
            };
            Ok(Source::Trees(Some(beneath), stack, Rules::Containers))
        };
        open().map_err(failure)
    }
}

/// Arguments of `lamina layer diff`.
#[derive(clap::Args, Debug)]
pub struct LayerDiffArgs {
    #[command(flatten)]
    layers: LayerArgs,
    #[command(flatten)]
    write: WriteArgs,
}

/// How an archive is written.
#[derive(clap::Args, Debug)]
pub struct WriteArgs {
    /// Write to this file [default: stdout]
    #[arg(short = 'O', long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    ids: IdArgs,
    /// Keep the parts of a second in times
    #[arg(long)]
    subseconds: bool,
}

/// Arguments of `lamina layer changes` and `diff-size`.
#[derive(clap::Args, Debug)]
pub struct LayerListArgs {
    #[command(flatten)]
    layers: LayerArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `lamina layer rebuild`.
#[derive(clap::Args, Debug)]
pub struct RebuildArgs {
    #[command(flatten)]
    layers: LayerArgs,
    /// The record, compressed or not
    #[arg(long, value_name = "FILE")]
    tar_split: PathBuf,
    /// What the digest of the archive must be
    #[arg(long, value_name = "DIGEST", value_parser = Digest::parse)]
    diff_id: Option<Digest>,
    /// Write to this file [default: stdout]
    #[arg(short = 'O', long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Arguments of `lamina diff`.
#[derive(clap::Args, Debug)]
pub struct DiffArgs {
    /// Two directories to compare, or layers, topmost last, of which the last one's changes are told
    #[arg(value_name = "DIR", required_unless_present = "upper_mounts")]
    trees: Vec<PathBuf>,
    /// Compare whole trees by walking both, even if the last is a layer over the others
    #[arg(long)]
    walk: bool,
    /// What BuildKit would mount as the parent: a JSON list of {type, source, options}
    #[arg(long, value_name = "JSON", conflicts_with = "trees")]
    lower_mounts: Option<String>,
    /// What it would mount as the layer
    #[arg(long, value_name = "JSON", conflicts_with = "trees")]
    upper_mounts: Option<String>,
    /// Write a layer archive instead of a list
    #[arg(long)]
    tar: bool,
    /// Print the list as JSON
    #[arg(long, conflicts_with = "tar")]
    json: bool,
    #[command(flatten)]
    write: WriteArgs,
}

/// What is to be compared.
enum Source {
    /// A layer over others.
    Layer(Stack, Differ),
    /// Two trees.
    Trees(Option<Stack>, Stack, Rules),
}

impl Source {
    fn tell(&self, sink: &mut dyn Sink) -> Result<()> {
        match self {
            Self::Layer(stack, differ) => walk::changes(stack, *differ, sink),
            Self::Trees(lower, upper, rules) => {
                let lower = lower.as_ref().and_then(Stack::root);
                match upper.root() {
                    Some(upper) => naive::changes(lower.as_ref(), &upper, *rules, sink),
                    None => Ok(()),
                }
            }
        }
    }

    fn is_buildkit(&self) -> bool {
        matches!(self, Self::Layer(_, Differ::BuildKit) | Self::Trees(_, _, Rules::BuildKit))
    }
}

/// Runs `lamina layer diff`.
///
/// # Errors
/// The sentence to print.
pub fn run_layer_diff(args: LayerDiffArgs) -> std::result::Result<(), Failure> {
    let source = args.layers.source()?;
    write(&source, &args.write).map_err(Failure::run)
}

/// Runs `lamina layer changes`.
///
/// # Errors
/// The sentence to print.
pub fn run_layer_changes(args: LayerListArgs) -> std::result::Result<(), Failure> {
    let source = args.layers.source()?;
    list(&source, args.json)
}

/// Runs `lamina layer diff-size`.
///
/// # Errors
/// The sentence to print.
pub fn run_layer_diff_size(args: LayerListArgs) -> std::result::Result<(), Failure> {
    let source = args.layers.source()?;
    let mut size = Size::default();
    source.tell(&mut size).map_err(Failure::run)?;
    if args.json {
        return print_json(&serde_json::json!({ "size": size.bytes }));
    }
    print(&format!("{}\n", size.bytes))
}

/// Runs `lamina layer rebuild`.
///
/// # Errors
/// The sentence to print.
pub fn run_layer_rebuild(args: RebuildArgs) -> std::result::Result<(), Failure> {
    let stack = args.layers.open()?;
    rebuild_file(&args, &stack).map_err(Failure::run)
}

fn rebuild_file(args: &RebuildArgs, stack: &Stack) -> Result<()> {
    let record = open_file(&args.tar_split)?;
    let output = BufWriter::with_capacity(256 * 1024, open_output(args.output.as_deref())?);
    let (rebuilt, _) =
        unpack(record, Limits::default(), |record| tar_split::rebuild(stack, record, output))?;
    match args.diff_id {
        Some(wanted) if wanted != rebuilt.0 => Err(Error::Corrupt {
            what: format!("the digest is {}, expected {wanted}", rebuilt.0).into(),
            at: "archive".into(),
        }),
        _ => Ok(()),
    }
}

/// Runs `lamina diff`.
///
/// # Errors
/// The sentence to print.
pub fn run_diff(args: DiffArgs) -> std::result::Result<(), Failure> {
    let source = match &args.upper_mounts {
        Some(upper) => mounts_source(args.lower_mounts.as_deref(), upper)?,
        None => trees_source(args.trees, args.walk).map_err(Failure::run)?,
    };
    if args.tar {
        return write(&source, &args.write).map_err(Failure::run);
    }
    list(&source, args.json)
}

fn trees_source(mut trees: Vec<PathBuf>, walk: bool) -> Result<Source> {
    if !walk {
        trees.reverse();
        return Ok(Source::Layer(open_stack(trees)?, Differ::Containers));
    }
    let upper = trees.pop().into_iter();
    trees.reverse();
    let lower = if trees.is_empty() { None } else { Some(open_stack(trees)?) };
    Ok(Source::Trees(lower, open_stack(upper)?, Rules::Containers))
}

fn mounts_source(lower: Option<&str>, upper: &str) -> std::result::Result<Source, Failure> {
    let parse = |flag: &'static str, text: &str| {
        serde_json::from_str::<Vec<Mount>>(text)
            .map_err(|error| Failure::usage(Error::invalid(flag, error.to_string())))
    };
    let lower = lower.map_or(Ok(Vec::new()), |text| parse("--lower-mounts", text))?;
    let upper = parse("--upper-mounts", upper)?;
    let layers = buildkit::layers(&lower, &upper)
        .map_err(|why| Failure::with_code(format!("mounts: {why}; compare them by walking"), 3))?;
    let stack = open_stack(layers.into_iter().map(PathBuf::from)).map_err(Failure::run)?;
    buildkit::check(&stack)
        .map_err(Failure::run)?
        .map_err(|why| Failure::with_code(format!("{why}; compare them by walking"), 3))?;
    Ok(Source::Layer(stack, Differ::BuildKit))
}

fn open_stack(paths: impl IntoIterator<Item = PathBuf>) -> Result<Stack> {
    let opened: Result<Vec<_>> =
        paths.into_iter().map(|path| Ok((open_directory(&path)?, path))).collect();
    Stack::new(opened?)?.as_meant()
}

fn write(source: &Source, args: &WriteArgs) -> Result<()> {
    let options = WriteOptions { ids: args.ids.ids(), subseconds: args.subseconds };
    let output = open_output(args.output.as_deref())?;
    let mut writer = Writer::new(BufWriter::with_capacity(256 * 1024, output), options);
    source.tell(&mut writer)?;
    writer.finish().map(drop)
}

fn open_output(path: Option<&Path>) -> Result<Box<dyn Write>> {
    let Some(path) = path else { return Ok(Box::new(io::stdout().lock())) };
    let file = File::create(path).map_err(|error| open_error(path, &error))?;
    Ok(Box::new(file))
}

fn open_file(path: &Path) -> Result<File> {
    File::open(path).map_err(|error| open_error(path, &error))
}

fn open_error(path: &Path, error: &io::Error) -> Error {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    Error::sys("open", path.display().to_string(), errno)
}

/// One change as it is printed.
#[derive(Serialize)]
struct Printed {
    kind: char,
    path: String,
}

fn list(source: &Source, json: bool) -> std::result::Result<(), Failure> {
    let mut list = List { without_parents: source.is_buildkit(), ..List::default() };
    source.tell(&mut list).map_err(Failure::run)?;
    list.lines.sort_by(|a, b| a.path.cmp(&b.path));
    if json {
        let show = |line: &Line| Printed {
            kind: line.kind,
            path: format!("/{}", String::from_utf8_lossy(&line.path)),
        };
        return print_json(&list.lines.iter().map(show).collect::<Vec<_>>());
    }
    let text: Vec<u8> = list
        .lines
        .iter()
        .flat_map(|line| [&[line.kind as u8, b' ', b'/'][..], &line.path, b"\n"].concat())
        .collect();
    super::print_bytes(&text)
}
