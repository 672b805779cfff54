#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/suites.sh [SUITE...]

Runs test suites of others on mounts of lamina, as root; all of them unless some are named.

  fsx    random reads, writes, truncations and mappings of one file, each read checked; for each I/O
         mode, the file beginning in the upper and in a lower layer (cargo install fsx)
  podman podman, buildah and skopeo with lamina as their mount program, as root and as a user made for
         the time: run, diff, cp, commit, export, build, volumes, id maps, force_mask; images are made
         of busybox-static, nothing is fetched

Environment: LAMINA_BIN, the binary to test instead of building one; FSX_OPERATIONS, how many each
(100000); FSX_MODES (noopen, open, passthrough, and the first two with writeback) and FSX_STARTS (upper lower whole), which of them; FSX_OPTIONS, more
mount options; FSX_SEED.
END
}

all=(fsx podman)
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
    awk -v below="$dir/" 'index($5, below) == 1 { print $5 }' /proc/self/mountinfo | tac |
        while read -r mount; do umount -l "$mount" || status=1; done
    # By force: processes of others with ids of the range count as this user's.
    [ -z "${user-}" ] || userdel -f "$user" || status=1
    rm -rf "$dir" || status=1
    exit "$status"
}
trap 'exit 130' INT
trap 'exit 143' TERM
if [ -n "${LAMINA_PODMAN_USER-}" ]; then
    # Part of the suite podman, which cleans up.
    dir=$LAMINA_PODMAN_USER
else
    dir=$(mktemp -d /var/tmp/lamina-suites.XXXXXX)
    trap clean_up EXIT
fi

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

# expect WHAT EXPECTED COMMAND...: what a command prints, in one line.
expect() {
    local what=$1 expected=$2 printed
    shift 2
    printed=$("$@" 2>&1 | sort_if "$what" | tr '\n' ' ') || true
    [ "$printed" = "$expected " ] || die "podman: $what: printed \"$printed\", expected \"$expected\""
}

sort_if() {
    case $1 in diff*) sort ;; *) cat ;; esac
}

# podman_store NAME [LINE]: a store of its own for the commands that follow, with one more option.
podman_store() {
    local root=$dir/podman/$1
    mkdir -p "$root"/{root,run,tmp,home,xdg}
    chmod 700 "$root/xdg"
    cat >"$root/containers.conf" <<END
[containers]
cgroups = "disabled"
netns = "host"
log_driver = "k8s-file"
default_ulimits = []
pids_limit = 0
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
END
    cat >"$root/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "$root/root"
rootless_storage_path = "$root/root"
runroot = "$root/run"
[storage.options.overlay]
mount_program = "$dir/podman/lamina"
${2-}
END
    export CONTAINERS_CONF=$root/containers.conf CONTAINERS_STORAGE_CONF=$root/storage.conf
    export TMPDIR=$root/tmp HOME=$root/home XDG_RUNTIME_DIR=$root/xdg
    store=$root/root
}

# What root and a user do alike.
podman_common() {
    local top=$dir/podman
    podman_store "$1"
    podman import -q "$top/image.tar" base >/dev/null
    podman info >"$HOME/info"
    grep -q 'Version: lamina [0-9]' "$HOME/info" || die "podman: info does not show our version"
    expect run '0:0 755 5:6 4711 again' podman run --rm base sh -c 'stat -c "%u:%g %a" /bin/busybox; touch /x
        chown 5:6 /x; chmod 4711 /x; stat -c "%u:%g %a" /x; rm -r /d; mkdir /d; echo again >/d/g; cat /d/*'
    podman run --name one base sh -c 'rm /d/f; echo new >/new; mkdir /e; chown 3:4 /e'
    expect diff 'A /e A /new C /d C /etc D /d/f' podman diff one
    echo payload >"$HOME/in"
    podman cp "$HOME/in" one:/e/in
    podman cp one:/new "$HOME/out"
    [ "$(cat "$HOME/out")" = new ] || die "podman: cp gave something else"
    podman export one | tar -t >"$HOME/list"
    grep -q '^e/in$' "$HOME/list" || die "podman: export misses what was copied"
    podman commit -q one two >/dev/null
    expect 'run of what was committed' 'payload new 3:4' podman run --rm two sh -c 'cat /e/in /new; ls /d; stat -c %u:%g /e'
    podman rm one >/dev/null
    mkdir "$HOME/volume"
    echo v >"$HOME/volume/v"
    expect 'volume' 'v v w' podman run --rm -v "$HOME/volume:/x:O" base sh -c 'cat /x/v; echo >/x/w; ls /x'
    [ "$(ls "$HOME/volume")" = v ] || die "podman: an overlay volume was written through"
    printf 'FROM localhost/base\nRUN echo built >/built; rm -r /d\nRUN mkdir /d; echo again >/d/g\n' >"$HOME/Containerfile"
    podman build -q --network=host --isolation=chroot -t built -f "$HOME/Containerfile" "$HOME" >/dev/null
    expect 'run of what was built' 'built g' podman run --rm built sh -c 'cat /built; ls /d'
    if [ "$1" = root ] && command -v buildah >/dev/null; then
        buildah from -q --name work localhost/two >/dev/null
        expect buildah '3:4' buildah run --isolation=chroot work stat -c %u:%g /e
        buildah commit -q work three >/dev/null
        buildah rm work >/dev/null
    fi
    if [ "$1" = root ] && command -v skopeo >/dev/null; then
        skopeo copy -q containers-storage:localhost/two "dir:$HOME/copied"
        [ -s "$HOME/copied/manifest.json" ] || die "podman: skopeo copied nothing"
    fi
}

# A store whose files all have one mode: owners and modes are in xattrs.
podman_force_mask() {
    podman_store "$1-mask" 'force_mask = "shared"'
    podman import -q "$dir/podman/image.tar" masked >/dev/null
    expect 'setuid with force_mask' '5:6 4711' podman run --name one masked \
        sh -c 'touch /x; chown 5:6 /x; chmod 4711 /x; stat -c "%u:%g %a" /x; rm /d/f; chown 7 /d'
    # Podman 4.3 itself loses setuid here when it unpacks.
    podman commit -q one masked2 >/dev/null
    podman rm one >/dev/null
    # The layers are read the same by a client that knows nothing of it.
    for conf in "$CONTAINERS_STORAGE_CONF" "$HOME/plain.conf"; do
        grep -v force_mask "$CONTAINERS_STORAGE_CONF" >"$HOME/plain.conf"
        CONTAINERS_STORAGE_CONF=$conf expect 'run with force_mask' '0:0 755 5:6 711 7:0 755' \
            podman run --rm masked2 stat -c '%u:%g %a' /bin/busybox /x /d
    done
    [ "$(stat -c %a "$store"/overlay/*/diff/x)" = 755 ] || die "podman: force_mask left another mode on the disk"
}

