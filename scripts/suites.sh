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
  pjdfstest  POSIX semantics, case by case beside kernel overlayfs on the same filesystem, as root and as
         root of a user namespace: what passes there passes here (cargo install pjdfstest)
  git    clone, changes, rebase, gc and fsck of this repository, in a lower layer and in the upper,
         compared byte by byte with the same on a plain directory, and read by kernel overlayfs after
  dpkg   packages installed, replaced, verified and purged in a loop, each file compared
  rpm    the same with rpm, its database in a lower layer, rebuilt each time (package rpm)
  stress the filesystem class of stress-ng, each stressor alone; what fails must fail on kernel
         overlayfs too (package stress-ng)

A suite whose program is missing says so and is skipped; fsx and pjdfstest are installed below target/.

Environment: LAMINA_BIN, the binary to test instead of building one; FSX_OPERATIONS, how many each
(100000); FSX_MODES (noopen, open, passthrough, and the first two with writeback) and FSX_STARTS
(upper lower whole), which of them; FSX_OPTIONS, more mount options; FSX_SEED; SUITE_OPTIONS, more mount
options for the suites after podman; LOOPS, rounds of dpkg and rpm (3); STRESS_SECONDS, for each stressor
(2), STRESSORS, which of them.
END
}

all=(fsx podman pjdfstest git dpkg rpm stress)
case "${1-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=scripts/lib/frame.sh
. scripts/lib/frame.sh
alone scripts/suites.sh "$@"
tools=${CARGO_TARGET_DIR:-$PWD/target}/suites
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$tools/bin:$PATH:/usr/sbin:/sbin
use_binary

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

# missing SUITE HINT PROGRAM...: whether one of the programs is missing, which is said.
missing() {
    local suite=$1 hint=${2:+ ($2)} program lack=''
    shift 2
    for program in "$@"; do
        command -v "$program" >/dev/null || lack="$lack $program"
    done
    [ -n "$lack" ] && say "$suite: skipped: missing are$lack$hint"
}

# crate NAME: has a program from a registry of crates.
crate() {
    command -v "$1" >/dev/null || cargo install --quiet --locked --root "$tools" "$1" || die "$1: cannot install it"
}

# mount_new OPTIONS: mounts a new upper over $dir/lower, which may hold files already, at $dir/merged.
mount_new() {
    mkdir -p "$dir/lower" "$dir/upper" "$dir/work" "$dir/merged"
    "$LAMINA_BIN" -o "lowerdir=$dir/lower,upperdir=$dir/upper,workdir=$dir/work$1" "$dir/merged"
}

# mount_kernel: mounts what mount_new made, and lamina has left, with kernel overlayfs.
mount_kernel() {
    mkdir -p "$dir/lower" "$dir/upper" "$dir/work" "$dir/merged"
    mount -t overlay -o "lowerdir=$dir/lower,upperdir=$dir/upper,workdir=$dir/work,redirect_dir=on" overlay "$dir/merged"
}

unmount_kernel() {
    umount "$dir/merged"
    rm -rf "${dir:?}"/{lower,upper,work,merged}
}

# tree DIR: types, modes, link targets and contents of all below it, but for .git.
tree() {
    (
        cd "$1"
        find . -name .git -prune -o -printf '%P %y %#m %l\n' | LC_ALL=C sort
        find . -name .git -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0 -r sha256sum
    )
}

# same WHAT DIR DIR: ends everything unless both trees are the same.
same() {
    diff <(tree "$2") <(tree "$3") >&2 || die "$1: the trees differ"
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
    crate fsx
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
    # While it is mounted podman compares ids with and without the map.
    podman diff mapped >"$HOME/diff"
    [ "$(grep -c -x -e 'A /x' -e 'D /d/f' "$HOME/diff")" = 2 ] || die "podman: diff of a mapped one misses what changed"
    podman unmount mapped >/dev/null
    expect 'diff of a mapped one' 'A /x C /d C /etc D /d/f' podman diff mapped
    podman commit -q mapped four >/dev/null
    expect 'run of what was mapped' '5:6' podman run --rm four stat -c %u:%g /x
    podman_force_mask user
}

