#!/usr/bin/env bash
set -euo pipefail
export LC_ALL=C

usage() {
    cat <<'END'
Usage: scripts/demo.sh

Installs what is missing, builds lamina and shows its main job as an ordinary user in a user
namespace: four layers made of real files of this machine are mounted as one tree, read, and
changed in every way; then it checks what landed in the upper layer, that no lower layer changed,
and that kernel overlayfs mounts the same layers to the same tree. Ends with status 0 only if
every check holds. Takes less than a minute after the build and removes all it made.

Environment:
  LAMINA_BIN  a mount program to use instead of building one
  TMPDIR      where the layers go, some 300 MB (default: /var/tmp)
END
}

# ---- Steps that run inside the user namespace. They work in $PWD, the directory of this run. ----

say() {
    printf '%-10s %s\n' "$1" "$2"
}

fail() {
    printf 'FAILED     %s\n' "$*" >&2
    exit 1
}

# Fails unless two files hold the same lines.
same() {
    if ! diff -a -u "$1" "$2" >difference; then
        head -n 40 difference >&2
        fail "$3: $(grep -a -c '^[-+][^-+]' difference) lines differ between $1 and $2"
    fi
}

# Fails unless the first argument equals the second.
equal() {
    [ "$1" = "$2" ] || fail "$3: found $1, expected $2"
}

# Prints all that can be seen of a tree: type, mode, owner, size or target, mtime, link count of
# all but directories; contents; xattrs.
manifest() {
    (
        cd "$1"
        # A directory's size says nothing, and its link count is the kernel's secret.
        find . -type d -printf '%y %m %U:%G %T@ %p\n' -o -type l -printf '%y %U:%G %T@ %n %p -> %l\n' \
            -o -printf '%y %m %U:%G %s %T@ %n %p\n' | sort
        find . -type f -print0 | sort -z | xargs -0 -r sha256sum
        getfattr -R -h -d -m '^user\.' . 2>/dev/null
    )
}

# A manifest without link counts: copying up one name of a hard-linked file leaves the count to
# the moment at which it is asked for.
without_link_counts() {
    sed -E 's/^([flpscb] .* [0-9.]+) [0-9]+ \.\//\1 .\//' "$1"
}

# Names all regular files of a tree, sorted, each ended by NUL.
files() {
    find "$@" -type f -print0 | sort -z
}

count() {
    find "$@" -printf x | wc -c
}

