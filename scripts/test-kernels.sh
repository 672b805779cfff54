#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/test-kernels.sh [-k KERNEL]... [SUITE...]

Runs suites of fuse-tests on other kernels, in virtual machines, as root; suites enter user namespaces by
themselves. In the guest runs an NFS server, for the tests that want one. Prints what was skipped and a
table. A guest is made of Debian packages alone, once, and kept in a cache directory; nothing is installed
here. A suite whose process is killed, or a guest that does not finish, is a failure.

  -k KERNEL   5.10, 6.1, 6.12 or 7; all of them unless given
  SUITE       names of fuse-tests, each with tests to run after a colon (SUITE:TEST), part of their names;
              merge posix_basic pitfalls_bugs pitfalls_more regressions users kernel_diff
              lesser_uppers filesystems unless given

Needs root to make guests, not to run them; the packages qemu-system-x86, mmdebstrap, busybox-static,
e2fsprogs, cpio, kmod, xz-utils, zstd, binutils.
Environment: LAMINA_BIN, a binary that runs on Debian 12; LAMINA_GUESTS, where guests are kept
(~/.cache/lamina-guests); GUEST_SECONDS, the limit for one kernel (7200); GUEST_ACCEL, kvm or tcg;
GUEST_MIRROR, a mirror of Debian; of fuse-tests: FUSE_TESTS_SEQUENCES (60), FUSE_TESTS_STACKS (20),
FUSE_TESTS_OPTIONS.
END
}

kernels=()
while getopts k:h option; do
    case $option in
        k) kernels+=("$OPTARG") ;;
        h)
            usage
            exit 0
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
done
shift $((OPTIND - 1))
[ ${#kernels[@]} -gt 0 ] || kernels=(5.10 6.1 6.12 7)
[ $# -gt 0 ] || set -- merge posix_basic pitfalls_bugs pitfalls_more regressions users kernel_diff lesser_uppers filesystems

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin
guests=${LAMINA_GUESTS:-${XDG_CACHE_HOME:-$HOME/.cache}/lamina-guests}
mkdir -p "$guests"
# shellcheck source=scripts/lib/frame.sh
. scripts/lib/frame.sh
qemu=
# shellcheck disable=SC2317
at_end() {
    [ -z "$qemu" ] || kill "$qemu" 2>/dev/null || true
}
scratch kernels

say() {
    printf 'kernels: %s\n' "$*"
}

missing=()
for program in qemu-system-x86_64 mmdebstrap busybox mke2fs cpio depmod xz zstd strip; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} -gt 0 ]; then
    say "skipped: not installed: ${missing[*]}"
    exit 0
fi

# package_of KERNEL: release of Debian and name of the package that has it.
package_of() {
    case $1 in
        5.10) echo bullseye linux-image-5.10.0-46-cloud-amd64 ;;
        6.1) echo bookworm linux-image-cloud-amd64 ;;
        6.12) echo bookworm linux-image-6.12-cloud-amd64 ;;
        7) echo forky linux-image-cloud-amd64 ;;
        *)
            printf 'kernels: there is no kernel %s\n' "$1" >&2
            exit 2
            ;;
    esac
}
for kernel in "${kernels[@]}"; do
    package_of "$kernel" >/dev/null
done

make_root() {
    local packages=acl,attr,bindfs,btrfs-progs,dosfstools,e2fsprogs,erofs-utils,fuse3,fuse-overlayfs,iproute2,kmod,libcap2-bin
    packages+=,nfs-common,nfs-kernel-server,openssh-sftp-server,procps,python3,quota,socat,sqlite3,squashfs-tools,sshfs
    packages+=,strace,uidmap,util-linux,xfsprogs
    say "making the root filesystem of the guests"
    # The shell of the hook knows the directory.
    # shellcheck disable=SC2016
    mmdebstrap --quiet --variant=apt --include="$packages" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook='chroot "$1" useradd --create-home --uid 1000 tests' \
        --customize-hook='echo user_allow_other >>"$1/etc/fuse.conf"' \
        --customize-hook='echo 127.0.0.1 localhost >"$1/etc/hosts"' \
        bookworm "$dir/root.tar" ${GUEST_MIRROR:+"$GUEST_MIRROR"}
    mkdir "$dir/root"
    tar -xpf "$dir/root.tar" -C "$dir/root"
    truncate -s 10G "$dir/root.img"
    mke2fs -q -t ext4 -E lazy_itable_init=1 -d "$dir/root" "$dir/root.img"
    rm -rf "$dir/root" "$dir/root.tar"
    mv "$dir/root.img" "$guests/root.img"
}

