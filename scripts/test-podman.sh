#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/test-podman.sh [root|user|images]...

Runs podman and buildah on stores of their own, as root and as a user made for it, with the kernel's
overlay and with lamina as mount_program; and the suites archive_images and archive_containerd, which
need more programs than setup.sh installs. All of it unless a part is named:

- clients: import, builds with deletions, recreated directories, hard links, capabilities and chown -R,
  run, exec, cp, diff, commit, export, maps of ids, volumes, eight containers at once, restart, a killed
  server. What is exported is the same, entry by entry, with lamina and with the kernel's overlay.
- stores: what podman writes opens in lamina, shows the same trees, takes a layer that podman then
  runs, and the other way round; layers that both have mounted at once stay until both are done.

- images: layers and images go to and from podman, buildah, skopeo, umoci and containerd, one of a whole
  distribution among them.

At the end each store is empty and lamina finds nothing wrong with it.

Installs podman, buildah, busybox and uidmap, for images skopeo, umoci, containerd and debootstrap
too, from the distribution where they are missing.
Environment: LAMINA_BIN, the binary to test instead of building one.
END
}

for argument in "$@"; do
    case $argument in
        root | user | images) ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
done
[ $# -gt 0 ] || set -- root user images

step() {
    printf 'test-podman: %s\n' "$*"
}

fail() {
    printf 'test-podman: FAILED: %s\n' "$*" >&2
    exit 1
}

# The user goes with what podman kept for its namespaces, which ends soon.
# shellcheck disable=SC2317
at_end() {
    [ -n "$user" ] || return 0
    for _ in $(seq 100); do
        pgrep -u "$user" >/dev/null || break
        sleep 0.1
    done
    # By force: processes of others with ids of the range count as this user's.
    userdel -f "$user"
}

# Part of the run as root, which cleans up.
if [ -n "${LAMINA_PODMAN_USER-}" ]; then
    dir=$LAMINA_PODMAN_USER who=user
else
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    # shellcheck source=scripts/lib/frame.sh
    . scripts/lib/frame.sh
    [ "$(id -u)" = 0 ] || fail "needs root"
    use_binary
    for package in podman buildah busybox python3 uidmap:newuidmap libcap2-bin:setcap passwd:useradd; do
        command -v "${package#*:}" >/dev/null || apt-get install -y -q "${package%:*}"
    done
    alone scripts/test-podman.sh "$@"
    # Podman's runtimes want one kind of cgroups.
    mount --make-rshared /
    umount /sys/fs/cgroup/unified 2>/dev/null || true
    scratch podman
    who=root user=''
    cp "$LAMINA_BIN" "$dir/lamina"
    cp scripts/test-podman.sh "$dir/script"
fi
program=$dir/lamina

same() {
    [ "$1" = "$2" ] || fail "$3: $(diff <(printf '%s\n' "$1") <(printf '%s\n' "$2") | head -n 20)"
}

# Runs a command, as a user in the namespaces that podman has.
inside() {
    if [ "$who" = root ]; then "$@"; else podman unshare "$@"; fi
}

lamina() {
    inside "$program" "$@"
}

# One line for each object of a tree: type, mode, owner, target, content, capability.
tree() {
    # shellcheck disable=SC2016
    inside bash -euc 'cd "$1"
        find . -mindepth 1 -printf "%P %y %m %U:%G %l\n" | sort
        find . -type f -print0 | sort -z | xargs -0 sha256sum
        getcap -r . 2>/dev/null | sort' - "$1"
}

# One line for each entry of an archive, all but times; of hard links the first by name is the file.
entries() {
    python3 - "$1" <<'END'
import hashlib, sys, tarfile
archive = tarfile.open(sys.argv[1])
members = {member.name: member for member in archive}
groups = {}
for member in members.values():
    groups.setdefault(member.linkname if member.islnk() else member.name, []).append(member.name)
first = {name: min(names) for names in groups.values() for name in names}
for name in sorted(members):
    member = members[name]
    link = first[name] if first[name] != name else member.linkname if member.issym() else ""
    real = members[member.linkname] if member.islnk() else member
    data = hashlib.sha256(archive.extractfile(real).read()).hexdigest() if real.isreg() else ""
    more = {key: value for key, value in real.pax_headers.items() if key.startswith("SCHILY.xattr")}
    print(name, real.type, oct(real.mode), real.uid, real.gid, real.devmajor, real.devminor, link, data, more)
END
}

# The value that a Python expression has for the records of a file of the store.
record() {
    python3 -c "import json, sys; records = json.load(open(sys.argv[1])); print($2)" "$1"
}

# configure NAME PROGRAM: a store of its own for the commands that follow.
configure() {
    local line=''
    store=$dir/$who/$1
    [ -z "$2" ] || line="mount_program = \"$2\""
    mkdir -p "$store"/{home/.config/containers,xdg,tmp}
    chmod 700 "$store/xdg"
    # As a user podman takes no roots from the file that CONTAINERS_STORAGE_CONF names.
    cat >"$store/home/.config/containers/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "$store/root"
runroot = "$store/run"
[storage.options.overlay]
$line
END
    export CONTAINERS_CONF=$dir/containers.conf
    if [ "$who" = root ]; then
        export CONTAINERS_STORAGE_CONF=$store/home/.config/containers/storage.conf
    fi
    export HOME=$store/home XDG_RUNTIME_DIR=$store/xdg TMPDIR=$store/tmp
}

# The store is given back: nothing is left in it, and nobody runs for it.
finish() {
    podman rm -af -t 0 >/dev/null
    podman rmi -af >/dev/null
    same "$(lamina store list)" "" "layers after the removal"
    lamina store check
    lamina store cleanup
    if [ "$who" = user ]; then podman system migrate; fi
}

prepare() {
    local file
    cat >"$dir/containers.conf" <<'END'
[containers]
cgroups = "disabled"
log_driver = "k8s-file"
netns = "host"
default_ulimits = []
pids_limit = 0
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
END
    mkdir -p "$dir/base"/{bin,etc,tmp,proc,dev,old/sub,keep/deep,owned/sub} "$dir/context"
    cp "$(command -v busybox)" "$dir/base/bin/busybox"
    for file in sh cat ls rm mkdir ln echo mv cp chown chmod stat touch sleep test id mkfifo sort; do
        ln -s busybox "$dir/base/bin/$file"
    done
    # Another program that gives capabilities, with what it loads.
    for file in $(command -v setcap) $(ldd "$(command -v setcap)" | grep -o '/[^ ]*'); do
        mkdir -p "$dir/base$(dirname "$file")"
        cp -L "$file" "$dir/base$file"
    done
    echo 'root:x:0:0::/:/bin/sh' >"$dir/base/etc/passwd"
    for file in file doomed old/sub/hidden old/gone keep/one keep/deep/two owned/a owned/sub/b tool; do
        echo "$file" >"$dir/base/$file"
    done
    ln "$dir/base/file" "$dir/base/linked"
    ln -s /file "$dir/base/owned/symlink"
    chmod 4755 "$dir/base/owned/a"
    chmod 1777 "$dir/base/tmp"
    cat >"$dir/context/Containerfile" <<'END'
FROM base
RUN rm /doomed /keep/one && echo two > /two && mkfifo /pipe
RUN rm -r /old && mkdir /old && echo new > /old/new
RUN ln /two /third && ln /two /again && echo more >> /again && mv /keep/deep /keep/moved
RUN setcap cap_net_raw+ep /tool && chown -R 7:8 /owned && chmod u+s /owned/sub/b
RUN rm -r /old && mkdir -p /old/sub && echo last > /old/sub/last && rm /third
RUN echo three > /three && chmod 750 /keep/moved
END
    tar --owner=0 --group=0 --numeric-owner --mtime=@1000000000 -C "$dir/base" -cf "$dir/base.tar" .
    chmod -R a+rX "$dir/context" "$dir/base.tar" "$dir/containers.conf" "$dir/script" "$dir/lamina"
}

import_and_build() {
    podman import -q "$dir/base.tar" base >/dev/null
    podman build --network=host --layers -q -t image "$dir/context" >/dev/null
}

image_layer() {
    record "$store/root/overlay-images/images.json" \
        '[r["layer"] for r in records if "localhost/image:latest" in r.get("names", [])][0]'
}

# alike NAME TEXT: what is said is the same as the first who said something under the name.
alike() {
    local file=$dir/$who/$1.expected
    if [ ! -e "$file" ]; then
        printf '%s\n' "$2" >"$file"
        [ -n "$2" ] || fail "$1: nothing to compare"
    fi
    same "$2" "$(cat "$file")" "$1, here and with the kernel's overlay"
}

# clients NAME PROGRAM: everything that podman and buildah ask of a mount.
clients() {
    local name=$1 number out pid merged
    step "$who, $name: import, build, export"
    configure "$name" "$2"
    import_and_build
    podman create --name plain image true >/dev/null
    podman export -o "$store/image.tar" plain
    out=$(entries "$store/image.tar")
    case $out in *doomed* | *hidden* | *third* | *old/new*) fail "what was removed is exported" ;; esac
    for number in keep/moved/two old/sub/last SCHILY.xattr.security.capability; do
        case $out in *"$number"*) ;; *) fail "$number is not exported" ;; esac
    done
    alike export "$out"
    step "$who, $name: run, exec, cp, diff, commit, restart"
    same "$(podman run --rm image cat /old/sub/last)" last "run"
    podman run -d --name one image sleep 1000 >/dev/null
    podman exec one sh -c 'echo new >/new; rm /three; rm -r /keep; mkdir /keep; chown 3:4 /keep; echo x >>/old/sub/last'
    echo payload >"$store/in"
    podman cp "$store/in" one:/keep/in
    podman cp one:/new "$store/out"
    same "$(cat "$store/out")" new "cp"
    # Of directories that were made anew podman says other things without native diff.
    alike diff "$(podman diff one | grep -v '^C' | grep -v '^D /keep' | sort)"
    podman commit -q one committed >/dev/null
    same "$(podman run --rm committed sh -c 'cat /keep/in /again /old/sub/last; stat -c %u:%g /keep; ls /three 2>&1')" \
        "$(printf 'payload\ntwo\nmore\nlast\nx\n3:4\nls: /three: No such file or directory')" "what was committed"
    podman create --name again committed true >/dev/null
    podman export -o "$store/committed.tar" again
    alike committed "$(entries "$store/committed.tar")"
    podman restart -t 0 one >/dev/null
    same "$(podman exec one cat /new /keep/in)" "$(printf 'new\npayload')" "after a restart"
    podman stop -t 0 one >/dev/null
    podman start one >/dev/null
    same "$(podman exec one cat /new)" new "after stop and start"
    step "$who, $name: read-only, ids, volumes"
    out=$(podman run --rm --read-only image sh -c 'cat /three; echo x 2>/dev/null >/x || echo refused')
    same "$out" "$(printf 'three\nrefused')" "read-only"
    if [ "$who" = user ]; then
        same "$(podman run --rm --userns=keep-id image sh -c 'id -u; touch /tmp/x; stat -c %u /tmp/x')" \
            "$(id -u; id -u)" "keep-id"
        maps
    elif [ -z "$2" ]; then
        maps
    else
        maps_or_shifted_twice "$name"
    fi
    mkdir "$store/volume"
    echo v >"$store/volume/v"
    same "$(podman run --rm -v "$store/volume:/tmp:O" image sh -c 'cat /tmp/v; echo w >/tmp/w; rm /tmp/v; ls /tmp')" \
        "$(printf 'v\nw')" "an overlay volume"
    same "$(ls "$store/volume")" v "what lies beneath an overlay volume"
    step "$who, $name: eight at once, a build by buildah"
    for number in 1 2 3 4 5 6 7 8; do
        podman run --rm image sh -c "echo $number >/mine; rm -r /owned; sleep 1; cat /mine /three" >"$store/out.$number" &
    done
    wait
    for number in 1 2 3 4 5 6 7 8; do
        same "$(cat "$store/out.$number")" "$(printf '%s\nthree' $number)" "container $number of eight"
    done
    if [ "$who" = root ]; then
        buildah from -q --name work localhost/image >/dev/null
        buildah run --isolation=chroot work sh -c 'rm -r /keep; echo b >/built'
        buildah commit -q work built >/dev/null
        buildah rm work >/dev/null
        same "$(podman run --rm built sh -c 'cat /built; ls -d /keep 2>/dev/null || echo none')" \
            "$(printf 'b\nnone')" "what buildah built"
    fi
    if [ -n "$2" ]; then
        step "$who, $name: the server of a container is killed"
        merged=$store/root/overlay/$(container_layer one)/merged
        pid=$(pgrep -f -- "$merged\$")
        kill -9 "$pid"
        if podman exec one cat /new 2>/dev/null; then fail "somebody answers for a dead server"; fi
        podman kill one >/dev/null
        # Podman wants to be asked twice: the first time it takes the dead mount away.
        podman start one >/dev/null 2>&1 || podman start one >/dev/null
        same "$(podman exec one cat /new /keep/in)" "$(printf 'new\npayload')" "after the server was killed"
    fi
    podman rm -f -t 0 one >/dev/null
    finish
}

