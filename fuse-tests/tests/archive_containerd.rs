//! Beside containerd: what it finds changed in its own snapshots is what we find, and it takes the images that we
//! write. A containerd of our own, without a registry.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use fuse_tests::case::{put, said, sh, umount};
use fuse_tests::env::{self, Base};
use fuse_tests::tree::{self, as_layers_tell, snapshot};
use fuse_tests::{needs_kernel_overlay, needs_root, skip};

/// A daemon with a root of its own.
struct Containerd {
    dir: PathBuf,
    daemon: Child,
    _base: Arc<Base>,
}

impl Containerd {
    /// Starts one; `None` if it is not installed.
    fn start() -> Option<Containerd> {
        Command::new("containerd").arg("--version").output().ok()?;
        let base = Base::get();
        let dir = base.unique("containerd");
        std::fs::create_dir(&dir).unwrap();
        let shown = dir.display();
        put(
            dir.join("config.toml"),
            format!(
                "version = 2\nroot = \"{shown}/root\"\nstate = \"{shown}/state\"\n\
                 disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
                 [grpc]\naddress = \"{shown}/socket\"\n[ttrpc]\naddress = \"{shown}/ttrpc\"\n"
            ),
        );
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let daemon = Command::new("containerd")
            .arg("--config")
            .arg(dir.join("config.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let containerd = Containerd { dir, daemon, _base: base };
        env::wait_until("containerd answers", Duration::from_secs(60), || {
            containerd.try_ctr("version").status.success()
        });
        Some(containerd)
    }

    fn try_ctr(&self, words: &str) -> std::process::Output {
        Command::new("ctr")
            .arg("--address")
            .arg(self.dir.join("socket"))
            .args(words.split(' '))
            .current_dir(&self.dir)
            .output()
            .unwrap()
    }

    #[track_caller]
    fn ctr(&self, words: &str) -> Vec<u8> {
        let out = self.try_ctr(words);
        assert!(out.status.success(), "ctr {words}: {}", said(&out));
        out.stdout
    }

    /// Makes a snapshot over another and runs a script in it.
    fn snapshot(&self, name: &str, parent: &str, script: &str) {
        self.ctr(format!("snapshots prepare {name}-active {parent}").trim_end());
        let mounted = self.mount(&format!("{name}-active"));
        sh(&mounted, &format!("set -e\n{script}"));
        umount(&mounted);
        self.ctr(&format!("snapshots commit {name} {name}-active"));
    }

    /// Mounts a snapshot as it says.
    fn mount(&self, name: &str) -> PathBuf {
        let at = self.dir.join("mounted");
        std::fs::create_dir_all(&at).unwrap();
        let command = self.ctr(&format!("snapshots mounts {} {name}", at.display()));
        sh(&self.dir, std::str::from_utf8(&command).unwrap());
        at
    }

    /// Returns the mounts of a snapshot as BuildKit has them, in JSON.
    fn described(&self, name: &str) -> String {
        let command =
            String::from_utf8(self.ctr(&format!("snapshots mounts /nowhere {name}"))).unwrap();
        let words: Vec<&str> = command.split_whitespace().collect();
        let ["mount", "-t", kind, source, "/nowhere", "-o", options] = words[..] else {
            panic!("{command}")
        };
        let mut list = String::new();
        for option in options.split(',') {
            write!(list, "{}\"{option}\"", if list.is_empty() { "" } else { "," }).unwrap();
        }
        format!("[{{\"type\":\"{kind}\",\"source\":\"{source}\",\"options\":[{list}]}}]")
    }

    fn lamina(&self, words: &[&str]) -> Vec<u8> {
        let out = Command::new(env::lamina()).args(words).current_dir(&self.dir).output().unwrap();
        assert!(out.status.success(), "{words:?}: {}", said(&out));
        out.stdout
    }

    /// One line for each entry of an archive in this directory, the times of marks left out.
    fn entries(&self, archive: &str) -> Vec<String> {
        let list = sh(
            &self.dir,
            &format!("tar --numeric-owner --full-time --quoting-style=escape -tvf {archive}"),
        );
        let mut lines = Vec::new();
        for line in list.lines() {
            let mut words: Vec<&str> = line.split_whitespace().collect();
            if words.get(5).is_some_and(|name| name.contains(".wh.")) {
                // The time of whoever wrote the archive.
                words.drain(3..5);
            } else {
                let time = words[4];
                words[4] = time.split('.').next().unwrap_or(time);
            }
            lines.push(words.join(" "));
        }
        lines.sort();
        lines
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.daemon);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.daemon.wait();
        for mount in env::mounts_below(&self.dir) {
            let _ = rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH);
        }
        let _ = Command::new("rm").arg("-rf").arg(&self.dir).status();
    }
}

