#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/test-podman.sh

Shares stores with podman, as root: one that podman writes with the kernel's overlay, one that it
writes through lamina as mount_program, and one that lamina makes. Each opens in the other program,
shows the same trees, takes a layer of the other that then runs, and is sound and empty at the end.

Installs podman and busybox from the distribution where they are missing.
Environment: LAMINA_BIN, the binary to test instead of building one.
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
# shellcheck source=scripts/lib/frame.sh
. scripts/lib/frame.sh
if [ "$(id -u)" != 0 ]; then
    printf 'test-podman: needs root\n' >&2
    exit 1
fi
use_binary
for program in podman busybox python3; do
    if ! command -v "$program" >/dev/null; then
        apt-get install -y -q "$program"
    fi
done
# Mounts of this run are seen by nobody else, and podman's runtimes want one kind of cgroups.
alone scripts/test-podman.sh
umount /sys/fs/cgroup/unified 2>/dev/null || true

dir=$(mktemp -d /var/tmp/lamina-podman.XXXXXX)
clean_up() {
    local status=$?
    trap - EXIT
    # Mounts may be stacked; each pass takes the top ones.
    local mounts pass
    for pass in 1 2 3 4; do
        mounts=$(awk -v dir="$dir/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | sort -r)
        if [ -z "$mounts" ]; then break; fi
        printf '%s\n' "$mounts" | while read -r mount; do umount -l "$mount" 2>/dev/null || true; done
    done
    [ "$pass" != 4 ] || status=1
    chmod -R u+rwx "$dir"
    rm -rf "$dir" || status=1
    exit "$status"
}
trap clean_up EXIT

step() {
    printf 'test-podman: %s\n' "$*"
}

fail() {
    printf 'test-podman: FAILED: %s\n' "$*" >&2
    exit 1
}

same() {
    [ "$1" = "$2" ] || fail "$3: $(diff <(printf '%s\n' "$1") <(printf '%s\n' "$2") | head -n 20)"
}

lamina() {
    "$LAMINA_BIN" "$@"
}

# One line for each object of a tree: type, mode, owner, size of files, target, content, capability.
tree() {
    (
        cd "$1"
        find . -mindepth 1 -printf '%P %y %m %U:%G %l\n' | sort
        find . -type f -print0 | sort -z | xargs -0 sha256sum
        getcap -r . 2>/dev/null | sort || true
    )
}

# The value that a Python expression has for the records of a file of the store.
record() {
    python3 -c "import json, sys; records = json.load(open(sys.argv[1])); print($2)" "$1"
}

configure() {
    store=$dir/$1
    mkdir -p "$store"
    {
        printf '[storage]\ndriver = "overlay"\ngraphroot = "%s/root"\nrunroot = "%s/run"\n' \
            "$store" "$store"
        # Otherwise podman binds the home over itself, and hides what is mounted in it.
        printf '[storage.options.overlay]\nskip_mount_home = "true"\n'
        if [ -n "$2" ]; then
            printf 'mount_program = "%s"\n' "$2"
        fi
    } >"$store/storage.conf"
    export CONTAINERS_STORAGE_CONF=$store/storage.conf
}

cat >"$dir/containers.conf" <<'END'
[containers]
cgroups = "disabled"
log_driver = "k8s-file"
netns = "host"
default_ulimits = []
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
END
export CONTAINERS_CONF=$dir/containers.conf

mkdir -p "$dir/base/bin" "$dir/base/old/sub" "$dir/context"
cp "$(command -v busybox)" "$dir/base/bin/busybox"
for name in sh cat ls rm mkdir ln echo; do
    ln -s busybox "$dir/base/bin/$name"
done
printf 'base\n' >"$dir/base/file"
printf 'doomed\n' >"$dir/base/doomed"
printf 'hidden\n' >"$dir/base/old/sub/hidden"
ln "$dir/base/file" "$dir/base/linked"
cat >"$dir/context/Containerfile" <<'END'
FROM base
RUN rm /doomed && echo two > /two
RUN rm -r /old && mkdir /old && echo new > /old/new && ln /two /again
RUN echo three > /three
END

# Podman's own store, with the kernel ("") or through a mount program.
podmans_store() {
    local name=$1 program=$2 image layers mounted seen backend container writable merged
    step "$name: podman imports and builds"
    configure "$name" "$program"
    tar -C "$dir/base" -c . | podman import -q - base >/dev/null
    podman build --network=host --layers -q -t image "$dir/context" >/dev/null
    step "$name: lamina finds the same layers, and nothing wrong"
    layers=$(record "$store/root/overlay-layers/layers.json" \
        '"\n".join(sorted(r["id"] for r in records))')
    same "$(lamina store list)" "$layers" "layers of podman and of lamina"
    lamina store check
    image=$(record "$store/root/overlay-images/images.json" \
        '[r["layer"] for r in records if "localhost/image:latest" in r.get("names", [])][0]')
    mounted=$(podman image mount image)
    seen=$(tree "$mounted")
    podman image unmount image >/dev/null
    case $seen in *doomed* | *hidden*) fail "podman shows what was removed" ;; esac
    for backend in kernel fuse; do
        # The kernel does not know the whiteouts of mount programs.
        if [ -n "$program" ] && [ "$backend" = kernel ]; then continue; fi
        merged=$(lamina layer mount --read-only --backend "$backend" "$image")
        same "$(tree "$merged")" "$seen" "$name by $backend"
        lamina layer unmount "$image"
    done
    step "$name: lamina writes into the layer of a container"
    container=$(podman create image cat /three)
    writable=$(record "$store/root/overlay-containers/containers.json" 'records[-1]["layer"]')
    merged=$(lamina layer mount "$writable")
    printf 'lamina\n' >"$merged/three"
    lamina layer unmount "$writable"
    same "$(podman start -a "$container")" lamina "the container after lamina"
    podman commit -q "$container" committed >/dev/null
    same "$(podman run --rm committed cat /three)" lamina "the committed image"
    step "$name: podman runs an image whose top layer lamina made"
    local new
    new=$(printf 'f%.0s' $(seq 64))
    lamina layer create --parent "$image" "$new"
    merged=$(lamina layer mount "$new")
    printf 'from a new layer\n' >"$merged/three"
    rm "$merged/two"
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
    same "$(podman run --rm image cat /three /again)" "$(printf 'from a new layer\ntwo')" \
        "the image with a layer of lamina"
    if podman run --rm image cat /two 2>/dev/null; then fail "a removed file is there"; fi
    lamina store check
    step "$name: all is removed"
    podman rm -af >/dev/null
    podman rmi -af >/dev/null
    for layer in $(lamina store list); do
        case $layer in "$image" | "$new") lamina store gc --orphans >/dev/null ;; esac
    done
    same "$(lamina store list)" "" "layers after the removal"
    lamina store check
}

lamina_store() {
    step "lamina's store: made by lamina, used by podman"
    configure made ""
    lamina store init
    lamina layer create base
    cp -a "$dir/base/." "$store/root/overlay/base/diff/"
    lamina layer create-rw --parent base work
    local merged
    merged=$(lamina layer mount work)
    same "$(podman run --rm --rootfs "$merged" /bin/cat /file)" base "a container on a mount of lamina"
    tar -C "$dir/base" -c . | podman import -q - base >/dev/null
    podman build --network=host --layers -q -t image "$dir/context" >/dev/null
    same "$(podman run --rm image cat /old/new)" new "an image in a store of lamina"
    lamina layer unmount work
    lamina store check
    podman rmi -af >/dev/null
    same "$(lamina store list)" "$(printf 'base\nwork')" "layers of lamina after podman"
    lamina layer remove work
    lamina layer remove base
    lamina store check
}

podmans_store kernel ""
podmans_store program "$LAMINA_BIN"
lamina_store
step "all passed"
