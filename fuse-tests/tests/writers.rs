//! Layers that others wrote: a stack whose layers are written in turn by kernel overlay, by fuse-overlayfs and by ours shows
//! what one kernel overlay shows on which the same operations were done.
//!
//! The model is one mount of kernel overlay on the bottom layers. Beside it grows a stack: one writer after the other mounts
//! what is there, does the next operations in a new upper layer, and leaves it to the next as one more lower layer. After each
//! the whole stack is mounted by ours, read-only, and compared with the model. A case ends early where a writer has given
//! another outcome than the model (a directory it does not rename, a bug of its own): what it wrote then has no measure.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fuse_tests::case::umount;
use fuse_tests::cases::{Style, generate_layers};
use fuse_tests::env;
use fuse_tests::fixture::{Kind, Mount, Sandbox, Spec, try_fill};
use fuse_tests::ops::{Op, Rng, Target, Verb};
use fuse_tests::run;
use fuse_tests::tree::{self, Options, Snapshot};
use fuse_tests::{needs_kernel_overlay, needs_root, skip};

/// Who writes a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    Lamina,
    Kernel,
    FuseOverlayfs,
}

/// Layers that are written on top of the bottom ones.
const STAGES: usize = 4;
/// Operations done in each.
const OPS: usize = 12;
/// Cases that share the mounts of one run.
const CASES: usize = 40;

/// One case: a directory of its own in every layer.
struct Story {
    dir: String,
    rng: Rng,
    /// Why it is followed no further.
    dropped: Option<String>,
    /// What has been done, for a report.
    log: String,
}

/// A mount of whoever writes.
enum Writing {
    Ours(Mount),
    Rival(PathBuf),
}

