//! What is measured: scenarios, each a stack of layers and steps done on one mount of it.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat};

use crate::control::{Control, Counts};
use crate::layers::{self, Layers, bytes, shell};
use crate::peer::{Mounted, Peer};

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
    /// Processor time of client and server.
    pub cpu: Duration,
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
            let cpu = client_time().saturating_sub(client);
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
                cpu: cpu + after.cpu.saturating_sub(cost.cpu),
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
    let new = |name, build, is_changed, steps| Scenario { name, build, is_changed, steps };
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
        new(
            "read",
            large_file,
            false,
            vec![
                step("sequential", |at, _| sequential(at, 1)),
                step("sequential-again", |at, _| sequential(at, 1)),
            ],
        ),
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
        new("mmap", large_file, false, vec![step("random", mmap_random)]),
        new(
            "write",
            empty,
            true,
            vec![
                step("sequential", write_sequential),
                step("random-4k", write_random),
                step("small", write_small),
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
    layers.file(0, "large", (2 << 30) / scale)?;
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

// Steps.

/// Lists and stats everything, as `find -ls` does; gives a sum of names, types and sizes.
pub fn walk(at: &Path) -> io::Result<u64> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut waiting: Vec<(OwnedFd, Vec<u8>)> =
        vec![(openat(CWD, at, flags, Mode::empty())?, Vec::new())];
    let mut sum = 0_u64;
    while let Some((dir, path)) = waiting.pop() {
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let stat = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            let below = [&path[..], b"/", name.to_bytes()].concat();
            let mut hasher = DefaultHasher::new();
            hasher.write(&below);
            hasher.write_u32(stat.st_mode);
            if kind == FileType::RegularFile {
                hasher.write_u64(stat.st_size.unsigned_abs());
            }
            sum = sum.wrapping_add(hasher.finish());
            if kind == FileType::Directory {
                waiting.push((openat(&dir, name, flags, Mode::empty())?, below));
            }
        }
    }
    Ok(sum)
}

fn walk_step(at: &Path, _: usize) -> io::Result<u64> {
    walk(at)
}

fn list(at: &Path, _: usize) -> io::Result<u64> {
    Ok(fs::read_dir(at.join("big"))?.count() as u64)
}

fn read_all(at: &Path, _: usize) -> io::Result<u64> {
    let mut sum = 0_u64;
    let mut waiting = vec![at.to_path_buf()];
    let mut buffer = vec![0; 65536];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                waiting.push(entry.path());
            } else if kind.is_file() {
                let mut file = File::open(entry.path())?;
                loop {
                    let n = file.read(&mut buffer)?;
                    if n == 0 {
                        break;
                    }
                    sum +=
                        buffer.iter().take(n).step_by(64).map(|byte| u64::from(*byte)).sum::<u64>();
                }
            }
        }
    }
    Ok(sum)
}

fn open_read(at: &Path, scale: usize) -> io::Result<u64> {
    let mut sum = 0;
    let mut buffer = [0; 4096];
    for round in 0..(50 / scale).max(2) {
        for n in 0..1000 {
            let mut file = File::open(at.join(format!("d{}/f{n}", n % 10)))?;
            let read = file.read(&mut buffer)?;
            if round == 0 {
                sum += buffer.iter().take(read).map(|byte| u64::from(*byte)).sum::<u64>();
            }
        }
    }
    Ok(sum)
}

fn untar(at: &Path, scale: usize) -> io::Result<u64> {
    let count = 20_000 / scale;
    // Made once, beside the layers.
    let tar = tar_path(at);
    if !tar.exists() {
        let tree = tar.with_extension("tree");
        for n in 0..count {
            let path = tree.join(format!("t/d{}/f{n}", n / 50));
            fs::create_dir_all(path.parent().unwrap_or(&tree))?;
            fs::write(&path, bytes(&format!("f{n}"), n * 97 % 8000))?;
        }
        shell(&tree, &format!("tar cf '{}' t; rm -rf t", tar.display()))?;
    }
    let file = tar.display();
    shell(at, &format!("tar xf '{file}'"))?;
    Ok(count as u64)
}

