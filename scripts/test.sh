#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/test.sh

Installs what is missing and runs every test: scripts/check.sh, scripts/test-mounts.sh, scripts/demo.sh,
and a share of the suites on what scripts/install.sh installs, which a machine is too slow for that takes
24 minutes for the rest. Stops at the first failure, with a status that is not 0.
END
}

case "${1-}" in
    "") ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
summary=()

# Runs one script; the last line of the whole run says how far it came.
run() {
    local started=$SECONDS status=0
    printf '== %s\n' "$*"
    "$scripts/$1" "${@:2}" || status=$?
    if [ $status != 0 ]; then
        printf '== FAILED: %s ended with status %s' "$1" "$status" >&2
        printf '; passed before: %s' "${summary[*]:-nothing}" >&2
        printf '\n' >&2
        exit "$status"
    fi
    summary+=("${1%.sh} ($((SECONDS - started)) s)")
}

run setup.sh --tests
run check.sh
run test-mounts.sh
run demo.sh
# The whole of it is to take less than half an hour, and building that file takes five minutes where this is so slow.
if ((SECONDS > 1440)); then
    printf '== all passed: %s; skipped on a slow machine: install.sh\n' "${summary[*]}"
    exit 0
fi
installed=$(mktemp -d /var/tmp/lamina-installed.XXXXXX)
trap 'rm -rf "$installed"' EXIT
chmod 755 "$installed"
run install.sh "$installed"
headers=$(readelf -lW "$installed/lamina")
if [[ $headers == *INTERP* ]]; then
    printf '== FAILED: what install.sh installs needs shared libraries\n' >&2
    exit 1
fi
export LAMINA_BIN=$installed/lamina
run test-mounts.sh --test posix_basic --test merge --test mounting --test daemon --test users --test store_mount --test archive_apply
printf '== all passed: %s\n' "${summary[*]}"