suite_podman() {
    local applet top=$dir/podman
    ! missing podman "packages podman, crun, busybox-static, passwd" podman crun busybox useradd || return 0
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
    setpriv --reuid "$user" --regid "$user" --init-groups -- env LAMINA_BIN="$top/lamina" \
        LAMINA_PODMAN_USER="$dir" bash "$0" podman
}

# pjd_run NAME: in /mnt; leaves lines "CASE ok", "CASE FAILED" and "CASE skipped" in ./NAME, the output in
# ./NAME.log.
pjd_run() {
    # Other cases leave files open for writing, and what is so cannot be remounted for the cases of EROFS.
    NO_COLOR=1 ./pjdfstest -c pjdfstest.toml -p /mnt >"$1.log" 2>&1 || true
    sed 's/^allow_remount.*/allow_remount = true/' pjdfstest.toml >remount.toml
    PATH=$PWD/bin:$PATH NO_COLOR=1 ./pjdfstest -c remount.toml -p /mnt ::erofs >"$1.erofs" 2>&1 || true
    if [ "$(cat "$1.log" "$1.erofs" | grep -c '^Summary')" != 2 ]; then
        tail -n 5 "$1.log" "$1.erofs" >&2
        die "pjdfstest: it did not end on $1"
    fi
    cat "$1.erofs" >>"$1.log"
    sed -nE '/^[^ ]*::erofs.* skipped$/d; s/^([^ \t]+) +(ok|FAILED|skipped)$/\1 \2/p' "$1.log" | LC_ALL=C sort >"$1"
}

# pjd_pair WHO [KERNEL_OPTION]: runs all on kernel overlayfs, then on lamina, and compares. The working
# directory holds the programs. Both are mounted at /mnt: sockets want short paths.
pjd_pair() {
    local who=$1 side layers status=0
    trap 'umount -l /mnt "$PWD/second" 2>/dev/null || true' EXIT
    mkdir -p second
    mount -t tmpfs -o mode=755 tmpfs second
    for side in kernel lamina; do
        mkdir -p "$who/$side"/{lower,upper,work}
        layers=lowerdir=$PWD/$who/$side/lower,upperdir=$PWD/$who/$side/upper,workdir=$PWD/$who/$side/work
        if [ $side = kernel ]; then
            mount -t overlay -o "$layers${2:+,$2}" overlay /mnt
            pjd_run "$who/$side.cases"
            umount /mnt
        else
            ./lamina -o "$layers${SUITE_OPTIONS:+,$SUITE_OPTIONS}" /mnt
            pjd_run "$who/$side.cases"
            ./lamina unmount /mnt
        fi
        say "pjdfstest: $who, $side: $(cut -d ' ' -f 2 "$who/$side.cases" | sort | uniq -c | tr -s ' \n' ' ')"
    done
    umount second
    grep -q ' ok$' "$who/kernel.cases" || die "pjdfstest: nothing passes on kernel overlayfs"
    grep ' ok$' "$who/kernel.cases" >"$who/kernel.ok"
    grep ' ok$' "$who/lamina.cases" >"$who/lamina.ok" || true
    say "pjdfstest: $who: pass only here: $(LC_ALL=C comm -13 "$who/kernel.ok" "$who/lamina.ok" | wc -l)"
    LC_ALL=C comm -23 "$who/kernel.ok" "$who/lamina.ok" >"$who/worse"
    while read -r side _; do
        grep -A 1 "^$side " "$who/lamina.cases.log" >&2 || true
        status=1
    done <"$who/worse"
    [ $status = 0 ] || die "pjdfstest: $who: $(wc -l <"$who/worse") cases pass on kernel overlayfs and not here"
}

