# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2154 # guest_dir, images and kind are set by prepare.sh
#
# Sourced by prepare.sh: the initramfs. Not compressed, since a kernel that runs in an emulator unpacks slowly.
# /init is the workload itself (workload/init.rs does the mounts): no shell, no fork, no exec before its first line.
#
# Two of them: workload.cpio has the workload alone, initramfs.cpio has busybox besides, for commands on the kernel's
# command line. Unpacking busybox takes 1.6 s in the emulator, so tests that need no shell take the first.

# Small, since every page is copied at boot, and without relocations, since every one is a page fault at start.
readonly rust_flags=(--edition=2024 -C opt-level=2 -C panic=abort -C strip=symbols -C target-feature=+crt-static
    -C lto=fat -C codegen-units=1 -C relocation-model=static)

# In the checkout, so that a toolchain file there is heeded. An installer of Rust need not have touched PATH.
rust_compiler() { (cd "$guest_dir" && PATH=$PATH:${HOME:-}/.cargo/bin rustc "$@"); }

initramfs_name() {
    local key
    key=$({
        version_of rust_compiler -V
        package_version busybox-static
        hash_files "$guest_dir"/workload/*.rs "$guest_dir/lib/initramfs.sh"
        [ "$kind" = small ] || { stock_name; cat "$guest_dir/lib/stock.sh"; }
    } | short_hash)
    echo "initramfs-$key"
}

initramfs() {
    rust_compiler -V >/dev/null || die "no rustc on PATH or in ~/.cargo/bin"
    need_packages busybox-static
    [ "$kind" = small ] || stock_kernel
    local name
    name=$(initramfs_name)
    publish "$name" initramfs_build
}

initramfs_build() {
    local out=$1 root=$1/root
    need_packages busybox-static cpio gcc libc6-dev
    mkdir -p "$root"/{dev,proc,sys,tmp}
    rust_compiler "${rust_flags[@]}" -o "$root/init" workload/workload.rs
    [ "$kind" = small ] || stock_modules "$root"
    initramfs_pack "$root" "$out/workload.cpio"
    mkdir "$root/bin"
    cp /bin/busybox "$root/bin/busybox"
    ln -s busybox "$root/bin/sh"
    initramfs_pack "$root" "$out/initramfs.cpio"
    rm -rf "$root"
}

# Fixed stamps, order, owners: the same key gives the same bytes.
initramfs_pack() {
    find "$1" -exec touch -h -d @0 {} +
    (cd "$1" && find . -mindepth 1 -printf '%P\n' | LC_ALL=C sort |
        cpio --quiet --reproducible -o -H newc -R 0:0) >"$2"
}
