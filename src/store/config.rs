//! Where the store lies unless a command says so: storage.conf as podman and buildah read it.
//!
//! One main file is read, then the drop-in files in the order of their names. Who is not root has
//! places of his own; of the system's files only what is meant for such users counts then. The file
//! of `CONTAINERS_STORAGE_CONF` counts whole for everybody, as since podman 6; before, podman took
//! of it nothing but `rootless_storage_path` for the places of a user. Inside of `podman unshare`
//! those count that podman has.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::layout::{Variant, io_error};
use super::{Store, StoreConfig};
use crate::error::{Errno, Error, Result};
use crate::options::show_path;

/// What of the surroundings decides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Surroundings {
    /// The user whose store it is: 0 for root of the machine.
    pub uid: u32,
    /// Environment variables that matter.
    pub variables: BTreeMap<&'static str, OsString>,
    /// Directory that `/etc` and `/usr/share` are looked for in.
    pub top: PathBuf,
}

const VARIABLES: [&str; 11] = [
    "CONTAINERS_GRAPHROOT",
    "CONTAINERS_RUNROOT",
    "CONTAINERS_STORAGE_CONF",
    "HOME",
    "USER",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
    "STORAGE_DRIVER",
    "STORAGE_OPTS",
    "_CONTAINERS_ROOTLESS_UID",
];

impl Surroundings {
    /// Returns those of this process.
    pub fn here() -> Self {
        let variables: BTreeMap<_, _> = VARIABLES
            .into_iter()
            .filter_map(|name| Some((name, std::env::var_os(name).filter(|v| !v.is_empty())?)))
            .collect();
        // Inside of the namespace that podman makes for a user everybody looks like root.
        let outside =
            variables.get("_CONTAINERS_ROOTLESS_UID").and_then(|uid| uid.to_str()?.parse().ok());
        let uid = outside.unwrap_or_else(|| rustix::process::geteuid().as_raw());
        Self { uid, variables, top: PathBuf::from("/") }
    }

    fn path(&self, variable: &str) -> Option<PathBuf> {
        self.variables.get(variable).map(PathBuf::from)
    }

    fn text(&self, variable: &str) -> Option<&str> {
        self.variables.get(variable)?.to_str()
    }

    fn home(&self) -> PathBuf {
        self.path("HOME").unwrap_or_else(|| PathBuf::from("/"))
    }

    fn is_rootless(&self) -> bool {
        self.uid != 0
    }

    fn user_conf_dir(&self) -> PathBuf {
        self.path("XDG_CONFIG_HOME")
            .unwrap_or_else(|| self.home().join(".config"))
            .join("containers")
    }

    /// Replaces `$HOME`, `$USER` and `$UID` in a path of a configuration.
    fn expand(&self, text: &str) -> PathBuf {
        let home = self.home();
        let values = [
            ("HOME", home.to_string_lossy().into_owned()),
            ("USER", self.text("USER").unwrap_or_default().to_owned()),
            ("UID", self.uid.to_string()),
        ];
        let mut text = text.to_owned();
        for (name, value) in values {
            text =
                text.replace(&format!("${{{name}}}"), &value).replace(&format!("${name}"), &value);
        }
        PathBuf::from(text)
    }
}

/// Returns the store that podman would use.
///
/// # Errors
/// `Invalid` for a file that is no TOML, or names another driver.
pub fn load(around: &Surroundings) -> Result<StoreConfig> {
    let mut config = defaults(around);
    if let Some(file) = around.path("CONTAINERS_STORAGE_CONF") {
        let table = read(&file)?.ok_or_else(|| {
            Error::sys(
                "open",
                format!("CONTAINERS_STORAGE_CONF={}", show_path(&file)),
                Errno::NOENT,
            )
        })?;
        apply(&mut config, &table, around, true)?;
    } else {
        let etc = around.top.join("etc/containers");
        let share = around.top.join("usr/share/containers");
        let user = around.user_conf_dir();
        let mut system = match read(&etc.join("storage.conf"))? {
            Some(table) => table,
            None => read(&share.join("storage.conf"))?.unwrap_or_default(),
        };
        for table in drop_ins(&[share.join("storage.conf.d"), etc.join("storage.conf.d")])? {
            merge(&mut system, table);
        }
        if !around.is_rootless() {
            apply(&mut config, &system, around, true)?;
        } else {
            // The user's file takes the place of the system's, whole.
            let mut own = read(&user.join("storage.conf"))?;
            for table in drop_ins(&[user.join("storage.conf.d")])? {
                merge(own.get_or_insert_default(), table);
            }
            apply(&mut config, &system, around, false)?;
            if let Some(own) = own {
                config.options.clear();
                apply(&mut config, &own, around, true)?;
            }
        }
    }
    if around.variables.contains_key("_CONTAINERS_ROOTLESS_UID") {
        // Versions of podman differ in what of a file they take for a user; unshare tells.
        if let Some(root) = around.path("CONTAINERS_GRAPHROOT") {
            config.root = root;
        }
        if let Some(run_root) = around.path("CONTAINERS_RUNROOT") {
            config.run_root = run_root;
        }
    }
    if let Some(driver) = around.text("STORAGE_DRIVER") {
        check_driver(driver, "STORAGE_DRIVER")?;
    }
    if let Some(options) = around.text("STORAGE_OPTS") {
        config.options = options.split(',').filter(|o| !o.is_empty()).map(str::to_owned).collect();
    }
    Ok(config)
}