macro_rules! containerd {
    () => {{
        needs_root!();
        needs_kernel_overlay!();
        match Containerd::start() {
            Some(containerd) => containerd,
            None => skip!("needs containerd"),
        }
    }};
}

/// Without xattrs of users, which containerd leaves out.
const BASE: &str = "
    mkdir -p d/deep closed/sub gone empty moved many
    echo x >d/deep/x; echo a >d/a; echo old >closed/old; echo s >closed/sub/s; echo g >gone/g
    echo m >moved/m; for n in 1 2 3 4 5; do echo $n >many/$n; done
    echo f >becomes-dir; mkdir becomes-file; echo i >becomes-file/in; ln -s a sym
    echo h >hard1; ln hard1 hard2; echo t >touched; echo c >chmodded; echo o >chowned; echo keep >keep
    mkfifo pipe; mknod char c 1 3; mknod block b 7 9; chmod 1777 empty; chmod 4755 keep
    find . -exec touch -h -d @1000000000 {} +
";

const CHANGES: &str = "
    rm d/a; echo new >d/new; rm -r closed; mkdir closed; echo n >closed/n; echo old >closed/old; rm -r gone; rmdir empty
    rm becomes-dir; mkdir becomes-dir; echo x >becomes-dir/x; rm -r becomes-file; echo x >becomes-file
    ln -sfn b sym; echo more >>many/3; rm many/1; touch -d @1234567890 touched; chmod 600 chmodded; chown 5:6 chowned
    mkdir -p added/deep/er; echo f >added/deep/er/f; ln added/deep/er/f added/link; mkfifo fifo; rm char; mknod char c 1 5
    setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 keep
    mkdir 'with space'; echo u >\"$(printf 'u\\303\\274')\"; chmod 700 moved
";

#[test]
fn changes_are_those_that_containerd_finds() {
    let containerd = containerd!();
    containerd.snapshot("base", "", BASE);
    containerd.ctr("snapshots prepare upper base");
    let upper = containerd.described("upper");
    // As a view of the base is described; those of ctr are collected as garbage.
    let base = upper.split("lowerdir=").nth(1).unwrap().split('"').next().unwrap();
    let lower =
        format!("[{{\"type\":\"bind\",\"source\":\"{base}\",\"options\":[\"rbind\",\"ro\"]}}]");
    let mounted = containerd.mount("upper");
    sh(&mounted, &format!("set -e\n{CHANGES}"));
    umount(&mounted);
    let mounts = ["diff", "--lower-mounts", &lower, "--upper-mounts", &upper];
    put(containerd.dir.join("ours.tar"), containerd.lamina(&[&mounts[..], &["--tar"]].concat()));
    put(containerd.dir.join("theirs.tar.gz"), containerd.ctr("snapshots diff base upper"));
    let theirs = containerd.entries("theirs.tar.gz");
    assert!(theirs.len() > 25, "{theirs:#?}");
    assert_eq!(containerd.entries("ours.tar"), theirs);
    // Unpacked by containerd and by us they are one tree.
    for archive in ["theirs.tar.gz", "ours.tar"] {
        containerd.lamina(&["layer", "apply", "--to", &format!("{archive}.layer"), archive]);
    }
    let layer = |name: &str| as_layers_tell(snapshot(containerd.dir.join(name)));
    tree::assert_same("layers", &layer("theirs.tar.gz.layer"), &layer("ours.tar.layer"));
}

