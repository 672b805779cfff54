//! Images of other programs: what podman, buildah, skopeo and umoci make is the same tree in our store, and what we make is
//! the same in theirs. No registry is needed: the images are built here.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use fuse_tests::case::{put, sh, umount};
use fuse_tests::env::{self, Base, mount_overlay, overlay_options};
use fuse_tests::tree::{self, Snapshot, as_layers_tell, snapshot};
use fuse_tests::{kill, needs_kernel_overlay, needs_root, skip};

/// A directory with stores of podman and of ours, and programs that use no other.
struct Bench {
    dir: PathBuf,
    _base: Arc<Base>,
}

/// Makes two layers over one another: every kind of object, then every kind of change.
const BUILD: &str = r#"
    mkdir -p base/bin base/etc base/d/deep base/closed base/many base/var
    head -c 300000 /dev/urandom >base/bin/tool; ln base/bin/tool base/bin/link; ln -s tool base/bin/sym
    for n in 1 2 3 4 5; do echo $n >base/many/$n; done
    echo a >base/etc/a; echo b >base/etc/b; echo o >base/closed/old; echo x >base/d/deep/x
    chown -R 5:6 base/d; chmod 4755 base/bin/tool; chmod 1777 base/var; mkfifo base/var/pipe
    c=$(buildah --signature-policy policy.json from scratch)
    buildah copy -q $c base /; buildah commit -q --signature-policy policy.json $c localhost/base
    c=$(buildah from --pull-never localhost/base); m=$(buildah mount $c)
    rm $m/etc/a; rm -r $m/closed; mkdir $m/closed; echo n >$m/closed/new; echo c >>$m/etc/b
    ln $m/bin/tool $m/bin/other; setfattr -n user.x -v 1 $m/etc/b; chmod 700 $m/var; rm -r $m/d; echo f >$m/d
    buildah umount $c; buildah commit -q --signature-policy policy.json $c localhost/top
    skopeo --policy policy.json copy -q containers-storage:localhost/top oci:oci:localhost/top:latest
    skopeo --policy policy.json copy -q containers-storage:localhost/top oci-archive:oci.tar:localhost/top:latest
    podman save -q -o docker.tar localhost/top
"#;

impl Bench {
    fn new() -> Option<Bench> {
        for program in ["podman", "buildah", "skopeo", "umoci"] {
            Command::new(program).arg("--version").output().ok()?;
        }
        let base = Base::get();
        let dir = base.unique("images");
        std::fs::create_dir(&dir).unwrap();
        let shown = dir.display();
        put(
            dir.join("storage.conf"),
            format!(
                "[storage]\ndriver=\"overlay\"\ngraphroot=\"{shown}/root\"\nrunroot=\"{shown}/run\"\n"
            ),
        );
        put(
            dir.join("containers.conf"),
            "[containers]\ncgroups=\"disabled\"\nnetns=\"host\"\ndefault_ulimits=[]\n\
             [engine]\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\n",
        );
        put(dir.join("policy.json"), "{\"default\":[{\"type\":\"insecureAcceptAnything\"}]}");
        let bench = Bench { dir, _base: base };
        bench.run(BUILD);
        bench.lamina("store init");
        Some(bench)
    }

    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-e", "-c", script])
            .current_dir(&self.dir)
            .env("CONTAINERS_STORAGE_CONF", self.dir.join("storage.conf"))
            .env("CONTAINERS_CONF", self.dir.join("containers.conf"));
        command
    }

    #[track_caller]
    fn run(&self, script: &str) -> String {
        let out = self.command(script).output().unwrap();
        assert!(out.status.success(), "{script}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().trim_end().to_owned()
    }

    fn try_lamina(&self, words: &str, arguments: &[&str]) -> Output {
        let mut words: Vec<&str> = words.split(' ').collect();
        words.extend(["--root", "ours", "--runroot", "ours-run"]);
        Command::new(env::lamina())
            .args(words)
            .args(arguments)
            .current_dir(&self.dir)
            .output()
            .unwrap()
    }

    #[track_caller]
    fn lamina(&self, words: &str) -> String {
        self.lamina_with(words, &[])
    }

    #[track_caller]
    fn lamina_with(&self, words: &str, arguments: &[&str]) -> String {
        let out = self.try_lamina(words, arguments);
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    /// The tree of an image as podman mounts it.
    fn podman_tree(&self, image: &str) -> Snapshot {
        let mount = self.run(&format!("podman image mount {image}"));
        let tree = snapshot(mount);
        self.run(&format!("podman image unmount {image}"));
        as_layers_tell(tree)
    }

    /// The tree of an image in our store as the kernel mounts its layers.
    fn our_tree(&self) -> Snapshot {
        let list = self.lamina("image list");
        let top = list.lines().next().unwrap().split(' ').nth(2).unwrap().to_owned();
        let metadata = self.lamina_with("layer metadata", &[&top]);
        let field = |name: &str| {
            let line = metadata.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("{name} in {metadata}")).to_owned()
        };
        let mut layers = vec![self.dir.join(field("UpperDir: "))];
        layers.extend(field("LowerDir: ").split(':').map(|lower| self.dir.join(lower)));
        let merged = self.dir.join("merged");
        std::fs::create_dir_all(&merged).unwrap();
        mount_overlay(&overlay_options(&layers, None), &merged).unwrap();
        let tree = as_layers_tell(snapshot(&merged));
        umount(&merged);
        tree
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self
            .command(
                "podman umount -a; podman image unmount -a; buildah umount -a; umount root/overlay",
            )
            .output();
        let _ = Command::new("rm").arg("-rf").arg(&self.dir).status();
    }
}

