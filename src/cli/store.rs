//! `lamina store`: the store as a whole.

use std::path::PathBuf;

use serde_json::json;

use super::{Failure, migrate, print};
use crate::error::{Error, Result};
use crate::store::check::Finding;
use crate::store::{Backend, Driver, Store, StoreConfig, Variant, driver};

/// Where the store is; the same for all commands that work on one.
#[derive(clap::Args, Debug)]
pub struct StoreArgs {
    #[command(flatten)]
    place: StorePlace,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl std::ops::Deref for StoreArgs {
    type Target = StorePlace;

    fn deref(&self) -> &StorePlace {
        &self.place
    }
}

/// Which store is meant.
#[derive(clap::Args, Debug)]
pub struct StorePlace {
    /// Root of the store [default: graphroot of storage.conf]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory for what need not outlive a boot [default: runroot of storage.conf]
    #[arg(long, value_name = "DIR")]
    runroot: Option<PathBuf>,
    /// Root of the store for read-only layers, if kept apart
    #[arg(long, value_name = "DIR")]
    imagestore: Option<PathBuf>,
    /// overlay (podman, buildah), overlay2 (Docker), or overlay1 or aufs (Docker of old) [default: the
    /// one whose layers lie in the root, else overlay]
    #[arg(long, value_name = "NAME")]
    driver: Option<String>,
    /// Option of the driver, such as overlay.mountopt=nodev; may be given more than once
    #[arg(long, value_name = "KEY=VALUE")]
    storage_opt: Vec<String>,
}

impl StorePlace {
    /// Returns the store that is meant.
    ///
    /// # Errors
    /// `Invalid` for a driver that is not known, and what reading storage.conf returns.
    pub fn config(&self) -> Result<StoreConfig> {
        let variant = match (&self.driver, &self.root) {
            (Some(driver), _) => Variant::parse(driver)?,
            (None, Some(root)) => driver::find(root)?,
            (None, None) => Variant::Containers,
        };
        let mut config = match variant {
            Variant::Containers => Store::default_config()?,
            Variant::Docker | Variant::Overlay1 | Variant::Aufs => StoreConfig {
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

    /// Opens the store that is meant, whichever driver keeps it.
    ///
    /// # Errors
    /// The sentence to print.
    pub fn driver(&self) -> std::result::Result<Box<dyn Driver>, Failure> {
        let config = self.config().map_err(Failure::usage)?;
        driver::open(&config).map_err(failure)
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
    /// Try what kernel and filesystem can do, and tell who mounts, why, and how to change it
    Probe(StoreArgs),
    /// Look for what is wrong; code 1 if something is
    Check(CheckArgs),
    /// Give back what killed processes left
    Gc(GcArgs),
    /// Unmount the home that mounting layers left, and remove what killed programs unpacked to
    Cleanup(StoreArgs),
    /// Tell what the space is used for
    Df(StoreArgs),
    /// Bring all layers of a store into another, of whatever driver, and compare them
    #[command(after_help = migrate::NOTES)]
    Migrate(migrate::MigrateArgs),
}

#[derive(clap::Args, Debug)]
struct CheckArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// Mend what can be mended; a layer that has its content is never removed
    #[arg(long)]
    repair: bool,
}

#[derive(clap::Args, Debug)]
struct GcArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// Also remove layers that no image and no container of the engine knows
    #[arg(long)]
    orphans: bool,
}

/// Runs `lamina store`.
///
/// # Errors
/// The sentence to print.
pub fn run(args: StoreCommandArgs) -> std::result::Result<(), Failure> {
    match args.command {
        StoreCommand::Init(args) => {
            let config = args.config().map_err(Failure::usage)?;
            driver::init(&config).map_err(failure).map(drop)
        }
        StoreCommand::Status(args) => {
            let facts = args.driver()?.status().map_err(failure)?;
            if args.json {
                let object: serde_json::Map<_, _> =
                    facts.into_iter().map(|(name, value)| (name, json!(value))).collect();
                return print(&format!("{}\n", serde_json::Value::from(object)));
            }
            let lines: String =
                facts.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
            print(&lines)
        }
        StoreCommand::Probe(args) => {
            let store = args.open()?;
            let probe = store.probe(true).map_err(failure)?;
            let choice = store.choose(&probe, false, None).map_err(failure)?;
            let backend = choice.backend.as_ref().map_or("none", Backend::name);
            if args.json {
                let value = json!({
                    "filesystem": probe.filesystem,
                    "facts": probe.facts,
                    "backend": backend,
                    "reason": choice.reason,
                    "cure": choice.cure,
                });
                return print(&format!("{value}\n"));
            }
            let mut text = format!("filesystem: {}\n", probe.filesystem);
            for fact in &probe.facts {
                let holds = if fact.holds { "yes" } else { "no" };
                let reason = match fact.reason.as_str() {
                    "" => String::new(),
                    reason => format!(" ({reason})"),
                };
                text.push_str(&format!("{}: {holds}{reason}\n", fact.name));
            }
            text.push_str(&format!("backend: {backend}\nreason: {}\n", choice.reason));
            if !choice.cure.is_empty() {
                text.push_str(&format!("cure: {}\n", choice.cure));
            }
            print(&text)
        }
        StoreCommand::Check(args) => check(&args),
        StoreCommand::Gc(args) => {
            let done = args.store.open()?.collect(args.orphans).map_err(failure)?;
            print(&findings(&done, args.store.json))
        }
        StoreCommand::Cleanup(args) => args.driver()?.cleanup().map_err(failure),
        StoreCommand::Df(args) => df(&args),
        StoreCommand::Migrate(args) => migrate::run(&args),
        StoreCommand::List(args) => {
            let layers = args.driver()?.list().map_err(failure)?;
            if args.json {
                let ids: Vec<&str> = layers.iter().map(|id| id.as_str()).collect();
                return print(&format!("{}\n", json!(ids)));
            }
            print(&layers.iter().map(|id| format!("{id}\n")).collect::<String>())
        }
    }
}

fn check(args: &CheckArgs) -> std::result::Result<(), Failure> {
    let config = args.store.config().map_err(Failure::usage)?;
    // Opening recovers, and so would hide what is to be told.
    let store = Store::open_as_it_is(&config).map_err(failure)?;
    if args.repair {
        let mended = store.repair().map_err(failure)?;
        print(&findings(&mended, args.store.json))?;
    }
    let found = store.check().map_err(failure)?;
    if !args.repair {
        print(&findings(&found, args.store.json))?;
    }
    if found.is_empty() {
        return Ok(());
    }
    let mendable = found.iter().filter(|finding| finding.kind.can_be_mended()).count();
    let cure = match (args.repair, mendable) {
        (false, 1..) => "lamina store check --repair mends what it can",
        _ => "nothing can be made of what is left; what is said above tells what to do",
    };
    Err(Failure::sentence(format!("{} things are wrong; {cure}", found.len())))
}

fn findings(found: &[Finding], json: bool) -> String {
    if json {
        return format!("{}\n", json!(found));
    }
    let line = |finding: &Finding| {
        let kind = json!(finding.kind);
        format!("{}: {}: {}\n", kind.as_str().unwrap_or_default(), finding.what, finding.detail)
    };
    found.iter().map(line).collect()
}

fn df(args: &StoreArgs) -> std::result::Result<(), Failure> {
    let items = args.open()?.usage().map_err(failure)?;
    if args.json {
        return print(&format!("{}\n", json!(items)));
    }
    let mut text = String::from("       BYTES      CONTENT         WORK  WHAT\n");
    for item in &items {
        let unknown =
            if item.known == Some(false) { " (no image or container knows it)" } else { "" };
        text.push_str(&format!(
            "{:12} {:12} {:12}  {} {}{unknown}\n",
            item.bytes, item.content, item.work, item.kind, item.name
        ));
    }
    let sum: u64 = items.iter().map(|item| item.bytes).sum();
    text.push_str(&format!("{sum:12}                            all\n"));
    print(&text)
}
