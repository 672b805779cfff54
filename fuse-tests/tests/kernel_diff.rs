//! Generated operation sequences on the program under test and on kernel overlayfs side by side.
//!
//! `FUSE_TESTS_SEQUENCES` sets how many (default 300, the full run is 100000), `FUSE_TESTS_SEED` where they begin.
//! A failure prints the shrunk case; put it into a file and run the test `replay` with `FUSE_TESTS_REPLAY=FILE`.

use fuse_tests::cases::Case;
use fuse_tests::fixture::Kind;
use fuse_tests::ops::Verb;
use fuse_tests::run::{Config, Lesser, Renames};
use fuse_tests::survey;
use fuse_tests::weak::Server;
use fuse_tests::{env, needs_kernel_overlay, needs_root, ran_in_user_namespace, skip};

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect(variable))
}

/// The share of the sequences that one test runs.
fn sequences(percent: u64) -> usize {
    usize::try_from((number("FUSE_TESTS_SEQUENCES", 300) * percent).div_ceil(100)).unwrap()
}

/// Tests begin far from each other.
fn seed(test: u64) -> u64 {
    number("FUSE_TESTS_SEED", 1).wrapping_add(test << 32)
}

/// Ends the calling test where the two cannot be mounted side by side, as root of the machine or as whoever runs it.
macro_rules! needs_both {
    (as_root) => {
        needs_root!();
        needs_both!();
    };
    () => {
        if let Some(reason) = env::no_fuse().or_else(env::no_kernel_overlay) {
            skip!("{reason}");
        }
    };
}

#[test]
fn sequences_as_root() {
    needs_both!(as_root);
    survey::run_many(seed(0), sequences(50), &Config::default());
}

/// The kernel moves directories with lower parts by redirects; ours moves what they hold, or writes redirects too. Each reads
/// what the other has written.
#[test]
fn sequences_with_directory_renames() {
    needs_both!(as_root);
    let config = Config { renames: Renames::Copied, ..Config::default() };
    survey::run_many(seed(5), sequences(20), &config);
    let config = Config { renames: Renames::Redirected, ..Config::default() };
    survey::run_many(seed(6), sequences(20), &config);
    let config = Config { renames: Renames::Lent, ..Config::default() };
    survey::run_many(seed(7), sequences(20), &config);
}

#[test]
fn sequences_with_hard_links_in_lower_layers() {
    needs_both!(as_root);
    survey::run_many(seed(1), sequences(20), &Config { links: true, ..Config::default() });
}

#[test]
fn sequences_with_an_index() {
    needs_both!(as_root);
    if env::filesystem_uuid(&env::Base::get().path).is_none() {
        skip!("the kernel does not tell the UUID of the filesystem, by which it knows an index");
    }
    let config = Config { links: true, index: true, ..Config::default() };
    survey::run_many(seed(5), sequences(20), &config);
}

#[test]
fn sequences_in_a_user_namespace() {
    if ran_in_user_namespace!() {
        return;
    }
    needs_both!();
    survey::run_many(seed(2), sequences(30), &Config::default());
}

/// Each changes how ours works, and nothing that is seen.
const OPTIONS: [[&str; 2]; 11] = [
    ["io=open", ""],
    ["io=passthrough", ""],
    ["io=noopen,writeback", ""],
    ["io=open,writeback", ""],
    ["transport=fuser", ""],
    ["transport=uring", ""],
    ["uuid=on", ""],
    ["uuid=off,xino=on", "xino=on"],
    ["fsync=0,threads=1", ""],
    ["timeout=0", ""],
    ["userxattr", "userxattr"],
];

#[test]
fn sequences_with_other_options() {
    needs_both!(as_root);
    let passthrough = env::extra_options().contains("io=passthrough");
    for (test, options) in (10..).zip(OPTIONS) {
        // Refused together.
        if passthrough && ["writeback", "fuser"].iter().any(|word| options[0].contains(word)) {
            continue;
        }
        // Added in Linux 5.11.
        if options[1] == "userxattr"
            && let Some(reason) = env::no_overlay_option(options[1])
        {
            skip!("{reason}");
        }
        survey::run_many(seed(test), sequences(5), &Config { options, ..Config::default() });
    }
}

#[test]
fn sequences_with_other_options_in_a_user_namespace() {
    if ran_in_user_namespace!() {
        return;
    }
    needs_both!();
    let options =
        OPTIONS.into_iter().filter(|[own, _]| !["io=passthrough", "userxattr"].contains(own));
    for (test, options) in (30..).zip(options) {
        survey::run_many(seed(test), sequences(5), &Config { options, ..Config::default() });
    }
}

/// An upper that keeps owner, mode and type in xattrs shows what any other does.
#[test]
fn sequences_with_overrides() {
    let options = "xattr_permissions=2";
    // Capabilities are kept in a `user.` xattr, which symlinks cannot have.
    let cannot = &[Verb::setacl, Verb::removeacl, Verb::setcap];
    on_a_lesser_upper(
        50,
        Lesser { options, server: None, cannot, cannot_hold: &[], is_kernel_format: false },
    );
}

fn on_a_lesser_upper(test: u64, lesser: Lesser) {
    needs_both!(as_root);
    if let Some(reason) = lesser.server.and_then(Server::missing) {
        skip!("{reason}");
    }
    let config = Config { lesser: Some(lesser), ..Config::default() };
    survey::run_many(seed(test), sequences(20), &config);
}

