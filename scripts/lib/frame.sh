# shellcheck shell=bash
# What the scripts that mount share. To be sourced by bash with `set -euo pipefail`, in the repository.

# alone SCRIPT ARGUMENT...: goes on, as root, in a mount namespace of its own, which the script is started again in. A
# namespace that anybody else makes would have copies of our mounts, and keep their servers alive.
alone() {
    [ "$(id -u)" = 0 ] || return 0
    case ${LAMINA_ALONE-} in
        '') LAMINA_ALONE=new exec unshare --mount --propagation private bash "$@" ;;
        new) ;;
        *) return 0 ;;
    esac
    export LAMINA_ALONE=yes
    # And ours has copies of theirs.
    local at
    for at in $(awk '$5 ~ "/(fuse-tests|lamina)-[^/]*(/|$)" { print $5 }' /proc/self/mountinfo | tac); do
        umount -l "$at" || true
    done
}

# use_binary: has LAMINA_BIN be the release build, unless it says otherwise.
use_binary() {
    PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin
    if [ -z "${LAMINA_BIN-}" ]; then
        cargo build --release --locked --bin lamina
        LAMINA_BIN=${CARGO_TARGET_DIR:-$PWD/target}/release/lamina
    fi
    export LAMINA_BIN
}

# scratch NAME: makes a directory for others to enter too, $dir, which goes with all that is mounted in it at the end of the
# script, after the function at_end if there is one.
scratch() {
    trap 'exit 130' INT
    trap 'exit 143' TERM
    dir=$(mktemp -d "/var/tmp/lamina-$1.XXXXXX")
    trap clean_up EXIT
    chmod 755 "$dir"
}

clean_up() {
    local status=$? at
    trap - EXIT
    cd /
    if declare -F at_end >/dev/null; then
        at_end || status=1
    fi
    # Mounts may be stacked.
    for at in $(awk -v below="$dir/" 'index($5, below) == 1 { print $5 }' /proc/self/mountinfo | tac); do
        umount -l "$at" || status=1
    done
    chmod -R u+rwx "$dir"
    rm -rf "$dir" || status=1
    exit "$status"
}