maps() {
    local map
    for map in '--uidmap=0:1:2000 --gidmap=0:1:2000' '--userns=auto:size=2000'; do
        if [ "$who" = root ]; then
            case $map in *auto*) continue ;; esac
        fi
        # shellcheck disable=SC2086
        same "$(podman run --rm $map image sh -c 'stat -c %u:%g /file /owned; touch /x; chown 5:6 /x; stat -c %u:%g /x')" \
            "$(printf '0:0\n7:8\n5:6')" "ids with $map"
    done
}

# Podman 4 gives mount programs layers that are shifted already, and a map to shift them once more.
maps_or_shifted_twice() {
    local seen other='' run=(run --rm --uidmap=0:1:2000 --gidmap=0:1:2000 image stat -c %u:%g /file)
    seen=$(podman "${run[@]}")
    if [ "$seen" = 0:0 ]; then
        maps
    elif ! other=$(command -v fuse-overlayfs); then
        step "$who, $1: skipped: --uidmap: shows $seen; there is no fuse-overlayfs to compare with"
    else
        other_podman() {
            podman --root "$dir/other" --runroot "$dir/run" --storage-opt "overlay.mount_program=$other" "$@"
        }
        other_podman import -q "$dir/base.tar" image >/dev/null
        same "$seen" "$(other_podman "${run[@]}")" "owners with --uidmap, by lamina and by fuse-overlayfs"
        other_podman rmi -af >/dev/null
        step "$who, $1: skipped: --uidmap: this podman has layers shifted twice, by fuse-overlayfs too"
    fi
}

