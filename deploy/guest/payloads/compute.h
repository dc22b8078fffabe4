/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of compute.elf share. */
#pragma once
#include "burn.h"
#include "cpu.h"

/* One vCPU's block: the first part as burn.h has it. */
struct block {
	u64 gpr[16];
	s64 st[8];
	u64 xmm[32];
	u64 out_gpr[16];
	s64 out_st[8];
	u64 out_xmm[32];
	u64 evolve, hold, rsp;
	u32 mxcsr, fcw;
	/* B_SIZE */
	u64 cpu, round, digest, io, mmio;
	const char *what;	/* the first failed check */
	u64 expected, found;
	u8 buffer[64];
};
_Static_assert(__builtin_offsetof(struct block, cpu) == B_SIZE, "burn.h");

/* Notes the first difference; the kernel part reports it. */
void check(struct block *b, const char *what, u64 expected, u64 found);

/* Port and MMIO accesses with their checks; at CPL 0 and at CPL 3. */
void io_round(struct block *b);