impl Writing {
    fn start(writer: Writer, spec: &Spec) -> Writing {
        match writer {
            Writer::Lamina => Writing::Ours(spec.mount()),
            Writer::Kernel => Writing::Ours(spec.clone().option("index=off").mount()),
            Writer::FuseOverlayfs => {
                let status = Command::new("fuse-overlayfs")
                    .args(["-o".as_ref(), spec.option_text().as_os_str()])
                    .arg(&spec.merged)
                    .status()
                    .unwrap();
                assert!(status.success(), "fuse-overlayfs: {status}");
                Writing::Rival(spec.merged.clone())
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            Writing::Ours(mount) => mount.path(),
            Writing::Rival(path) => path,
        }
    }

    fn end(self) {
        match self {
            Writing::Ours(mount) => mount.unmount(),
            Writing::Rival(path) => {
                umount(&path);
                env::wait_until("fuse-overlayfs ends", std::time::Duration::from_secs(20), || {
                    env::processes_with_argument(&path).is_empty()
                });
            }
        }
    }
}

/// An operation whose result one layer can hold: links part between layers, in every writer.
fn operation(rng: &mut Rng, fifos: bool) -> Op {
    loop {
        let op = Op::generate(rng);
        let is_apart = op.verb == Verb::mkfifo && !fifos
            || matches!(
                op.verb,
                Verb::link
                    | Verb::remount
                    | Verb::drop_caches
                    | Verb::open
                    | Verb::mkwhiteout
                    | Verb::rename_whiteout
            );
        if !is_apart {
            return op;
        }
    }
}

fn snapshot(root: &Path, dir: &str, start: i128, dir_times: bool) -> Snapshot {
    let options = Options {
        recent: Some(start),
        check_ino: false,
        dir_times,
        check_dots: false,
        ..Options::default()
    };
    let mut tree = tree::snapshot_with(root.join(dir), options);
    tree.entries.retain(|_, entry| !entry.get("stat").starts_with("No such file"));
    tree
}

/// Runs [`CASES`] stories with the writers in turn; gives how many were followed to the end.
fn tell(seed: u64, writers: [Writer; STAGES]) -> usize {
    let mut sandbox = Sandbox::new();
    // It opens a fifo to copy it, and then waits for ever for somebody at the other end.
    let rival = writers.contains(&Writer::FuseOverlayfs);
    let bottom: Vec<PathBuf> = (0..2).map(|_| sandbox.layer("")).collect();
    let mut stories: Vec<Story> = (0..CASES)
        .map(|n| {
            let mut rng = Rng::new(seed.wrapping_add(n as u64));
            let dir = format!("s{n:02}");
            let style = Style { links: false, marks: false };
            let mut layers = generate_layers(&mut rng, bottom.len(), style);
            if rival {
                let is_fifo = |line: &String| line.starts_with("fifo ");
                for lines in &mut layers {
                    let fifos: Vec<String> =
                        lines.iter().filter(|line| is_fifo(line)).cloned().collect();
                    let names: Vec<&str> =
                        fifos.iter().filter_map(|line| line.split(' ').nth(1)).collect();
                    lines.retain(|line| {
                        !line.split(' ').nth(1).is_some_and(|at| names.contains(&at))
                    });
                }
            }
            let mut log = format!("# seed {seed} story {n} writers {writers:?}\n");
            for (layer, lines) in bottom.iter().zip(&layers) {
                fs::create_dir(layer.join(&dir)).unwrap();
                try_fill(&layer.join(&dir), &lines.join("\n")).unwrap();
                let _ = writeln!(log, "# layer\n{}", lines.join("\n"));
            }
            Story { dir, rng, dropped: None, log }
        })
        .collect();
    let start = tree::now();
    // The rival's copies change the times of directories above them.
    let dir_times = !rival;
    let model =
        sandbox.side(Kind::Kernel, "model").option("index=off").option("redirect_dir=on").mount();
    let mut stack = sandbox.lowers();
    for (stage, writer) in writers.into_iter().enumerate() {
        let kind = if writer == Writer::Kernel { Kind::Kernel } else { Kind::Lamina };
        let mut spec = sandbox.side(kind, &format!("stage{stage}"));
        spec.lowers.clone_from(&stack);
        if kind == Kind::Lamina {
            spec = spec.option("dev");
        }
        let writing = Writing::start(writer, &spec);
        for story in stories.iter_mut().filter(|story| story.dropped.is_none()) {
            let _ = writeln!(story.log, "# {writer:?}");
            let mut theirs = Target::new(&writing.path().join(&story.dir), start);
            let mut kernels = Target::new(&model.path().join(&story.dir), start);
            theirs.hide_dangling = writer == Writer::Kernel;
            kernels.hide_dangling = true;
            theirs.dir_times = dir_times;
            kernels.dir_times = dir_times;
            for _ in 0..OPS {
                let op = operation(&mut story.rng, !rival);
                let _ = writeln!(story.log, "{op}");
                let (got, want) = (theirs.apply(&op), kernels.apply(&op));
                if got != want
                    && !run::ALLOWED.iter().any(|known| (known.applies)(&op, &got, &want))
                {
                    let ours = writer == Writer::Lamina;
                    assert!(!ours, "`{op}` gives {got}, in the model {want}\n{}", story.log);
                    story.dropped = Some(format!("{writer:?} {op}: {got}, not {want}"));
                    break;
                }
            }
            if writer == Writer::FuseOverlayfs && story.dropped.is_none() {
                drop((theirs, kernels));
                let live = snapshot(writing.path(), &story.dir, start, dir_times);
                let want = snapshot(model.path(), &story.dir, start, dir_times);
                if !tree::diff(&live, &want).is_empty() {
                    story.dropped = Some("fuse-overlayfs shows another tree".into());
                }
            }
        }
        writing.end();
        stack.insert(0, spec.upper.unwrap().0);
        let mut seen = sandbox.side(Kind::Lamina, &format!("seen{stage}")).read_only();
        seen.lowers.clone_from(&stack);
        let seen = seen.mount();
        for story in stories.iter().filter(|story| story.dropped.is_none()) {
            let ours = snapshot(seen.path(), &story.dir, start, dir_times);
            let want = snapshot(model.path(), &story.dir, start, dir_times);
            let lines = tree::diff(&ours, &want);
            assert!(
                lines.is_empty(),
                "layer {stage} written by {writer:?} (left ours, right the model):\n{}\n{}",
                lines.join("\n"),
                story.log
            );
        }
        seen.unmount();
    }
    model.unmount();
    for story in &stories {
        if let Some(why) = &story.dropped
            && std::env::var_os("FUSE_TESTS_SURVEY").is_some()
        {
            println!("{}: {why}", story.dir);
        }
    }
    stories.iter().filter(|story| story.dropped.is_none()).count()
}

fn rounds(default: usize) -> usize {
    let asked = std::env::var("FUSE_TESTS_SEQUENCES").ok().and_then(|n| n.parse::<usize>().ok());
    // What is asked for is counted in operation sequences, of which a round has one for each story and layer.
    asked.map_or(default, |n| n.div_ceil(CASES * STAGES))
}

fn seed() -> u64 {
    std::env::var("FUSE_TESTS_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1) << 32
}

fn tell_all(writers: &[Writer], least: usize) {
    let mut rng = Rng::new(seed() ^ 0x77);
    for round in 0..rounds(2) {
        let order = std::array::from_fn(|_| *rng.pick(writers));
        let told = tell(seed() + (round as u64) * 1000, order);
        assert!(told >= least, "only {told} of {CASES} stories went to the end: {order:?}");
    }
}

#[test]
fn layers_of_the_kernel_and_ours() {
    needs_root!();
    needs_kernel_overlay!();
    tell_all(&[Writer::Kernel, Writer::Lamina], CASES / 4);
}

#[test]
fn layers_of_fuse_overlayfs() {
    needs_root!();
    needs_kernel_overlay!();
    if Command::new("fuse-overlayfs").arg("--version").output().is_err() {
        skip!("fuse-overlayfs is not installed");
    }
    tell_all(&[Writer::FuseOverlayfs], 1);
    tell_all(&[Writer::FuseOverlayfs, Writer::Kernel, Writer::Lamina], 1);
}