suite_pjdfstest() {
    local first=100000 top=$dir/pjdfstest holder namespace namespace_PID
    ! missing pjdfstest '' nsenter || return 0
    crate pjdfstest
    chmod 755 "$dir"
    mkdir -m 755 "$top" "$top/namespace"
    cp "$LAMINA_BIN" "$top/lamina"
    cp "$(command -v pjdfstest)" "$top/pjdfstest"
    # Cases remount; mount(8) would look for a helper of the type fuse.
    mkdir "$top/bin"
    printf '#!/bin/sh\nexec %s -i "$@"\n' "$(command -v mount)" >"$top/bin/mount"
    chmod 755 "$top/bin/mount"
    cat >"$top/pjdfstest.toml" <<END
[features]
secondary_fs = "$top/second"
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = false
[dummy_auth]
entries = [["nobody", "$(id -gn nobody)"], ["daemon", "$(id -gn daemon)"]]
END
    (cd "$top" && pjd_pair root)
    if ! unshare --user true 2>/dev/null || [ "$(stat -c %a /dev/fuse)" != 666 ]; then
        say "pjdfstest: in a user namespace: skipped: none may be made, or /dev/fuse is not for everybody"
        return
    fi
    # The namespace lasts as long as this cat, which ends when we do.
    coproc namespace { exec unshare --user cat; }
    # The variable goes when the process ends.
    holder=$namespace_PID
    echo >&"${namespace[1]}"
    read -r -t 60 _ <&"${namespace[0]}" || die "pjdfstest: there is no user namespace"
    echo "0 $first 65536" >"/proc/$holder/uid_map"
    echo "0 $first 65536" >"/proc/$holder/gid_map"
    chown -R "$first:$first" "$top"
    nsenter --user --target "$holder" --setuid 0 --setgid 0 unshare --mount --propagation private \
        bash -euo pipefail -c "$(declare -f say die pjd_run pjd_pair); cd \"\$0\"; pjd_pair namespace userxattr" "$top"
    kill "$holder"
    wait "$holder" 2>/dev/null || true
    rm -rf "$top"
}

# What git does in one clone.
git_changes() {
    cd "$1"
    export GIT_AUTHOR_DATE='@1 +0000' GIT_COMMITTER_DATE='@1 +0000' GIT_CONFIG_GLOBAL=/dev/null
    git config user.name tests
    git config user.email tests@localhost
    git config gc.auto 0
    git checkout -q -b topic
    git rm -q -r scripts
    git mv src moved
    printf 'more\n' >>README.md
    chmod +x Cargo.toml
    ln -s README.md link
    git add -A
    git commit -qm topic
    git checkout -q -b other HEAD~1
    mkdir new
    seq 1000 >new/numbers
    git add -A
    git commit -qm other
    git rebase -q topic
    printf 'stashed\n' >>new/numbers
    git stash -q
    git checkout -q topic
    git checkout -q other
    git stash pop -q
    git commit -qam last
    git reflog expire --expire=now --all
    git gc -q --aggressive --prune=now
    git fsck --full --strict --no-progress
    [ -z "$(git status --porcelain)" ]
}

suite_git() {
    local clone
    ! missing git '' git || return 0
    say "git: clone, changes, rebase, gc, fsck"
    mkdir "$dir/lower"
    git clone -q --no-local . "$dir/lower/below"
    git clone -q --no-local . "$dir/plain"
    mount_new ",redirect_dir=on${SUITE_OPTIONS:+,$SUITE_OPTIONS}"
    git clone -q --no-local . "$dir/merged/fresh"
    for clone in plain merged/below merged/fresh; do
        bash -euo pipefail -c "$(declare -f git_changes); git_changes \"\$0\"" "$dir/$clone" || die "git: failed in $clone"
    done
    for clone in below fresh; do
        same "git: $clone" "$dir/plain" "$dir/merged/$clone"
    done
    "$LAMINA_BIN" unmount "$dir/merged"
    mount_kernel
    for clone in below fresh; do
        same "git: $clone, read by the kernel" "$dir/plain" "$dir/merged/$clone"
        git -C "$dir/merged/$clone" fsck --full --strict --no-progress
        [ "$(git -C "$dir/merged/$clone" rev-parse HEAD)" = "$(git -C "$dir/plain" rev-parse HEAD)" ] ||
            die "git: the commits differ"
    done
    unmount_kernel
    rm -rf "$dir/plain"
}