# Makes the lowers 1 (bottom) to 4 (top), an empty upper, and the manifests of the lowers.
make_layers() {
    local name
    mkdir 1 2 3 4 upper work upper-0 work-0 merged kernel
    # The two roots are compared, so they are of one time.
    touch -r upper upper-0
    # Some 5,000 files and links, evenly spread; small ones, to bound the size.
    find /usr/lib /usr/share /etc -xdev \( -type f -size -64k ! -perm /7000 -readable -o -type l \) \
        -print0 2>/dev/null | sort -z >all || true
    local total step
    total=$(tr -dc '\0' <all | wc -c)
    step=$(((total + 4999) / 5000))
    [ "$total" -gt 2000 ] || fail "this machine has only $total files to make layers of"
    sed -z -n "1~${step}p" all | sed -z 's,^/,,' >chosen
    # Half of them at the bottom, the rest above, so that most directories are merged ones.
    sed -z -n '1~10p;2~10p;3~10p;4~10p;5~10p' chosen >chosen-1
    sed -z -n '6~10p;7~10p' chosen >chosen-2
    sed -z -n '8~10p' chosen >chosen-3
    sed -z -n '9~10p;10~10p' chosen >chosen-4
    for name in 1 2 3 4; do
        tar -C / --null --no-recursion -T "chosen-$name" -cf - | tar -C "$name" --no-same-owner -xpf -
    done

    # Files deleted in 2, files changed in 4.
    mapfile -t -d '' bottom < <(cd 1 && files . | sed -z 's,^\./,,')
    local i
    for ((i = 7; i < ${#bottom[@]}; i += 30)); do
        name=${bottom[i]}
        mkdir -p "2/${name%/*}"
        mknod "2/$name" c 0 0
        printf '%s\0' "$name" >>deleted
    done
    for ((i = 11; i < ${#bottom[@]}; i += 30)); do
        name=${bottom[i]}
        mkdir -p "4/${name%/*}"
        cp -p "1/$name" "4/$name"
        chmod u+w "4/$name"
        echo 'changed in layer 4' >>"4/$name"
    done

    # One of each case in a directory of its own, of real files again.
    mkdir -p {1,2,3,4}/demo 1/demo/{returns,opaque,plain}
    cp -p "${bottom[@]/#/1/}" 1/demo/plain 2>/dev/null || true
    mapfile -t -d '' some < <(cd 1/demo/plain && files . | sed -z -n '1,30p')
    for name in "${some[@]}"; do
        cp -p "1/demo/plain/$name" 1/demo/returns/
        cp -p "1/demo/plain/$name" 1/demo/opaque/
    done
    find 1/demo/plain -type f | sort | sed 1,60d | tr '\n' '\0' | xargs -0 -r rm
    mknod 2/demo/returns c 0 0
    mkdir 3/demo/returns 3/demo/opaque
    echo 'new in layer 3' >3/demo/returns/new
    echo 'new in layer 3' >3/demo/opaque/new
    setfattr -n user.overlay.opaque -v y 3/demo/opaque
    mkdir 4/demo/opaque
    echo 'new in layer 4' >4/demo/opaque/newer
    echo 'linked three times' >2/demo/link-a
    ln 2/demo/link-a 2/demo/link-b
    ln 2/demo/link-a 2/demo/link-c
    ln -s link-a 3/demo/symlink
    ln -s /nowhere 3/demo/dangling
    mkfifo 3/demo/fifo
    echo 'not UTF-8' >"2/demo/"$'caf\xe9 \xff'
    long=$(printf 'n%.0s' {1..255})
    echo 'a name of 255 bytes' >"2/demo/$long"
    head -c 104857600 /dev/urandom >1/demo/big
    setfattr -n user.demo -v lower 1/demo/big
    touch -d '1961-04-12 06:07:00.5 UTC' 3/demo/symlink 2/demo/link-a -h
    for name in 1 2 3 4; do
        manifest "$name" >"lower-$name"
    done
    say layers "4 lowers: $(count 1 2 3 4 -type f) files, $(count 1 2 3 4 -type d) directories,\
 $(count 1 2 3 4 -type l) symlinks, $(count 1 2 3 4 -type c) whiteouts, $(du -sm 1 2 3 4 |
            awk '{ sum += $1 } END { print sum }') MiB"
}

# Mounts the lowers and `$1` as upper with the kernel and writes a manifest of what it shows.
mount_kernel() {
    mount -t overlay overlay kernel \
        -o "userxattr,lowerdir=4:3:2:1,upperdir=$1,workdir=$2" 2>kernel-refuses || return 1
}

show_kernel() {
    mount_kernel "$1" "$2" || exit 3
    manifest kernel >"$3"
    umount kernel
}

# Pid of the mount program that serves this mount namespace. Nobody else is in it.
server_pids() {
    local namespace process
    namespace=$(readlink "/proc/$$/ns/mnt")
    for process in /proc/[0-9]*; do
        [ "$(readlink "$process/ns/mnt" 2>/dev/null)" = "$namespace" ] &&
            [ "$(readlink "$process/exe" 2>/dev/null)" = "$PWD/lamina" ] &&
            echo "${process#/proc/}"
    done
    return 0
}

mount_union() {
    ./lamina -o "lowerdir=$PWD/4:$PWD/3:$PWD/2:$PWD/1,upperdir=$PWD/upper,workdir=$PWD/work" merged ||
        fail "lamina ended with status $?"
    mountpoint -q merged || fail "lamina ended with status 0, but nothing is mounted"
}

# Unmounts by the command given, and waits for the server to end.
unmount_union() {
    "$@"
    local i
    for ((i = 0; i < 100; i++)); do
        [ -n "$(server_pids)" ] || return 0
        sleep 0.1
    done
    fail "lamina still runs 10 s after the unmount"
}

drop_union() {
    umount -l merged 2>/dev/null || true
    local pid
    for pid in $(server_pids); do
        kill -KILL "$pid" 2>/dev/null || true
    done
}

# Keeps a copy of the files `$2`... as they are now, below keep/$1.
keep() {
    local set=$1
    shift
    mkdir -p "keep/$set"
    (cd merged && cp -p --parents -t "../keep/$set" -- "$@")
}

read_and_change() {
    trap drop_union EXIT
    trap 'exit 1' INT TERM
    mount_union
    say mounted "lamina -o lowerdir=4:3:2:1,upperdir=upper,workdir=work merged"

    manifest merged >union-before
    local bytes name
    bytes=$(tar -C merged -cf - . | wc -c)
    say read "$(count merged) objects and $((bytes >> 20)) MiB read through the mount"
    equal "$(sort -z deleted | (cd merged && xargs -0 ls -d 2>/dev/null) | wc -l)" 0 "files deleted in layer 2"
    equal "$(ls merged/demo/returns)" new "a deleted directory that comes back"
    equal "$(ls -m merged/demo/opaque)" "new, newer" "an opaque directory"
    equal "$(count merged -type c)" 0 "whiteouts to be seen"
    equal "$(stat -c %h merged/demo/link-a)" 3 "hard links of one file"
    equal "$(readlink merged/demo/symlink)" link-a "a symlink"
    equal "$(cat "merged/demo/"$'caf\xe9 \xff')" "not UTF-8" "a name that is not UTF-8"
    equal "$(cat "merged/demo/$(printf 'n%.0s' {1..255})")" "a name of 255 bytes" "a long name"
    cmp merged/demo/big 1/demo/big || fail "the 100 MiB file differs"
    say checked "deleted files gone, returned and opaque directories, links, names, 100 MiB file"

    # Different files for each kind of change, spread over the tree.
    mapfile -t -d '' all < <(cd merged && files etc usr | sed -z -n '3~7p')
    [ ${#all[@]} -ge 300 ] || fail "only ${#all[@]} files to change"
    local edits=("${all[@]:0:50}") appends=("${all[@]:50:50}") renames=("${all[@]:100:50}")
    local removals=("${all[@]:150:100}") cuts=("${all[@]:250:20}") rewrites=("${all[@]:270:20}")
    chmod u+rw "${edits[@]/#/merged/}"
    keep edits "${edits[@]}"
    keep appends "${appends[@]}"
    keep renames "${renames[@]}"
    keep cuts "${cuts[@]}"

    for name in "${edits[@]}"; do
        sed -i '1i edited' "merged/$name"
        sed -i '1i edited' "keep/edits/$name"
        cmp "merged/$name" "keep/edits/$name" || fail "edit of $name"
    done
    for name in "${appends[@]}"; do
        echo appended >>"merged/$name"
        (cat "keep/appends/$name" && echo appended) | cmp - "merged/$name" || fail "append to $name"
    done
    for name in "${cuts[@]}"; do
        truncate -s 10 "merged/$name"
        truncate -s 10 "keep/cuts/$name"
        cmp "merged/$name" "keep/cuts/$name" || fail "truncation of $name"
    done
    for name in "${rewrites[@]}"; do
        echo rewritten >"merged/$name"
        equal "$(cat "merged/$name")" rewritten "rewriting $name"
    done
    say edited "${#edits[@]} files edited, ${#appends[@]} appended to, ${#cuts[@]} cut, ${#rewrites[@]} rewritten"

    printf 'in the middle' | dd of=merged/demo/big bs=1 seek=50000000 conv=notrunc status=none
    echo 'at the end' >>merged/demo/big
    cp 1/demo/big keep/big
    printf 'in the middle' | dd of=keep/big bs=1 seek=50000000 conv=notrunc status=none
    echo 'at the end' >>keep/big
    cmp merged/demo/big keep/big || fail "the changed 100 MiB file"
    rm keep/big
    setfattr -n user.demo -v upper merged/demo/big
    equal "$(getfattr --only-values -n user.demo merged/demo/big 2>/dev/null)" upper "an xattr"
    say edited "100 MiB file written in the middle and at the end, xattr changed"

    for name in "${renames[@]}"; do
        mv "merged/$name" "merged/$name.renamed"
        [ ! -e "merged/$name" ] || fail "$name is still there after its rename"
        cmp "merged/$name.renamed" "keep/renames/$name" || fail "rename of $name"
    done
    mv merged/demo/plain merged/demo/moved
    [ ! -e merged/demo/plain ] || fail "a directory is still there after its rename"
    diff -r 1/demo/plain merged/demo/moved || fail "contents of a renamed directory"
    say renamed "${#renames[@]} files and a directory of $(count merged/demo/moved -type f) files"

    exec 9<"merged/demo/link-a"
    rm merged/demo/link-a
    equal "$(cat <&9)" "linked three times" "reading a deleted file that is open"
    exec 9<&-
    for name in "${removals[@]}"; do
        rm -f "merged/$name"
        [ ! -e "merged/$name" ] || fail "$name is still there"
    done
    rm -r merged/demo/returns merged/demo/opaque
    mkdir merged/demo/opaque
    equal "$(ls merged/demo/opaque)" "" "a directory removed and made again"
    echo again >merged/demo/opaque/again
    say deleted "$((${#removals[@]} + 1)) files and 2 directories, one of them made again, empty"

    # Directories until there are a thousand files in them.
    local chosen=(merged/etc merged/demo)
    for name in merged/usr/share/*/; do
        [ "$(count "${chosen[@]}" -type f)" -lt 1000 ] || break
        chosen+=("${name%/}")
    done
    chmod -R g-w,o-rwx "${chosen[@]}"
    equal "$(count "${chosen[@]}" ! -type l -perm /007)" 0 "files that chmod -R missed"
    say chmod "chmod -R changed $(count "${chosen[@]}" ! -type l) objects"

    mkdir -p merged/new/deep/er
    echo new >merged/new/deep/er/file
    ln merged/new/deep/er/file merged/new/link
    ln -s deep/er/file merged/new/symlink
    mkfifo merged/new/fifo
    touch -d '2200-01-01 00:00:00.123456789 UTC' merged/new/link
    cp -r /usr/share/doc/fuse3 merged/new/ 2>/dev/null || true
    equal "$(cat merged/new/symlink)" new "a new file"
    say created "$(count merged/new) objects in a new directory"

    sync -f merged/new
    manifest merged >union-live
    unmount_union umount merged
    mount_union
    manifest merged >union-after
    unmount_union ./lamina unmount merged
    trap - EXIT
    without_link_counts union-live >live
    without_link_counts union-after >after
    same live after "the tree after unmount and mount"
    say remounted "$(count upper) objects in upper; the tree is as it was before the unmount"

    say upper "$(count upper -type f) files, $(count upper -type d) directories, $(count upper -type c) whiteouts,\
 $(getfattr -R -h -m '^user\.overlay\.opaque$' upper 2>/dev/null | grep -c '^user') opaque marks, $(du -sm upper | cut -f 1) MiB; among them:"
    find upper -mindepth 1 \( -path 'upper/demo*' -o -path 'upper/new*' \) ! -path '*/fuse3/*' \
        ! -path '*/moved/*' -printf '           %M %s %P\n' | sort -k 3 | cut -c 1-100 | cat -v | head -n 25
    for name in 1 2 3 4; do
        manifest "$name" >now
        same "lower-$name" now "lower layer $name"
    done
    say lowers "unchanged: names, modes, owners, times, contents, xattrs of $(cat lower-? | wc -l) lines"
}

# ---- The run from outside: builds, becomes an ordinary user, cleans up. ----

# Runs a step in a new user and mount namespace as an ordinary user, in the directory of this run.
in_namespace() {
    local command=()
    if [ "$(id -u)" = 0 ]; then
        # The namespace must be made by somebody without privilege.
        command+=(setpriv --reuid 65534 --regid 65534 --clear-groups --)
    fi
    command+=(unshare -Urm --propagation private bash "$dir/demo.sh" --step "$@")
    # A process group of its own, so that a signal ends what the step has started, too.
    set -m
    (cd "$dir" && exec env -i PATH="$PATH" HOME="$dir" TMPDIR="$dir" "${command[@]}") &
    child=$!
    set +m
    local status=0
    wait "$child" || status=$?
    child=
    return "$status"
}

# Compares by a mount that root makes, with the tree still read as an ordinary user.
in_root_mount() {
    # shellcheck disable=SC2016 # expanded by the inner shell
    unshare -m --propagation private bash -c '
        set -eu
        cd "$1"
        mount -t overlay overlay kernel -o "userxattr,lowerdir=4:3:2:1,upperdir=$2,workdir=$3"
        setpriv --reuid 65534 --regid 65534 --clear-groups -- \
            unshare -Ur bash ./demo.sh --step manifest kernel "$4"
    ' - "$dir" "$@"
}

compare_with_kernel() {
    local upper=$1 work=$2 ours=$3 theirs=$4 what=$5 how="in the same kind of user namespace" status=0
    in_namespace kernel "$upper" "$work" "$theirs" || status=$?
    if [ $status = 3 ]; then
        local reason
        reason=$(head -n 1 "$dir/kernel-refuses")
        if [ "$(id -u)" != 0 ]; then
            say kernel "SKIPPED: kernel overlayfs cannot be mounted in a user namespace here: $reason"
            return 0
        fi
        say kernel "cannot mount overlayfs in a user namespace here ($reason); root mounts it"
        how="mounted by root"
        status=0
        in_root_mount "$upper" "$work" "$theirs" || status=$?
        if [ $status != 0 ]; then
            say kernel "SKIPPED: kernel overlayfs cannot be mounted by root either"
            return 0
        fi
    fi
    [ $status = 0 ] || fail "the kernel's manifest of $what"
    (cd "$dir" && same "$ours" "$theirs" "$what")
    say kernel "overlayfs $how shows the same tree, $what: $(wc -l <"$dir/$theirs") lines equal"
}

clean_up() {
    local status=$?
    trap - EXIT
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -TERM -- "-$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    if [ -n "$dir" ]; then
        # The kernel leaves a directory of mode 0 in its work directory.
        chmod -R u+rwx "$dir" 2>/dev/null || true
        rm -rf "$dir" || status=1
    fi
    exit "$status"
}

dir=
child=
case "${1-}" in
    "") ;;
    --step)
        case "${2-}" in
            layers) make_layers ;;
            union) read_and_change ;;
            kernel) show_kernel "$3" "$4" "$5" ;;
            manifest) manifest "$3" >"$4" ;;
            *) exit 2 ;;
        esac
        exit 0
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -n "${LAMINA_BIN-}" ]; then
    "$root/scripts/setup.sh" --no-build
else
    "$root/scripts/setup.sh"
    PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
    (cd "$root" && cargo build --release --locked --bin lamina)
    LAMINA_BIN=${CARGO_TARGET_DIR:-$root/target}/release/lamina
fi

PATH=$PATH:/usr/sbin:/sbin
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
started=$SECONDS
dir=$(mktemp -d "${TMPDIR:-/var/tmp}/lamina-demo.XXXXXX")
cp "$LAMINA_BIN" "$dir/lamina"
cp "${BASH_SOURCE[0]}" "$dir/demo.sh"
chmod 755 "$dir" "$dir/lamina" "$dir/demo.sh"
if [ "$(id -u)" = 0 ]; then
    chown -R 65534:65534 "$dir"
    say user "root started this; all that follows runs as user 65534 (nobody)"
fi
in_namespace layers
in_namespace union
compare_with_kernel upper-0 work-0 union-before kernel-before "lowers only"
compare_with_kernel upper work union-after kernel-after "with all changes"
say "done" "all checks passed in $((SECONDS - started)) s"