container_layer() {
    podman inspect --format '{{.GraphDriver.Data.UpperDir}}' "$1" | sed 's|/diff$||; s|.*/||'
}

# stores NAME PROGRAM: podman's own store, opened by lamina.
stores() {
    local name=$1 program_option=$2 image layers mounted seen backend container writable merged new
    step "$who, $name: lamina finds the layers of podman, and nothing wrong"
    configure "shared-$name" "$program_option"
    import_and_build
    layers=$(record "$store/root/overlay-layers/layers.json" \
        '"\n".join(sorted(r["id"] for r in records))')
    same "$(lamina store list)" "$layers" "layers of podman and of lamina"
    lamina store check
    image=$(image_layer)
    if lamina layer remove "$image" 2>"$store/said"; then fail "a layer of an image was removed"; fi
    grep -q 'records of an engine name it' "$store/said" || fail "$(cat "$store/said")"
    mounted=$(inside podman image mount image)
    seen=$(tree "$mounted")
    inside podman image unmount image >/dev/null
    case $seen in *doomed* | *hidden*) fail "podman shows what was removed" ;; esac
    for backend in kernel fuse; do
        # The kernel does not know the whiteouts of mount programs.
        if [ -n "$program_option" ] && [ "$backend" = kernel ]; then continue; fi
        merged=$(lamina layer mount --read-only --backend "$backend" "$image")
        same "$(tree "$merged")" "$seen" "$name by $backend"
        lamina layer unmount "$image"
    done
    step "$who, $name: lamina writes into the layer of a container"
    container=$(podman create image cat /three)
    writable=$(container_layer "$container")
    merged=$(lamina layer mount "$writable")
    inside sh -c "echo lamina >$merged/three"
    lamina layer unmount "$writable"
    same "$(podman start -a "$container")" lamina "the container after lamina"
    podman commit -q "$container" committed >/dev/null
    same "$(podman run --rm committed cat /three)" lamina "the committed image"
    step "$who, $name: both have a layer mounted at once"
    # One that ran may stay mounted as long as podman likes.
    container=$(podman create image cat /three)
    writable=$(container_layer "$container")
    merged=$store/root/overlay/$writable/merged
    is_up() { inside test -e "$merged/three"; }
    inside podman mount "$container" >/dev/null
    same "$(lamina layer mount "$writable")" "$merged" "one mountpoint"
    inside podman unmount "$container" >/dev/null
    is_up || fail "podman unmounted beneath lamina"
    lamina layer unmount "$writable"
    if is_up; then fail "the last user left a mount: $(counts)"; fi
    lamina layer mount "$writable" >/dev/null
    inside podman mount "$container" >/dev/null
    lamina layer unmount "$writable"
    is_up || fail "lamina unmounted beneath podman"
    if lamina layer unmount "$writable" 2>/dev/null; then fail "lamina gave back what podman has"; fi
    inside podman unmount "$container" >/dev/null
    if is_up; then fail "the last user left a mount: $(counts)"; fi
    # A running container on a mount of lamina's.
    podman run -d --name running image sleep 1000 >/dev/null
    writable=$(container_layer running)
    podman stop -t 0 running >/dev/null
    merged=$(lamina layer mount "$writable")
    podman start running >/dev/null
    lamina layer unmount "$writable"
    same "$(podman exec running cat /three)" three "a container on a mount of lamina"
    podman rm -f -t 0 running >/dev/null
    step "$who, $name: podman runs an image whose top layer lamina made"
    new=$(printf 'f%.0s' $(seq 64))
    lamina layer create --parent "$image" "$new"
    merged=$(lamina layer mount "$new")
    inside sh -c "echo from a new layer >$merged/three; rm $merged/two"
    lamina layer unmount "$new"
    python3 - "$store/root" "$image" "$new" <<'END'
