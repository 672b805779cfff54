#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/setup.sh [--tests | --no-build]

Installs what building and running lamina needs and is missing: Debian and Ubuntu packages, a
Rust toolchain, /dev/fuse that users may open, user namespaces. Changes nothing that is there.
Uses sudo where root is needed. The other scripts call it.

  --tests     also installs what only the tests need
  --no-build  only what running needs: no compiler, no Rust

Environment:
  LAMINA_SETUP_SYSCTL=no  where a sysctl forbids user namespaces, says so and fails
                          instead of setting it until the next boot
END
}

packages=(fuse3 uidmap util-linux attr)
is_build=yes
case "${1-}" in
    "") ;;
    --tests)
        packages+=(acl bindfs btrfs-progs dosfstools e2fsprogs erofs-utils fuse-overlayfs openssh-sftp-server
            python3 quota shellcheck socat sqlite3 squashfs-tools sshfs strace xfsprogs)
        ;;
    --no-build) is_build=no ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac

[ $is_build = no ] || packages+=(gcc libc6-dev ca-certificates)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin

say() {
    printf 'setup: %s\n' "$*"
}

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# Runs a command as root; its last resort is a sentence that says what to run.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root, and there is no sudo: $*"
    fi
}

is_updated=no
install_packages() {
    command -v apt-get >/dev/null ||
        die "missing: $*; install them by hand, this system has no apt-get"
    if [ $is_updated = no ]; then
        say "reading package lists"
        as_root apt-get -qq update || die "apt-get update failed"
        is_updated=yes
    fi
    say "installing $*"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
        -o Dpkg::Use-Pty=0 install --no-install-recommends "$@" >/dev/null ||
        die "apt-get could not install: $*"
}

is_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

set_up_packages() {
    local package missing=()
    for package in "${packages[@]}"; do
        is_installed "$package" || missing+=("$package")
    done
    if [ ${#missing[@]} = 0 ]; then
        say "packages: all there"
    else
        install_packages "${missing[@]}"
    fi
}

# Prints the version of the cargo on PATH, if it runs.
cargo_version() {
    cargo --version 2>/dev/null | cut -d ' ' -f 2
}

is_rust_new_enough() {
    local version
    version=$(cargo_version) && [ -n "$version" ] &&
        printf '%s\n' "$rust_wanted" "$version" | sort -V -C
}

set_up_rust() {
    rust_wanted=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$root/Cargo.toml")
    if ! is_rust_new_enough; then
        if ! command -v rustup >/dev/null; then
            if [ -n "$(apt-cache madison rustup 2>/dev/null)" ]; then
                install_packages rustup
            else
                is_installed curl || install_packages curl
                say "installing Rust in ${CARGO_HOME:-$HOME/.cargo} with the installer of rust-lang.org"
                curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
                    RUSTUP_INIT_SKIP_PATH_CHECK=yes sh -s -- -q -y --profile minimal --no-modify-path ||
                    die "the Rust installer failed"
            fi
        fi
        if ! is_rust_new_enough; then
            say "installing the stable Rust toolchain (at least $rust_wanted is needed)"
            rustup --quiet toolchain install stable --profile minimal ||
                die "rustup could not install Rust"
            rustup --quiet default stable
        fi
        hash -r
        is_rust_new_enough ||
            die "Rust $rust_wanted or newer is needed; $(command -v cargo) is $(cargo_version)"
    fi
    if ! cargo fmt --version >/dev/null 2>&1 || ! cargo clippy --version >/dev/null 2>&1; then
        if command -v rustup >/dev/null; then
            say "adding rustfmt and clippy"
            rustup --quiet component add rustfmt clippy || die "rustup could not add them"
        else
            install_packages rustfmt rust-clippy
        fi
    fi
    say "rust: $(cargo_version)"
}

# Distributions ship /dev/fuse open to everybody; containers and small images often do not.
set_up_dev_fuse() {
    if [ ! -e /dev/fuse ]; then
        as_root modprobe fuse 2>/dev/null || true
    fi
    if [ ! -e /dev/fuse ]; then
        say "making /dev/fuse"
        as_root mknod -m 0666 /dev/fuse c 10 229 ||
            die "/dev/fuse cannot be made; in a container, start it with --device /dev/fuse"
    fi
    if [ "$(stat -c %a /dev/fuse)" != 666 ]; then
        say "giving /dev/fuse mode 0666, as distributions do"
        as_root chmod 0666 /dev/fuse || die "/dev/fuse cannot be opened to users"
    fi
    (: <>/dev/fuse) 2>/dev/null ||
        die "/dev/fuse cannot be opened: is there a fuse module (modprobe fuse), and does a container allow the device (--device /dev/fuse)?"
    say "/dev/fuse: open to users"
}

# Tries what the main job does: a mount in a user namespace made by an ordinary user.
can_make_user_namespace() {
    local command=(unshare -Urm mount -t tmpfs tmpfs /tmp)
    if [ "$(id -u)" = 0 ]; then
        setpriv --reuid 65534 --regid 65534 --clear-groups -- "${command[@]}" 2>/dev/null
    else
        "${command[@]}" 2>/dev/null
    fi
}

set_up_user_namespaces() {
    local setting file value cure=()
    if ! can_make_user_namespace; then
        for setting in kernel.unprivileged_userns_clone=1 \
            kernel.apparmor_restrict_unprivileged_userns=0 user.max_user_namespaces=15000; do
            file=$(sysctl_file "$setting")
            value=$(cat "$file" 2>/dev/null) || continue
            case $setting in
                user.*) [ "$value" -gt 0 ] || cure+=("$setting") ;;
                *) [ "$value" = "${setting#*=}" ] || cure+=("$setting") ;;
            esac
        done
        if [ ${#cure[@]} = 0 ]; then
            die "users cannot make user namespaces here, and no sysctl says why; in a container, start it with --security-opt seccomp=unconfined --security-opt apparmor=unconfined, or with --privileged"
        fi
        if [ "${LAMINA_SETUP_SYSCTL-}" = no ]; then
            die "users cannot make user namespaces here; the cure: sudo sysctl -w ${cure[*]}"
        fi
        say "allowing users to make user namespaces until the next boot: sysctl -w ${cure[*]}"
        for setting in "${cure[@]}"; do
            echo "${setting#*=}" | as_root tee "$(sysctl_file "$setting")" >/dev/null ||
                die "cannot be set here; outside of any container, run: sudo sysctl -w $setting"
        done
        can_make_user_namespace || die "users still cannot make user namespaces"
    fi
    say "user namespaces: open to users"
}

# Prints where a setting like `kernel.a=1` lies.
sysctl_file() {
    local name=${1%=*}
    printf '/proc/sys/%s' "${name//.//}"
}

set_up_packages
[ $is_build = no ] || set_up_rust
set_up_dev_fuse
set_up_user_namespaces