podman_root() {
    podman_common root
    podman_force_mask root
    say "podman: as root: skipped: --uidmap: podman 4.3 gives shifted layers and a map to shift them once more"
}

podman_user() {
    podman_common user
    # shellcheck disable=SC2016
    expect keep-id "$(id -u):$(id -g) 0:0 555 $(id -u):$(id -g)" podman run --rm --userns=keep-id base \
        sh -c 'echo $(id -u):$(id -g); stat -c "%u:%g %a" /; echo >/tmp/x; stat -c %u:%g /tmp/x'
    for map in '--uidmap=0:1:2000 --gidmap=0:1:2000' '--userns=auto:size=2000'; do
        # shellcheck disable=SC2086
        expect "run $map" '0:0 555 5:6' podman run --rm $map base \
            sh -c 'stat -c "%u:%g %a" /; echo >/x; chown 5:6 /x; stat -c %u:%g /x'
    done
    # shellcheck disable=SC2086
    podman run --name mapped --uidmap=0:1:2000 base sh -c 'rm /d/f; echo >/x; chown 5:6 /x'
    expect 'diff of a mapped one' 'A /x C /d C /etc D /d/f' podman diff mapped
    podman commit -q mapped four >/dev/null
    expect 'run of what was mapped' '5:6' podman run --rm four stat -c %u:%g /x
    podman_force_mask user
}

suite_podman() {
    local applet missing='' top=$dir/podman
    for applet in podman crun busybox useradd; do
        command -v $applet >/dev/null || missing="$missing $applet"
    done
    if [ -n "$missing" ]; then
        say "podman: skipped: missing are$missing (packages podman, crun, busybox-static, passwd)"
        return
    fi
    chmod 755 "$dir"
    mkdir -p "$top/image"/{bin,etc,d}
    mkdir -m 1777 "$top/image/tmp"
    cp "$LAMINA_BIN" "$top/lamina"
    cp "$(command -v busybox)" "$top/image/bin/busybox"
    for applet in sh ls cat echo mkdir rm touch stat chown chmod id; do
        ln -s busybox "$top/image/bin/$applet"
    done
    echo 'root:x:0:0::/:/bin/sh' >"$top/image/etc/passwd"
    echo x >"$top/image/d/f"
    chmod 555 "$top/image"
    tar --owner=0 --group=0 -C "$top/image" -cf "$top/image.tar" .
    mount --make-rshared /
    # crun wants one hierarchy or the other.
    ! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
    (podman_root)
    if [ ! -w /dev/fuse ] || [ "$(stat -c %a /dev/fuse)" != 666 ]; then
        say "podman: as a user: skipped: /dev/fuse is not for everybody (chmod 666 /dev/fuse)"
        return
    fi
    user=lamina-podman-$$
    # Not a system user: those get no subordinate ids.
    useradd --no-create-home --home-dir "$top" --shell /usr/sbin/nologin "$user"
    chown "$user:$user" "$top"
    setpriv --reuid "$user" --regid "$user" --init-groups -- env LAMINA_SUITES_ALONE=1 LAMINA_BIN="$top/lamina" \
        LAMINA_PODMAN_USER="$dir" bash "$0" podman
}

if [ -n "${LAMINA_PODMAN_USER-}" ]; then
    # Ends the process that keeps the user's namespaces.
    trap 'podman system migrate >/dev/null 2>&1 || true' EXIT
    podman_user
    exit 0
fi
[ $# -gt 0 ] || set -- "${all[@]}"
for suite in "$@"; do
    [ "$(type -t "suite_$suite")" = function ] || die "there is no suite $suite"
    "suite_$suite"
done
say "passed: $*"