import json, sys
root, parent, new = sys.argv[1:]
def change(path, edit):
    records = json.load(open(path))
    edit(records)
    json.dump(records, open(path, "w"))
change(root + "/overlay-layers/layers.json",
       lambda records: records.append({
           "id": new, "parent": parent, "created": "2026-01-01T00:00:00Z",
           "diff-digest": "sha256:" + new, "diff-size": 4096}))
def use(records):
    for record in records:
        if "localhost/image:latest" in record.get("names", []):
            record["layer"] = new
change(root + "/overlay-images/images.json", use)
END
    same "$(podman run --rm image cat /three /again)" "$(printf 'from a new layer\ntwo\nmore')" \
        "the image with a layer of lamina"
    if podman run --rm image cat /two 2>/dev/null; then fail "a removed file is there"; fi
    lamina store check
    podman rm -af >/dev/null
    podman rmi -af >/dev/null
    for layers in $(lamina store list); do
        case $layers in "$image" | "$new") lamina store gc --orphans >/dev/null ;; esac
    done
    finish
}

# What the counts of mounts are.
counts() {
    cat "$store/run/overlay-layers/mountpoints.json"
}

made_by_lamina() {
    local merged home
    step "$who: a store made by lamina, used by podman"
    configure made ""
    lamina store init
    lamina layer create base
    inside tar -C "$store/root/overlay/base/diff" -xf "$dir/base.tar"
    lamina layer create-rw --parent base work
    merged=$(lamina layer mount work)
    same "$(podman run --rm --rootfs "$merged" /bin/cat /file)" file "a container on a mount of lamina"
    import_and_build
    same "$(podman run --rm image cat /old/sub/last)" last "an image in a store of lamina"
    inside test -e "$merged/file" || fail "podman hides the mounts of lamina"
    lamina layer unmount work
    lamina store check
    podman rmi -af >/dev/null
    same "$(lamina store list)" "$(printf 'base\nwork')" "layers of lamina after podman"
    lamina layer remove work
    lamina layer remove base
    finish
    [ "$who" = user ] || return 0
    step "$who: the roots are those of this podman, whatever it takes of a file that is named"
    cat >"$store/named.conf" <<END
[storage]
driver = "overlay"
graphroot = "$store/named/root"
runroot = "$store/named/run"
END
    (
        export CONTAINERS_STORAGE_CONF=$store/named.conf
        home=$(podman info --format '{{.Store.GraphRoot}}')/overlay
        same "$(lamina store status | sed -n 's/^Home: //p')" "$home" "the home of podman and of lamina"
        podman system migrate
    )
}

