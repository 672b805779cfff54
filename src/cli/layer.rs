//! `lamina layer`: one layer of the store.

use serde_json::json;

use super::store::{StoreArgs, failure};
use super::{Failure, apply, diff, print};
use crate::archive::Digest;
use crate::error::Error;
use crate::options::show_path;
use crate::store::{Backend, CreateOptions, Driver, LayerId, MountRequest};
use crate::sys::userns::Maps;

/// Arguments of `lamina layer`.
#[derive(clap::Args, Debug)]
pub struct LayerCommandArgs {
    #[command(subcommand)]
    command: LayerCommand,
}

#[derive(clap::Subcommand, Debug)]
enum LayerCommand {
    /// Make a layer of an image
    Create(CreateArgs),
    /// Make the writable layer of a container
    CreateRw(CreateArgs),
    /// Remove a layer with its content
    Remove(RemoveArgs),
    /// Succeed if there is such a layer; fail with code 1 and no word if not
    Exists(OneLayer),
    /// Print the directories of a layer
    Metadata(OneLayer),
    /// Mount a layer, or count once more that it is, and print where
    Mount(MountArgs),
    /// Give a mount back; the last one takes it down
    #[command(alias = "umount")]
    Unmount(OneLayer),
    /// Change the owners of all that a layer shows, from one map of ids to another
    UpdateIdMap(IdMapArgs),
    /// Unpack an archive to a layer
    Apply(apply::ApplyArgs),
    /// Write what a layer changes as an archive
    Diff(diff::LayerDiffArgs),
    /// List what a layer changes: A added, C changed, D deleted
    Changes(diff::LayerListArgs),
    /// Write the archive that a layer came as, from its tar-split record
    Rebuild(diff::RebuildArgs),
    /// Print the size of the files that a layer has, in bytes
    DiffSize(diff::LayerListArgs),
}

#[derive(clap::Args, Debug)]
struct IdMapArgs {
    #[command(flatten)]
    layer: OneLayer,
    /// Users as they are: INSIDE:OUTSIDE:COUNT; none is equal ids
    #[arg(long, value_name = "MAP")]
    from_uidmap: Vec<String>,
    /// Groups as they are
    #[arg(long, value_name = "MAP")]
    from_gidmap: Vec<String>,
    /// Users as they are to be
    #[arg(long, value_name = "MAP")]
    to_uidmap: Vec<String>,
    /// Groups as they are to be
    #[arg(long, value_name = "MAP")]
    to_gidmap: Vec<String>,
}

#[derive(clap::Args, Debug)]
struct MountArgs {
    #[command(flatten)]
    layer: OneLayer,
    /// Nothing may be changed through the mount
    #[arg(long)]
    read_only: bool,
    /// Skip syncs; contents may be lost in a crash of the machine
    #[arg(long)]
    volatile: bool,
    /// Mount options instead of those of the driver
    #[arg(short = 'o', value_name = "OPTS")]
    options: Vec<String>,
    /// SELinux label of the mount
    #[arg(long, value_name = "LABEL")]
    label: Option<String>,
    /// kernel, fuse or flat (a copy instead of a mount), whatever the probe says
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,
    /// Users that the mount shows: INSIDE:OUTSIDE:COUNT, as for a user namespace
    #[arg(long, value_name = "MAP", requires = "gidmap")]
    uidmap: Vec<String>,
    /// Groups that the mount shows
    #[arg(long, value_name = "MAP", requires = "uidmap")]
    gidmap: Vec<String>,
}

#[derive(clap::Args, Debug)]
struct CreateArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// The layer beneath it
    #[arg(long, value_name = "ID")]
    parent: Option<String>,
    /// A layer whose content and parent it is to have
    #[arg(long, value_name = "ID", conflicts_with = "parent")]
    template: Option<String>,
    /// Its content is the one with this digest of its table of contents, in an additional layer store
    #[arg(long, value_name = "DIGEST", conflicts_with = "template", value_parser = Digest::parse)]
    toc_digest: Option<Digest>,
    /// Reference of its image, for stores that are asked with one
    #[arg(long, value_name = "REF", requires = "toc_digest", default_value = "")]
    reference: String,
    /// Name of the new layer
    id: String,
}

#[derive(clap::Args, Debug)]
struct RemoveArgs {
    #[command(flatten)]
    layer: OneLayer,
    /// Also one that an image or a container of an engine has; its record stays, and is broken
    #[arg(long)]
    force: bool,
}

#[derive(clap::Args, Debug)]
struct OneLayer {
    #[command(flatten)]
    store: StoreArgs,
    /// Name of the layer
    id: String,
}

impl OneLayer {
    fn open(&self) -> Result<(Box<dyn Driver>, LayerId), Failure> {
        Ok((self.store.driver()?, parse(&self.id)?))
    }
}

fn parse(id: &str) -> Result<LayerId, Failure> {
    LayerId::parse(id).map_err(Failure::usage)
}

