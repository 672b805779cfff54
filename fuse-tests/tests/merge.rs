//! The merge rule: tables written by hand, and generated layer stacks compared with kernel overlayfs on the same directories.

use std::path::Path;

use fuse_tests::cases::{Style, generate_layers};
use fuse_tests::fixture::{Kind, Sandbox, fill};
use fuse_tests::ops::Rng;
use fuse_tests::tree::{self, Snapshot};
use fuse_tests::{env, ran_in_user_namespace, skip};

/// A stack and what is seen of it.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    /// Bottom first.
    layers: &'static [&'static str],
    /// `path=content`, `path/` for a directory, `path@` for a symbolic link, `path!` for anything else.
    expected: &'static str,
}

/// What kernel overlayfs shows in the same way.
const KERNEL: &[Row] = &[
    Row {
        name: "three directories merge",
        layers: &["file d/a 644 1\nfile d/b 644 1", "file d/b 644 2", "file d/c 644 3"],
        expected: "d/ d/a=1 d/b=2 d/c=3",
    },
    Row {
        name: "whiteout in the middle ends the merge of a directory",
        layers: &["file d/low 644 1", "whiteout d", "file d/top 644 3"],
        expected: "d/ d/top=3",
    },
    Row {
        name: "whiteout in the middle, nothing above",
        layers: &["file d/low 644 1\nfile f 644 1", "whiteout d\nwhiteout f", "file x 644 3"],
        expected: "x=3",
    },
    Row {
        name: "whiteout in the middle of a file that comes back",
        layers: &["file f 644 1", "whiteout f", "file f 644 3"],
        expected: "f=3",
    },
    Row {
        name: "opaque in the middle",
        layers: &["file d/low 644 1", "file d/mid 644 2\nopaque d", "file d/top 644 3"],
        expected: "d/ d/mid=2 d/top=3",
    },
    Row {
        name: "opaque at the top",
        layers: &["file d/low 644 1", "file d/mid 644 2", "file d/top 644 3\nopaque d"],
        expected: "d/ d/top=3",
    },
    Row {
        name: "opaque at the bottom changes nothing",
        layers: &["file d/low 644 1\nopaque d", "file d/mid 644 2"],
        expected: "d/ d/low=1 d/mid=2",
    },
    Row {
        name: "opaque hides only its own name",
        layers: &["file d/low 644 1\nfile e/low 644 1", "dir d\nopaque d\ndir e", "dir d\ndir e"],
        expected: "d/ e/ e/low=1",
    },
    Row {
        name: "opaque of a value that is not y is not opaque",
        layers: &["file d/low 644 1", "file d/mid 644 2\nopaque d n", "dir d"],
        expected: "d/ d/low=1 d/mid=2",
    },
    Row {
        name: "opaque parent hides a deeper directory below it",
        layers: &["file d/e/low 644 1", "dir d\nopaque d", "file d/e/top 644 3"],
        expected: "d/ d/e/ d/e/top=3",
    },
    Row {
        name: "file in the middle ends the merge of a directory",
        layers: &["file d/low 644 1", "file d 644 file", "file d/top 644 3"],
        expected: "d/ d/top=3",
    },
    Row {
        name: "symlink in the middle ends the merge and is not followed",
        layers: &["file d/low 644 1\nfile e/other 644 1", "symlink d e", "file d/top 644 3"],
        expected: "d/ d/top=3 e/ e/other=1",
    },
    Row {
        name: "fifo in the middle ends the merge of a directory",
        layers: &["file d/low 644 1", "fifo d", "file d/top 644 3"],
        expected: "d/ d/top=3",
    },
    Row {
        name: "file over directory over file",
        layers: &["file x 644 1", "file x/in 644 2", "file x 644 3"],
        expected: "x=3",
    },
    Row {
        name: "directory over file over directory",
        layers: &["file x/low 644 1", "file x 644 2", "dir x"],
        expected: "x/",
    },
    Row {
        name: "symlink over directory",
        layers: &["file x/low 644 1\nfile y/low 644 y", "symlink x y"],
        expected: "x@ y/ y/low=y",
    },
    Row {
        name: "a symlink to a directory in an upper layer does not merge with it",
        layers: &["file real/low 644 1", "symlink d real", "dir d\nfile d/top 644 3"],
        expected: "d/ d/top=3 real/ real/low=1",
    },
    Row {
        name: "a whiteout in a merged directory",
        layers: &["file d/a 644 1\nfile d/b 644 1", "whiteout d/a", "dir d"],
        expected: "d/ d/b=1",
    },
    Row {
        name: "a whiteout of nothing",
        layers: &["file d/a 644 1", "whiteout d/none\nwhiteout none", "dir d"],
        expected: "d/ d/a=1",
    },
    Row {
        name: "whiteout of a directory, made again two layers above, twice",
        layers: &[
            "file d/1 644 1",
            "whiteout d",
            "file d/2 644 2",
            "whiteout d",
            "file d/3 644 3",
            "file d/4 644 4",
        ],
        expected: "d/ d/3=3 d/4=4",
    },
    Row {
        name: "a layer without the parent in the middle",
        layers: &["file d/e/low 644 1", "file other 644 2", "file d/e/top 644 3"],
        expected: "d/ d/e/ d/e/low=1 d/e/top=3 other=2",
    },
    Row {
        name: "a whiteout of a parent also ends its children",
        layers: &["file d/e/low 644 1", "whiteout d", "file d/e/top 644 3", "file d/e/more 644 4"],
        expected: "d/ d/e/ d/e/more=4 d/e/top=3",
    },
    Row {
        name: "names of every kind",
        layers: &["file \\xff\\xfe 644 1\nfile a\\sb 644 2", "file \\xc3\\x28 644 3"],
        expected: "a b=2 \u{fffd}(=3 \u{fffd}\u{fffd}=1",
    },
    Row {
        name: "xattr whiteouts in a marked directory",
        layers: &[
            "file d/a 644 1\nfile d/b 644 1",
            "dir d\nxwhiteout d/a\nopaque . x",
            "dir d\nfile d/c 644 3",
        ],
        expected: "d/ d/b=1 d/c=3",
    },
    Row {
        name: "an xattr whiteout of a directory in the middle",
        layers: &["file d/e/low 644 1", "dir d\nxwhiteout d/e\nopaque . x", "file d/e/top 644 3"],
        expected: "d/ d/e/ d/e/top=3",
    },
];

