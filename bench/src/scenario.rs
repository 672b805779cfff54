//! What is measured: scenarios, each a stack of layers and steps done on one mount of it.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::control::{Control, Counts};
use crate::layers::{self, Layers};
use crate::peer::{Mounted, Peer};
use crate::steps::{
    append_all, append_large, chmod_all, create_in, git_checkout, git_clone, git_status, list,
    make, misses, misses_again, mmap_random, move_directory, open_read, random_read, read_all,
    remove, sequential, sqlite, stat_beside_a_copy, storm, unlink_in, untar, walk, walk_step,
    write_random, write_sequential, write_small,
};

/// Where, and how much of it.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// A directory on the filesystem to measure on.
    pub at: &'a Path,
    /// Divides the amounts of work.
    pub scale: usize,
}

/// A stack of layers and what is done on it.
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    build: fn(&mut Layers, usize) -> io::Result<()>,
    /// Steps that change the tree: the plain one is copied for each run.
    is_changed: bool,
    /// On a filesystem whose files can share blocks.
    pub shares_blocks: bool,
    /// In their order.
    pub steps: Vec<Step>,
}

/// One thing that is timed.
pub struct Step {
    /// Its name.
    pub name: &'static str,
    kind: Kind,
    /// Does it below a directory; what it gives must be the same for all.
    run: Run,
}

type Run = fn(&Path, usize) -> io::Result<u64>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// With whatever is cached.
    Read,
    /// With nothing cached.
    Cold,
    /// The tree is looked at afterwards, out of the time.
    Change,
    /// It gives a time in microseconds, which counts instead of its own.
    Latency,
}

const fn step(name: &'static str, run: Run) -> Step {
    Step { name, kind: Kind::Read, run }
}

const fn cold(name: &'static str, run: Run) -> Step {
    Step { name, kind: Kind::Cold, run }
}

const fn change(name: &'static str, run: Run) -> Step {
    Step { name, kind: Kind::Change, run }
}

/// What one step took.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Time on the wall.
    pub time: Duration,
    /// Processor time of the client.
    pub client: Duration,
    /// Processor time of the server.
    pub server: Duration,
    /// Most memory of the server so far, bytes.
    pub memory: u64,
    /// Requests to the server.
    pub requests: Counts,
    /// What the step gave; must be the same for all peers.
    pub check: u64,
}

impl Scenario {
    /// Runs all steps on a fresh mount. Where requests are counted, the times are longer by that.
    pub fn run(
        &self,
        peer: &Peer,
        place: Place<'_>,
        control: &Control,
        is_counted: bool,
    ) -> Result<Vec<Sample>, String> {
        let at = place.at;
        let failed = |e: io::Error| format!("{}: {e}", self.name);
        let build = |layers: &mut Layers| (self.build)(layers, place.scale);
        let stack = layers::stack(at, self.is_changed, peer.is_native(), build).map_err(failed)?;
        for layer in stack.lowers.iter().chain([&stack.plain]) {
            // The layers are in memory, but for cold steps.
            walk(layer).map_err(failed)?;
        }
        rustix::fs::sync();
        let begun = Instant::now();
        let mounted = Mounted::new(peer, &stack)?;
        let mut samples = vec![Sample { time: begun.elapsed(), ..Sample::default() }];
        for step in &self.steps {
            if step.kind == Kind::Cold {
                control.drop_caches();
            }
            let connection = mounted.connection().filter(|_| is_counted);
            if let Some(device) = connection {
                control.count(device);
            }
            let (cost, client) = (mounted.cost(), client_time());
            let begun = Instant::now();
            let check = (step.run)(&mounted.path, place.scale);
            let mut time = begun.elapsed();
            let client = client_time().saturating_sub(client);
            let after = mounted.cost();
            let requests = connection.map(|_| control.counted()).unwrap_or_default();
            let mut check = check.map_err(|e| format!("{} {}: {e}", self.name, step.name))?;
            match step.kind {
                Kind::Read | Kind::Cold => {}
                Kind::Change => check = check.wrapping_add(walk(&mounted.path).map_err(failed)?),
                Kind::Latency => time = Duration::from_micros(std::mem::take(&mut check)),
            }
            samples.push(Sample {
                time,
                client,
                server: after.cpu.saturating_sub(cost.cpu),
                memory: after.memory,
                requests,
                check,
            });
        }
        mounted.end()?;
        Ok(samples)
    }

