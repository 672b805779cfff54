//! `lamina store`: the store as a whole.

use std::path::PathBuf;

use serde_json::json;

use super::{Failure, print};
use crate::error::{Error, Result};
use crate::store::{Store, StoreConfig, Variant};

/// Where the store is; the same for all commands that work on one.
#[derive(clap::Args, Debug)]
pub struct StoreArgs {
    /// Root of the store [default: graphroot of storage.conf]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory for what need not outlive a boot [default: runroot of storage.conf]
    #[arg(long, value_name = "DIR")]
    runroot: Option<PathBuf>,
    /// Root of the store for read-only layers, if kept apart
    #[arg(long, value_name = "DIR")]
    imagestore: Option<PathBuf>,
    /// overlay (podman, buildah) or overlay2 (Docker)
    #[arg(long, value_name = "NAME", default_value = "overlay")]
    driver: String,
    /// Option of the driver, such as overlay.mountopt=nodev; may be given more than once
    #[arg(long, value_name = "KEY=VALUE")]
    storage_opt: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl StoreArgs {
    /// Returns the store that is meant.
    ///
    /// # Errors
    /// `Invalid` for a driver that is not known, and what reading storage.conf returns.
    pub fn config(&self) -> Result<StoreConfig> {
        let variant = Variant::parse(&self.driver)?;
        let mut config = match variant {
            Variant::Containers => Store::default_config()?,
            Variant::Docker => StoreConfig {
                root: "/var/lib/docker".into(),
                run_root: "/run/docker".into(),
                image_store: None,
                variant,
                options: Vec::new(),
            },
        };
        if let Some(root) = &self.root {
            // What a configuration says of its own store is not said of another.
            config.image_store = None;
            config.options.clear();
            config.root.clone_from(root);
            if self.runroot.is_none() {
                return Err(Error::invalid(
                    "--root",
                    "needs the directory for running state of that store; add --runroot DIR",
                ));
            }
        }
        if let Some(run_root) = &self.runroot {
            config.run_root.clone_from(run_root);
        }
        if let Some(images) = &self.imagestore {
            config.image_store = Some(images.clone());
        }
        config.options.extend(self.storage_opt.iter().cloned());
        Ok(config)
    }

    /// Opens the store that is meant.
    ///
    /// # Errors
    /// The sentence to print.
    pub fn open(&self) -> std::result::Result<Store, Failure> {
        let config = self.config().map_err(Failure::usage)?;
        Store::open(&config).map_err(failure)
    }
}

/// Returns how a command on a store fails: what the user wrote wrongly has a code of its own.
pub fn failure(error: Error) -> Failure {
    if matches!(error, Error::Invalid { .. }) { Failure::usage(error) } else { Failure::run(error) }
}

/// Arguments of `lamina store`.
#[derive(clap::Args, Debug)]
pub struct StoreCommandArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(clap::Subcommand, Debug)]
enum StoreCommand {
    /// Make a store, or complete one
    Init(StoreArgs),
    /// Tell what the store is and can do
    Status(StoreArgs),
    /// List the layers
    List(StoreArgs),
}

/// Runs `lamina store`.
///
/// # Errors
/// The sentence to print.
pub fn run(args: StoreCommandArgs) -> std::result::Result<(), Failure> {
    match args.command {
        StoreCommand::Init(args) => {
            let config = args.config().map_err(Failure::usage)?;
            Store::init(&config).map_err(failure).map(drop)
        }
        StoreCommand::Status(args) => {
            let store = args.open()?;
            let facts = store.status().map_err(failure)?;
            if args.json {
                let object: serde_json::Map<_, _> =
                    facts.into_iter().map(|(name, value)| (name, json!(value))).collect();
                return print(&format!("{}\n", serde_json::Value::from(object)));
            }
            let lines: String =
                facts.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
            print(&lines)
        }
        StoreCommand::List(args) => {
            let layers = args.open()?.list().map_err(failure)?;
            if args.json {
                let ids: Vec<&str> = layers.iter().map(|id| id.as_str()).collect();
                return print(&format!("{}\n", json!(ids)));
            }
            print(&layers.iter().map(|id| format!("{id}\n")).collect::<String>())
        }
    }
}