/// What the kernel does not know.
const OTHERS: &[Row] = &[
    Row {
        name: ".wh. file hides a file",
        layers: &["file a 644 1\nfile b 644 1", "file .wh.a"],
        expected: "b=1",
    },
    Row {
        name: ".wh. file hides a directory, which comes back",
        layers: &["file d/low 644 1", "file .wh.d", "file d/top 644 3"],
        expected: "d/ d/top=3",
    },
    Row {
        name: ".wh. file beside the object of its own layer hides what is below",
        layers: &["file d/low 644 1", "file d/new 644 2\nfile .wh.d"],
        expected: "d/ d/new=2",
    },
    Row {
        name: ".wh..wh..opq makes a directory opaque",
        layers: &["file d/low 644 1", "file d/mid 644 2\nfile d/.wh..wh..opq", "file d/top 644 3"],
        expected: "d/ d/mid=2 d/top=3",
    },
    Row {
        name: "what .wh..wh..opq hides need not make sense",
        layers: &[
            "file d/lowest 644 0",
            "file d/low 644 1\nxattr d user.overlay.redirect x//y",
            "file d/mid 644 2\nfile d/.wh..wh..opq",
            "file d/top 644 3",
        ],
        expected: "d/ d/mid=2 d/top=3",
    },
    Row {
        name: ".wh..wh..opq in a directory whose directories merge",
        layers: &[
            "file d/s/low 644 1",
            "file d/s/mid 644 2\nfile d/.wh..wh..opq",
            "file d/s/top 644 3",
        ],
        expected: "d/ d/s/ d/s/mid=2 d/s/top=3",
    },
    Row {
        name: ".wh..wh..opq at the root of a layer",
        layers: &["file low 644 1", "file mid 644 2\nfile .wh..wh..opq", "file top 644 3"],
        expected: "mid=2 top=3",
    },
    Row {
        name: ".wh. names are not seen in a directory of one layer",
        layers: &["file d/.wh.x\nfile d/y 644 1\nfile d/.wh..wh..opq", "dir e"],
        expected: "d/ d/y=1 e/",
    },
    Row {
        name: "a whiteout in a directory of one layer is hidden",
        layers: &["whiteout d/x\nfile d/y 644 1", "dir e"],
        expected: "d/ d/y=1 e/",
    },
    Row {
        name: "opaque by user.overlay.opaque",
        layers: &["file d/low 644 1", "file d/mid 644 2\nxattr d user.overlay.opaque y", "dir d"],
        expected: "d/ d/mid=2",
    },
    Row {
        name: "opaque by user.fuseoverlayfs.opaque",
        layers: &["file d/low 644 1", "file d/mid 644 2\nxattr d user.fuseoverlayfs.opaque y"],
        expected: "d/ d/mid=2",
    },
];