# A whole distribution and a layer on it: the same tree, changes and image in podman and in ours, both ways.
distribution() {
    local suite merged top wanted config from form out
    local fields='{{.Config}} {{.Architecture}} {{len .RootFS.Layers}} {{.Created}} {{.History}}'
    suite=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-stable}")
    mkdir -p "$dir/$who"
    configure distribution ""
    step "images: $suite by debootstrap"
    debootstrap --variant=minbase "$suite" "$dir/$suite" >"$dir/debootstrap.log" 2>&1 ||
        fail "debootstrap: $(tail -n 3 "$dir/debootstrap.log")"
    tar -C "$dir/$suite" --xattrs -cf "$dir/$suite.tar" .
    podman import -q "$dir/$suite.tar" localhost/base >/dev/null 2>&1
    cat >"$dir/context/Debian" <<'END'
FROM localhost/base
RUN rm -r /usr/share/doc /var/cache/* && mkdir /usr/share/doc && echo new >/usr/share/doc/new
RUN chown -R 1000:1000 /usr/share/zoneinfo && chmod 4711 /bin/mount && ln /bin/cat /bin/other
RUN echo more >>/etc/passwd && mv /usr/share/common-licenses /moved && dpkg --purge --force-all sed
END
    podman build -q -f "$dir/context/Debian" -t localhost/top "$dir/context" >"$dir/build.log" 2>&1 ||
        fail "podman build: $(tail -n 3 "$dir/build.log")"
    podman save -q -o "$dir/top.tar" localhost/top
    skopeo copy -q --insecure-policy "docker-archive:$dir/top.tar" "oci:$dir/oci:localhost/top:latest"
    merged=$(podman image mount localhost/top)
    local ours=(--root "$dir/ours" --runroot "$dir/ours-run")
    "$program" store init "${ours[@]}"
    for from in "$dir/top.tar" "$dir/oci"; do
        "$program" image import "${ours[@]}" "$from" >/dev/null
        top=$("$program" image list "${ours[@]}" | cut -d' ' -f3)
        "$program" layer mount "${ours[@]}" --read-only --backend kernel "$top" >"$dir/mounted"
        same "$(tree "$merged")" "$(tree "$(cat "$dir/mounted")")" "images: ${from##*/}"
        "$program" layer unmount "${ours[@]}" "$top"
        for form in docker oci-tar; do
            "$program" image export "${ours[@]}" --format "$form" localhost/top:latest "$from.$form"
        done
        "$program" image remove "${ours[@]}" localhost/top:latest
        "$program" store gc "${ours[@]}" >/dev/null
    done
    wanted=$(tree "$merged")
    config=$(podman image inspect -f "$fields" localhost/top)
    podman image unmount localhost/top >/dev/null
    for out in "$dir"/{top.tar,oci}.{docker,oci-tar}; do
        podman rmi -af >/dev/null
        podman load -q -i "$out" >/dev/null 2>&1
        same "$config" "$(podman image inspect -f "$fields" localhost/top)" "images: podman load ${out##*/}"
        same "$wanted" "$(tree "$(podman image mount localhost/top)")" "images: podman load ${out##*/}"
        podman image unmount localhost/top >/dev/null
    done
    finish
}

