//! Generated cases, run on the program under test and on kernel overlayfs side by side.
//!
//! A case is a small layer stack and a list of operations. Many cases share one mount, each in a directory of its own.
//! Compared are the outcome of every operation, the tree every few operations and at the end, the tree after a remount, and
//! the trees when each side mounts what the other one wrote.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::cases::Case;
use crate::env;
use crate::fixture::{Kind, Mount, Sandbox, Spec, try_fill};
use crate::images::{Image, Packed};
use crate::ops::{Op, PATHS, Target, Verb};
use crate::tree::{self, Options, Snapshot};
use crate::weak::{Server, Store};

/// A difference between ours and the kernel's that is meant to be.
pub struct Allowed {
    /// What differs, and why that is right.
    pub reason: &'static str,
    /// Whether the outcomes (ours, the kernel's) of an operation differ just so.
    pub applies: fn(&Op, &str, &str) -> bool,
}

/// All differences that are meant to be. Beside these, some values are never compared: access and change times, inode numbers
/// (only which names share one, and that listings agree with stat), block counts, and link counts of directories.
/// Generated sequences read through descriptors that are fresh or open for writing, because the kernel's descriptors that were
/// opened for reading before a copy-up go on showing the old data, and ours do not. What the kernel lists but does not find is
/// left out of its listings: it lists a directory that only one layer has as it is, whiteouts included, and ours hides whiteouts
/// everywhere.
pub const ALLOWED: &[Allowed] = &[
    Allowed {
        reason: "removing the ACL that it does not have is no error of an upper object only. Opening a file for writing copies \
             it up in the kernel, not in ours; with an index ours copies up what lies above every name that a changed file was \
             seen under",
        applies: |op, ours, kernel| {
            op.verb == Verb::removeacl
                && matches!((ours, kernel), ("ENODATA", "ok") | ("ok", "ENODATA"))
        },
    },
    Allowed {
        reason: "an xattr that is not there cannot be removed; the kernel says that a lower filesystem has none at all, although the \
             upper one would take it",
        applies: |op, ours, kernel| {
            let removes = matches!(op.verb, Verb::removexattr | Verb::removeacl);
            removes && (ours, kernel) == ("ENODATA", "EOPNOTSUPP")
        },
    },
    Allowed {
        reason: "what was removed while open has no name; the kernel goes on showing the link count of a lower object",
        applies: |op, ours, kernel| {
            op.verb == Verb::hstat && ours.replace(" nlink 0 ", " nlink 1 ") == kernel
        },
    },
    Allowed {
        reason: "a lower directory that was removed while open has no place to be copied to; the kernel gives one errno or another",
        applies: |op, ours, kernel| {
            let by_handle =
                matches!(op.verb, Verb::hutimens | Verb::hchmod | Verb::hchown | Verb::hsetxattr);
            by_handle && (ours, kernel) == ("ENOENT", "ENOTDIR")
        },
    },
    Allowed {
        reason: "renaming one name of a file to another of its names, or exchanging the two, does nothing; in a user namespace the \
             kernel takes the two names of a copied-up file for two files, and gives up",
        applies: |op, ours, kernel| {
            let apart = !env::is_initial_namespace();
            let is_rename = [Verb::rename, Verb::exchange].contains(&op.verb);
            apart && is_rename && (ours, kernel) == ("ok", "ESTALE")
        },
    },
];

/// What becomes of a directory with lower parts that is renamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renames {
    /// Neither side does it.
    Refused,
    /// Ours completes it in the upper layer, the kernel writes a redirect.
    Copied,
    /// Both write a redirect.
    Redirected,
    /// Both write a redirect, and copy no data up where attributes change.
    Lent,
}

impl Renames {
    /// The options of a side.
    fn options(self, side: Kind) -> &'static str {
        match (self, side) {
            (Renames::Refused, Kind::Lamina) => "dir_rename_entries=0",
            (Renames::Refused, Kind::Kernel) => "redirect_dir=nofollow",
            (Renames::Copied, Kind::Lamina) => "rw",
            (Renames::Copied, Kind::Kernel) | (Renames::Redirected, _) => "redirect_dir=on",
            (Renames::Lent, _) => "redirect_dir=on,metacopy=on",
        }
    }
}