fn defaults(around: &Surroundings) -> StoreConfig {
    let (root, run_root) = if around.is_rootless() {
        let data =
            around.path("XDG_DATA_HOME").unwrap_or_else(|| around.home().join(".local/share"));
        let run = around
            .path("XDG_RUNTIME_DIR")
            .unwrap_or_else(|| PathBuf::from(format!("/tmp/storage-run-{}", around.uid)));
        (data.join("containers/storage"), run.join("containers"))
    } else {
        ("/var/lib/containers/storage".into(), "/run/containers/storage".into())
    };
    StoreConfig {
        root,
        run_root,
        image_store: None,
        variant: Variant::Containers,
        options: Vec::new(),
    }
}

/// Puts what a file says into `config`; of a system's file read for a user, only what is for users.
fn apply(
    config: &mut StoreConfig,
    table: &Table,
    around: &Surroundings,
    whole: bool,
) -> Result<()> {
    let empty = Table::new();
    let storage = table.get("storage").and_then(Value::as_table).unwrap_or(&empty);
    let text = |name: &str| storage.get(name).and_then(Value::as_str).filter(|v| !v.is_empty());
    if let Some(driver) = text("driver") {
        check_driver(driver, "driver in storage.conf")?;
    }
    if around.is_rootless()
        && let Some(path) = text("rootless_storage_path")
    {
        config.root = around.expand(path);
    }
    let options = storage.get("options").and_then(Value::as_table).unwrap_or(&empty);
    let found = driver_options(options);
    if !whole {
        let for_users = |option: &String| option.contains("ignore_chown_errors");
        config.options.extend(found.into_iter().filter(for_users));
        return Ok(());
    }
    if let Some(path) = text("graphroot") {
        config.root = around.expand(path);
    }
    if let Some(path) = text("runroot") {
        config.run_root = around.expand(path);
    }
    if let Some(path) = text("imagestore") {
        config.image_store = Some(around.expand(path));
    }
    config.options.extend(found);
    Ok(())
}

fn check_driver(driver: &str, from: &str) -> Result<()> {
    if matches!(driver, "overlay" | "overlay2") {
        return Ok(());
    }
    Err(Error::invalid(
        format!("{from}: {driver}"),
        "is a driver that lamina does not keep; name the store by --root and --runroot",
    ))
}

/// Returns `KEY=VALUE` for the options of the driver; those of `options.overlay` are last and win.
fn driver_options(options: &Table) -> Vec<String> {
    const SCALARS: [&str; 8] = [
        "size",
        "inodes",
        "mount_program",
        "mountopt",
        "skip_mount_home",
        "ignore_chown_errors",
        "force_mask",
        "use_composefs",
    ];
    let mut found = Vec::new();
    for (list, key) in
        [("additionalimagestores", "imagestore"), ("additionallayerstores", "additionallayerstore")]
    {
        let stores = options.get(list).and_then(Value::as_array).map(Vec::as_slice);
        for store in stores.unwrap_or_default().iter().filter_map(Value::as_str) {
            found.push(format!("overlay.{key}={store}"));
        }
    }
    let overlay = options.get("overlay").and_then(Value::as_table);
    for table in [Some(options), overlay].into_iter().flatten() {
        for (name, value) in table {
            let value = match value {
                Value::String(text) => text.clone(),
                Value::Integer(number) if name == "force_mask" => format!("{number:o}"),
                Value::Integer(number) => number.to_string(),
                Value::Boolean(truth) => truth.to_string(),
                Value::Float(_) | Value::Datetime(_) | Value::Array(_) | Value::Table(_) => {
                    continue;
                }
            };
            if (SCALARS.contains(&name.as_str()) || name == "sync") && !value.is_empty() {
                found.push(format!("overlay.{name}={value}"));
            }
        }
    }
    found
}

