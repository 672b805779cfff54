//! `lamina image`: images into a store and out of it.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde_json::json;

use super::apply::{bar, in_user_namespace, open_directory, print_json, split};
use super::store::{StoreArgs, failure};
use super::{Failure, print};
use crate::archive::ApplyOptions;
use crate::archive::bundle::Bundle;
use crate::archive::compress::Packing;
use crate::error::{Context, Error, Result};
use crate::image::export::{Format, export};
use crate::image::import::{ImportOptions, import};
use crate::image::{Record, Records};

/// Arguments of `lamina image`.
#[derive(clap::Args, Debug)]
pub struct ImageCommandArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(clap::Subcommand, Debug)]
enum ImageCommand {
    /// Take images into the store: an OCI layout (directory or tar) or a docker save archive
    Import(ImportArgs),
    /// Write an image of the store
    Export(ExportArgs),
    /// List the images: id, names, the topmost layer
    List(StoreArgs),
    /// Forget an image; its layers stay
    Remove(OneImage),
}

#[derive(clap::Args, Debug)]
struct ImportArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// The name that the image is to have
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The layout's directory, or the archive; - is stdin
    source: PathBuf,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Shape {
    /// OCI layout, a directory
    Oci,
    /// OCI layout in one tar file
    OciTar,
    /// As docker save and podman save write
    Docker,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Compression {
    /// Not at all
    None,
    /// gzip, which everybody reads
    Gzip,
    /// zstd
    Zstd,
}

#[derive(clap::Args, Debug)]
struct ExportArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// What is written
    #[arg(long, value_name = "FORMAT", default_value = "oci")]
    format: Shape,
    /// How the layers of an OCI layout are compressed
    #[arg(long, value_name = "HOW", default_value = "none")]
    compression: Compression,
    /// Name or id of the image
    image: String,
    /// Where it is written; must not exist
    to: PathBuf,
}

#[derive(clap::Args, Debug)]
struct OneImage {
    #[command(flatten)]
    store: StoreArgs,
    /// Name or id of the image
    image: String,
}

/// Runs `lamina image`.
///
/// # Errors
/// The sentence to print.
pub fn run(args: ImageCommandArgs) -> std::result::Result<(), Failure> {
    match args.command {
        ImageCommand::Import(args) => run_import(&args),
        ImageCommand::Export(args) => run_export(&args),
        ImageCommand::List(args) => {
            let records = open_records(&args)?.list().map_err(failure)?;
            print_records(&records, args.json)
        }
        ImageCommand::Remove(args) => {
            let records = open_records(&args.store)?;
            let record = records.find(&args.image).map_err(failure)?;
            records.remove(&record).map_err(failure)
        }
    }
}

fn open_records(args: &StoreArgs) -> std::result::Result<Records, Failure> {
    args.driver()?;
    let config = args.config().map_err(Failure::usage)?;
    Records::open(&config.root).map_err(failure)
}

fn print_records(records: &[Record], json: bool) -> std::result::Result<(), Failure> {
    if json {
        let show = |record: &Record| {
            json!({
                "id": record.id().to_string(),
                "names": record.names,
                "layers": record.layers,
            })
        };
        return print_json(&records.iter().map(show).collect::<Vec<_>>());
    }
    let line = |record: &Record| {
        let names = if record.names.is_empty() { "-".to_owned() } else { record.names.join(",") };
        let top = record.layers.last().map_or("-", String::as_str);
        format!("{} {names} {top}\n", record.id())
    };
    print(&records.iter().map(line).collect::<String>())
}

fn run_import(args: &ImportArgs) -> std::result::Result<(), Failure> {
    let store = args.store.driver()?;
    let records = open_records(&args.store)?;
    let bundle = open_bundle(args, &records).map_err(failure)?;
    let options = ImportOptions {
        apply: ApplyOptions { in_user_namespace: in_user_namespace(), ..ApplyOptions::default() },
        name: args.name.clone(),
    };
    let shown = std::io::stderr().is_terminal().then(|| bar(0));
    let watch = |file: Box<dyn Read + Send>, size: u64| -> Box<dyn Read + Send> {
        match &shown {
            Some(bar) => {
                bar.inc_length(size);
                Box::new(bar.wrap_read(file))
            }
            None => file,
        }
    };
    let imported = import(store.as_ref(), &records, &bundle, &options, &watch).map_err(failure)?;
    print_records(&imported, args.store.json)
}

fn open_bundle(args: &ImportArgs, records: &Records) -> Result<Bundle> {
    let is_stdin = args.source.as_os_str() == "-";
    if !is_stdin && let Ok(dir) = open_directory(&args.source) {
        return Ok(Bundle::directory(dir));
    }
    let path = if is_stdin { PathBuf::from("/dev/stdin") } else { args.source.clone() };
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, rustix::fs::Mode::empty())
        .at("open", || path.display().to_string())?;
    Bundle::tar(File::from(file), || records.unnamed_file())
}

fn run_export(args: &ExportArgs) -> std::result::Result<(), Failure> {
    let store = args.store.driver()?;
    let record = open_records(&args.store)?.find(&args.image).map_err(failure)?;
    let format = match args.format {
        Shape::Oci => Format::OciDirectory,
        Shape::OciTar => Format::OciTar,
        Shape::Docker => Format::Docker,
    };
    let packing = match args.compression {
        Compression::None => Packing::Plain,
        Compression::Gzip => Packing::Gzip,
        Compression::Zstd => Packing::Zstd,
    };
    let done = || -> Result<_> {
        let (parent, name) = split(&args.to)?;
        let parent = open_directory(parent)?;
        export(store.as_ref(), &record, format, packing, parent, &args.to, name.as_bytes())
    };
    let id = done().map_err(|error: Error| failure(error))?;
    if args.store.json {
        return print_json(&json!({ "id": id.to_string() }));
    }
    print(&format!("{id}\n"))
}