# make_kernel KERNEL: vmlinuz, and an initrd that loads all modules that the suites want.
make_kernel() {
    local release package version module number=100
    read -r release package < <(package_of "$1")
    say "fetching kernel $1 ($package of $release)"
    mkdir -p "$dir/kernel" "$dir/init/modules" "$dir/new"
    # The list of an archived release has expired.
    mmdebstrap --quiet --variant=extract --include="$package" --aptopt='Acquire::Check-Valid-Until "false"' \
        "$release" "$dir/kernel.tar" ${GUEST_MIRROR:+"$GUEST_MIRROR"}
    tar -xf "$dir/kernel.tar" -C "$dir/kernel" --no-same-owner --exclude='./dev/*'
    if [ -d "$dir/kernel/usr/lib/modules" ] && [ ! -d "$dir/kernel/lib/modules" ]; then
        mkdir -p "$dir/kernel/lib"
        mv "$dir/kernel/usr/lib/modules" "$dir/kernel/lib/modules"
    fi
    version=$(ls "$dir/kernel/lib/modules")
    depmod -b "$dir/kernel" "$version"
    cp "$(find "$dir/kernel/boot" "$dir/kernel/lib/modules/$version" -name 'vmlinuz*' | head -1)" "$dir/new/vmlinuz"
    # In an order in which they can be loaded.
    for module in virtio_pci virtio_blk virtio_console virtio_rng crc32c_generic ext4 loop fuse overlay xfs btrfs squashfs erofs \
        nls_cp437 nls_iso8859-1 nls_ascii vfat nfsd nfs nfsv3 nfsv4; do
        modprobe -d "$dir/kernel" -S "$version" --show-depends "$module" 2>/dev/null || true
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$dir/list"
    while read -r module; do
        number=$((number + 1))
        case $module in
            *.xz) xz -dc "$module" ;;
            *.zst) zstd -dcq "$module" ;;
            *) cat "$module" ;;
        esac >"$dir/init/modules/$number.ko"
    done <"$dir/list"
    cp "$(command -v busybox)" "$dir/init/busybox"
    cat >"$dir/init/init" <<'END'
#!/busybox sh
b=/busybox
$b mkdir -p /dev /proc /sys /root
$b mount -t devtmpfs none /dev
$b mount -t proc none /proc
$b mount -t sysfs none /sys
for module in /modules/*.ko; do $b insmod $module 2>/dev/null; done
tries=0
while [ ! -b /dev/vdb ] && [ $tries -lt 200 ]; do
    $b usleep 50000
    tries=$((tries + 1))
done
$b mount -t ext4 /dev/vda /root || $b poweroff -f
$b mkdir -p /root/in
$b tar -xf /dev/vdb -C /root/in
for point in dev proc sys; do $b mount --move /$point /root/$point; done
exec $b switch_root /root /in/start
END
    chmod 755 "$dir/init/init"
    (cd "$dir/init" && find . | cpio -o -H newc -R 0:0 --quiet | zstd -q >"$dir/new/initrd")
    rm -rf "${guests:?}/$1"
    mv "$dir/new" "$guests/$1"
    rm -rf "$dir"/{kernel,kernel.tar,init,list}
}

# What runs in the guest as process 1: the suites, then the end.
write_start() {
    {
        printf '#!/bin/bash\n'
        printf 'export FUSE_TESTS_SEQUENCES=%q FUSE_TESTS_STACKS=%q FUSE_TESTS_OPTIONS=%q\n' \
            "${FUSE_TESTS_SEQUENCES:-60}" "${FUSE_TESTS_STACKS:-20}" "${FUSE_TESTS_OPTIONS-}"
        cat <<'END'
exec </dev/null >/dev/console 2>&1
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 LAMINA_BIN=/in/lamina RUST_BACKTRACE=0
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ln -sfn /proc/self/fd /dev/fd
ln -sfn /proc/self/mounts /etc/mtab
ip link set lo up
chmod 666 /dev/fuse
chmod 755 /in
for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" != out ] || exec 3>"/dev/${port##*/}"
done

start_nfs() {
    mkdir -p /run/rpcbind /var/lib/nfs/v4recovery /var/lib/nfs/sm
    mount -t nfsd nfsd /proc/fs/nfsd || return 1
    rpcbind -w
    rpc.statd --no-notify
    for file in lease grace; do echo 10 >/proc/fs/nfsd/nfsv4${file}time; done
    rpc.mountd
    rpc.nfsd -V 3 -V 4 -V 4.2 4 || return 1
    # Linux 7 refuses that for a while; then the grace period takes its ten seconds.
    echo Y >/proc/fs/nfsd/v4_end_grace || true
}
if start_nfs; then
    export FUSE_TESTS_NFS=1
