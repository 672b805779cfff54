#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/check.sh

Checks that need no mount: formatting, lints, documentation, unit tests, scripts, dependencies.
Warnings are errors. Says what it skipped because a tool is missing.
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

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH

step() {
    printf 'check: %s\n' "$*"
    "$@"
}

step cargo fmt --all --check
step cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
RUSTDOCFLAGS="-D warnings" step cargo doc --workspace --no-deps --locked --quiet
step cargo test -p laminafs --locked --quiet
step cargo test -p lamina-bench --bins --locked --quiet
if command -v shellcheck >/dev/null; then
    step shellcheck -x scripts/*.sh scripts/lib/*.sh .ci/run
else
    printf 'check: skipped: shellcheck is not installed\n'
fi
if cargo deny --version >/dev/null 2>&1; then
    step cargo deny --locked check
else
    printf 'check: skipped: cargo-deny is not installed\n'
fi
