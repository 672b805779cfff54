#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/suites.sh [SUITE...]

Runs test suites of others on mounts of lamina, as root; all of them unless some are named.

  fsx    random reads, writes, truncations and mappings of one file, each read checked; for each I/O
         mode, the file beginning in the upper and in a lower layer (cargo install fsx)
  pjdfstest  POSIX semantics; every case that passes on kernel overlayfs on the same filesystem must pass
         here, as root and as root of a user namespace (cargo install pjdfstest)
  git    clone, changes, gc and fsck of a repository, the work tree compared byte by byte
  dpkg   packages unpacked, replaced and removed by dpkg, each file compared with the package's
  stress the filesystem class of stress-ng, each stressor some seconds, without an error (STRESS_SECONDS, 2)

Environment: LAMINA_BIN, the binary to test instead of building one; FSX_OPERATIONS, how many each
(100000); FSX_MODES (noopen open, each with and without writeback) and FSX_STARTS (upper lower whole), which of them; FSX_OPTIONS, more
mount options; FSX_SEED.
END
}

all=(fsx pjdfstest git dpkg stress)
case "${1-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A mount namespace that anybody else makes would copy our mounts and keep their servers alive.
if [ -z "${LAMINA_SUITES_ALONE-}" ]; then
    export LAMINA_SUITES_ALONE=1
    exec unshare --mount --propagation private bash scripts/suites.sh "$@"
fi
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin
if [ -z "${LAMINA_BIN-}" ]; then
    cargo build --release --locked --bin lamina
    LAMINA_BIN=${CARGO_TARGET_DIR:-$PWD/target}/release/lamina
fi

clean_up() {
    local status=$?
    trap - EXIT
    cd /
    while umount -l "$dir/merged" 2>/dev/null; do :; done
    rm -rf "$dir" || status=1
    exit "$status"
}
trap 'exit 130' INT
trap 'exit 143' TERM
dir=$(mktemp -d /var/tmp/lamina-suites.XXXXXX)
trap clean_up EXIT

say() {
    printf 'suites: %s\n' "$*"
}

die() {
    printf 'suites: %s\n' "$*" >&2
    exit 1
}

# mount_new OPTIONS: mounts a new upper over $dir/lower, which may hold files already, at $dir/merged.
mount_new() {
    mkdir -p "$dir/lower" "$dir/upper" "$dir/work" "$dir/merged"
    "$LAMINA_BIN" -o "lowerdir=$dir/lower,upperdir=$dir/upper,workdir=$dir/work$1" "$dir/merged"
}

unmount() {
    "$LAMINA_BIN" unmount "$dir/merged"
    rm -rf "${dir:?}"/{lower,upper,work,merged}
}

# fsx_once OPTIONS START: START is upper, lower (the file is cut at the first open) or whole (it
# begins with all its data in the lower layer, and is never cut).
fsx_once() {
    local before after block=false
    say "fsx: ${FSX_OPERATIONS:-100000} operations, $1, file beginning in $2"
    mkdir "$dir/lower"
    head -c 262144 /dev/urandom >"$dir/lower/other"
    [ "$2" = upper ] || cp "$dir/lower/other" "$dir/lower/file"
    before=$(cd "$dir/lower" && sha256sum -- *)
    mount_new ",$1${FSX_OPTIONS:+,$FSX_OPTIONS}"
    [ "$2" != whole ] || block=true
    cat >"$dir/fsx.toml" <<END
flen = 262144
blockmode = $block
[weights]
invalidate = 1
read = 10
write = 10
mapread = 10
mapwrite = 10
fsync = 0.1
fdatasync = 0.1
sendfile = 2
posix_fadvise = 1
END
    if [ "$block" = true ]; then
        printf 'truncate = 0\n' >>"$dir/fsx.toml"
    else
        printf '%s\n' 'close_open = 1' 'truncate = 5' 'posix_fallocate = 2' 'punch_hole = 2' 'copy_file_range = 2' \
            >>"$dir/fsx.toml"
    fi
    (cd "$dir" && fsx -q -S "${FSX_SEED:-1}" -N "${FSX_OPERATIONS:-100000}" -f fsx.toml -P "$dir" \
        merged/file)
    after=$(cd "$dir/lower" && sha256sum -- *)
    [ "$before" = "$after" ] || die "fsx: a lower layer CHANGED"
    unmount
}

suite_fsx() {
    local io start
    command -v fsx >/dev/null || die "fsx is missing: cargo install fsx"
    for io in ${FSX_MODES:-noopen open noopen,writeback open,writeback}; do
        for start in ${FSX_STARTS:-upper lower whole}; do
            fsx_once "io=$io" "$start"
        done
    done
}

