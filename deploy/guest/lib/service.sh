# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2154 # guest_dir, images and kind are set by prepare.sh
#
# Sourced by prepare.sh: a guest with a real service. service.img is an ext4 file system with Redis and its libraries,
# as Debian packs them; service.cpio is an initramfs whose /init (service/) mounts it and runs what is in it.
#
# The programs are on the disk: an initramfs is unpacked whole before the first process, at 0.8 s per MB in the emulator,
# and stays in memory; of the disk only what runs is read.

# The server and what its libraries need. Redis-server itself is scripts and a link to the program in redis-tools.
readonly service_packages=(redis-server redis-tools libatomic1 libc6 libcap2 libgcc-s1 libgcrypt20 libgpg-error0
    libjemalloc2 liblz4-1 liblzf1 liblzma5 libssl3 libstdc++6 libsystemd0 libzstd1)
readonly service_disk_bytes=$((256 << 20))
# Fixed, as all that mkfs.ext4 would draw or read from the clock: the same key gives the same bytes.
readonly service_uuid=c0100000-0000-4000-8000-000000000001

# Names and versions as apt wants to be asked for them. Once a run: apt takes a third of a second for it.
service_find() {
    [ -z "${service_known:-}" ] || return 0
    service_known=$(service_versions)
    if [ -z "$service_known" ]; then
        as_root apt-get update >&2 || true
        service_known=$(service_versions)
    fi
}

# Nothing if one of them is unknown.
service_versions() {
    local known
    known=$(apt-cache show --no-all-versions "${service_packages[@]}" 2>/dev/null |
        awk '/^Package: /{ name = $2 } /^Version: /{ print name "=" $2 }' | LC_ALL=C sort) || return 0
    [ "$(grep -c . <<<"$known")" -ne ${#service_packages[@]} ] || echo "$known"
}

service_disk_name() {
    local key
    key=$({
        echo "$service_known"
        package_version e2fsprogs
        hash_files "$guest_dir/service/redis.conf" "$guest_dir/lib/service.sh"
    } | short_hash)
    echo "service-disk-$key"
}

service_init_name() {
    local key
    key=$({
        version_of rust_compiler -V
        hash_files "$guest_dir"/service/*.rs "$guest_dir"/workload/{chain,init,sys}.rs
        hash_files "$guest_dir/lib/initramfs.sh" "$guest_dir/lib/service.sh"
        [ "$kind" = small ] || { stock_name; cat "$guest_dir/lib/stock.sh"; }
    } | short_hash)
    echo "service-init-$key"
}

service() {
    rust_compiler -V >/dev/null || die "no rustc on PATH or in ~/.cargo/bin"
    # The key needs its version.
    need_packages e2fsprogs
    service_find
    [ -n "$service_known" ] ||
        die "apt does not know all of ${service_packages[*]}; run apt-get update as root, and see that Debian's main archive is in its sources"
    [ "$kind" = small ] || stock_kernel
    local disk init
    disk=$(service_disk_name)
    init=$(service_init_name)
    publish "$disk" service_disk_build
    publish "$init" service_init_build
}

service_init_build() {
    local out=$1 root=$1/root
    need_packages cpio gcc libc6-dev
    mkdir -p "$root"/{dev,proc,sys,disk}
    rust_compiler "${rust_flags[@]}" -o "$root/init" service/service.rs
    [ "$kind" = small ] || stock_modules "$root"
    initramfs_pack "$root" "$out/service.cpio"
    rm -rf "$root"
}

service_disk_build() {
    local out=$1 unpack=$1/unpack root=$1/root image=$1/service.img
    need_packages dpkg e2fsprogs
    service_unpack "$unpack"
    service_root "$unpack" "$root"
    truncate -s "$service_disk_bytes" "$image"
    service_format "$image" "$root"
    e2fsck -fn "$image" >&2 || die "the new file system in $image is not clean"
    rm -rf "$unpack" "$root"
}

# Nothing is installed: the packages are only taken apart.
service_unpack() {
    local unpack=$1 versions package
    mkdir -p "$unpack/packages" "$unpack/root"
    readarray -t versions <<<"$service_known"
    (cd "$unpack/packages" && apt-get download -q -o APT::Sandbox::User=root "${versions[@]}" >&2) ||
        die "cannot download ${versions[*]}"
    for package in "$unpack"/packages/*.deb; do dpkg-deb -x "$package" "$unpack/root"; done
}

# What the server's program loads, by its loader's own word, and nothing else of the packages.
service_root() {
    local from=$1/root root=$2 libraries=lib/x86_64-linux-gnu loader=lib64/ld-linux-x86-64.so.2 needed library
    mkdir -p "$root"/{dev,etc,lib64,proc,tmp,usr/bin,var/lib/redis} "$root/$libraries"
    cp -L "$from/usr/bin/redis-server" "$root/usr/bin/"
    cp -L "$from/$loader" "$root/$loader"
    cp "$guest_dir/service/redis.conf" "$root/etc/"
    needed=$("$from/$loader" --library-path "$from/usr/$libraries:$from/$libraries" --list "$from/usr/bin/redis-server") ||
        die "redis-server lacks a library: $needed"
    awk '$2 == "=>" { print $3 }' <<<"$needed" | while read -r library; do
        # Anything else is the host's library, which has no place in the key.
        case $library in
            "$from"/*) cp -L "$library" "$root/$libraries/" ;;
            *) die "redis-server needs $library, which none of the packages has: add its package to service_packages" ;;
        esac
    done
    find "$root" -exec touch -h -d @0 {} +
}

# An ext4 like any other, with its journal and checksums. Tables are written at once, which in a new file are holes: a
# guest that wrote them later would be busy with it for its first minutes. An error makes it read-only, which is seen.
service_format() {
    E2FSPROGS_FAKE_TIME=1 mkfs.ext4 -q -F -b 4096 -I 256 -N 4096 -L colo-service -U "$service_uuid" -e remount-ro \
        -E "hash_seed=$service_uuid,root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0" -d "$2" "$1" >&2
    # What it takes over from the files of whoever builds: some stamps, which no tool can set there, and the owner.
    local field
    for field in ctime ctime_extra atime atime_extra mtime_extra uid gid; do
        find "$2" -mindepth 1 -printf "sif /%P $field 0\n"
    done | E2FSPROGS_FAKE_TIME=1 debugfs -w -f - "$1" >/dev/null 2>&1 || die "debugfs cannot set stamps and owners in $1"
}