everything() {
    mkdir -p "$dir/$who"
    clients kernel ""
    clients lamina "$program"
    stores kernel ""
    stores lamina "$program"
    made_by_lamina
}

if [ "$who" = user ]; then
    everything
    exit
fi
prepare
for argument in "$@"; do
    if [ "$argument" = root ]; then
        (everything)
    elif [ "$argument" = images ]; then
        for package in skopeo umoci containerd debootstrap; do
            command -v "$package" >/dev/null || apt-get install -y -q "$package"
        done
        FUSE_TESTS_SKIP_LOG=$dir/skips scripts/test-mounts.sh --test archive_images --test archive_containerd
        [ ! -s "$dir/skips" ] || fail "images: tests were skipped"
        (distribution)
    elif [ "$(stat -c %a /dev/fuse)" != 666 ]; then
        step "user: skipped: /dev/fuse is not for everybody (chmod 666 /dev/fuse)"
    else
        user=lamina-podman-$$
        # Not a system user: those get no subordinate ids.
        useradd --no-create-home --home-dir "$dir/user" --shell /usr/sbin/nologin "$user"
        install -d -o "$user" -g "$user" "$dir/user"
        setpriv --reuid "$user" --regid "$user" --init-groups -- env LAMINA_PODMAN_USER="$dir" bash "$dir/script"
    fi
done
step "all passed"