/// How cases are made and compared.
#[derive(Clone, Debug)]
pub struct Config {
    /// Who is compared with the kernel; the kernel itself, to test the harness.
    pub ours: Kind,
    /// Lower layers hold hard links. Then the kernel has an index and, unless `index` is set, nothing is remounted: without an
    /// index on disk the links of a lower file part at the next mount.
    pub links: bool,
    /// Ours has an index too.
    pub index: bool,
    /// What becomes of a directory with lower parts that is renamed.
    pub renames: Renames,
    /// More options of ours, and of the kernel's.
    pub options: [&'static str; 2],
    /// Operations in each case.
    pub ops: usize,
    /// A fault for the test of the harness: what this does to our snapshots must be found.
    pub fault: Option<fn(&mut Snapshot)>,
    /// What is different about the upper layer of ours.
    pub lesser: Option<Lesser>,
    /// What the lower layers of both sides lie on, if not on the filesystem of the test data.
    pub image: Option<Image>,
}

/// An upper layer on a filesystem that can do less. The kernel has no such upper layer, so its own is as ever.
#[derive(Clone, Copy, Debug)]
pub struct Lesser {
    /// Options of ours.
    pub options: &'static str,
    /// Who serves the upper layer, if it is no local directory.
    pub server: Option<Server>,
    /// Operations that it cannot do, or does otherwise, which are left out.
    pub cannot: &'static [Verb],
    /// First words of the lines of lower layers that it could not copy up.
    pub cannot_hold: &'static [&'static str],
    /// What is written is of the kernel's form: then each side mounts what the other wrote.
    pub is_kernel_format: bool,
}

impl Config {
    /// What the names of the kernel's marks begin with.
    fn prefix(&self) -> &'static str {
        if self.options[1] == "userxattr" { "user.overlay." } else { env::overlay_prefix() }
    }

    /// A line of a layer, its mark by the name that the kernel reads.
    fn mark<'a>(&self, line: &'a str) -> std::borrow::Cow<'a, str> {
        match line.strip_prefix("opaque ") {
            Some(path) => format!("xattr {path} {}opaque y", self.prefix()).into(),
            None => line.into(),
        }
    }

    fn may_remount(&self) -> bool {
        self.index || !self.links
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            ours: Kind::Lamina,
            links: false,
            index: false,
            renames: Renames::Refused,
            options: [""; 2],
            ops: 20,
            fault: None,
            lesser: None,
            image: None,
        }
    }
}

/// A difference.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Index of the case; none if only the whole batch shows it.
    pub case: Option<usize>,
    /// What differs.
    pub text: String,
}

struct Pair {
    ours: Option<Mount>,
    kernel: Option<Mount>,
}

impl Pair {
    fn paths(&self) -> (PathBuf, PathBuf) {
        let path = |mount: &Option<Mount>| mount.as_ref().map(|m| m.path().to_path_buf());
        (path(&self.ours).unwrap_or_default(), path(&self.kernel).unwrap_or_default())
    }

    fn remount(&mut self) {
        self.ours = self.ours.take().map(Mount::remount);
        self.kernel = self.kernel.take().map(Mount::remount);
    }
}

/// The directory of a case in a batch.
fn directory(index: usize) -> String {
    format!("s{index:03}")
}

