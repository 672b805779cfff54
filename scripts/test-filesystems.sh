#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/test-filesystems.sh [-f FILESYSTEM]... [SUITE...]

Runs suites of fuse-tests with all their layers on other filesystems, as root; suites enter user
namespaces by themselves. Each filesystem is in an image of its own below /var/tmp, mounted by a loop
device. Prints what was skipped and a table. Filesystems that can be lower layers only are tried by the
suite filesystems, on whatever holds the test data.

  -f FILESYSTEM  ext4, xfs (with reflink), btrfs or tmpfs; all of them unless given
  SUITE          names of fuse-tests; merge kernel_diff posix_basic posix_more pitfalls_bugs
                 pitfalls_more regressions users redirects metacopies identity filesystems store_driver
                 store_engine store_mount store_flat store_check unless given

A filesystem whose mkfs is missing says so and is skipped (packages e2fsprogs, xfsprogs, btrfs-progs).
Environment: LAMINA_BIN, the binary to test instead of building one; and those of fuse-tests.
END
}

filesystems=()
while getopts f:h option; do
    case $option in
        f) filesystems+=("$OPTARG") ;;
        h)
            usage
            exit 0
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
done
[ ${#filesystems[@]} -gt 0 ] || filesystems=(ext4 xfs btrfs tmpfs)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() {
    printf 'filesystems: %s\n' "$*"
}

die() {
    printf 'filesystems: %s\n' "$*" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || die "this needs root"
# shellcheck source=scripts/lib/frame.sh
. scripts/lib/frame.sh
alone scripts/test-filesystems.sh "$@"
shift $((OPTIND - 1))
[ $# -gt 0 ] || set -- merge kernel_diff posix_basic posix_more pitfalls_bugs pitfalls_more regressions users redirects metacopies \
    identity filesystems store_driver store_engine store_mount store_flat store_check
use_binary
scratch filesystems
mkdir "$dir/mnt"

# mount_new FILESYSTEM: a fresh one at $dir/mnt; fails, and says so, where it cannot be had.
mount_new() {
    local make
    case $1 in
        ext4) make=(mkfs.ext4 -q) ;;
        xfs) make=(mkfs.xfs -q -m reflink=1) ;;
        btrfs) make=(mkfs.btrfs -q) ;;
        tmpfs)
            mount -t tmpfs -o size=6G tmpfs "$dir/mnt"
            return
            ;;
        *) die "there is no filesystem $1" ;;
    esac
    command -v "${make[0]}" >/dev/null || {
        say "$1: skipped: ${make[0]} is not installed"
        return 1
    }
    truncate -s 8G "$dir/image"
    "${make[@]}" "$dir/image" >/dev/null 2>&1 || die "$1: ${make[*]} failed"
    mount -t "$1" -o loop "$dir/image" "$dir/mnt" || {
        say "$1: skipped: it cannot be mounted here"
        return 1
    }
    rm -rf "$dir/mnt/lost+found"
}

status=0
: >"$dir/table"
for filesystem in "${filesystems[@]}"; do
    mount_new "$filesystem" || continue
    : >"$dir/skips"
    chmod 666 "$dir/skips"
    for suite in "$@"; do
        started=$SECONDS code=0
        say "$filesystem: $suite"
        FUSE_TESTS_DIR=$dir/mnt FUSE_TESTS_SKIP_LOG=$dir/skips \
            cargo test -p fuse-tests --locked --quiet --test "$suite" >"$dir/log" 2>&1 || code=$?
        [ $code = 0 ] || {
            status=1
            cat "$dir/log" >&2
        }
        printf '%-8s %-16s %s %s, %s s\n' "$filesystem" "$suite" "$([ $code = 0 ] && echo ok || echo FAILED)" \
            "$(sed -n 's/^test result: [^.]*\. \(.*\); 0 ignored.*/\1/p' "$dir/log" | tail -n 1)" $((SECONDS - started)) >>"$dir/table"
    done
    sed -E "s/^SKIP [0-9]+: ([^:]+: )?(SKIP [0-9]+: [^:]+: )?/filesystems: $filesystem: skipped: /" "$dir/skips" | sort | uniq -c
    umount "$dir/mnt" || die "$filesystem: something is left mounted there"
    rm -f "$dir/image"
done
cat "$dir/table"
exit $status
