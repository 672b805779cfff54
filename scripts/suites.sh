#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/suites.sh [SUITE...]

Runs test suites of others on mounts of lamina, as root; all of them unless some are named.

  fsx    random reads, writes, truncations and mappings of one file, each read checked; for each I/O
         mode, the file beginning in the upper and in a lower layer (cargo install fsx)

Environment: LAMINA_BIN, the binary to test instead of building one; FSX_OPERATIONS, how many each
(100000); FSX_MODES (noopen, open, passthrough, and the first two with writeback) and FSX_STARTS (upper lower whole), which of them; FSX_OPTIONS, more
mount options; FSX_SEED.
END
}

all=(fsx)
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
    local before after left seed block=false
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
    # In slices: fsx keeps its mappings, of which a process may have about 65,000.
    left=${FSX_OPERATIONS:-100000} seed=${FSX_SEED:-1}
    while [ "$left" -gt 0 ]; do
        (cd "$dir" && fsx -q -S "$seed" -N $((left < 50000 ? left : 50000)) -f fsx.toml -P "$dir" \
            merged/file)
        left=$((left - 50000)) seed=$((seed + 1))
    done
    after=$(cd "$dir/lower" && sha256sum -- *)
    [ "$before" = "$after" ] || die "fsx: a lower layer CHANGED"
    unmount
}

suite_fsx() {
    local io start
    command -v fsx >/dev/null || die "fsx is missing: cargo install fsx"
    for io in ${FSX_MODES:-noopen open passthrough noopen,writeback open,writeback}; do
        for start in ${FSX_STARTS:-upper lower whole}; do
            fsx_once "io=$io" "$start"
        done
    done
}

[ $# -gt 0 ] || set -- "${all[@]}"
for suite in "$@"; do
    [ "$(type -t "suite_$suite")" = function ] || die "there is no suite $suite"
    "suite_$suite"
done
say "passed: $*"