/// Runs cases on one pair of mounts.
///
/// # Errors
/// The first difference.
pub fn run_batch(cases: &[Case], config: &Config) -> Result<(), Failure> {
    let mut sandbox = Sandbox::new();
    let height = cases.iter().map(|case| case.layers.len()).max().unwrap_or(1);
    let mut layers: Vec<PathBuf> = (0..height).map(|_| sandbox.layer("")).collect();
    // The kernel refuses a single lower layer only without an upper one, so one is enough here.
    for (index, case) in cases.iter().enumerate() {
        for (layer, lines) in layers.iter_mut().zip(&case.layers) {
            let root = layer.join(directory(index));
            std::fs::create_dir(&root).unwrap();
            let lines = lines.iter().map(|line| config.mark(line)).collect::<Vec<_>>().join("\n");
            try_fill(&root, &lines).map_err(|text| Failure { case: Some(index), text })?;
        }
    }
    let _packed = config.image.map(|image| Packed::new(&sandbox, &layers, image));
    // Symlinks and special files have no `user.` xattrs.
    let knows_origins = env::is_initial_namespace()
        && config.options[1] != "userxattr"
        && config.image.is_none_or(|image| image.has_uuid() && env::gives_handles(&layers[0]));
    let index = if config.links { "index=on" } else { "index=off" };
    let ours = sandbox.side(config.ours, "ours");
    let ours = if config.index { ours.option("index=on") } else { ours };
    let ours = ours.option(config.renames.options(config.ours));
    let ours = match config.ours {
        Kind::Kernel => ours.option(index),
        // Device nodes work in the mounts of the kernel's root.
        Kind::Lamina if env::is_machine_root() => ours.option("dev").option("suid"),
        Kind::Lamina => ours,
    };
    let kernel = sandbox.side(Kind::Kernel, "kernel").option(index);
    let kernel = kernel.option(config.renames.options(Kind::Kernel));
    let lesser = config.lesser.map_or("", |lesser| lesser.options);
    let [own, of_kernel] = config.options;
    let more = |spec: Spec, options: &str| match options {
        "" => spec,
        options => spec.option(options),
    };
    let (mut ours, kernel) = (more(more(ours, lesser), own), more(kernel, of_kernel));
    let server = config.lesser.and_then(|lesser| lesser.server);
    let store = server.map(|server| Store::mount(server, sandbox.root(), "store"));
    if let Some(store) = &store {
        let dirs = ["upper", "work"].map(|name| store.path.join(name));
        for dir in &dirs {
            std::fs::create_dir(dir).unwrap();
            try_fill(dir, "").unwrap();
        }
        let [upper, work] = dirs;
        ours.upper = Some((upper, work));
    }
    let start = tree::now();
    let mut pair = Pair { ours: Some(ours.mount()), kernel: Some(kernel.mount()) };
    let mut ends = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let run = Run { config, dir: directory(index), start, knows_origins };
        let end = run.operations(case, &mut pair);
        ends.push(end.map_err(|text| Failure { case: Some(index), text })?);
    }
    let compare = |pair: &Pair, when: &str| {
        for (index, end) in ends.iter().enumerate() {
            let run = Run { config, dir: directory(index), start, knows_origins };
            run.compare(pair, when, Some(end))
                .map_err(|text| Failure { case: Some(index), text })?;
        }
        Ok(())
    };
    if config.may_remount() {
        pair.remount();
        compare(&pair, "after a remount")?;
    }
    if config.may_remount() {
        // Each on the upper layer of the other.
        drop((pair.ours.take(), pair.kernel.take()));
        if config.lesser.is_some_and(|lesser| !lesser.is_kernel_format) {
            return Ok(());
        }
        // A whiteout in a directory with a redirect hides what lies elsewhere.
        let is_plain = matches!(config.renames, Renames::Refused | Renames::Copied);
        if let Some((upper, work)) = ours.upper.as_ref().filter(|_| is_plain) {
            check_upper(&sandbox, upper, work, config)
                .map_err(|text| Failure { case: None, text })?;
        }
        let crossed = |spec: &Spec, other: &Spec| spec.clone().on_upper_of(other).mount();
        let (a, b) = (crossed(&ours, &kernel), crossed(&kernel, &ours));
        let pair = Pair { ours: Some(a), kernel: Some(b) };
        compare(&pair, "each on the upper layer of the other")?;
    }
    Ok(())
}

/// What must hold in an upper layer that is not mounted: a whiteout only where it hides something (so none in an opaque
/// directory), no names that the kernel would show, nothing left in the work directory.
fn check_upper(
    sandbox: &Sandbox,
    upper: &Path,
    work: &Path,
    config: &Config,
) -> Result<(), String> {
    let options = Options { private_xattrs: true, check_ino: false, ..Options::default() };
    let tree = tree::snapshot_with(upper, options);
    let mut lowers = sandbox.side(Kind::Kernel, "lowers").read_only();
    if !config.options[1].is_empty() {
        lowers = lowers.option(config.options[1]);
    }
    if lowers.lowers.len() == 1 {
        // The kernel refuses a single layer.
        let empty = sandbox.root().join("empty");
        std::fs::create_dir_all(&empty).unwrap();
        lowers.lowers.push(empty);
    }
    let lowers = lowers.mount();
    let opaque = format!("xattr {}opaque", config.prefix());
    let mut problems = String::new();
    for (path, entry) in &tree.entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(".wh.") {
            problems += &format!("{}: the kernel would show this\n", path.display());
        }
        if entry.get("device") == "0:0" {
            let hidden = std::fs::symlink_metadata(lowers.path().join(path)).is_ok();
            let apart = path.ancestors().any(|dir| {
                tree.get(dir).is_some_and(|dir| dir.get(&opaque) == "y" && dir != entry)
            });
            if !hidden || apart {
                problems += &format!("{}: a whiteout that hides nothing\n", path.display());
            }
        }
    }
    drop(lowers);
    let left = tree::snapshot_with(work, options);
    // Not counted is the inode that whiteouts are links of; the next mount empties the directory.
    let counted = |path: &&PathBuf| {
        path.starts_with("work") && path.components().count() > 1 && !path.ends_with("whiteout")
    };
    for path in left.entries.keys().filter(counted) {
        problems += &format!("left in the work directory: {}\n", path.display());
    }
    if problems.is_empty() { Ok(()) } else { Err(format!("upper layer: {problems}")) }
}

