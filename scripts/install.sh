#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/install.sh [DIR]

Installs what building needs and is missing, builds lamina and puts it into DIR; without DIR into
/usr/local/bin for root, ~/.local/bin for others. It is one file that needs no shared library: it
runs on any Linux of the same architecture, in any container.
END
}

case "${1-}" in
    -*)
        usage
        [ "$1" = -h ] || [ "$1" = --help ] || exit 2
        exit 0
        ;;
esac
dir=${1-}
if [ -z "$dir" ] && [ "$(id -u)" = 0 ]; then
    dir=/usr/local/bin
elif [ -z "$dir" ]; then
    dir=$HOME/.local/bin
fi
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin
scripts/setup.sh
# Where a target is named its flags are not those of build scripts and macros, which cannot be static.
host=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
unset CARGO_ENCODED_RUSTFLAGS
if ! RUSTFLAGS="${RUSTFLAGS-} -C target-feature=+crt-static" \
    cargo build --quiet --profile dist --locked --bin lamina --target "$host"; then
    printf 'install: not built; it needs the static C library (Debian: libc6-dev, Fedora: glibc-static), which\n' >&2
    printf 'install: "cargo install --path ." does without\n' >&2
    exit 1
fi
install -m 755 "$CARGO_TARGET_DIR/$host/dist/lamina" "$dir/lamina"
printf 'install: %s\n' "$dir/lamina"
