//! `lamina layer`: one layer of the store.

use serde_json::json;

use super::store::{StoreArgs, failure};
use super::{Failure, apply, diff, print};
use crate::options::show_path;
use crate::store::{CreateOptions, LayerId, Store};

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
    Remove(OneLayer),
    /// Succeed if there is such a layer; fail with code 1 and no word if not
    Exists(OneLayer),
    /// Print the directories of a layer
    Metadata(OneLayer),
    /// Unpack an archive to a layer
    Apply(apply::ApplyArgs),
    /// Write what a layer changes as an archive
    Diff(diff::LayerDiffArgs),
    /// List what a layer changes: A added, C changed, D deleted
    Changes(diff::LayerListArgs),
    /// Print the size of the files that a layer has, in bytes
    DiffSize(diff::LayerListArgs),
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
    /// Name of the new layer
    id: String,
}

#[derive(clap::Args, Debug)]
struct OneLayer {
    #[command(flatten)]
    store: StoreArgs,
    /// Name of the layer
    id: String,
}

impl OneLayer {
    fn open(&self) -> Result<(Store, LayerId), Failure> {
        Ok((self.store.open()?, parse(&self.id)?))
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
        LayerCommand::DiffSize(args) => diff::run_layer_diff_size(args),
        LayerCommand::Remove(args) => {
            let (store, id) = args.open()?;
            store.remove(&id).map_err(failure)
        }
        LayerCommand::Exists(args) => {
            let (store, id) = args.open()?;
            match store.exists(&id).map_err(failure)? {
                true => Ok(()),
                false => Err(Failure::silent()),
            }
        }
        LayerCommand::Metadata(args) => {
            let (store, id) = args.open()?;
            let metadata = store.metadata(&id).map_err(failure)?;
            let lowers: Vec<String> = metadata.lowers.iter().map(|path| show_path(path)).collect();
            let mut fields = vec![
                ("UpperDir", show_path(&metadata.upper)),
                ("WorkDir", show_path(&metadata.work)),
                ("MergedDir", show_path(&metadata.merged)),
            ];
            if !lowers.is_empty() {
                fields.push(("LowerDir", lowers.join(":")));
            }
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
    let store = args.store.open()?;
    let options = CreateOptions { parent: parent.as_ref(), read_write, owner: None };
    store.create(&id, options).map_err(failure)?;
    if args.store.json {
        return print(&format!("{}\n", json!({ "id": id.as_str() })));
    }
    Ok(())
}