struct Run<'a> {
    config: &'a Config,
    dir: String,
    start: i128,
    /// The kernel can tell where a file was copied up from.
    knows_origins: bool,
}

impl Run<'_> {
    fn operations(&self, case: &Case, pair: &mut Pair) -> Result<Snapshot, String> {
        let mut targets = self.targets(pair);
        for (number, op) in case.ops.iter().enumerate() {
            if self.is_left_out(op, pair) {
                continue;
            }
            match op.verb {
                Verb::drop_caches if env::is_machine_root() => {
                    std::fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
                }
                Verb::remount if self.config.may_remount() => {
                    drop(targets);
                    pair.remount();
                    targets = self.targets(pair);
                }
                _ => {}
            }
            let ours = targets.0.apply(op);
            let kernel = targets.1.apply(op);
            if ours != kernel && !self.is_allowed(op, &ours, &kernel) {
                return Err(format!(
                    "operation {number} `{op}`: ours gives {ours}, the kernel {kernel}"
                ));
            }
            if number % 8 == 7 {
                self.compare(pair, &format!("after operation {number} `{op}`"), None)?;
            }
        }
        drop(targets);
        self.compare(pair, "at the end", None)
    }

    /// Whether these are outcomes that are meant to differ.
    fn is_allowed(&self, op: &Op, ours: &str, kernel: &str) -> bool {
        // As in trees: see `forgive_times`.
        let without_time = |text: &str| text.split(" mtime ").next().map(str::to_owned);
        let is_late = self.config.renames == Renames::Lent
            && op.verb == Verb::hstat
            && without_time(ours) == without_time(kernel);
        is_late || ALLOWED.iter().any(|known| (known.applies)(op, ours, kernel))
    }

    /// Whether an operation is meant to have another outcome, so that trees could not be compared after it.
    fn is_left_out(&self, op: &Op, pair: &Pair) -> bool {
        let object = || std::fs::metadata(pair.paths().1.join(&self.dir).join(PATHS[op.path])).ok();
        let collects_writes = self.config.options[0].contains("writeback");
        match op.verb {
            // Whiteouts that users make: the kernel refuses them.
            Verb::mkwhiteout | Verb::rename_whiteout => self.config.ours == Kind::Lamina,
            // The kernel that collects writes does not ask for a new time when a file is cut to the size it
            // has, as truncate(2) lets it.
            Verb::truncate if collects_writes => object().is_some_and(|m| m.len() == op.size()),
            // Nor where holes are: the file is data to its end.
            Verb::hseek => collects_writes,
            _ => false,
        }
    }

    fn targets(&self, pair: &Pair) -> (Target, Target) {
        let (ours, kernel) = pair.paths();
        let mut ours = Target::new(&ours.join(&self.dir), self.start);
        ours.hide_dangling = self.config.ours == Kind::Kernel;
        let mut kernel = Target::new(&kernel.join(&self.dir), self.start);
        kernel.hide_dangling = true;
        (ours, kernel)
    }

    /// Compares the trees with each other and with an earlier one of the kernel, and gives the kernel's.
    fn compare(
        &self,
        pair: &Pair,
        when: &str,
        earlier: Option<&Snapshot>,
    ) -> Result<Snapshot, String> {
        let dir_times = std::env::var_os("FUSE_TESTS_NO_DIR_TIMES").is_none();
        let recent = Some(self.start);
        let take = |root: &Path, kind: Kind| {
            // The kernel's listings do not always agree with its stat: in user namespaces, and on upper layers of others.
            let check_ino = kind == Kind::Lamina;
            let options = Options { recent, check_ino, dir_times, ..Options::default() };
            tree::snapshot_with(root.join(&self.dir), options)
        };
        let (ours, kernel) = pair.paths();
        let (mut ours, mut kernel) = (take(&ours, self.config.ours), take(&kernel, Kind::Kernel));
        if let Some(fault) = self.config.fault {
            fault(&mut ours);
        }
        for (tree, kind) in [(&mut ours, self.config.ours), (&mut kernel, Kind::Kernel)] {
            if kind == Kind::Kernel {
                tree.entries.retain(|_, entry| !entry.get("stat").starts_with("No such file"));
            }
        }
        forgive_links(&mut ours, &kernel, self.knows_origins);
        self.forgive_times(&mut ours, &kernel);
        if earlier.is_none() {
            self.forgive_hidden_names(&mut ours, &kernel);
        }
        let differences = tree::diff(&ours, &kernel);
        if !differences.is_empty() {
            let text = differences.join("\n");
            return Err(format!(
                "{when} the trees differ (left ours, right the kernel's):\n{text}"
            ));
        }
        if let Some(earlier) = earlier {
            let mut earlier = earlier.clone();
            forgive_links(&mut earlier, &kernel, self.knows_origins);
            self.forgive_times(&mut earlier, &kernel);
            let mut now = kernel.clone();
            forgive_links(&mut now, &earlier, self.knows_origins);
            let differences = tree::diff(&earlier, &now);
            if !differences.is_empty() {
                let text = differences.join("\n");
                return Err(format!("{when} both trees are not what they were:\n{text}"));
            }
        }
        Ok(kernel)
    }
}