macro_rules! bench {
    () => {{
        needs_root!();
        needs_kernel_overlay!();
        match Bench::new() {
            Some(bench) => bench,
            None => skip!("needs podman, buildah, skopeo and umoci"),
        }
    }};
}

#[test]
fn images_come_in_as_podman_unpacks_them() {
    let bench = bench!();
    let wanted = bench.podman_tree("localhost/top");
    bench.run("gzip -k docker.tar");
    for source in ["oci", "oci.tar", "docker.tar", "docker.tar.gz"] {
        let told = bench.lamina_with("image import", &[source]);
        assert!(told.contains("localhost/top"), "{told}");
        assert_eq!(bench.lamina("store list").lines().count(), 2, "{source}");
        tree::assert_same(source, &wanted, &bench.our_tree());
        bench.run("rm -rf ours ours-run");
        bench.lamina("store init");
    }
}

#[test]
fn images_go_out_to_skopeo_umoci_and_podman() {
    let bench = bench!();
    let wanted = bench.podman_tree("localhost/top");
    bench.lamina_with("image import", &["--name", "localhost/again:latest", "oci"]);
    bench.lamina_with("image export", &["localhost/again:latest", "out"]);
    bench
        .lamina_with("image export", &["--format", "oci-tar", "localhost/again:latest", "out.tar"]);
    bench.lamina_with(
        "image export",
        &["--format", "docker", "localhost/again:latest", "out-docker.tar"],
    );
    bench.run("skopeo inspect oci:out:localhost/again:latest");
    for source in
        ["oci:out:localhost/again:latest", "oci-archive:out.tar", "docker-archive:out-docker.tar"]
    {
        bench.run(&format!(
            "skopeo --policy policy.json copy -q {source} containers-storage:localhost/copied:1"
        ));
        tree::assert_same(source, &wanted, &bench.podman_tree("localhost/copied:1"));
        bench.run("podman rmi -f localhost/copied:1");
    }
    for how in ["gzip", "zstd"] {
        let name = format!("out-{how}");
        let export = ["--compression", how, "localhost/again:latest", &name];
        bench.lamina_with("image export", &export);
        bench.run(&format!("grep -q 'layer.v1.tar+{how}' {name}/blobs/sha256/*"));
        bench.run(&format!(
            "skopeo --policy policy.json copy -q oci:{name}:localhost/again:latest \
             containers-storage:localhost/copied:1"
        ));
        tree::assert_same(how, &wanted, &bench.podman_tree("localhost/copied:1"));
        bench.run("podman rmi -f localhost/copied:1");
        // The same layers, so the same image.
        let told = bench
            .lamina_with("image export", &["localhost/again:latest", &format!("{name}-plain")]);
        bench.lamina_with("image import", &["--name", how, &name]);
        let listed = bench.lamina("image list");
        assert!(listed.contains(told.trim()), "{listed}");
    }
    let docker =
        ["--compression", "gzip", "--format", "docker", "localhost/again:latest", "no.tar"];
    let out = bench.try_lamina("image export", &docker);
    assert_eq!(out.status.code(), Some(2));
    assert!(!bench.dir.join("no.tar").exists());
    bench.run("podman load -q -i out-docker.tar");
    tree::assert_same("podman load", &wanted, &bench.podman_tree("localhost/again:latest"));
    bench.run("cp -r out plain; sed -i 's,localhost/again:latest,x,' plain/index.json; umoci unpack --image plain:x bundle");
    // One tree on one filesystem: a file changed in the upper layer has no other name in a lower one any more.
    let without_links = |mut tree: Snapshot| {
        tree.entries.values_mut().for_each(|entry| entry.clear("nlink"));
        tree
    };
    let unpacked = as_layers_tell(snapshot(bench.dir.join("bundle/rootfs")));
    tree::assert_same("umoci", &without_links(wanted), &without_links(unpacked));
}

#[test]
fn what_is_exported_twice_has_the_same_digests() {
    let bench = bench!();
    bench.lamina_with("image import", &["oci"]);
    let name = "localhost/top:latest";
    let first = bench.lamina_with("image export", &[name, "one"]);
    assert_eq!(bench.lamina_with("image export", &[name, "two"]), first);
    bench.run("diff -r one two");
    bench.run("rm -rf ours ours-run");
    bench.lamina("store init");
    bench.lamina_with("image import", &["one"]);
    assert_eq!(bench.lamina_with("image export", &[name, "three"]), first);
}

