#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: scripts/bench-archive.sh [FILES [MIB]]

Measures layers from archives and back, as ratios to tar on the same machine:

  diff, changes      ten changed files over a base of FILES files (100000)
  commit             the same changes from a container's layer into a layer of the store
  apply              a layer of MIB mebibytes (1024), beside tar -x, and podman load if there is podman

Prints the best of five runs each (three for apply), warm cache. Needs root and kernel overlay.
Environment: LAMINA_BIN, the binary; BENCH_DIR, where the data goes (/var/tmp).
END
}

case "${1-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac

files=${1:-100000}
mib=${2:-1024}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
if [ -z "${LAMINA_BIN-}" ]; then
    cargo build --release --locked --bin lamina
    LAMINA_BIN=${CARGO_TARGET_DIR:-$PWD/target}/release/lamina
fi

dir=$(mktemp -d "${BENCH_DIR:-/var/tmp}/lamina-bench.XXXXXX")
clean_up() {
    umount "$dir/merged" 2>/dev/null || true
    rm -rf "$dir"
}
trap clean_up EXIT
cd "$dir"

# Prints the least milliseconds that a command took in so many runs; $1 runs, $2 what is removed before each.
best() {
    local runs=$1 remove=$2 least=
    shift 2
    for _ in $(seq "$runs"); do
        rm -rf "$remove"
        sync
        local start end
        start=$(date +%s%N)
        "$@" >/dev/null
        end=$(date +%s%N)
        local took=$(((end - start) / 1000))
        if [ -z "$least" ] || [ "$took" -lt "$least" ]; then
            least=$took
        fi
    done
    printf '%d.%03d\n' $((least / 1000)) $((least % 1000))
}

ratio() {
    awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'
}

mkdir base upper work merged
awk -v n="$files" 'BEGIN { for (i = 0; i < n; i++) printf "d%d/s%d/f%d\n", i % 100, int(i / 100) % 10, i }' >list
sed 's,/[^/]*$,,' list | sort -u | sed 's,^,base/,' | xargs mkdir -p
(cd base && xargs touch <../list)
mount -t overlay overlay -o lowerdir=base,upperdir=upper,workdir=work merged
for n in 1 2 3 4 5 6 7 8 9 10; do
    head -c 10000 /dev/urandom >"merged/d$n/s0/changed"
done
umount merged
find base -type f | wc -l >/dev/null

tar=$(best 5 none tar -C upper -cf tar.tar .)
diff=$(best 5 none "$LAMINA_BIN" layer diff --lower base -O diff.tar upper)
changes=$(best 5 none "$LAMINA_BIN" layer changes --lower base upper)
printf 'tar of the ten changed files    %8s ms\n' "$tar"
printf 'layer diff, %6d files below  %8s ms   %s times tar\n' "$files" "$diff" "$(ratio "$diff" "$tar")"
printf 'layer changes                   %8s ms\n' "$changes"

place=(--root "$dir/store" --runroot "$dir/store-run" --storage-opt overlay.skip_mount_home=true)
"$LAMINA_BIN" store init "${place[@]}"
"$LAMINA_BIN" layer create "${place[@]}" base
cp -al base/. store/overlay/base/diff/
"$LAMINA_BIN" layer create-rw "${place[@]}" --parent base work
cp -a upper/. store/overlay/work/diff/
commit() {
    "$LAMINA_BIN" layer diff "${place[@]}" --id work |
        "$LAMINA_BIN" layer apply "${place[@]}" --id "new-$(date +%N)" --parent base -
}
printf 'commit: diff into apply         %8s ms\n' "$(best 5 none commit)"

mkdir tree
each=$((mib / 4))
for n in 1 2 3 4; do
    mkdir "tree/$n"
    head -c $((each * 1048576 / 2)) /dev/urandom >"tree/$n/large"
    head -c $((each * 1048576 / 2)) /dev/urandom | split -a 4 -b 65536 - "tree/$n/f"
done
tar -C tree -cf layer.tar .
cat layer.tar >/dev/null
mkdir to
untar=$(best 3 to sh -c 'mkdir to && tar -C to -xpf layer.tar')
apply=$(best 3 to "$LAMINA_BIN" layer apply --to to layer.tar)
printf 'tar -x of %5d MiB              %8s ms\n' "$mib" "$untar"
printf 'layer apply                     %8s ms   %s times tar\n' "$apply" "$(ratio "$apply" "$untar")"

if command -v podman >/dev/null; then
    export CONTAINERS_STORAGE_CONF=$dir/storage.conf
    printf '[storage]\ndriver="overlay"\ngraphroot="%s/root"\nrunroot="%s/run"\n' "$dir" "$dir" >storage.conf
    podman import -q layer.tar localhost/bench >/dev/null
    podman save -q -o image.tar localhost/bench
    podman rmi -f localhost/bench >/dev/null
    load=$(best 1 none podman load -q -i image.tar)
    printf 'podman load                     %8s ms   layer apply takes %s of it\n' "$load" "$(ratio "$apply" "$load")"
    podman system reset -f >/dev/null 2>&1 || true
    umount "$dir/root/overlay" 2>/dev/null || true
fi