else
    echo "SKIP 0: start: NFS: the server does not start" >&3
fi
export FUSE_TESTS_SKIP_LOG=/skips
: >/skips
chmod 666 /skips
while read -r suite filter; do
    started=$SECONDS
    "/in/suites/$suite" $filter 2>&1 | tee /log | sed -u "s/^/LOG $suite /" >&3
    status=${PIPESTATUS[0]}
    echo "RESULT $(uname -r) $suite $status $(sed -n 's/^test result: [^.]*\. \(.*\); 0 ignored.*/\1/p' /log | tail -1), $((SECONDS - started)) s" >&3
done </in/list
cat /skips >&3
sync
echo o >/proc/sysrq-trigger
sleep 100
END
    } >"$dir/in/start"
    chmod 755 "$dir/in/start"
}

[ -e "$guests/root.img" ] || make_root
if [ -z "${LAMINA_BIN-}" ]; then
    cargo build --release --locked --bin lamina
    LAMINA_BIN=${CARGO_TARGET_DIR:-$PWD/target}/release/lamina
fi
mkdir -p "$dir/in/suites"
strip -o "$dir/in/lamina" "$LAMINA_BIN"
for suite in "$@"; do
    filter=
    case $suite in *:*) filter=${suite#*:} ;; esac
    suite=${suite%%:*}
    printf '%s %s\n' "$suite" "$filter" >>"$dir/in/list"
    binary=$(cargo test -p fuse-tests --locked --no-run --test "$suite" --message-format json 2>/dev/null |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1)
    strip -o "$dir/in/suites/$suite" "$binary"
done
write_start
tar -cf "$dir/in.tar" --owner=0 --group=0 -C "$dir/in" .

# A paravirtual kvm has the device, but cannot run a kernel that does not know it.
accel=${GUEST_ACCEL:-tcg}
if [ -z "${GUEST_ACCEL-}" ] && [ -w /dev/kvm ]; then
    if [ -d /sys/module/kvm_intel ] || [ -d /sys/module/kvm_amd ]; then accel=kvm; fi
fi
cpu=host
[ "$accel" = kvm ] || { accel=tcg,thread=multi cpu=max; }

status=0
for kernel in "${kernels[@]}"; do
    [ -e "$guests/$kernel/vmlinuz" ] || make_kernel "$kernel"
    say "$kernel: $* ($accel)"
    : >"$dir/out"
    # What it says of tsc and the timer keeps emulated processors from going astray on a busy machine.
    timeout -k 5 "${GUEST_SECONDS:-7200}" qemu-system-x86_64 -accel "$accel" -cpu "$cpu" -M q35 -m 2G -smp 2 \
        -nodefaults -no-user-config -display none -nic none -no-reboot -serial "file:$dir/console" \
        -kernel "$guests/$kernel/vmlinuz" -initrd "$guests/$kernel/initrd" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check" \
        -drive "if=virtio,format=raw,file=$guests/root.img,snapshot=on,cache=unsafe" \
        -drive "if=virtio,format=raw,file=$dir/in.tar,readonly=on" \
        -device virtio-serial -chardev "file,id=out,path=$dir/out" -device virtserialport,chardev=out,name=out \
        -object rng-random,id=rng,filename=/dev/urandom -device virtio-rng,rng=rng </dev/null >"$dir/qemu" 2>&1 &
    qemu=$!
    wait "$qemu" || say "$kernel: qemu ended with status $?"
    qemu=
    awk '$1 == "RESULT" && $4 != 0 { print $3 }' "$dir/out" |
        while read -r suite; do sed -n "s/^LOG $suite //p" "$dir/out"; done
    sed -nE 's/^SKIP [0-9]+: ([^:]+: )?(SKIP [0-9]+: [^:]+: )?/kernels: skipped: /p' "$dir/out" | sort | uniq -c
    cat "$dir/out" >>"$dir/all"
    [ "$(grep -c '^RESULT' "$dir/out")" = $# ] || {
        say "$kernel: the guest did not finish"
        tail -n 20 "$dir/console" "$dir/qemu"
        status=1
    }
    if grep -qE 'BUG:|Oops|Call Trace|blocked for more than' "$dir/console"; then
        say "$kernel: the kernel complained"
        grep -E -A 20 'BUG:|Oops|WARNING:|blocked for more than' "$dir/console" | head -60
    fi
done
printf '\n%-28s %-18s %s\n' kernel suite result
while read -r _ version suite code rest; do
    [ "$code" = 0 ] || status=1
    printf '%-28s %-18s %s %s\n' "$version" "$suite" "$([ "$code" = 0 ] && echo ok || echo FAILED)" "$rest"
done < <(grep '^RESULT' "$dir/all")
exit "$status"