# pjd_run WHO DIR [COMMAND...]: runs pjdfstest in DIR by COMMAND; leaves "CASE ok" and "CASE FAILED" lines
# in $dir/WHO.
pjd_run() {
    local who=$1 at=$2
    shift 2
    cat >"$dir/pjd.toml" <<'END'
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
[dummy_auth]
entries = [["nobody", "nogroup"], ["tests", "tests"], ["pjdfstest", "pjdfstest"]]
END
    "$@" pjdfstest -c "$dir/pjd.toml" -p "$at" >"$dir/$who.log" 2>&1 || true
    sed -nE 's/^([a-z_0-9:]+) +\.* *(ok|FAILED|success|failed).*/\1 \2/p; s/^(.*[^ .])[ .\t]+(ok|FAILED|success|failed)$/\1 \2/p' \
        "$dir/$who.log" | sed -E 's/success$/ok/; s/failed$/FAILED/' | LC_ALL=C sort -u >"$dir/$who"
    [ -s "$dir/$who" ] || {
        tail -20 "$dir/$who.log" >&2
        die "pjdfstest did not run as $who"
    }
}

# The tree of a checkout, byte by byte.
sums() {
    (cd "$1" && find . -path ./.git -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum)
}

suite_git() {
    command -v git >/dev/null || die "git is missing"
    say "git: clone, changes, gc, fsck"
    mkdir -p "$dir/lower"
    git clone -q . "$dir/lower/below"
    git clone -q . "$dir/apart"
    mount_new ""
    local tree
    git clone -q . "$dir/merged/fresh"
    for tree in "$dir/merged/below" "$dir/merged/fresh" "$dir/apart"; do
        (
            cd "$tree"
            git config user.name tests
            git config user.email tests@localhost
            git config gc.auto 0
            git rm -q -r src/sys
            git mv src/union src/moved
            printf 'more\n' >>README.md
            chmod +x Cargo.toml
            git add -A
            GIT_AUTHOR_DATE='@1 +0000' GIT_COMMITTER_DATE='@1 +0000' git commit -qm change
            git checkout -q -b other HEAD~1
            git checkout -q -
            git gc -q --prune=now
            git fsck --full --strict --no-progress >/dev/null
            [ -z "$(git status --porcelain)" ]
        ) || die "git: failed in $tree"
    done
    for tree in "$dir/merged/below" "$dir/merged/fresh"; do
        cmp <(sums "$dir/apart") <(sums "$tree") || die "git: $tree differs"
        [ "$(git -C "$tree" rev-parse HEAD)" = "$(git -C "$dir/apart" rev-parse HEAD)" ]
    done
    unmount
    rm -rf "$dir/apart"
}

suite_dpkg() {
    command -v dpkg-deb >/dev/null || {
        say "dpkg: skipped: there is no dpkg"
        return
    }
    say "dpkg: unpacks, replaces and removes packages"
    local version root=$dir/merged number
    # Two versions of a package with many files.
    for version in 1 2; do
        mkdir -p "$dir/p$version/DEBIAN" "$dir/p$version/usr/share/tests"
        for number in $(seq 300); do
            printf '%s %s\n' "$number" "$version" >"$dir/p$version/usr/share/tests/f$((number + version * 50))"
        done
        ln -s "f$((100 + version))" "$dir/p$version/usr/share/tests/link"
        ln "$dir/p$version/usr/share/tests/f200" "$dir/p$version/usr/share/tests/hard"
        printf 'Package: tests\nVersion: %s\nArchitecture: all\nMaintainer: tests\nDescription: tests\n' "$version" \
            >"$dir/p$version/DEBIAN/control"
        dpkg-deb --build "$dir/p$version" "$dir/$version.deb" >/dev/null
        rm -r "$dir/p$version/DEBIAN"
    done
    mkdir -p "$dir/lower/var/lib/dpkg"/{info,updates,triggers}
    : >"$dir/lower/var/lib/dpkg/status"
    cp -a "$dir/p1/usr" "$dir/lower/"
    mount_new ""
    for version in 1 2 1 2; do
        dpkg --root="$root" --log=/dev/null --force-not-root --force-script-chrootless -i "$dir/$version.deb" >/dev/null
        cmp <(sums "$dir/p$version/usr") <(sums "$root/usr") || die "dpkg: version $version differs"
    done
    dpkg --root="$root" --log=/dev/null -P tests >/dev/null 2>&1
    [ ! -e "$root/usr/share/tests" ] || die "dpkg: files are left"
    unmount
    rm -rf "${dir:?}"/{p1,p2,1.deb,2.deb}
}

suite_stress() {
    command -v stress-ng >/dev/null || {
        say "stress: skipped: stress-ng is not installed"
        return
    }
    say "stress: the filesystem class of stress-ng"
    mount_new ""
    mkdir "$dir/merged/stress"
    stress-ng --class filesystem --sequential 1 --timeout "${STRESS_SECONDS:-2}" --verify \
        --temp-path "$dir/merged/stress" --exclude "${STRESS_WITHOUT:-}" --log-file "$dir/stress.log" >/dev/null 2>&1 || {
        grep -E 'fail|error' "$dir/stress.log" >&2 || tail -30 "$dir/stress.log" >&2
        die "stress: stress-ng found an error"
    }
    ls "$dir/merged/stress" >/dev/null
    "$LAMINA_BIN" unmount "$dir/merged"
    rm -rf "${dir:?}"/{lower,upper,work,merged,stress.log}
}

[ $# -gt 0 ] || set -- "${all[@]}"
for suite in "$@"; do
    [ "$(type -t "suite_$suite")" = function ] || die "there is no suite $suite"
    "suite_$suite"
done
say "passed: $*"
