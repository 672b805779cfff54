#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/test-mounts.sh [ARGUMENTS OF cargo test]

Builds lamina and runs all suites of fuse-tests, which mount for real: as whoever starts it and,
started by root, again as an ordinary user, whom it makes for the time of the run; a share of them
also over the other transport. The least server of the benchmark is tested too. Suites enter user
namespaces by themselves. Lists what was skipped, and fails if a mount is left behind.

  scripts/test-mounts.sh                   everything
  scripts/test-mounts.sh --test merge      one suite

Environment: LAMINA_BIN, the binary to test instead of building one; and those of fuse-tests.
END
}

case "${1-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/frame.sh
. scripts/lib/frame.sh
alone scripts/test-mounts.sh "$@"
use_binary

user=
at_end() {
    [ -z "$user" ] || userdel "$user"
}
scratch suites

count_mounts() {
    grep -c -E ' - (fuse|fuse\.[^ ]+|overlay) ' /proc/self/mountinfo || true
}

mounts_before=$(count_mounts)
export FUSE_TESTS_SKIP_LOG=${FUSE_TESTS_SKIP_LOG:-$dir/skips}
# Tests that skip in a user namespace write there as somebody else.
touch "$FUSE_TESTS_SKIP_LOG"
chmod 666 "$FUSE_TESTS_SKIP_LOG"

printf 'suites: as user %s\n' "$(id -un)"
cargo test -p fuse-tests --locked "$@"

# The limit of all servers, a part of the benchmark.
if [ $# = 0 ]; then
    cargo test -p lamina-bench --locked --quiet --test least
fi

# A share of them over the other transports; io_uring where the kernel offers it.
if [ $# = 0 ]; then
    transports=(fuser)
    if [ "$(cat /sys/module/fuse/parameters/enable_uring 2>/dev/null)" = Y ]; then
        transports+=(uring)
    else
        printf 'suites: skipped over transport=uring: enable_uring of the fuse module is not Y\n'
    fi
    for transport in "${transports[@]}"; do
        printf 'suites: over transport=%s\n' "$transport"
        FUSE_TESTS_OPTIONS=transport=$transport cargo test -p fuse-tests --locked --quiet \
            --test posix_basic --test merge --test regressions --test users --test transport
    done
fi

# The same binaries as somebody without privilege, who has a range of ids to map.
if [ "$(id -u)" = 0 ] && [ $# = 0 ]; then
    if ! command -v useradd >/dev/null; then
        printf 'suites: skipped as an ordinary user: there is no useradd\n'
    else
        name=lamina-test-$$
        # Not a system user: those get no subordinate ids.
        useradd --no-create-home --home-dir "$dir" --shell /usr/sbin/nologin "$name"
        user=$name
        mkdir "$dir/data" "$dir/bin"
        chown "$user" "$dir/data"
        touch "$dir/skips-user"
        chown "$user" "$dir/skips-user"
        cp "$LAMINA_BIN" "$dir/bin/lamina"
        cargo test -p fuse-tests --locked --no-run --message-format json 2>/dev/null |
            sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' >"$dir/list"
        while read -r binary; do
            # It reads the sources, which may lie where this user cannot look.
            case ${binary##*/} in tidy-*) continue ;; esac
            cp "$binary" "$dir/bin/"
            printf 'suites: as an ordinary user: %s\n' "${binary##*/}"
            (cd "$dir/data" && setpriv --reuid "$user" --regid "$user" --init-groups -- \
                env HOME="$dir/data" LAMINA_BIN="$dir/bin/lamina" \
                FUSE_TESTS_DIR="$dir/data" FUSE_TESTS_SKIP_LOG="$dir/skips-user" \
                "$dir/bin/${binary##*/}" --quiet)
        done <"$dir/list"
        cat "$dir/skips-user" >>"$FUSE_TESTS_SKIP_LOG"
    fi
fi

if [ -s "$FUSE_TESTS_SKIP_LOG" ]; then
    printf 'suites: skipped tests, by reason:\n'
    sed -E 's/^SKIP [0-9]+: ([^:]+: )?(SKIP [0-9]+: )?//' "$FUSE_TESTS_SKIP_LOG" | sort | uniq -c
fi
mounts_after=$(count_mounts)
if [ "$mounts_after" != "$mounts_before" ]; then
    printf 'suites: %s mounts before, %s after\n' "$mounts_before" "$mounts_after" >&2
    exit 1
fi
