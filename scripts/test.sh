#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/test.sh

Installs what is missing and runs every test: scripts/check.sh, and on what scripts/install.sh installs
scripts/test-mounts.sh and scripts/demo.sh. Stops at the first failure, with a status that is not 0.
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
installed=$(mktemp -d /var/tmp/lamina-installed.XXXXXX)
trap 'rm -rf "$installed"' EXIT
chmod 755 "$installed"
run install.sh "$installed"
headers=$(readelf -lW "$installed/lamina")
if [[ $headers == *INTERP* ]]; then
    printf '== FAILED: what install.sh installs needs shared libraries\n' >&2
    exit 1
fi
# What users get is what is tested.
export LAMINA_BIN=$installed/lamina
run test-mounts.sh
run demo.sh
printf '== all passed: %s\n' "${summary[*]}"
