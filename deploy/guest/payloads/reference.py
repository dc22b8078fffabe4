#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the payloads should find, computed without them.

reference.py result ROUNDS SEED CPUS   the result of compute.elf, 16 hex digits
reference.py module LENGTH             a module for dirty.elf's module=1, to stdout
reference.py table                     the table of README.md
"""

import struct
import sys

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def scramble(x):
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def rol(x, n):
    return ((x << n) | (x >> (64 - n))) & MASK


def mix(d, v):
    return ((rol(d, 5) ^ v) * GOLDEN) & MASK


def double(bits):
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def bits(x):
    return struct.unpack("<Q", struct.pack("<d", x))[0]


def user(d, key):
    v = [scramble(key + (i + 1) * GOLDEN) for i in range(56)]
    r = v[:16]
    r[4] &= 0x7FFFFFFFFFF8
    s = [(x & 0xFFFFFFFF) - ((x & 0x80000000) << 1) if i & 1 else x >> 3 for i, x in enumerate(v[16:24])]
    x = v[24:]
    for i in range(16):
        x[i] = bits(0.5) if i in (6, 7) else 0x3FF0000000000000 | x[i] >> 12

    ax, bx, dx, si, di, r8, r9 = r[0], r[3], r[2], r[6], r[7], r[8], r[9]
    for _ in range(1024):
        ax = (ax * 0x5851F42D + bx) & MASK
        dx = rol(dx ^ ax, 7)
        si = (si + dx) & MASK
        di = rol((di - si) & MASK, 53)
        r8 ^= di
        r9 = (r9 + r8 + 1) & MASK
    r[0], r[2], r[6], r[7], r[8], r[9] = ax, dx, si, di, r8, r9

    a, b, c, e = s[0], s[2], s[4], s[6]
    s1, s3, s5, s7 = s[1], s[3], s[5], s[7]
    for _ in range(1024):
        a, b = b - s3, a + s1
        a, c = c + s5, a
        a, e = -(e - s7), a
    s[0], s[2], s[4], s[6] = a, b, c, e

    for lane in range(2):
        f = [double(x[2 * i + lane]) for i in range(8)]
        n9, n10, n11 = x[18 + lane], x[20 + lane], x[22 + lane]
        x0, x2, x5 = f[0], f[2], f[5]
        for _ in range(1024):
            x0 += f[1]
            x2 = x2 * f[3] - f[4]
            x5 = f[6] / x5 + f[7]
            x0 += x2
            x0 += x5
            n9 = (n9 + n10) & MASK
            n11 ^= n9
        x[lane], x[4 + lane], x[10 + lane], x[16 + lane] = bits(x0), bits(x2), bits(x5), bits(x5)
        x[18 + lane], x[22 + lane] = n9, n11
    for value in r + s + x:
        d = mix(d, value & MASK)
    return d


def kernel(x):
    for _ in range(64):
        x = (x * 0x5851F42D4C957F2D + 0x14057B7EF767814F) & MASK
        x ^= x >> 29
        x = rol(x, 17)
    return x


def vcpu(rounds, seed, cpu):
    d = scramble(seed + (cpu + 1) * GOLDEN)
    past = []
    for n in range(rounds):
        d = user(d, scramble(scramble(scramble(seed) + cpu) + n))
        d = mix(d, kernel(d))
        d = mix(d, 1)
        if n >= 64:
            d = mix(d, scramble(past[n - 64]))
        past.append(d)
    return d


def result(rounds, seed, cpus):
    d = scramble(seed)
    for cpu in range(cpus):
        d = mix(d, vcpu(rounds, seed, cpu))
    return d


def module(length):
    x, out = length, bytearray()
    for _ in range(length):
        x = (x * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(x >> 24)
    return bytes(out)


def main(argv):
    if argv[1:2] == ["result"] and len(argv) == 5:
        print("%016x" % result(*(int(a, 0) for a in argv[2:])))
    elif argv[1:2] == ["module"] and len(argv) == 3:
        sys.stdout.buffer.write(module(int(argv[2], 0)))
    elif argv[1:] == ["table"]:
        for row in ((1, 1, 1), (16, 1, 1), (64, 1, 1), (64, 1, 2), (128, 7, 2), (256, 42, 1), (1000, 1, 1), (1000, 1, 2)):
            print("| %d | %d | %d | `%016x` |" % (row + (result(*row),)))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv)