/// Writes an OCI layout of two layers.
fn layout(containerd: &Containerd) {
    containerd.snapshot("base", "", BASE);
    containerd.snapshot("top", "base", CHANGES);
    put(containerd.dir.join("0.tar.gz"), containerd.ctr("snapshots diff base"));
    put(containerd.dir.join("1.tar.gz"), containerd.ctr("snapshots diff top"));
    sh(
        &containerd.dir,
        r#"set -e
        mkdir -p oci/blobs/sha256
        blob() { d=$(sha256sum <"$1" | cut -d' ' -f1); s=$(stat -c %s "$1"); cp "$1" oci/blobs/sha256/$d; }
        for n in 0 1; do
            diff="$diff${diff:+,}\"sha256:$(zcat $n.tar.gz | sha256sum | cut -d' ' -f1)\""
            blob $n.tar.gz
            layers="$layers${layers:+,}{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip\",\"digest\":\"sha256:$d\",\"size\":$s}"
        done
        printf '{"architecture":"%s","os":"linux","rootfs":{"type":"layers","diff_ids":[%s]}}' \
            "$(dpkg --print-architecture)" "$diff" >config
        blob config
        printf '{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:%s","size":%s},"layers":[%s]}' \
            $d $s "$layers" >manifest
        blob manifest
        printf '{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%s","size":%s}]}' \
            $d $s >oci/index.json
        echo '{"imageLayoutVersion":"1.0.0"}' >oci/oci-layout"#,
    );
}

#[test]
fn containerd_unpacks_what_is_exported_to_the_same_tree() {
    let containerd = containerd!();
    layout(&containerd);
    let store = ["--root", "ours", "--runroot", "ours-run"];
    let ours = |words: &[&str]| {
        let out = containerd.lamina(&[words, &store].concat());
        String::from_utf8(out).unwrap()
    };
    ours(&["store", "init"]);
    ours(&["image", "import", "--name", "localhost/image:1", "oci"]);
    let listed = ours(&["image", "list"]);
    let top = listed.split_whitespace().nth(2).unwrap();
    let merged = ours(&["layer", "mount", "--read-only", "--backend", "kernel", top]);
    let wanted = as_layers_tell(snapshot(Path::new(merged.trim())));
    ours(&["layer", "unmount", top]);
    for how in ["none", "gzip", "zstd"] {
        let file = format!("{how}.tar");
        ours(&[
            "image",
            "export",
            "--format",
            "oci-tar",
            "--compression",
            how,
            "localhost/image:1",
            &file,
        ]);
        containerd.ctr(&format!("images import {file}"));
        let list = String::from_utf8(containerd.ctr("snapshots ls")).unwrap();
        let parents: Vec<&str> =
            list.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
        let is_top = |line: &&str| {
            line.starts_with("sha256:") && !parents.contains(&line.split(' ').next().unwrap())
        };
        let name = list
            .lines()
            .find(is_top)
            .unwrap_or_else(|| panic!("{list}"))
            .split(' ')
            .next()
            .unwrap();
        containerd.ctr(&format!("snapshots prepare seen {name}"));
        let mounted = containerd.mount("seen");
        let seen = as_layers_tell(snapshot(&mounted));
        umount(&mounted);
        tree::assert_same(how, &wanted, &seen);
        containerd.ctr("snapshots remove seen");
        containerd.ctr("images remove --sync localhost/image:1");
        let list = String::from_utf8(containerd.ctr("snapshots ls")).unwrap();
        assert!(!list.contains("sha256:"), "{list}");
    }
}
