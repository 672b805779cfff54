//! What is done in the steps of scenarios: the same work on whatever is mounted.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat};

use crate::layers::{bytes, shell};

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

pub fn walk_step(at: &Path, _: usize) -> io::Result<u64> {
    walk(at)
}

pub fn list(at: &Path, _: usize) -> io::Result<u64> {
    Ok(fs::read_dir(at.join("big"))?.count() as u64)
}

pub fn read_all(at: &Path, _: usize) -> io::Result<u64> {
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

pub fn open_read(at: &Path, scale: usize) -> io::Result<u64> {
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

pub fn untar(at: &Path, scale: usize) -> io::Result<u64> {
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

pub fn remove(at: &Path, name: &str) -> io::Result<u64> {
    fs::remove_dir_all(at.join(name))?;
    Ok(0)
}

pub fn append_all(at: &Path, scale: usize) -> io::Result<u64> {
    for n in 0..5000 / scale {
        let path = at.join(format!("d{}/f{n}", n % 20));
        OpenOptions::new().append(true).open(path)?.write_all(b"more")?;
    }
    Ok(0)
}

pub fn chmod_all(at: &Path, scale: usize) -> io::Result<u64> {
    for n in 0..5000 / scale {
        fs::set_permissions(
            at.join(format!("d{}/f{n}", n % 20)),
            PermissionsExt::from_mode(0o600),
        )?;
    }
    Ok(0)
}

pub fn append_large(at: &Path, _: usize) -> io::Result<u64> {
    let path = at.join("large");
    OpenOptions::new().append(true).open(&path)?.write_all(b"more")?;
    Ok(fs::metadata(path)?.len())
}

pub fn sequential(at: &Path, jobs: u64) -> io::Result<u64> {
    let path = at.join("large");
    let len = fs::metadata(&path)?.len();
    in_jobs(jobs, |job| {
        let file = File::open(&path)?;
        let mut buffer = vec![0; 128 << 10];
        let (start, end) = (len * job / jobs, len * (job + 1) / jobs);
        let mut at = start;
        while at < end {
            let room =
                usize::try_from(end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
            match file.read_at(&mut buffer[..room], at)? {
                0 => break,
                n => at += n as u64,
            }
        }
        // What was read, not what should have been.
        Ok(at - start)
    })
}

/// Does a job of each number at once; the sum of what they give.
fn in_jobs(jobs: u64, job: impl Fn(u64) -> io::Result<u64> + Sync) -> io::Result<u64> {
    let job = &job;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs).map(|n| scope.spawn(move || job(n))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| io::Error::other("panic"))?)
            .sum()
    })
}

pub fn random_read(at: &Path, scale: usize, jobs: u64) -> io::Result<u64> {
    let path = at.join("large");
    let blocks = fs::metadata(&path)?.len() / 4096;
    let count = 65_536 / scale as u64 / jobs;
    in_jobs(jobs, |job| {
        let file = File::open(&path)?;
        let mut buffer = [0; 4096];
        let mut sum = 0_u64;
        for n in 0..count {
            let block = (n + job * count).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            file.read_exact_at(&mut buffer, block % blocks * 4096)?;
            sum += u64::from(buffer[0]);
        }
        Ok(sum)
    })
}

pub fn mmap_random(at: &Path, scale: usize, jobs: u64) -> io::Result<u64> {
    // Maps in another program, since this one has no unsafe code.
    let script = "
import mmap, sys
f = open('large', 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
n = len(m) // 4096; s = 0; count = int(sys.argv[1]); first = int(sys.argv[2]) * count
for i in range(first, first + count): s += m[(i * 0x9e3779b97f4a7c15 >> 20) % n * 4096]
print(s)";
    let count = (20_000 / scale as u64 / jobs).to_string();
    in_jobs(jobs, |job| {
        let mut python = Command::new("python3");
        let out = python.args(["-c", script, &count, &job.to_string()]).current_dir(at).output()?;
        String::from_utf8_lossy(&out.stdout).trim().parse().map_err(io::Error::other)
    })
}

/// Writes a file for each job, together half a GiB.
pub fn write_sequential(at: &Path, scale: usize, jobs: u64) -> io::Result<u64> {
    let block = bytes("block", 128 << 10);
    in_jobs(jobs, |job| {
        let mut file = File::create(at.join(format!("new{job}")))?;
        for _ in 0..4096 / scale as u64 / jobs {
            file.write_all(&block)?;
        }
        file.metadata().map(|meta| meta.len())
    })
}

pub fn write_random(at: &Path, scale: usize, jobs: u64) -> io::Result<u64> {
    let block = bytes("small block", 4096);
    in_jobs(jobs, |job| {
        let file = OpenOptions::new().write(true).open(at.join(format!("new{job}")))?;
        let blocks = file.metadata()?.len() / 4096;
        for n in 0..32_768 / scale as u64 / jobs {
            let at = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % blocks;
            file.write_all_at(&block, at * 4096)?;
        }
        Ok(blocks)
    })
}

pub fn write_small(at: &Path, scale: usize) -> io::Result<u64> {
    let mut file = OpenOptions::new().append(true).create(true).open(at.join("log"))?;
    for _ in 0..20_000 / scale {
        file.write_all(b"a line of a log file\n")?;
    }
    file.metadata().map(|meta| meta.len())
}

pub fn make(at: &Path, _: usize) -> io::Result<u64> {
    shell(&at.join("src"), "make -s -j2")?;
    Ok(0)
}

pub fn git(at: &Path, script: &str) -> io::Result<u64> {
    shell(
        at,
        &format!(
            "export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'; {script}"
        ),
    )?;
    Ok(0)
}

pub fn git_status(at: &Path, _: usize) -> io::Result<u64> {
    git(at, "cd repo; test -z \"$(git status -s)\"")
}

pub fn git_checkout(at: &Path, _: usize) -> io::Result<u64> {
    git(at, "cd repo; git checkout -q one; test -z \"$(git status -s)\"")
}

pub fn git_clone(at: &Path, _: usize) -> io::Result<u64> {
    git(at, "git clone -q repo clone; cd clone; test -z \"$(git status -s)\"")
}

pub fn misses(at: &Path, scale: usize) -> io::Result<u64> {
    let dir = openat(CWD, at.join("usr/lib"), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mut found = 0;
    for n in 0..4000 / scale {
        let name = format!("lib{n}.so");
        found += u64::from(statat(dir.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW).is_ok());
    }
    Ok(found)
}

/// Several times: what the kernel knows is told in no time.
pub fn misses_again(at: &Path, scale: usize) -> io::Result<u64> {
    (0..5).map(|_| misses(at, scale)).sum()
}

pub fn create_in(at: &Path) -> io::Result<u64> {
    (0..1000).try_for_each(|n| File::create_new(at.join(format!("big/new{n}"))).map(drop))?;
    Ok(0)
}

pub fn unlink_in(at: &Path) -> io::Result<u64> {
    (0..1000).try_for_each(|n| fs::remove_file(at.join(format!("big/name-of-file-{n}"))))?;
    Ok(0)
}

pub fn storm(at: &Path, scale: usize) -> io::Result<u64> {
    in_jobs(4, |who| {
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
        Ok(0)
    })?;
    walk(at)
}

pub fn move_directory(at: &Path, _: usize) -> io::Result<u64> {
    // mv(1) copies where rename(2) does not work.
    shell(at, "mv d moved")?;
    Ok(0)
}

pub fn sqlite(at: &Path, scale: usize) -> io::Result<u64> {
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
pub fn stat_beside_a_copy(at: &Path, _: usize) -> io::Result<u64> {
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