fn read(path: &Path) -> Result<Option<Table>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("read", path, error)),
    };
    text.parse().map(Some).map_err(|error: toml::de::Error| {
        Error::invalid(
            show_path(path),
            format!("is no valid TOML ({}); correct it", error.message()),
        )
    })
}

/// Reads the `.conf` files of directories, sorted by name; one of a later directory takes the
/// place of one of the same name before.
fn drop_ins(dirs: &[PathBuf]) -> Result<Vec<Table>> {
    let mut files = BTreeMap::new();
    for dir in dirs {
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io_error("opendir", dir, error)),
        };
        for entry in entries {
            let name = entry.map_err(|error| io_error("readdir", dir, error))?.file_name();
            if name.as_bytes().ends_with(b".conf") {
                files.insert(name.clone(), dir.join(name));
            }
        }
    }
    let mut tables = Vec::new();
    for path in files.values() {
        tables.extend(read(path)?);
    }
    Ok(tables)
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

impl Store {
    /// Returns the paths that a configuration leads to, for a command that says less.
    ///
    /// # Errors
    /// As [`load`].
    pub fn default_config() -> Result<StoreConfig> {
        load(&Surroundings::here())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine {
        dir: tempfile::TempDir,
        around: Surroundings,
    }

    impl Machine {
        fn new(uid: u32) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let mut variables = BTreeMap::new();
            variables.insert("HOME", OsString::from(dir.path().join("home")));
            let around = Surroundings { uid, variables, top: dir.path().to_owned() };
            Self { dir, around }
        }

        fn file(&self, path: &str, text: &str) -> PathBuf {
            let path = self.dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            #[allow(clippy::disallowed_methods, reason = "a test by path")]
            std::fs::write(&path, text).unwrap();
            path
        }

        fn load(&self) -> StoreConfig {
            load(&self.around).unwrap()
        }
    }

    #[test]
    fn without_files_there_are_the_usual_places() {
        let config = Machine::new(0).load();
        assert_eq!(config.root, Path::new("/var/lib/containers/storage"));
        assert_eq!(config.run_root, Path::new("/run/containers/storage"));
        let mut user = Machine::new(1000);
        let home = user.dir.path().join("home");
        assert_eq!(user.load().root, home.join(".local/share/containers/storage"));
        assert_eq!(user.load().run_root, Path::new("/tmp/storage-run-1000/containers"));
        user.around.variables.insert("XDG_DATA_HOME", "/data".into());
        user.around.variables.insert("XDG_RUNTIME_DIR", "/run/user/1000".into());
        assert_eq!(user.load().root, Path::new("/data/containers/storage"));
        assert_eq!(user.load().run_root, Path::new("/run/user/1000/containers"));
    }

    #[test]
    fn the_file_of_the_machine_and_drop_ins_are_read_in_order() {
        let machine = Machine::new(0);
        let shared = "[storage]\ndriver = \"overlay\"\ngraphroot = \"/share\"\n";
        machine.file("usr/share/containers/storage.conf", shared);
        assert_eq!(machine.load().root, Path::new("/share"));
        let etc = "[storage]\ndriver = \"overlay2\"\ngraphroot = \"/etc-root\"\nrunroot = \"/run/x\"\n\
            imagestore = \"/images\"\n[storage.options]\nadditionalimagestores = [\"/a\", \"/b\"]\n\
            mount_program = \"/old\"\n[storage.options.overlay]\nmount_program = \"/new\"\n\
            mountopt = \"nodev\"\nignore_chown_errors = \"true\"\n";
        machine.file("etc/containers/storage.conf", etc);
        let config = machine.load();
        assert_eq!(config.root, Path::new("/etc-root"));
        assert_eq!(config.image_store, Some("/images".into()));
        let options = super::super::DriverOptions::parse(&config.options).unwrap();
        assert_eq!(options.image_stores, ["/a", "/b"].map(PathBuf::from));
        assert_eq!(options.mount_program, Some("/new".into()));
        assert!(options.ignore_chown_errors);
        machine.file("usr/share/containers/storage.conf.d/50.conf", "[storage]\nrunroot=\"/50\"\n");
        machine.file("usr/share/containers/storage.conf.d/60.conf", "[storage]\nrunroot=\"/no\"\n");
        machine.file("etc/containers/storage.conf.d/60.conf", "[storage]\ngraphroot=\"/60\"\n");
        machine.file("etc/containers/storage.conf.d/70.txt", "[storage]\ngraphroot=\"/70\"\n");
        let config = machine.load();
        assert_eq!((config.root, config.run_root), ("/60".into(), "/50".into()));
    }