/// What only root can make.
const TRUSTED: &[Row] = &[
    Row {
        name: "opaque by trusted.overlay.opaque",
        layers: &[
            "file d/low 644 1",
            "file d/mid 644 2\nxattr d trusted.overlay.opaque y",
            "dir d",
        ],
        expected: "d/ d/mid=2",
    },
    Row {
        name: "no redirect leads to what .wh..wh..opq hides",
        layers: &[
            "file d/y/low 644 1",
            "dir d/x\nxattr d/x trusted.overlay.redirect y\nfile d/.wh..wh..opq",
            "file d/top 644 3",
        ],
        expected: "d/ d/top=3 d/x/",
    },
];

/// The tree in the words of [`Row::expected`].
fn show(root: &Path, tree: &Snapshot) -> String {
    let mut words = Vec::new();
    for (path, entry) in tree.entries.iter().filter(|(path, _)| path.as_os_str() != ".") {
        let name = path.to_string_lossy();
        words.push(match entry.get("type") {
            "Directory" => format!("{name}/"),
            "Symlink" => format!("{name}@"),
            "RegularFile" => {
                let content = std::fs::read(root.join(path)).unwrap();
                format!("{name}={}", String::from_utf8_lossy(&content))
            }
            _ => format!("{name}!"),
        });
    }
    words.join(" ")
}

/// Lookup by name must agree with the listing: names of the layers that the merged tree has not, but that are found in it.
fn hidden_but_found<'a>(
    sandbox: &'a Sandbox,
    merged: &'a Path,
    tree: &'a Snapshot,
) -> impl Iterator<Item = String> + 'a {
    let names = sandbox.lowers().into_iter().flat_map(|layer| {
        let paths = tree::snapshot(layer).entries.into_keys();
        paths.filter(|path| path.as_os_str() != ".").collect::<Vec<_>>()
    });
    names
        .filter(|path| tree.get(path).is_none())
        // Through a symbolic link, something else is found.
        .filter(|path| {
            let parent = path.parent().unwrap_or(path);
            parent.as_os_str().is_empty()
                || tree.get(parent).is_some_and(|p| p.get("type") == "Directory")
        })
        .filter(|path| std::fs::symlink_metadata(merged.join(path)).is_ok())
        .map(|path| path.display().to_string())
}

/// Linux 6.7 does.
fn kernel_reads_xattr_whiteouts() -> bool {
    let mut sandbox = Sandbox::new();
    sandbox.layer("file a");
    sandbox.layer("xwhiteout a");
    let mount = sandbox.mount(Kind::Kernel);
    std::fs::symlink_metadata(mount.path().join("a")).is_err()
}

fn check(rows: &[Row], with_kernel: bool) {
    check_deep(rows, with_kernel, 1);
}

