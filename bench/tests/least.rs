//! The least server is a filesystem: what is done on it comes out as on a directory of the disk.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use fuse_tests::env::{self, Base};
use fuse_tests::skip;
use fuse_tests::tree::{Options, now, snapshot_with};
use rustix::mount::UnmountFlags;

/// Makes layers `top` and `low`, and in `plain` what both show together.
const LAYERS: &str = "
mkdir -p top/d low/d low/e/deep
echo top > top/d/both; echo low > low/d/both; echo low > low/d/low; echo x > low/e/deep/f
ln -s d/low low/link
mkdir upper work merged plain
cp -a low/. top/. plain/";

/// One of everything that is done to files.
const WORK: &str = "
cat link d/both
printf more >> d/low
mkdir -p new/a; printf x > new/a/f; mv new/a/f new/g; ln new/g new/h; ln -s g new/s
chmod 600 new/g; touch -d @1000 new/h; mkfifo new/fifo
mv e/deep/f d/both; mv e new/e; rmdir new/a; rm link
truncate -s 2 d/low; truncate -s 5 d/low
seq 300000 > large; printf middle | dd of=large bs=1 seek=1000000 conv=notrunc
cp large copy; cmp large copy
printf end | dd of=holes bs=1 seek=3000000
for n in $(seq 500); do echo $n > new/e/$n; done; rm new/e/*7
test ! -e absent; ls -Al . new | wc -l";

/// A mount that ends when dropped, also by a failure.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        // Gone already, where the test has come to its end.
        let _ = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
    }
}

fn run(dir: &Path, script: &str) -> String {
    let out = Command::new("sh").args(["-exc", script]).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Tells whether a process has the path among its arguments.
fn is_served(merged: &Path) -> bool {
    let wanted = merged.as_os_str().as_encoded_bytes();
    let lines = fs::read_dir("/proc").unwrap().flatten();
    let mut lines = lines.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.any(|line| line.split(|byte| *byte == 0).any(|word| word == wanted))
}

#[test]
fn work_comes_out_as_on_a_disk() {
    if !env::is_root() {
        skip!("only root mounts without a helper");
    }
    if let Some(reason) = env::no_fuse() {
        skip!("{reason}");
    }
    let base = Base::get();
    let dir = base.unique("least");
    fs::create_dir(&dir).unwrap();
    let begun = now();
    run(&dir, LAYERS);
    let (merged, at) = (dir.join("merged"), dir.display());
    let list = format!("lowerdir={at}/top:{at}/low,upperdir={at}/upper,workdir={at}/work");
    let status = Command::new(env!("CARGO_BIN_EXE_lamina-bench"))
        .args(["--mount-least", "-o", &list])
        .arg(&merged)
        .stdin(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    let mounted = Mounted(&merged);
    let view = |path: &Path| {
        let options = Options { recent: Some(begun), check_dots: false, ..Options::default() };
        snapshot_with(path, options).entries
    };
    let plain = dir.join("plain");
    assert_eq!(view(&merged), view(&plain));
    assert_eq!(run(&merged, WORK), run(&plain, WORK));
    assert_eq!(view(&merged), view(&plain));
    rustix::mount::unmount(&merged, UnmountFlags::empty()).unwrap();
    env::wait_until("the server to end", Duration::from_secs(10), || !is_served(&merged));
    drop(mounted);
    fs::remove_dir_all(&dir).unwrap();
}
