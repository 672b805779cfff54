#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/bench.sh [--quick] [--root | --rootless] [--rounds N] [--only NAME]...

Installs the rivals (fuse-overlayfs 1.x from the distribution, 2.x by cargo), builds lamina, and runs
lamina, kernel overlayfs, the bare filesystem and both rivals in turns, on an ext4 in memory; and where
FUSE itself counts, the least server there can be, which answers from its own memory, and kernel overlayfs
asked over FUSE, which is lamina with a mount of it as its upper. Prints times and
their ratios to kernel overlayfs, checks that all came to the same result, and writes tables and plots
to docs/benchmarks. Needs root, 16 GiB of memory, and an otherwise idle machine.

  --quick       a tenth of the work, one round: to see that all of it runs
  --root        only as root; --rootless: only in a user namespace; otherwise both
  --rounds N    how often each scenario is run, 3 unless given
  --only NAME   scenarios whose name starts so: tree, small, copyup, git, deep, ...
END
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
rounds=3 scale=1 modes=(root rootless) only=()
while [ $# -gt 0 ]; do
    case $1 in
        --quick) rounds=1 scale=10 ;;
        --root) modes=(root) ;;
        --rootless) modes=(rootless) ;;
        --rounds) rounds=${2:?} && shift ;;
        --only) only+=(--only "${2:?}") && shift ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
    shift
done
if [ "$(id -u)" != 0 ]; then
    printf 'bench: needs root, to mount a filesystem in memory\n' >&2
    exit 1
fi
# shellcheck source=scripts/lib/frame.sh
. scripts/lib/frame.sh
quick=()
[ $scale = 1 ] || quick=(--quick)
mode=()
[ ${#modes[@]} = 2 ] || mode=("--${modes[0]}")
alone scripts/bench.sh "${quick[@]}" "${mode[@]}" --rounds "$rounds" "${only[@]}"
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin

scripts/setup.sh
cache=${XDG_CACHE_HOME:-$HOME/.cache}/lamina-bench
missing=()
for package in fuse-overlayfs git gcc make sqlite3 python3 e2fsprogs xfsprogs tar; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed' || missing+=("$package")
done
if [ ${#missing[@]} != 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"
fi
if [ ! -x "$cache/bin/fuse-overlayfs" ]; then
    cargo install --quiet --root "$cache" fuse-overlayfs || printf 'bench: without fuse-overlayfs 2.x\n' >&2
fi
cargo build --quiet --release --locked -p lamina-bench

dir=$(mktemp -d /var/tmp/lamina-bench.XXXXXX)
server=
# Whether transport=uring is allowed; it is while this runs.
rings=/sys/module/fuse/parameters/enable_uring allowed=
clean_up() {
    local status=$?
    trap - EXIT
    [ -z "$server" ] || kill "$server" || true
    [ -z "$allowed" ] || printf '%s' "$allowed" >"$rings"
    umount "$dir/fs" 2>/dev/null || true
    umount "$dir/xfs" 2>/dev/null || true
    umount "$dir/memory" 2>/dev/null || true
    rm -rf --one-file-system "$dir"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# A disk's noise would be larger than what is measured. With a journal: without one ext4 looks at each inode that was
# removed lately before it makes a file, which takes a millisecond a file after a large rm.
mkdir "$dir/memory" "$dir/fs" "$dir/xfs"
mount -t tmpfs -o size=14G lamina-bench "$dir/memory"
truncate -s 10G "$dir/memory/image"
mkfs.ext4 -q -J size=256 -E lazy_itable_init=0,lazy_journal_init=0 -N 2000000 "$dir/memory/image"
mount -o loop,noatime "$dir/memory/image" "$dir/fs"
truncate -s 4G "$dir/memory/shares"
mkfs.xfs -q "$dir/memory/shares"
mount -o loop,noatime "$dir/memory/shares" "$dir/xfs"
chmod 755 "$dir"
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing || true

if [ -w "$rings" ]; then
    allowed=$(<"$rings")
    printf Y >"$rings"
fi

# Our own with an option, and the limit of all servers, where that is to show something.
variants() {
    local word
    if [ -n "$allowed" ]; then
        printf '%s\n' --peer "lamina-uring=$1,transport=uring"
        for word in small read random write storm dirs rmlower; do printf '%s\n' --for "$word"; done
    fi
    printf '%s\n' --peer "lamina-volatile=$1,volatile" --for copyup --peer "lamina-metacopy=$1,metacopy=on" --for chmod
    [ "$2" = rootless ] || printf '%s\n' --peer "lamina-passthrough=$1,io=passthrough"
    [ "$2" = rootless ] || for word in read random mmap write; do printf '%s\n' --for "$word"; done
    printf '%s\n' --least
    for word in small copyup chmod random mmap write read git compile storm dirs rmlower bigdir deep400 sqlite; do
        printf '%s\n' --for "$word"
    done
    printf '%s\n' --over-kernel "$1"
    for word in small copyup chmod git storm dirs rmlower bigdir deep400 beside; do printf '%s\n' --for "$word"; done
}
# For whoever may not look into the home of root.
mkdir "$dir/bin"
scripts/install.sh "$dir/bin"
cp "${CARGO_TARGET_DIR:-$PWD/target}/release/lamina-bench" "$dir/bin/"
[ ! -x "$cache/bin/fuse-overlayfs" ] || cp "$cache/bin/fuse-overlayfs" "$dir/bin/fuse-overlayfs-2"
peers=(--peer "lamina=$dir/bin/lamina" --peer "fuse-overlayfs-1=$(command -v fuse-overlayfs)")
[ ! -x "$dir/bin/fuse-overlayfs-2" ] || peers+=(--peer "fuse-overlayfs-2=$dir/bin/fuse-overlayfs-2")

for mode in "${modes[@]}"; do
    printf '== %s\n' "$mode"
    mkdir "$dir/fs/$mode" "$dir/xfs/$mode"
    arguments=(--at "$dir/fs/$mode" --reflinks "$dir/xfs/$mode" --mode "$mode" --rounds "$rounds" --scale "$scale" "${only[@]}")
    readarray -t more < <(variants "$dir/bin/lamina" "$mode")
    if [ "$mode" = root ]; then
        "$dir/bin/lamina-bench" "${arguments[@]}" --out "$dir/out" "${peers[@]}" "${more[@]}"
    else
        "$dir/bin/lamina-bench" --serve "$dir/control" &
        server=$!
        until [ -S "$dir/control" ]; do sleep 0.1; done
        mkdir -p "$dir/out-user"
        chown 65534:65534 "$dir/fs/$mode" "$dir/xfs/$mode" "$dir/out-user"
        HOME=$dir/out-user setpriv --reuid 65534 --regid 65534 --clear-groups -- \
            unshare --user --map-root-user --mount \
            "$dir/bin/lamina-bench" "${arguments[@]}" --out "$dir/out-user" --control "$dir/control" "${peers[@]}" "${more[@]}"
    fi
done
mkdir -p docs/benchmarks
if [ $scale = 1 ]; then
    cp "$dir"/out*/*.md "$dir"/out*/*.svg docs/benchmarks/
    printf 'bench: tables and plots are in docs/benchmarks\n'
fi
