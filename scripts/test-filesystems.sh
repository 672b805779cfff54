#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/test-filesystems.sh [--quick] [FILESYSTEM...]

Runs the suites with all layers on other filesystems, and lamina beside kernel overlayfs with lower
layers on filesystems that are only read, or that have no owners, xattrs or ACLs. Makes images in a
directory of its own under /var/tmp and mounts them by loop devices; needs root.

  layers and upper:  ext4 xfs btrfs tmpfs
  lower layers:      squashfs erofs iso vfat

All of them unless some are named; those whose tools are missing are skipped, with a word.

  --quick     a share of the suites that takes a minute for each filesystem

Environment: LAMINA_BIN, the binary to test instead of building one; those of fuse-tests.
END
}

suites=(merge kernel_diff posix_basic pitfalls_bugs pitfalls_more regressions)
filter=()
case "${1-}" in
    -h | --help)
        usage
        exit 0
        ;;
    --quick)
        suites=(merge kernel_diff)
        export FUSE_TESTS_STACKS=${FUSE_TESTS_STACKS:-40} FUSE_TESTS_SEQUENCES=${FUSE_TESTS_SEQUENCES:-60}
        filter=(as_root in_a_user_namespace tables)
        shift
        ;;
esac
[ $# -gt 0 ] || set -- ext4 xfs btrfs tmpfs squashfs erofs iso vfat

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "$(id -u)" = 0 ] || {
    printf 'filesystems: this needs root\n' >&2
    exit 1
}
# A mount namespace that anybody else makes would copy our mounts and keep their servers alive.
if [ -z "${LAMINA_SUITES_ALONE-}" ]; then
    export LAMINA_SUITES_ALONE=1
    exec unshare --mount --propagation private bash scripts/test-filesystems.sh "$@"
fi
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin
if [ -z "${LAMINA_BIN-}" ]; then
    cargo build --release --locked --bin lamina
    LAMINA_BIN=${CARGO_TARGET_DIR:-$PWD/target}/release/lamina
fi
export LAMINA_BIN

dir=$(mktemp -d /var/tmp/lamina-filesystems.XXXXXX)
clean_up() {
    local status=$?
    trap - EXIT
    cd /
    # Those of this namespace only; the innermost are the last.
    awk -v dir="$dir/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | tac |
        while read -r point; do umount -l "$point"; done
    rm -rf "$dir" || status=1
    exit "$status"
}
trap 'exit 130' INT
trap 'exit 143' TERM
trap clean_up EXIT
passed=() skipped=()

say() {
    printf 'filesystems: %s\n' "$*"
}

# has PROGRAM FILESYSTEM: notes a skip where the program, or the kernel's part, is missing.
has() {
    if ! command -v "$1" >/dev/null; then
        skipped+=("$2 ($1 is not installed)")
        return 1
    fi
    modprobe -q "${3:-$2}" 2>/dev/null || true
    if ! grep -qw "${3:-$2}" /proc/filesystems; then
        skipped+=("$2 (not in this kernel)")
        return 1
    fi
}

# run_suites FILESYSTEM: with all layers in $dir/mnt.
run_suites() {
    local suite
    for suite in "${suites[@]}"; do
        say "$1: $suite"
        # Other filesystems keep the time of a directory a little differently from ext4.
        FUSE_TESTS_NO_DIR_TIMES=1 FUSE_TESTS_DIR=$dir/mnt \
            cargo test -p fuse-tests --locked --quiet --test "$suite" -- "${filter[@]}"
    done
}

# on_image FILESYSTEM MKFS...: the suites on a fresh image.
on_image() {
    local type=$1
    shift
    has "$1" "$type" || return 0
    mkdir "$dir/mnt"
    truncate -s 6G "$dir/img"
    "$@" "$dir/img" >/dev/null
    mount -o loop "$dir/img" "$dir/mnt"
    rm -rf "$dir/mnt/lost+found"
    run_suites "$type"
    [ "$type" != xfs ] || check_shared_extents
    umount "$dir/mnt"
    rm -rf "${dir:?}"/{mnt,img}
    passed+=("$type")
}

# A copied-up file shares its blocks with the lower one.
check_shared_extents() {
    local before after
    (cd "$dir/mnt" && mkdir lower upper work merged && head -c 64M /dev/urandom >lower/file)
    sync -f "$dir/mnt"
    "$LAMINA_BIN" -o "lowerdir=$dir/mnt/lower,upperdir=$dir/mnt/upper,workdir=$dir/mnt/work" "$dir/mnt/merged"
    before=$(df --output=used -k "$dir/mnt" | tail -1)
    printf x >>"$dir/mnt/merged/file"
    sync -f "$dir/mnt"
    after=$(df --output=used -k "$dir/mnt" | tail -1)
    "$LAMINA_BIN" unmount "$dir/mnt/merged"
    [ "$(stat -c %s "$dir/mnt/upper/file")" = 67108865 ]
    [ $((after - before)) -lt 8192 ] || {
        say "xfs: a copy-up of 64 MiB took $((after - before)) KiB"
        return 1
    }
    rm -rf "${dir:?}/mnt/"*
}

# What a tree shows, without what copy-up and listings are free to choose.
show() {
    (cd "$1" && find . -printf '%y %m %U:%G %l %p ' \( -type f -printf '%s %T@ %n' -exec sha256sum {} \; -o -printf '\n' \) |
        LC_ALL=C sort)
}