/// Runs `lamina layer`.
///
/// # Errors
/// The sentence to print.
pub fn run(args: LayerCommandArgs) -> Result<(), Failure> {
    match args.command {
        LayerCommand::Create(args) => create(&args, false),
        LayerCommand::CreateRw(args) => create(&args, true),
        LayerCommand::Apply(args) => apply::run_apply(args),
        LayerCommand::Diff(args) => diff::run_layer_diff(args),
        LayerCommand::Changes(args) => diff::run_layer_changes(args),
        LayerCommand::Rebuild(args) => diff::run_layer_rebuild(args),
        LayerCommand::DiffSize(args) => diff::run_layer_diff_size(args),
        LayerCommand::Remove(args) => {
            let (store, id) = args.layer.open()?;
            store.remove(&id, args.force).map_err(failure)
        }
        LayerCommand::Exists(args) => {
            let (store, id) = args.open()?;
            match store.exists(&id).map_err(failure)? {
                true => Ok(()),
                false => Err(Failure::silent()),
            }
        }
        LayerCommand::Mount(args) => mount(&args),
        LayerCommand::UpdateIdMap(args) => {
            let (store, id) = (args.layer.store.open()?, parse(&args.layer.id)?);
            let from = maps(&args.from_uidmap, &args.from_gidmap)?.unwrap_or_default();
            let to = maps(&args.to_uidmap, &args.to_gidmap)?.unwrap_or_default();
            store.update_id_map(&id, &from, &to).map_err(failure)
        }
        LayerCommand::Unmount(args) => {
            let (store, id) = args.open()?;
            store.unmount(&id).map_err(failure)
        }
        LayerCommand::Metadata(args) => {
            let (store, id) = args.open()?;
            let fields = store.metadata(&id).map_err(failure)?;
            if args.store.json {
                let object: serde_json::Map<_, _> =
                    fields.into_iter().map(|(name, value)| (name.into(), json!(value))).collect();
                return print(&format!("{}\n", serde_json::Value::from(object)));
            }
            print(
                &fields
                    .iter()
                    .map(|(name, value)| format!("{name}: {value}\n"))
                    .collect::<String>(),
            )
        }
    }
}

fn create(args: &CreateArgs, read_write: bool) -> Result<(), Failure> {
    let id = parse(&args.id)?;
    let parent = args.parent.as_deref().or(args.template.as_deref()).map(parse).transpose()?;
    if let Some(toc) = &args.toc_digest {
        return create_additional(args, &id, parent.as_ref(), toc);
    }
    let store = args.store.driver()?;
    let options = CreateOptions { parent: parent.as_ref(), read_write, owner: None };
    store.make(&id, options, None).map_err(failure)?;
    if args.store.json {
        return print(&format!("{}\n", json!({ "id": id.as_str() })));
    }
    Ok(())
}

/// Makes a layer of one that an additional layer store has.
fn create_additional(
    args: &CreateArgs,
    id: &LayerId,
    parent: Option<&LayerId>,
    toc: &Digest,
) -> Result<(), Failure> {
    let store = args.store.open()?;
    let found = store.find_additional(toc, &args.reference).map_err(failure)?;
    let found = found.ok_or_else(|| {
        Failure::sentence(format!(
            "{toc}: no additional layer store has it; name them by --storage-opt \
             overlay.additionallayerstore=PATH[:ref]"
        ))
    })?;
    let info = found.info().map_err(failure)?;
    store.create_from_additional(id, parent, &found).map_err(failure)?;
    if !args.store.json {
        return Ok(());
    }
    // What the store says of it, if that is JSON.
    let info = serde_json::from_str(&info).unwrap_or(serde_json::Value::String(info));
    print(&format!("{}\n", json!({ "id": id.as_str(), "blob": found.blob(), "info": info })))
}

fn mount(args: &MountArgs) -> Result<(), Failure> {
    let (store, id) = args.layer.open()?;
    let request = MountRequest {
        read_only: args.read_only,
        volatile: args.volatile,
        options: args
            .options
            .iter()
            .flat_map(|list| list.split(','))
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect(),
        label: args.label.clone(),
        maps: maps(&args.uidmap, &args.gidmap)?,
        backend: args.backend.as_deref().map(backend).transpose()?,
    };
    let merged = store.mount(&id, &request).map_err(failure)?;
    if args.layer.store.json {
        return print(&format!("{}\n", json!({ "merged": show_path(&merged) })));
    }
    print(&format!("{}\n", merged.display()))
}

fn backend(name: &str) -> Result<Backend, Failure> {
    match name {
        "kernel" => Ok(Backend::Kernel),
        "fuse" => Ok(Backend::Fuse),
        "flat" => Ok(Backend::Flat),
        _ => Err(Failure::usage(Error::invalid(
            format!("--backend {name}"),
            "is not known; use kernel, fuse or flat",
        ))),
    }
}

/// Parses `INSIDE:OUTSIDE:COUNT` maps; none at all is no map.
pub(super) fn maps(uids: &[String], gids: &[String]) -> Result<Option<Maps>, Failure> {
    let parse = |map: &String| {
        let mut numbers = map.split(':').map(|number| number.parse::<u32>().ok());
        match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
            (Some(Some(inside)), Some(Some(outside)), Some(Some(count)), None) if count > 0 => {
                Ok((inside, outside, count))
            }
            _ => Err(Failure::usage(Error::invalid(
                format!("map {map}"),
                "is not INSIDE:OUTSIDE:COUNT; write three numbers",
            ))),
        }
    };
    if uids.is_empty() && gids.is_empty() {
        return Ok(None);
    }
    let all = |list: &[String]| list.iter().map(parse).collect::<Result<Vec<_>, _>>();
    Ok(Some(Maps { uids: all(uids)?, gids: all(gids)? }))
}