# package_tree DIR VERSION: what a package holds: 300 files, some in both versions, and links.
package_tree() {
    local number at=$1/usr/share/tests
    mkdir -p "$at/deep"
    for number in $(seq $((50 * $2)) $((50 * $2 + 299))); do
        seq "$2" "$number" >"$at/f$number"
    done
    printf '#!/bin/sh\n' >"$at/deep/program$2"
    chmod 4755 "$at/deep/program$2"
    ln -s "f$((100 + $2))" "$at/link"
    ln "$at/f200" "$at/hard"
}

suite_dpkg() {
    local version round root=$dir/merged
    ! missing dpkg '' dpkg dpkg-deb || return 0
    say "dpkg: ${LOOPS:-3} rounds"
    for version in 1 2; do
        package_tree "$dir/p$version" $version
        cp -a "$dir/p$version" "$dir/build"
        mkdir "$dir/build/DEBIAN"
        printf '%s\n' 'Package: tests' "Version: $version" 'Architecture: all' 'Maintainer: tests' 'Description: tests' \
            >"$dir/build/DEBIAN/control"
        dpkg-deb --build --root-owner-group "$dir/build" "$dir/$version.deb" >/dev/null
        rm -r "$dir/build"
    done
    mkdir -p "$dir/lower/var/lib/dpkg"/{info,updates,triggers}
    : >"$dir/lower/var/lib/dpkg/status"
    # The first version is in the lower layer already.
    dpkg --root="$dir/lower" --log=/dev/null -i "$dir/1.deb" >/dev/null
    mount_new "${SUITE_OPTIONS:+,$SUITE_OPTIONS}"
    for round in $(seq "${LOOPS:-3}"); do
        for version in 2 1; do
            dpkg --root="$root" --log=/dev/null --force-downgrade -i "$dir/$version.deb" >/dev/null 2>&1 ||
                die "dpkg: round $round, version $version: cannot install"
            same "dpkg: round $round, version $version" "$dir/p$version/usr" "$root/usr"
            [ -z "$(dpkg --root="$root" --verify tests)" ] || die "dpkg: round $round, version $version: verify"
        done
    done
    "$LAMINA_BIN" unmount "$root"
    mount_kernel
    same "dpkg: read by the kernel" "$dir/p1/usr" "$root/usr"
    umount "$root"
    mount_new "${SUITE_OPTIONS:+,$SUITE_OPTIONS}"
    dpkg --root="$root" --log=/dev/null -P tests >/dev/null 2>&1
    [ ! -e "$root/usr/share/tests" ] || die "dpkg: files are left"
    unmount
    rm -rf "${dir:?}"/{p1,p2,1.deb,2.deb}
}

# rpm_in ROOT ARGUMENT...: rpm; what it prints is shown when it fails.
rpm_in() {
    local root=$1
    shift
    rpm --root "$root" "$@" >"$dir/rpm.log" 2>&1 || {
        cat "$dir/rpm.log" >&2
        die "rpm: rpm $* failed"
    }
}

# rpm_build VERSION: $dir/VERSION.rpm of $dir/pVERSION.
rpm_build() {
    cat >"$dir/tests.spec" <<END
Name: tests
Version: $1
Release: 1
Summary: tests
License: none
BuildArch: noarch
%description
%install
mkdir -p %{buildroot}
cp -a $dir/p$1/usr %{buildroot}/
%files
/usr/share/tests
END
    rpmbuild --quiet -bb --define "_topdir $dir/rpmbuild" --define '__os_install_post %{nil}' "$dir/tests.spec" >"$dir/rpm.log" 2>&1 || {
        cat "$dir/rpm.log" >&2
        die "rpm: cannot build"
    }
    mv "$dir/rpmbuild/RPMS/noarch/tests-$1-1.noarch.rpm" "$dir/$1.rpm"
    rm -r "$dir/rpmbuild"
}