# What is done to a tree; errors are outcomes too.
change() {
    (
        cd "$1"
        printf more >>dir/file
        rm dir/gone
        rm -r tree
        mkdir tree
        mv dir/moved renamed
        chmod 600 cut
        chown 7:8 owned
        ln renamed linked
        touch -d @1000000000.5 timed
        truncate -s 0 cut
        mv dir/deep deep
        ln -s nowhere link2
        setfattr -n user.new -v 1 dir/file
        sha256sum <big
    ) 2>&1 | LC_ALL=C sed 's/^[^:]*: line [0-9]*: //'
}

# as_lower FILESYSTEM MAKE OPTIONS: beside the kernel, two layers of which the top one is on it.
as_lower() {
    local type=$1 make=$2 options=$3 who
    (
        mkdir "$dir/tree" "$dir/base" && cd "$dir/tree"
        mkdir -p dir/deep/er tree/sub
        for name in plain owned timed cut dir/file dir/gone dir/moved dir/deep/er/x tree/sub/1; do
            printf '%s\n' "$name" >"$name"
        done
        head -c 3M /dev/urandom >big
        if [ "$type" != vfat ]; then
            ln -s dir/file link
            ln plain hard
            chown 12:34 owned
            chmod 4750 plain
            mkdir -p "$dir/base/opaque" opaque
            : >"$dir/base/opaque/hidden"
            touch opaque/.wh..wh..opq opaque/shown
        fi
        if [ "$type" = squashfs ] || [ "$type" = erofs ]; then
            mknod dir/white c 0 0
            mkdir -p "$dir/base/dir"
            : >"$dir/base/dir/white"
            setfattr -n user.kept -v 1 owned
        fi
        mkdir -p "$dir/base/dir/deep"
        : >"$dir/base/dir/deep/below"
    )
    "$make"
    mkdir "$dir/mnt"
    mount -o "loop,ro$options" "$dir/img" "$dir/mnt"
    for who in ours kernel; do
        mkdir -p "$dir/$who"/{upper,work,merged}
    done
    "$LAMINA_BIN" -o "lowerdir=$dir/mnt:$dir/base,upperdir=$dir/ours/upper,workdir=$dir/ours/work" "$dir/ours/merged"
    mount -t overlay -o "lowerdir=$dir/mnt:$dir/base,upperdir=$dir/kernel/upper,workdir=$dir/kernel/work,xino=off" \
        overlay "$dir/kernel/merged"
    for who in ours kernel; do
        show "$dir/$who/merged" >"$dir/$who/before"
        change "$dir/$who/merged" >"$dir/$who/said" || true
        show "$dir/$who/merged" >"$dir/$who/after"
    done
    # The kernel shows .wh. files, and what they hide; its copies take the time of the change.
    forgive() { sed -E -e '/\.wh\./d' -e '/opaque/d' -e 's/ [0-9]+\.[0-9]+ ([0-9]+)([0-9a-f]{64})/ \1\2/' "$1"; }
    for part in before said after; do
        diff -u <(forgive "$dir/kernel/$part") <(forgive "$dir/ours/$part") || {
            say "$type as a lower layer: different from the kernel's, $part the changes"
            return 1
        }
    done
    [ "$type" = vfat ] || { ! grep -q hidden "$dir/ours/before" && grep -q opaque/shown "$dir/ours/before"; }
    "$LAMINA_BIN" unmount "$dir/ours/merged"
    umount "$dir/kernel/merged" "$dir/mnt"
    rm -rf "${dir:?}"/{mnt,img,tree,base,ours,kernel}
    passed+=("$type")
}

make_squashfs() { mksquashfs "$dir/tree" "$dir/img" -quiet -no-progress; }
make_erofs() { mkfs.erofs --quiet "$dir/img" "$dir/tree"; }
make_iso() { xorriso -as mkisofs -quiet -R -o "$dir/img" "$dir/tree" 2>/dev/null; }
make_vfat() {
    truncate -s 64M "$dir/img"
    mkfs.vfat "$dir/img" >/dev/null
    mkdir "$dir/fill"
    mount -o loop "$dir/img" "$dir/fill"
    cp -r "$dir/tree/." "$dir/fill/"
    umount "$dir/fill"
    rmdir "$dir/fill"
}

for type in "$@"; do
    case $type in
        ext4) on_image ext4 mkfs.ext4 -q ;;
        xfs) on_image xfs mkfs.xfs -q -m reflink=1 ;;
        btrfs) on_image btrfs mkfs.btrfs -q ;;
        tmpfs)
            mkdir "$dir/mnt"
            mount -t tmpfs -o size=4G tmpfs "$dir/mnt"
            run_suites tmpfs
            umount "$dir/mnt"
            rmdir "$dir/mnt"
            passed+=(tmpfs)
            ;;
        squashfs) ! has mksquashfs squashfs || as_lower squashfs make_squashfs "" ;;
        erofs) ! has mkfs.erofs erofs || as_lower erofs make_erofs "" ;;
        iso) ! has xorriso iso iso9660 || as_lower iso make_iso "" ;;
        vfat) ! has mkfs.vfat vfat || as_lower vfat make_vfat "" ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
done
say "passed: ${passed[*]:-none}${skipped[*]:+; skipped: ${skipped[*]}}"