const NO_FLAGS: Lesser = Lesser {
    options: "upper_lacks=tmpfile:exchange:whiteout",
    server: None,
    cannot: &[Verb::exchange],
    cannot_hold: &[],
    is_kernel_format: true,
};

#[test]
fn sequences_without_flags_of_rename() {
    on_a_lesser_upper(5, NO_FLAGS);
}

#[test]
fn sequences_without_hard_links() {
    let options = "upper_lacks=link";
    on_a_lesser_upper(6, Lesser { options, cannot: &[], ..NO_FLAGS });
}

#[test]
fn sequences_with_marks_in_files() {
    let options = "upper_lacks=chardev:xattr";
    on_a_lesser_upper(7, Lesser { options, cannot: &[], is_kernel_format: false, ..NO_FLAGS });
}

#[test]
fn sequences_without_anything() {
    let options = "upper_lacks=tmpfile:exchange:whiteout:chardev:xattr:link:unlink_open";
    on_a_lesser_upper(8, Lesser { options, is_kernel_format: false, ..NO_FLAGS });
}

/// Nearly what an NFS v3 client gives.
#[test]
fn sequences_on_bindfs() {
    on_a_lesser_upper(
        9,
        Lesser {
            options: "",
            // It remembers attributes by name, so for a second one name does not tell that another has gone.
            server: Some(Server::Bindfs(&["--xattr-none", "-o", "attr_timeout=0,entry_timeout=0"])),
            cannot: &[
                Verb::exchange,
                Verb::setxattr,
                Verb::removexattr,
                Verb::setacl,
                Verb::removeacl,
                Verb::setcap,
                Verb::hsetxattr,
                Verb::punch,
                Verb::hseek,
                // It does nothing where only one of the times is to change.
                Verb::utimens,
                Verb::hutimens,
                // It gives them to their owner after it made them, and setuid is lost.
                Verb::mkfifo,
                Verb::mkchar,
            ],
            cannot_hold: &["xattr"],
            is_kernel_format: false,
        },
    );
}

#[test]
fn sequences_on_nfs_v3() {
    on_a_lesser_upper(
        10,
        Lesser {
            options: "",
            server: Some(Server::Nfs("3")),
            cannot: &[
                Verb::exchange,
                Verb::setxattr,
                Verb::removexattr,
                Verb::setcap,
                Verb::hsetxattr,
                Verb::punch,
                Verb::hseek,
                // Seconds are 32 bits without a sign there.
                Verb::utimens,
                Verb::hutimens,
            ],
            cannot_hold: &["xattr", "mtime"],
            is_kernel_format: false,
        },
    );
}

/// Kernel against kernel: the comparison itself finds nothing where nothing differs.
#[test]
fn kernel_against_kernel_shows_no_difference() {
    needs_kernel_overlay!();
    for links in [false, true] {
        let config = Config { ours: Kind::Kernel, links, ..Config::default() };
        survey::run_many(seed(3), sequences(20), &config);
    }
}

/// A test that cannot fail is a defect: one wrong bit of a mode must be found, and shrunk to nothing.
#[test]
fn an_injected_fault_is_found_and_shrunk() {
    needs_kernel_overlay!();
    let config = Config {
        ours: Kind::Kernel,
        fault: Some(|tree| {
            for entry in tree.entries.values_mut().filter(|e| e.get("type") == "Symlink") {
                entry.set("mode", "0644");
            }
        }),
        ..Config::default()
    };
    // Of this seed, whatever the others run with: some cases cannot be made smaller than two lines,
    // because the one that is left would mean something else.
    let seed = (4 << 32) + 1;
    let failure = std::panic::catch_unwind(|| survey::run_many(seed, 20, &config)).unwrap_err();
    let text = failure.downcast_ref::<String>().unwrap();
    assert!(text.contains("mode: left \"0644\", right \"0777\""), "{text}");
    let case = Case::parse(text.split_once(survey::CASE_FOLLOWS).unwrap().1).unwrap();
    let lines = case.ops.len() + case.layers.iter().map(Vec::len).sum::<usize>();
    assert_eq!(lines, 1, "one line that makes a symlink is enough: {text}");
}

/// What is printed at a failure reads back as the same case.
#[test]
fn a_printed_case_reads_back() {
    for n in 0..50 {
        let case = Case::generate(n, &Config { ops: 60, links: n % 2 == 0, ..Config::default() });
        let again = Case::parse(&case.to_string()).unwrap();
        assert_eq!(again.to_string(), case.to_string());
        assert_eq!(again.layers, case.layers);
    }
}

/// Runs the case in the file `FUSE_TESTS_REPLAY`, as it was printed; with `FUSE_TESTS_LINKS=1` as one of the hard-link test, with
/// `FUSE_TESTS_LINKS=index` of the one with an index, with `FUSE_TESTS_USER=1` in a user namespace.
#[test]
fn replay() {
    let Some(file) = std::env::var_os("FUSE_TESTS_REPLAY") else { return };
    if std::env::var_os("FUSE_TESTS_USER").is_some() && ran_in_user_namespace!() {
        return;
    }
    let text = std::fs::read_to_string(file).unwrap();
    let links = std::env::var("FUSE_TESTS_LINKS").ok();
    let index = links.as_deref() == Some("index");
    let config = Config { links: links.is_some(), index, ..Config::default() };
    survey::run_one(&Case::parse(&text).unwrap(), &config);
}