fn tar_path(at: &Path) -> PathBuf {
    // `at` is the mountpoint, or the plain copy, in the directory of the run.
    let run = at.parent().unwrap_or(at);
    run.parent().unwrap_or(run).join("layers").join("small.tar")
}

fn remove(at: &Path, name: &str) -> io::Result<u64> {
    fs::remove_dir_all(at.join(name))?;
    Ok(0)
}

fn append_all(at: &Path, scale: usize) -> io::Result<u64> {
    for n in 0..5000 / scale {
        let path = at.join(format!("d{}/f{n}", n % 20));
        OpenOptions::new().append(true).open(path)?.write_all(b"more")?;
    }
    Ok(0)
}

fn chmod_all(at: &Path, scale: usize) -> io::Result<u64> {
    for n in 0..5000 / scale {
        fs::set_permissions(
            at.join(format!("d{}/f{n}", n % 20)),
            PermissionsExt::from_mode(0o600),
        )?;
    }
    Ok(0)
}

fn append_large(at: &Path, _: usize) -> io::Result<u64> {
    let path = at.join("large");
    OpenOptions::new().append(true).open(&path)?.write_all(b"more")?;
    Ok(fs::metadata(path)?.len())
}

fn sequential(at: &Path, _: usize) -> io::Result<u64> {
    let mut file = File::open(at.join("large"))?;
    let mut buffer = vec![0; 128 << 10];
    let mut total = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(total),
            n => total += n as u64,
        }
    }
}

fn random_read(at: &Path, scale: usize, jobs: u64) -> io::Result<u64> {
    let path = at.join("large");
    let blocks = fs::metadata(&path)?.len() / 4096;
    let count = 65_536 / scale as u64 / jobs;
    let job = |job: u64| -> io::Result<u64> {
        let file = File::open(&path)?;
        let mut buffer = [0; 4096];
        let mut sum = 0_u64;
        for n in 0..count {
            let block = (n + job * count).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            file.read_exact_at(&mut buffer, block % blocks * 4096)?;
            sum += u64::from(buffer[0]);
        }
        Ok(sum)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs).map(|n| scope.spawn(move || job(n))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| io::Error::other("panic"))?)
            .sum()
    })
}