/// Checks stacks whose lowest and topmost layer are there `copies` times, which shows no difference.
fn check_deep(rows: &[Row], with_kernel: bool, copies: usize) {
    let mut problems = Vec::new();
    for row in rows {
        let mut sandbox = Sandbox::new();
        for (at, layer) in row.layers.iter().enumerate() {
            let is_outer = at == 0 || at + 1 == row.layers.len();
            for _ in 0..if is_outer { copies } else { 1 } {
                sandbox.layer(layer);
            }
        }
        let mut specs = vec![
            ("ours", sandbox.spec(Kind::Lamina)),
            ("ours, read-only", sandbox.spec(Kind::Lamina).read_only()),
        ];
        let has_marks = row.layers.iter().any(|layer| layer.contains("xwhiteout"));
        if with_kernel && has_marks && !kernel_reads_xattr_whiteouts() {
            env::note_skip(row.name, "this kernel reads no xattr whiteouts");
        } else if with_kernel {
            specs.push(("kernel", sandbox.spec(Kind::Kernel)));
        }
        for (who, spec) in specs {
            let mount = spec.mount();
            let tree = tree::snapshot(mount.path());
            let seen = show(mount.path(), &tree);
            if seen != row.expected {
                problems.push(format!("{} ({who}): {seen:?} for {:?}", row.name, row.expected));
            }
            problems.extend(
                hidden_but_found(&sandbox, mount.path(), &tree)
                    .map(|name| format!("{} ({who}): {name} is not listed but found", row.name)),
            );
            mount.unmount();
        }
    }
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn tables_as_the_kernel_has_it() {
    if !env::is_machine_root() {
        skip!("needs root");
    }
    if let Some(reason) = env::no_fuse().or_else(env::no_kernel_overlay) {
        skip!("{reason}");
    }
    check(KERNEL, true);
}

#[test]
fn tables_of_other_formats() {
    if !env::is_machine_root() {
        skip!("needs root");
    }
    if let Some(reason) = env::no_fuse() {
        skip!("{reason}");
    }
    check(OTHERS, false);
    check(TRUSTED, false);
}

// Two threads open and list the parts of such directories.
#[test]
fn tables_in_deep_stacks() {
    if !env::is_machine_root() {
        skip!("needs root");
    }
    if let Some(reason) = env::no_fuse() {
        skip!("{reason}");
    }
    // A copy of a redirect leads to something else.
    let leads = |row: &&Row| {
        let outer = [row.layers.first(), row.layers.last()];
        outer.into_iter().flatten().any(|layer| layer.contains("redirect"))
    };
    for rows in [KERNEL, OTHERS, TRUSTED] {
        let rows: Vec<_> = rows.iter().filter(|row| !leads(row)).copied().collect();
        check_deep(&rows, false, 32);
    }
}

#[test]
fn tables_in_a_user_namespace() {
    if ran_in_user_namespace!() {
        return;
    }
    if let Some(reason) = env::no_fuse().or_else(env::no_kernel_overlay) {
        skip!("{reason}");
    }
    check(KERNEL, true);
    check(OTHERS, false);
}

/// Stacks of 2 to 6 layers in one mount, each in a directory of its own.
fn compare_stacks(seed: u64, count: usize) {
    const BATCH: usize = 40;
    let marks = kernel_reads_xattr_whiteouts();
    for batch in 0..count.div_ceil(BATCH) {
        let mut sandbox = Sandbox::new();
        let layers: Vec<_> = (0..6).map(|_| sandbox.layer("opaque . x")).collect();
        let mut texts = Vec::new();
        for n in 0..BATCH {
            let seed = seed.wrapping_add((batch * BATCH + n) as u64);
            let style = Style { links: true, marks };
            let stack = generate_layers(&mut Rng::new(seed), 6, style);
            for (layer, lines) in layers.iter().zip(&stack) {
                let root = layer.join(format!("s{n:03}"));
                std::fs::create_dir(&root).unwrap();
                fill(&root, &lines.join("\n"));
            }
            texts.push(format!(
                "# seed {seed}\n# layer\n{}",
                stack.iter().map(|l| l.join("\n")).collect::<Vec<_>>().join("\n# layer\n")
            ));
        }
        for read_only in [false, true] {
            let make = |kind| {
                let spec = sandbox.side(kind, if kind == Kind::Kernel { "kernel" } else { "ours" });
                if read_only { spec.read_only() } else { spec }
            };
            let (ours, kernel) = (make(Kind::Lamina).mount(), make(Kind::Kernel).mount());
            for (n, text) in texts.iter().enumerate() {
                let take = |root: &Path| tree::snapshot(root.join(format!("s{n:03}")));
                let (ours, mut kernel) = (take(ours.path()), take(kernel.path()));
                // Whiteouts in a directory that one layer has: listed by the kernel, not found.
                kernel.entries.retain(|_, entry| !entry.get("stat").starts_with("No such file"));
                let lines = tree::diff(&ours, &kernel);
                assert!(
                    lines.is_empty(),
                    "read-only {read_only}, left ours, right the kernel's:\n{}\n{text}",
                    lines.join("\n")
                );
            }
            ours.unmount();
            kernel.unmount();
        }
    }
}

fn stacks() -> usize {
    std::env::var("FUSE_TESTS_STACKS").map_or(200, |text| text.parse().expect("FUSE_TESTS_STACKS"))
}

#[test]
fn generated_stacks_as_root() {
    if !env::is_machine_root() {
        skip!("needs root");
    }
    if let Some(reason) = env::no_fuse().or_else(env::no_kernel_overlay) {
        skip!("{reason}");
    }
    compare_stacks(1, stacks());
}

#[test]
fn generated_stacks_in_a_user_namespace() {
    if ran_in_user_namespace!() {
        return;
    }
    if let Some(reason) = env::no_fuse().or_else(env::no_kernel_overlay) {
        skip!("{reason}");
    }
    compare_stacks(1_000_000, stacks());
}
