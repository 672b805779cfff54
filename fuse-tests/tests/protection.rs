//! Append-only and immutable objects: the same is refused as by kernel overlayfs on the same layers, and each reads the marks that
//! the other has written.

use std::path::Path;
use std::process::Command;

use fuse_tests::fixture::{Kind, Sandbox, Spec};
use fuse_tests::{env, needs_kernel_overlay, needs_root, skip};

/// Runs a shell command in `dir` for each line, and gives the lines with what became of them.
fn outcomes(dir: &Path, lines: &str) -> String {
    let mut said = String::new();
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let out = Command::new("sh").args(["-c", line]).current_dir(dir).output().unwrap();
        let end = if out.status.success() { "done" } else { "refused" };
        said += &format!("{line}: {end} {}\n", String::from_utf8_lossy(&out.stdout).trim());
    }
    said
}

fn run(dir: &Path, command: &str) -> bool {
    Command::new("sh").args(["-c", command]).current_dir(dir).status().unwrap().success()
}

/// Takes the flags away when the test ends, however it ends, so that its directory can be removed.
struct Unprotect<'a>(&'a Sandbox);

impl Drop for Unprotect<'_> {
    fn drop(&mut self) {
        run(self.0.root(), "chattr -R -f -ia . || true");
        self.0.forget_seals();
    }
}

const CHANGES: &str = "
    lsattr -d immutable append whole grows
    echo x >immutable
    echo x >>immutable
    chmod 600 immutable
    chown 1 immutable
    touch immutable
    truncate -s 1 immutable
    setfattr -n user.a -v 1 immutable
    setfattr -x user.b immutable
    rm immutable
    mv immutable other
    mv plain immutable
    ln immutable other
    fallocate -l 1 immutable
    echo x >append
    echo x >>append
    cat append
    chmod 600 append
    touch append
    touch -d @5 append
    truncate -s 100 append
    fallocate -p -l 1 append
    rm append
    ln append other
    mv append other
    mkdir whole/new
    touch whole/new
    ln -s x whole/new
    rm whole/f
    rm -r whole/d
    rmdir whole
    mv whole/f other
    mv plain whole/plain
    ln plain whole/plain
    echo x >>whole/f
    chmod 600 whole/f
    cat whole/f
    mkdir whole/d/new
    chmod 700 whole
    mkdir grows/new
    touch grows/f2
    mv plain grows/plain
    mv grows/f other
    mv other grows/f
    rm grows/f
    rmdir grows/new
    rmdir grows/empty
    mv grows other
    chmod 700 grows
    lsattr -d immutable append whole grows whole/d
    cat immutable append whole/f
    ls . whole grows";

/// Flags go, come, and stay over a remount.
const FLAGS: &str = "
    chattr -i immutable
    echo y >>immutable
    lsattr -d immutable
    chattr +a immutable
    echo y >immutable
    echo y >>immutable
    chattr -i whole
    touch whole/now
    chattr +i whole
    touch whole/then
    chattr -a grows
    rm grows/f2
    echo z >fresh
    chattr +i fresh
    echo z >>fresh
    chattr +d fresh
    lsattr -d fresh
    mkdir dir
    chattr +ai dir
    touch dir/f";

const STATE: &str = "
    lsattr -d immutable append whole grows fresh dir
    cat immutable append fresh
    echo w >>fresh
    rm immutable
    rm append
    touch whole/then
    touch dir/f
    rm grows/new/../f2
    ls . whole grows dir";

#[test]
fn protected_objects_are_refused_as_by_the_kernel() {
    needs_root!();
    needs_kernel_overlay!();
    let mut sandbox = Sandbox::new();
    let lower = sandbox.layer(
        "file immutable 644 size:5\nxattr immutable user.b 1\nfile append 644 size:5\nfile plain 644 size:5\n\
         dir whole 755\nfile whole/f 644 size:5\ndir whole/d 755\ndir grows 755\nfile grows/f 644 size:5\ndir grows/empty 755",
    );
    let protect = "chattr +i immutable whole && chattr +a append grows";
    if !run(&lower, protect) {
        skip!("no chattr(1), or the filesystem has no flags");
    }
    let sides = [("ours", Kind::Lamina), ("kernel", Kind::Kernel)].map(|(name, kind)| {
        let spec = sandbox.side(kind, name);
        if kind == Kind::Kernel { spec.option("index=off") } else { spec }
    });
    let _unprotect = Unprotect(&sandbox);
    let step = |specs: [&Spec; 2], lines: &str| {
        let [ours, kernel] = specs.map(|spec| {
            let mount = spec.mount();
            outcomes(mount.path(), lines)
        });
        assert_eq!(ours, kernel);
        ours
    };
    let [ours, kernel] = &sides;
    let said = step([ours, kernel], CHANGES);
    assert!(said.contains("echo x >>append: done"), "{said}");
    assert!(said.contains("rm append: refused"), "{said}");
    step([ours, kernel], FLAGS);
    let said = step([ours, kernel], STATE);
    assert!(said.contains("echo w >>fresh: refused"), "{said}");
    let crossed = [&ours.clone().on_upper_of(kernel), &kernel.clone().on_upper_of(ours)];
    assert_eq!(step(crossed, STATE), said);
    sandbox.check_lowers();
    // The upper itself stays free to change.
    let upper = &ours.upper.as_ref().unwrap().0;
    assert!(env::overlay_prefix().starts_with("trusted"));
    assert_eq!(
        outcomes(
            upper,
            "getfattr --only-values -n trusted.overlay.protattr whole\nlsattr -d whole"
        ),
        outcomes(
            &kernel.upper.as_ref().unwrap().0,
            "getfattr --only-values -n trusted.overlay.protattr whole\nlsattr -d whole"
        ),
    );
}

/// `sync` and `noatime` go along with a copy, of data or of attributes alone, and nothing else does.
#[test]
fn flags_that_are_copied_up() {
    needs_root!();
    needs_kernel_overlay!();
    for option in ["", "metacopy=on"] {
        let mut sandbox = Sandbox::new();
        let layer = sandbox.layer("");
        let prepare = "mkdir sync both
            echo x | tee sync/f both/f none noatime nodump >/dev/null
            chattr +S sync; chattr +AS both both/f; chattr +A noatime sync/f; chattr +d nodump";
        if !run(&layer, prepare) {
            skip!("no flags here");
        }
        let change = "echo y >>sync/f; chmod 600 noatime both/f; touch both none nodump
            lsattr -d sync sync/f both both/f none noatime nodump";
        let [ours, kernels] =
            [(Kind::Lamina, "ours"), (Kind::Kernel, "kernels")].map(|(kind, name)| {
                let mut spec = sandbox.side(kind, name);
                spec.options.extend((!option.is_empty()).then(|| option.to_owned()));
                let upper = spec.upper.clone().unwrap().0;
                let mount = spec.mount();
                let shown = outcomes(mount.path(), change);
                mount.unmount();
                (shown, outcomes(&upper, "lsattr -d sync sync/f both both/f none noatime nodump"))
            });
        assert_eq!(ours, kernels, "{option}");
        let has = |flag| ours.1.matches(flag).count();
        assert_eq!((has('S'), has('A')), (3, 4), "{}", ours.1);
    }
}
