//! What the server holds for what the kernel knows: descriptors and memory are bounded, and come back.

use std::fs;
use std::time::Duration;

use fuse_tests::case::{Case, append, forget_all, names, put};
use fuse_tests::env::wait_until;
use fuse_tests::needs_root;

const DIRS: usize = 200;
const FILES: usize = 100;

/// Lists and looks up all, and gives the number of files.
fn walk(c: &Case) -> usize {
    let dirs = names(c.m(""));
    dirs.iter().map(|dir| names(c.m(dir)).len()).sum()
}

/// Walks, changes and forgets 20,000 files, several times over, by a server that was started after `setup`.
fn hold_little(setup: &str, descriptors: usize) {
    let mut c = Case::new(2);
    for dir in 0..DIRS {
        for file in 0..FILES {
            // Every other directory is merged.
            put(c.l(if dir % 2 == 0 { file % 2 } else { 1 }, &format!("d{dir}/f{file}")), "x");
        }
    }
    c.mount_after(setup);
    let mut first = 0;
    for round in 0..4 {
        assert_eq!(walk(&c), DIRS * FILES, "{setup}, round {round}");
        let open = c.server_descriptors();
        assert!(open <= descriptors, "{setup}, round {round}: {open} descriptors when walked");
        let full = c.server_memory();
        assert!(full < 64 << 10, "{setup}, round {round}: {full} KiB when walked");
        // Copies up a file in each directory, and makes, links and unlinks another.
        for dir in 0..DIRS {
            append(c.m(&format!("d{dir}/f{round}")), "+");
            put(c.m(&format!("d{dir}/new")), "");
            fs::hard_link(c.m(&format!("d{dir}/new")), c.m(&format!("d{dir}/link"))).unwrap();
            fs::remove_file(c.m(&format!("d{dir}/new"))).unwrap();
            fs::remove_file(c.m(&format!("d{dir}/link"))).unwrap();
        }
        let open = c.server_descriptors();
        assert!(open <= descriptors, "{setup}, round {round}: {open} descriptors when changed");
        forget_all();
        wait_until("descriptors to be closed", Duration::from_secs(5), || {
            c.server_descriptors() <= descriptors.min(100)
        });
        let memory = c.server_memory();
        if round == 0 {
            first = memory;
        }
        assert!(memory < first + (8 << 10), "{setup}: {first} KiB, {round} rounds later {memory}");
    }
}

#[test]
fn twenty_thousand_files_are_forgotten() {
    needs_root!();
    hold_little(":", 2000);
}

#[test]
fn twenty_thousand_files_fit_into_256_descriptors() {
    needs_root!();
    hold_little("ulimit -n 256", 256);
}

// A tree of directories as deep as it is large: each is held by the one beneath it.
#[test]
fn deep_trees_are_forgotten() {
    needs_root!();
    let mut c = Case::new(1);
    c.mount_after("ulimit -n 256");
    let root = c.m("");
    for tree in 0..20 {
        let mut path = root.join(format!("t{tree}"));
        for _ in 0..100 {
            path.push("d");
        }
        fs::create_dir_all(&path).unwrap();
        put(path.join("bottom"), "x");
        assert!(c.server_descriptors() <= 256);
    }
    forget_all();
    wait_until("descriptors to be closed", Duration::from_secs(5), || {
        c.server_descriptors() <= 200
    });
    let mut path = root.join("t7");
    for _ in 0..100 {
        path.push("d");
    }
    assert_eq!(names(&path), ["bottom"]);
    fs::remove_dir_all(root.join("t7")).unwrap();
    assert_eq!(names(&root).len(), 19);
}