    /// The names of the samples that [`Scenario::run`] gives.
    pub fn names(&self) -> Vec<String> {
        let steps = self.steps.iter().map(|step| step.name);
        ["mount"].into_iter().chain(steps).map(|step| format!("{}.{step}", self.name)).collect()
    }
}

/// Processor time of this process and the children it has waited for.
fn client_time() -> Duration {
    let microseconds = |who| {
        let usage = getrusage(who).ok()?;
        u64::try_from((usage.user_time() + usage.system_time()).num_microseconds()).ok()
    };
    let all = [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN];
    Duration::from_micros(all.into_iter().filter_map(microseconds).sum())
}

/// All of them.
pub fn all() -> Vec<Scenario> {
    let new = |name, build, is_changed, steps| {
        let shares_blocks = false;
        Scenario { name, build, is_changed, shares_blocks, steps }
    };
    vec![
        new(
            "tree",
            tree,
            false,
            vec![
                step("find-first", walk_step),
                step("find-warm", walk_step),
                cold("find-cold", walk_step),
                cold("read-cold", read_all),
                step("read-warm", read_all),
            ],
        ),
        new("openread", few_files, false, vec![step("first", open_read), step("warm", open_read)]),
        new(
            "small",
            empty,
            true,
            vec![change("untar", untar), change("rm", |at, _| remove(at, "t"))],
        ),
        new("copyup", many_files, true, vec![change("append", append_all)]),
        new("chmod", many_files, true, vec![change("lower", chmod_all)]),
        new("copyup1g", large_file, true, vec![change("append", append_large)]),
        new("sparse1g", sparse_file, true, vec![change("append", append_large)]),
        Scenario {
            shares_blocks: true,
            ..new("reflink1g", large_file, true, vec![change("append", append_large)])
        },
        new(
            "read",
            large_file,
            false,
            vec![
                step("sequential", |at, _| sequential(at, 1)),
                step("sequential-again", |at, _| sequential(at, 1)),
            ],
        ),
        new("read4", large_file, false, vec![step("sequential", |at, _| sequential(at, 4))]),
        new(
            "random",
            large_file,
            false,
            vec![step("read-4k", |at, scale| random_read(at, scale, 1))],
        ),
        new(
            "random4",
            large_file,
            false,
            vec![step("read-4k", |at, scale| random_read(at, scale, 4))],
        ),
        new("mmap", large_file, false, vec![step("random", |at, scale| mmap_random(at, scale, 1))]),
        new(
            "mmap4",
            large_file,
            false,
            vec![step("random", |at, scale| mmap_random(at, scale, 4))],
        ),
        new(
            "write",
            empty,
            true,
            vec![
                step("sequential", |at, scale| write_sequential(at, scale, 1)),
                step("random-4k", |at, scale| write_random(at, scale, 1)),
                step("small", write_small),
            ],
        ),
        new(
            "write4",
            empty,
            true,
            vec![
                step("sequential", |at, scale| write_sequential(at, scale, 4)),
                step("random-4k", |at, scale| write_random(at, scale, 4)),
            ],
        ),
        new("compile", sources, true, vec![change("make", make), step("make-again", make)]),
        new(
            "git",
            repository,
            true,
            vec![
                step("status-first", git_status),
                step("status-warm", git_status),
                step("checkout", git_checkout),
                step("clone", git_clone),
            ],
        ),
        new("deep1", |l, _| deep(l, 1), false, deep_steps()),
        new("deep16", |l, _| deep(l, 16), false, deep_steps()),
        new("deep128", |l, _| deep(l, 128), false, deep_steps()),
        new("deep400", |l, _| deep(l, 400), false, deep_steps()),
        new(
            "bigdir",
            big_directory,
            true,
            vec![
                cold("ls-U-cold", list),
                cold("ls-l-cold", walk_step),
                step("ls-l-warm", walk_step),
                change("create-1k", |at, _| create_in(at)),
                change("unlink-1k", |at, _| unlink_in(at)),
            ],
        ),
        new(
            "storm",
            empty,
            true,
            vec![change("4-processes", storm), change("rm", |at, _| remove(at, "storm"))],
        ),
        new(
            "dirs",
            lower_directory,
            true,
            vec![change("mv", move_directory), change("rm", |at, _| remove(at, "moved"))],
        ),
        new("rmlower", lower_directory, true, vec![change("rm", |at, _| remove(at, "d"))]),
        new("sqlite", empty, true, vec![step("wal", sqlite)]),
        new(
            "beside",
            huge_file,
            true,
            vec![Step { name: "stat-p99", kind: Kind::Latency, run: stat_beside_a_copy }],
        ),
    ]
}