suite_rpm() {
    local version round root=$dir/merged
    ! missing rpm 'package rpm' rpm rpmbuild || return 0
    say "rpm: ${LOOPS:-3} rounds"
    for version in 1 2; do
        package_tree "$dir/p$version" $version
        rpm_build $version
    done
    mkdir -p "$dir/lower"
    rpm_in "$dir/lower" --initdb
    rpm_in "$dir/lower" --nodeps -i "$dir/1.rpm"
    mount_new "${SUITE_OPTIONS:+,$SUITE_OPTIONS}"
    for round in $(seq "${LOOPS:-3}"); do
        for version in 2 1; do
            rpm_in "$root" --rebuilddb
            rpm_in "$root" --nodeps -U --oldpackage "$dir/$version.rpm"
            same "rpm: round $round, version $version" "$dir/p$version/usr" "$root/usr"
            rpm_in "$root" --nodeps -V tests
        done
    done
    "$LAMINA_BIN" unmount "$root"
    mount_kernel
    same "rpm: read by the kernel" "$dir/p1/usr" "$root/usr"
    rpm_in "$root" --nodeps -V tests
    umount "$root"
    mount_new "${SUITE_OPTIONS:+,$SUITE_OPTIONS}"
    rpm_in "$root" -e tests
    [ ! -e "$root/usr/share/tests" ] || die "rpm: files are left"
    unmount
    rm -rf "${dir:?}"/{p1,p2,1.rpm,2.rpm,tests.spec,rpm.log}
}

# stress_one STRESSOR: runs it in the mount at $dir/merged; its status is stress-ng's.
stress_one() {
    local status=0
    mkdir "$dir/merged/stress"
    stress-ng --"$1" 1 --timeout "${STRESS_SECONDS:-2}" --verify --temp-path "$dir/merged/stress" >"$dir/stress.log" 2>&1 || status=$?
    rm -rf "$dir/merged/stress" || status=1
    return $status
}

suite_stress() {
    local stressor ours theirs passed=0 skipped='' both='' worse='' list
    ! missing stress 'package stress-ng' stress-ng || return 0
    list=${STRESSORS:-$(stress-ng --class 'filesystem?' | sed -n 's/.*stressors: //p')}
    [ -n "$list" ] || die "stress: stress-ng names no stressors"
    say "stress: $(wc -w <<<"$list") stressors of stress-ng"
    for stressor in $list; do
        ours=0 theirs=0
        mount_new "${SUITE_OPTIONS:+,$SUITE_OPTIONS}"
        stress_one "$stressor" || ours=$?
        unmount
        if [ $ours = 0 ]; then
            passed=$((passed + 1))
            continue
        fi
        cp "$dir/stress.log" "$dir/ours.log"
        mount_kernel
        stress_one "$stressor" || theirs=$?
        unmount_kernel
        # 3: it lacks something; 4: it is not for this machine; else it may not want to endanger the machine.
        if [ $theirs != $ours ]; then
            worse="$worse $stressor"
            say "stress: $stressor: status $ours here, $theirs on kernel overlayfs"
            cat "$dir/ours.log" >&2
        elif [ $ours = 3 ] || [ $ours = 4 ] || grep -q 'No stress workers' "$dir/ours.log"; then
            skipped="$skipped $stressor"
        else
            both="$both $stressor"
        fi
    done
    say "stress: passed: $passed; skipped by stress-ng:${skipped:- none}; failed on kernel overlayfs too:${both:- none}"
    [ -z "$worse" ] || die "stress: fail only here:$worse"
    rm -f "$dir"/{stress,ours}.log
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