    #[test]
    fn a_user_has_places_of_his_own() {
        let mut machine = Machine::new(1000);
        machine.around.variables.insert("USER", "joe".into());
        machine.file(
            "etc/containers/storage.conf",
            "[storage]\ndriver=\"overlay\"\ngraphroot=\"/var\"\nrunroot=\"/run\"\n\
             rootless_storage_path=\"/big/$USER/$UID\"\n[storage.options.overlay]\n\
             mountopt=\"nodev\"\nignore_chown_errors=\"true\"\n",
        );
        let config = machine.load();
        assert_eq!(config.root, Path::new("/big/joe/1000"));
        assert_eq!(config.run_root, Path::new("/tmp/storage-run-1000/containers"));
        assert_eq!(config.options, ["overlay.ignore_chown_errors=true"]);
        machine.file(
            "home/.config/containers/storage.conf",
            "[storage]\ndriver=\"overlay\"\ngraphroot=\"$HOME/s\"\n",
        );
        let config = machine.load();
        assert_eq!(config.root, machine.dir.path().join("home/s"));
        assert!(config.options.is_empty());
    }

    #[test]
    fn the_environment_wins() {
        let mut machine = Machine::new(0);
        machine.file("etc/containers/storage.conf", "[storage]\ngraphroot=\"/etc-root\"\n");
        let other = machine.file("other.conf", "[storage]\ngraphroot=\"/other\"\n");
        machine.around.variables.insert("CONTAINERS_STORAGE_CONF", other.into());
        machine.around.variables.insert("STORAGE_OPTS", "overlay.mountopt=nodev".into());
        let config = machine.load();
        assert_eq!(config.root, Path::new("/other"));
        assert_eq!(config.options, ["overlay.mountopt=nodev"]);
        machine.around.variables.insert("STORAGE_DRIVER", "vfs".into());
        assert!(load(&machine.around).unwrap_err().to_string().contains("STORAGE_DRIVER: vfs"));
        machine.around.variables.insert("CONTAINERS_STORAGE_CONF", "/no/such/file".into());
        assert!(load(&machine.around).is_err());
    }

    #[test]
    fn a_user_has_the_places_of_the_named_file_and_those_that_podman_unshare_tells() {
        let mut machine = Machine::new(1000);
        machine.file("etc/containers/storage.conf", "[storage]\nrootless_storage_path=\"/big\"\n");
        let text = "[storage]\ngraphroot=\"/mine\"\nrunroot=\"/mine-run\"\n";
        let named = machine.file("named.conf", text);
        machine.around.variables.insert("CONTAINERS_STORAGE_CONF", named.into());
        let places = |machine: &Machine| {
            let config = machine.load();
            (config.root, config.run_root)
        };
        assert_eq!(places(&machine), ("/mine".into(), "/mine-run".into()));
        // What podman 4 has for such a file; nobody else's word counts.
        machine.around.variables.insert("CONTAINERS_GRAPHROOT", "/told".into());
        machine.around.variables.insert("CONTAINERS_RUNROOT", "/told-run".into());
        assert_eq!(places(&machine), ("/mine".into(), "/mine-run".into()));
        machine.around.variables.insert("_CONTAINERS_ROOTLESS_UID", "1000".into());
        assert_eq!(places(&machine), ("/told".into(), "/told-run".into()));
    }

    #[test]
    fn broken_files_are_named() {
        let machine = Machine::new(0);
        machine.file("etc/containers/storage.conf", "[storage\n");
        let message = load(&machine.around).unwrap_err().to_string();
        assert!(message.contains("etc/containers/storage.conf: is no valid TOML"), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}
