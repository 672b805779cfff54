//! `lamina store migrate`: from one store to another.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use serde_json::json;

use super::apply::bar;
use super::store::failure;
use super::{Failure, print};
use crate::error::{Error, Result};
use crate::image::{Record, Records};
use crate::options::show_path;
use crate::store::driver::Driver;
use crate::store::engine::IMAGES;
use crate::store::layout::{LayerId, io_error};
use crate::store::migrate::{bring, plan};
use crate::store::{Store, StoreConfig, Variant, driver};

/// Shown below the help.
pub(super) const NOTES: &str = "\
Nobody may use either store meanwhile. Data is shared where the filesystem can (reflinks), else
copied. A migration that was stopped goes on where it was. Images of lamina image come along. Records of
images and containers that engines keep beside the layers are not brought: export images and import them
instead.

In overlay1 a layer that another lies on becomes a complete tree, the others become containers'. What
its trees were made on is taken from Docker's records (ROOT/image/overlay/layerdb), if they are there.";

/// Arguments of `lamina store migrate`.
#[derive(clap::Args, Debug)]
pub(super) struct MigrateArgs {
    /// Driver of the old store [default: the one whose layers lie there]
    #[arg(long, value_name = "NAME")]
    from_driver: Option<String>,
    /// Driver of the new store [default: the one whose layers lie there, else overlay]
    #[arg(long, value_name = "NAME")]
    to_driver: Option<String>,
    /// Share files by hard links, for a store that is given up: nobody may write to it afterwards
    #[arg(long)]
    hard_links: bool,
    /// Remove the layers of the old store when all of them were brought and found to be the same
    #[arg(long)]
    remove: bool,
    /// Directory for running state of the old store, where its layers may be mounted [default: runroot
    /// of storage.conf, or Docker's]
    #[arg(long, value_name = "DIR")]
    runroot: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Root of the old store
    from: PathBuf,
    /// Root of the new store; made if it is not there
    to: PathBuf,
}

/// Runs `lamina store migrate`.
///
/// # Errors
/// The sentence to print.
pub(super) fn run(args: &MigrateArgs) -> std::result::Result<(), Failure> {
    let (layers, bytes) = migrate(args).map_err(failure)?;
    if args.json {
        return print(&format!("{}\n", json!({ "layers": layers, "bytes": bytes })));
    }
    print(&format!("{layers} layers, {bytes} bytes\n"))
}

fn migrate(args: &MigrateArgs) -> Result<(usize, u64)> {
    let config = |root: &Path, name: &Option<String>| {
        let variant = match name {
            Some(name) => Variant::parse(name)?,
            None => driver::find(root)?,
        };
        let run_root = match (&args.runroot, variant) {
            (Some(path), _) => path.clone(),
            (None, Variant::Containers) => Store::default_config()?.run_root,
            (None, _) => "/run/docker".into(),
        };
        let root = root.to_owned();
        let options = Vec::new();
        Ok::<_, Error>(StoreConfig { root, run_root, image_store: None, variant, options })
    };
    let (from, to) = (config(&args.from, &args.from_driver)?, config(&args.to, &args.to_driver)?);
    let (old, new) = (driver::open(&from)?, driver::init(&to)?);
    let home = |config: &StoreConfig| {
        let path = config.root.join(config.variant.home_name());
        std::fs::canonicalize(&path).map_err(|error| io_error("realpath", &path, error))
    };
    if home(&from)? == home(&to)? {
        return Err(Error::invalid(
            show_path(&args.to),
            "is the old store itself; name another root, or another driver by --to-driver",
        ));
    }
    let steps = plan(old.as_ref())?;
    if args.remove {
        for step in &steps {
            refuse_named(old.as_ref(), &step.id)?;
        }
    }
    let bytes = steps.iter().map(|step| step.bytes).sum();
    let bar = if std::io::stderr().is_terminal() { bar(bytes) } else { ProgressBar::hidden() };
    for step in &steps {
        bring(old.as_ref(), new.as_ref(), step, args.hard_links, &mut |bytes| bar.inc(bytes))?;
    }
    bar.finish_and_clear();
    let images = images(&from)?;
    if !images.is_empty() {
        let records = Records::open(&to.root)?;
        for image in &images {
            records.add(&mut image.clone())?;
        }
    }
    if args.remove {
        for image in &images {
            Records::open(&from.root)?.remove(image)?;
        }
        for step in steps.iter().rev() {
            old.remove(&step.id, false)?;
        }
    }
    Ok((steps.len(), bytes))
}

/// Fails for a layer that an engine would miss.
fn refuse_named(store: &dyn Driver, id: &LayerId) -> Result<()> {
    if !store.is_named(id)? {
        return Ok(());
    }
    Err(Error::Busy {
        what: format!(
            "{id}: records of an engine name it; leave --remove out, and remove its images and \
             containers there (rmi, rm of podman or docker)"
        )
        .into(),
    })
}

/// Returns the images that `lamina image` brought into a store.
fn images(config: &StoreConfig) -> Result<Vec<Record>> {
    match std::fs::exists(config.root.join(IMAGES)) {
        Ok(false) => Ok(Vec::new()),
        Ok(true) => Records::open(&config.root)?.list(),
        Err(error) => Err(io_error("stat", &config.root, error)),
    }
}