fn deep_steps() -> Vec<Step> {
    vec![step("list", walk_step), step("miss-new", misses), step("miss-again", misses_again)]
}

// Layers.

fn empty(layers: &mut Layers, _: usize) -> io::Result<()> {
    layers.empty(1)
}

fn tree(layers: &mut Layers, scale: usize) -> io::Result<()> {
    layers.empty(10)?;
    for n in 0..60_000 / scale {
        let path = format!("a{}/b{}/f{n}", n / 1500, n / 14 % 107);
        layers.file(n % 10, &path, n * 37 % 6000)?;
        if n % 50 == 0 {
            layers.link(n % 10, &format!("{path}.link"), "f")?;
        }
    }
    Ok(())
}

fn few_files(layers: &mut Layers, _: usize) -> io::Result<()> {
    layers.empty(4)?;
    (0..1000).try_for_each(|n| layers.file(n % 4, &format!("d{}/f{n}", n % 10), 3000))
}

fn many_files(layers: &mut Layers, scale: usize) -> io::Result<()> {
    layers.empty(2)?;
    (0..5000 / scale).try_for_each(|n| layers.file(n % 2, &format!("d{}/f{n}", n % 20), 5000))
}

fn large_file(layers: &mut Layers, scale: usize) -> io::Result<()> {
    layers.empty(1)?;
    layers.file(0, "large", (1 << 30) / scale)
}

fn huge_file(layers: &mut Layers, scale: usize) -> io::Result<()> {
    layers.empty(1)?;
    // The plain tree has nothing to copy, and no room for as much.
    layers.lower_file(0, "large", (4 << 30) / scale)?;
    layers.file(0, "beside", 10)
}

fn sparse_file(layers: &mut Layers, _: usize) -> io::Result<()> {
    layers.empty(1)?;
    layers.sparse(0, "large", 1 << 30)
}

fn deep(layers: &mut Layers, count: usize) -> io::Result<()> {
    layers.empty(count)?;
    for n in 0..count.max(100) {
        layers.file(n % count, &format!("usr/lib/p{}/f{n}", n % 10), 100)?;
    }
    Ok(())
}

fn big_directory(layers: &mut Layers, scale: usize) -> io::Result<()> {
    layers.empty(2)?;
    (0..100_000 / scale).try_for_each(|n| layers.file(n % 2, &format!("big/name-of-file-{n}"), 0))
}

fn lower_directory(layers: &mut Layers, scale: usize) -> io::Result<()> {
    layers.empty(2)?;
    (0..10_000 / scale).try_for_each(|n| layers.file(1, &format!("d/s{}/f{n}", n % 100), 500))
}

fn sources(layers: &mut Layers, scale: usize) -> io::Result<()> {
    layers.empty(2)?;
    let count = 80 / scale.min(8);
    let mut objects = String::new();
    for n in 0..count {
        let includes =
            "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include \"all.h\"\n";
        let body = format!(
            "{includes}int f{n}(int x) {{ return printf(\"%d\", x + {n}) + (int)strlen(N); }}\n"
        );
        layers.content(0, &format!("src/f{n}.c"), body.as_bytes())?;
        objects += &format!(" f{n}.o");
    }
    layers.content(1, "src/all.h", b"#define N \"name\"\n")?;
    let rules = format!("all.a:{objects}\n\tar rc $@ $^\n%.o: %.c all.h\n\tgcc -O0 -c -o $@ $<\n");
    layers.content(1, "src/Makefile", rules.as_bytes())
}

fn repository(layers: &mut Layers, scale: usize) -> io::Result<()> {
    layers.empty(1)?;
    let count = 4000 / scale;
    layers.script(&format!(
        "mkdir repo; cd repo; git init -q .; git config user.name n; git config user.email e@e
        i=0; while [ $i -lt {count} ]; do d=d$((i % 100)); mkdir -p $d; echo content $i > $d/f$i; i=$((i+1)); done
        git add -A; git commit -qm one; git branch one
        for f in d1*/*; do echo more >> $f; done; git commit -qam two; git status -s"
    ))
}