fn mmap_random(at: &Path, scale: usize) -> io::Result<u64> {
    // Maps in another program, since this one has no unsafe code.
    let script = "
import mmap, sys
f = open('large', 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
n = len(m) // 4096; s = 0
for i in range(int(sys.argv[1])): s += m[(i * 0x9e3779b97f4a7c15 >> 20) % n * 4096]
print(s)";
    let count = (20_000 / scale).to_string();
    let out = Command::new("python3").args(["-c", script, &count]).current_dir(at).output()?;
    String::from_utf8_lossy(&out.stdout).trim().parse().map_err(io::Error::other)
}

fn write_sequential(at: &Path, scale: usize) -> io::Result<u64> {
    let mut file = File::create(at.join("new"))?;
    let block = bytes("block", 128 << 10);
    for _ in 0..4096 / scale {
        file.write_all(&block)?;
    }
    file.metadata().map(|meta| meta.len())
}

fn write_random(at: &Path, scale: usize) -> io::Result<u64> {
    let file = OpenOptions::new().write(true).open(at.join("new"))?;
    let blocks = file.metadata()?.len() / 4096;
    let block = bytes("small block", 4096);
    for n in 0..32_768 / scale as u64 {
        let at = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % blocks;
        file.write_all_at(&block, at * 4096)?;
    }
    Ok(blocks)
}

fn write_small(at: &Path, scale: usize) -> io::Result<u64> {
    let mut file = OpenOptions::new().append(true).create(true).open(at.join("log"))?;
    for _ in 0..20_000 / scale {
        file.write_all(b"a line of a log file\n")?;
    }
    file.metadata().map(|meta| meta.len())
}

fn make(at: &Path, _: usize) -> io::Result<u64> {
    shell(&at.join("src"), "make -s -j2")?;
    Ok(0)
}

fn git(at: &Path, script: &str) -> io::Result<u64> {
    shell(
        at,
        &format!(
            "export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'; {script}"
        ),
    )?;
    Ok(0)
}

fn git_status(at: &Path, _: usize) -> io::Result<u64> {
    git(at, "cd repo; test -z \"$(git status -s)\"")
}

fn git_checkout(at: &Path, _: usize) -> io::Result<u64> {
    git(at, "cd repo; git checkout -q one; test -z \"$(git status -s)\"")
}

fn git_clone(at: &Path, _: usize) -> io::Result<u64> {
    git(at, "git clone -q repo clone; cd clone; test -z \"$(git status -s)\"")
}

fn misses(at: &Path, scale: usize) -> io::Result<u64> {
    let dir = openat(CWD, at.join("usr/lib"), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mut found = 0;
    for n in 0..4000 / scale {
        let name = format!("lib{n}.so");
        found += u64::from(statat(dir.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW).is_ok());
    }
    Ok(found)
}

/// Several times: what the kernel knows is told in no time.
fn misses_again(at: &Path, scale: usize) -> io::Result<u64> {
    (0..5).map(|_| misses(at, scale)).sum()
}

fn create_in(at: &Path) -> io::Result<u64> {
    (0..1000).try_for_each(|n| File::create_new(at.join(format!("big/new{n}"))).map(drop))?;
    Ok(0)
}

fn unlink_in(at: &Path) -> io::Result<u64> {
    (0..1000).try_for_each(|n| fs::remove_file(at.join(format!("big/name-of-file-{n}"))))?;
    Ok(0)
}

fn storm(at: &Path, scale: usize) -> io::Result<u64> {
    let one = |who: usize| -> io::Result<()> {
        let own = at.join(format!("storm/p{who}"));
        fs::create_dir_all(&own)?;
        for n in 0..2000 / scale {
            let (file, other) = (own.join(format!("f{n}")), own.join(format!("g{n}")));
            fs::write(&file, "some content")?;
            fs::rename(&file, &other)?;
            fs::symlink_metadata(&other)?;
            if n % 2 == 0 {
                fs::remove_file(&other)?;
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|n| scope.spawn(move || one(n))).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| io::Error::other("panic"))?)
    })?;
    walk(at)
}

fn move_directory(at: &Path, _: usize) -> io::Result<u64> {
    // mv(1) copies where rename(2) does not work.
    shell(at, "mv d moved")?;
    Ok(0)
}

fn sqlite(at: &Path, scale: usize) -> io::Result<u64> {
    let rows = 20_000 / scale;
    shell(
        at,
        &format!(
            "sqlite3 db \"PRAGMA journal_mode=wal; CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);\" > /dev/null
            i=0; while [ $i -lt 20 ]; do
              sqlite3 db \"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < {}) INSERT INTO t(b) SELECT hex(i * 7919) FROM n\"
              i=$((i+1))
            done
            test \"$(sqlite3 db 'PRAGMA integrity_check; SELECT count(*) FROM t' | tr '\\n' ' ')\" = 'ok {} '",
            rows / 20,
            rows / 20 * 20
        ),
    )?;
    Ok(0)
}

/// How long the slowest in a hundred of many stat(2) takes beside a large copy-up, in microseconds.
fn stat_beside_a_copy(at: &Path, _: usize) -> io::Result<u64> {
    let large = at.join("large");
    let beside = &at.join("beside");
    std::thread::scope(|scope| {
        let copy = scope.spawn(|| OpenOptions::new().append(true).open(large)?.write_all(b"x"));
        let mut times = Vec::new();
        while !copy.is_finished() {
            // Names that nobody asked for yet, so that no cache of the kernel answers.
            let begun = Instant::now();
            fs::metadata(beside)?;
            let miss = fs::metadata(at.join(format!("miss{}", times.len())));
            times.push(begun.elapsed());
            assert!(miss.is_err());
            std::thread::sleep(Duration::from_micros(500));
        }
        copy.join().map_err(|_| io::Error::other("panic"))??;
        times.sort_unstable();
        Ok(times
            .get(times.len().saturating_sub(1) * 99 / 100)
            .map_or(0, |time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)))
    })
}
