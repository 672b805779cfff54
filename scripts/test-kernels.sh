#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/test-kernels.sh [-k KERNEL]... [SUITE...]

Runs suites of fuse-tests in virtual machines with other kernels, as root (suites enter user
namespaces by themselves), and prints a table. A guest is made of Debian packages alone, once, and
kept in a cache directory; nothing is installed here. Needs root to make guests, not to run them.

  -k KERNEL   5.10, 6.1, 6.12 or 7; all of them unless given
  SUITE       names of fuse-tests; merge posix_basic pitfalls_bugs kernel_diff unless given

Needs: qemu-system-x86, mmdebstrap, busybox-static, e2fsprogs, cpio, kmod, xz-utils, zstd.
Environment: LAMINA_BIN, a binary that runs on Debian 12; LAMINA_GUESTS, where guests are kept
(~/.cache/lamina-guests); GUEST_SECONDS, the limit for one kernel (3600); GUEST_ACCEL, kvm or tcg.
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
[ $# -gt 0 ] || set -- merge posix_basic pitfalls_bugs kernel_diff

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin
guests=${LAMINA_GUESTS:-${XDG_CACHE_HOME:-$HOME/.cache}/lamina-guests}
mkdir -p "$guests"
dir=$(mktemp -d /var/tmp/lamina-kernels.XXXXXX)
qemu=
# shellcheck disable=SC2317
clean_up() {
    local status=$?
    trap - EXIT
    [ -z "$qemu" ] || kill "$qemu" 2>/dev/null || true
    rm -rf "$dir" || status=1
    exit "$status"
}
trap 'exit 130' INT
trap 'exit 143' TERM
trap clean_up EXIT

say() {
    printf 'kernels: %s\n' "$*"
}

missing=()
for program in qemu-system-x86_64 mmdebstrap busybox mke2fs cpio depmod xz zstd; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} -gt 0 ]; then
    say "skipped: not installed: ${missing[*]}"
    exit 0
fi

# package_of KERNEL: suite and name of the package with that kernel.
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

make_root() {
    say "making the root filesystem of the guests"
    # The shell of the hook knows the directory.
    # shellcheck disable=SC2016
    mmdebstrap --quiet --variant=apt --include=acl,attr,e2fsprogs,fuse3,kmod,libcap2-bin,procps,python3,uidmap,util-linux \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook='chroot "$1" useradd --create-home --uid 1000 tests' bookworm "$dir/root.tar"
    mkdir "$dir/root"
    tar -xpf "$dir/root.tar" -C "$dir/root"
    truncate -s 8G "$dir/root.img"
    mke2fs -q -t ext4 -d "$dir/root" "$dir/root.img"
    rm -rf "$dir/root" "$dir/root.tar"
    mv "$dir/root.img" "$guests/root.img"
}

make_kernel() {
    local suite package version modules module
    read -r suite package < <(package_of "$1")
    say "fetching kernel $1 ($package of $suite)"
    mkdir -p "$dir/kernel" "$dir/init/modules"
    mmdebstrap --quiet --variant=extract --include="$package" \
        --aptopt='Acquire::Check-Valid-Until "false"' "$suite" "$dir/kernel.tar"
    tar -xf "$dir/kernel.tar" -C "$dir/kernel" --no-same-owner --exclude='./dev/*'
    if [ -d "$dir/kernel/usr/lib/modules" ]; then
        mkdir -p "$dir/kernel/lib"
        mv "$dir/kernel/usr/lib/modules" "$dir/kernel/lib/modules"
    fi
    version=$(ls "$dir/kernel/lib/modules")
    modules=$dir/kernel/lib/modules/$version
    depmod -b "$dir/kernel" "$version"
    mkdir "$dir/new"
    cp "$(find "$dir/kernel/boot" "$modules" -name "vmlinuz*" 2>/dev/null | head -1)" "$dir/new/vmlinuz"
    # All that the suites may want, in the order in which they can be loaded.
    for module in virtio_pci virtio_blk virtio_console ext4 fuse overlay loop xfs btrfs squashfs erofs; do
        modprobe -d "$dir/kernel" -S "$version" --show-depends "$module" 2>/dev/null || true
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$dir/list"
    local number=100
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
    cat >"$dir/in/start" <<'END'
#!/bin/bash
exec </dev/null >/dev/console 2>&1
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 LAMINA_BIN=/in/lamina RUST_BACKTRACE=0
export FUSE_TESTS_SEQUENCES=${FUSE_TESTS_SEQUENCES:-60} FUSE_TESTS_STACKS=${FUSE_TESTS_STACKS:-20}
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sfn /proc/self/fd /dev/fd
chmod 666 /dev/fuse
chmod 755 /in
exec 3>/dev/vport0p1 || exec 3>/dev/virtio-ports/out
for suite in /in/suites/*; do
    "$suite" --test-threads 2 >/log 2>&1
    status=$?
    echo "RESULT $(uname -r) ${suite##*/} $status $(sed -n 's/^test result: [^.]*\. //p' /log | tail -1)" >&3
    [ $status = 0 ] || cat /log >&3
    grep -h '^SKIP' /log >&3
done
sync
echo o >/proc/sysrq-trigger
sleep 100
END
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
cpu=max
[ "$accel" = tcg ] && accel=tcg,thread=multi || cpu=host

status=0
for kernel in "${kernels[@]}"; do
    [ -e "$guests/$kernel/vmlinuz" ] || make_kernel "$kernel"
    say "$kernel: $* ($accel)"
    : >"$dir/out"
    timeout -k 5 "${GUEST_SECONDS:-3600}" qemu-system-x86_64 -accel "$accel" -cpu "$cpu" -M q35 -m 2G -smp 2 \
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
    grep -v '^SKIP' "$dir/out" | grep -v '^RESULT' || true
    sed -nE 's/^SKIP [0-9]+: [^:]+: /kernels: skipped: /p' "$dir/out" | sort | uniq -c
    cat "$dir/out" >>"$dir/all"
    [ "$(grep -c '^RESULT' "$dir/out")" = $# ] || {
        say "$kernel: the guest did not finish"
        tail -20 "$dir/console" "$dir/qemu"
        status=1
    }
done
printf '\n%-28s %-18s %s\n' kernel suite result
while read -r _ version suite code rest; do
    [ "$code" = 0 ] || status=1
    printf '%-28s %-18s %s %s\n' "$version" "$suite" "$([ "$code" = 0 ] && echo ok || echo FAILED)" "$rest"
done < <(grep '^RESULT' "$dir/all")
exit "$status"