impl Run<'_> {
    /// The kernel changes the modification time of a file when it copies the data up that a change of attributes left below.
    fn forgive_times(&self, tree: &mut Snapshot, other: &Snapshot) {
        if self.config.renames != Renames::Lent {
            return;
        }
        for (path, entry) in &mut tree.entries {
            let Some(other) = other.get(path).filter(|other| other.get("type") == "RegularFile")
            else {
                continue;
            };
            if entry.get("mtime") == "recent" || other.get("mtime") == "recent" {
                entry.set("mtime", other.get("mtime"));
            }
        }
    }
}

impl Run<'_> {
    /// A server, or ours in its work directory, keeps a name for a file that loses one while it is open (`.fuse_hidden`,
    /// `.nfs`), and counts it until the file is closed, for the last time at a remount.
    fn forgive_hidden_names(&self, tree: &mut Snapshot, other: &Snapshot) {
        let hides =
            |lesser: Lesser| lesser.server.is_some() || lesser.options.contains("unlink_open");
        if !self.config.lesser.is_some_and(hides) {
            return;
        }
        for (path, entry) in &mut tree.entries {
            let count = |text: &str| text.parse::<u64>().ok();
            if let Some(other) = other.get(path)
                && let (Some(ours), Some(kernel)) =
                    (count(entry.get("nlink")), count(other.get("nlink")))
                && ours == kernel + 1
            {
                entry.set("nlink", other.get("nlink"));
            }
        }
    }
}

/// In a user namespace, with `userxattr`, or from a filesystem without a UUID or file handles, the kernel cannot tell where a file
/// was copied up from. When a lower file has got a second name, its two names then have different inode numbers until the next
/// mount, so one file looks like two, one of which may have more names. Removed from `tree` is what `other` does not see.
fn forgive_links(tree: &mut Snapshot, other: &Snapshot, knows_origins: bool) {
    if knows_origins {
        return;
    }
    let firsts: BTreeMap<PathBuf, String> =
        tree.entries.iter().map(|(path, entry)| (path.clone(), entry.get(LINK).into())).collect();
    let first_of = |path: &str| firsts.get(Path::new(path)).map_or("", String::as_str);
    for (path, entry) in &mut tree.entries {
        let Some(seen) = other.get(path).map(|other| other.get(LINK)) else { continue };
        if seen.is_empty() {
            entry.clear(LINK);
        } else if !entry.get(LINK).is_empty() && first_of(seen) == entry.get(LINK) {
            entry.set(LINK, seen);
        }
    }
}

/// The field that names the first name of a file with several.
const LINK: &str = "same file as";
