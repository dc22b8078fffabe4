/* SPDX-License-Identifier: Apache-2.0 */
/* What a 64-bit payload can ask of the machine. */
#pragma once
#include "layout.h"
#include "lib.h"

/* Vectors; anything else that arrives is an error. */
#define VEC_ONESHOT	0x40
#define VEC_PERIODIC	0x41
#define VEC_PIT		0x42
#define VEC_DEADLINE	0x43
#define VEC_COM1	0x44
#define VEC_SPURIOUS	0xff

#define LAPIC_LVT_MASKED	0x10000
#define LAPIC_LVT_PERIODIC	0x20000
#define LAPIC_LVT_DEADLINE	0x40000

extern u32 mb_magic, mb_info, map_gib;
extern volatile u64 irq_count[MAX_CPUS][8];	/* by vector - 0x40 */

/* Given by the payload. */
void payload_main(void);
void payload_irq(u32 cpu, u32 vector);

static inline u64 rdmsr(u32 msr)
{
	u32 lo, hi;
	asm volatile("rdmsr" : "=a"(lo), "=d"(hi) : "c"(msr));
	return lo | (u64)hi << 32;
}
static inline void wrmsr(u32 msr, u64 v)
{
	asm volatile("wrmsr" :: "a"((u32)v), "d"((u32)(v >> 32)), "c"(msr) : "memory");
}
static inline u64 rdtsc(void)
{
	u32 lo, hi;
	asm volatile("rdtsc" : "=a"(lo), "=d"(hi));
	return lo | (u64)hi << 32;
}

static inline struct mb_info *mb(void) { return (struct mb_info *)(uptr)mb_info; }
const char *cmdline(void);
int ram_covers(u64 start, u64 length);

u32 this_cpu(void);
void lock(void);
void unlock(void);

/* Starts CPUs 1..count-1 (APIC ids are the indexes), runs fn on all, this one
 * included, and returns when all are through. `started`, if given, is called
 * on this CPU when all have come up and before any enters fn. */
void cpus_run(u32 count, void (*fn)(u32 cpu), void (*started)(void));

/* Runs fn(arg) at CPL 3 on this CPU's user stack, with interrupts on. The ports
 * of COM1 are open to it by the TSS's bitmap. */
void run_user(void (*fn)(void *), void *arg);

void lapic_write(u32 reg, u32 v);
u32 lapic_read(u32 reg);
void ioapic_route(u32 pin, u32 vector);	/* edge, to the boot CPU */
void pit_oneshot(u32 count);

u64 scramble(u64 x);			/* the finaliser of splitmix64 */
#define GOLDEN 0x9e3779b97f4a7c15ull