#[test]
fn changes_are_those_that_podman_tells() {
    let bench = bench!();
    let container = bench.run("podman create --network host localhost/top sh");
    let mount = bench.run(&format!("podman mount {container}"));
    sh(
        Path::new(&mount),
        "echo z >etc/z; rm etc/b; mkdir -p new/deep; echo 1 >new/deep/1; chmod 600 many/1; echo x >>many/2; \
         rm -r many/3; rm -r closed; mkdir closed; echo again >closed/again; ln -sf x bin/sym; touch -d @5 bin/tool",
    );
    let mut wanted: Vec<String> =
        bench.run(&format!("podman diff {container}")).lines().map(str::to_owned).collect();
    wanted.sort();
    let upper = bench
        .run(&format!("podman inspect --format '{{{{.GraphDriver.Data.UpperDir}}}}' {container}"));
    let lowers = bench
        .run(&format!("podman inspect --format '{{{{.GraphDriver.Data.LowerDir}}}}' {container}"));
    let mut command = Command::new(env::lamina());
    command.args(["layer", "changes"]);
    for lower in lowers.split(':') {
        command.args(["--lower", lower]);
    }
    let out = command.arg(&upper).output().unwrap();
    let mut found: Vec<String> =
        String::from_utf8(out.stdout).unwrap().lines().map(str::to_owned).collect();
    found.sort();
    bench.run(&format!("podman umount {container}; podman rm -f {container}"));
    assert_eq!(found, wanted);
}

#[test]
fn a_damaged_image_leaves_no_record() {
    let bench = bench!();
    // The larger blob is the lower layer's: cut it, and its layer cannot be whole.
    bench.run("f=$(ls -S oci/blobs/sha256 | head -1); truncate -s -100 oci/blobs/sha256/$f");
    let out = bench.try_lamina("image import", &["oci"]);
    assert_eq!(out.status.code(), Some(1), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(bench.lamina("image list"), "");
    assert_eq!(bench.lamina("store list"), "");
}

#[test]
fn killed_while_it_imports_it_leaves_whole_layers_and_no_record() {
    let bench = bench!();
    if Command::new("strace").arg("-V").output().is_err() {
        skip!("needs strace");
    }
    let wanted = bench.podman_tree("localhost/top");
    let mut import = Command::new(env::lamina());
    import.args(["image", "import", "--root", "ours", "--runroot", "ours-run", "oci"]);
    import.current_dir(&bench.dir);
    let anew = || {
        bench.run("rm -rf ours ours-run");
        bench.lamina("store init");
    };
    let calls = kill::calls_of_all(&import, 11);
    let mut kills = 0;
    for call in &calls {
        anew();
        kills += usize::from(kill::at_any(&import, call));
        if !bench.lamina("image list").is_empty() {
            // It had done all but to say so.
            tree::assert_same("killed late", &wanted, &bench.our_tree());
        }
        // What was left is gone since the store was opened.
        assert_eq!(bench.lamina("store check"), "", "{call:?}");
        bench.run("test -z \"$(ls ours/overlay/tempdirs 2>/dev/null)\"");
        bench.lamina_with("image import", &["oci"]);
        tree::assert_same(&format!("{call:?}"), &wanted, &bench.our_tree());
    }
    // Which thread does what differs from run to run.
    assert!(kills * 10 > calls.len() * 8, "{kills} of {} killed it", calls.len());
}

#[test]
fn the_bytes_that_podman_took_come_out_again() {
    let bench = bench!();
    let layers = bench.run(
        "/usr/bin/python3 -c 'import json\nfor l in json.load(open(\"root/overlay-layers/layers.json\")):\n  if \"diff-digest\" in l: print(l[\"id\"], l[\"diff-digest\"])'",
    );
    let mut count = 0;
    for line in layers.lines() {
        let (id, digest) = line.split_once(' ').unwrap();
        let layer = bench.dir.join("root/overlay").join(id);
        let lowers = std::fs::read_to_string(layer.join("lower")).unwrap_or_default();
        let mut command = Command::new(env::lamina());
        command.args(["layer", "rebuild", "--diff-id", digest, "-O", "rebuilt.tar", "--tar-split"]);
        command.arg(format!("root/overlay-layers/{id}.tar-split.gz")).current_dir(&bench.dir);
        for lower in lowers.split(':').filter(|lower| !lower.is_empty()) {
            command.arg("--lower").arg(bench.dir.join("root/overlay").join(lower));
        }
        let out = command.arg(layer.join("diff")).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let sum = bench.run("sha256sum rebuilt.tar");
        assert!(sum.starts_with(digest.trim_start_matches("sha256:")));
        count += 1;
    }
    assert_eq!(count, 2);
}
