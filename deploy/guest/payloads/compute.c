/* SPDX-License-Identifier: Apache-2.0 */
/* compute.elf: a result that comes out right only if every register, timer,
 * interrupt, port access and page of the guest lives through whatever is done to
 * it. README.md defines the digest, reference.py computes it elsewhere. */
#include "compute.h"

#define PAGES	0x400000ul	/* RING pages for each vCPU */
#define RING	64
#define WORDS	16

struct state {
	struct block block;
	u64 history[RING];
} __attribute__((aligned(4096)));

static u64 rounds, seed, cpus, io, verbose, hold, tick, mmio;
static u64 results[MAX_CPUS];
static int has_deadline;
static struct state *states;

void burn(void);
u64 kernel_mix(u64 x, const u64 *sentinels, u64 *found);

static inline u64 mix(u64 d, u64 v)
{
	return ((d << 5 | d >> 59) ^ v) * GOLDEN;
}

/* Runs at CPL 3 too: no printing, no privileged instruction. */
void check(struct block *b, const char *what, u64 expected, u64 found)
{
	if (b->what || expected == found)
		return;
	b->what = what;
	b->expected = expected;
	b->found = found;
}

static u64 block_key(const struct block *b)
{
	return scramble(scramble(scramble(seed) + b->cpu) + b->round);
}

static void user_round(void *arg)
{
	static const char *const gpr[16] = {
		"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
		"r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
	};
	static const char *const st[8] = { "st0", "st1", "st2", "st3", "st4", "st5", "st6", "st7" };
	static const char *const xmm[16] = {
		"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
		"xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
	};
	struct block *b = arg;
	u64 key = block_key(b), d = b->digest, v;
	int i;

	for (i = 0; i < 56; i++) {
		v = scramble(key + (i + 1) * GOLDEN);
		if (i < 16) {
			b->gpr[i] = i == 4 ? v & 0x7ffffffffff8 : v;
		} else if (i < 24) {
			b->st[i - 16] = i & 1 ? (s64)(int)(u32)v : (s64)(v >> 3);
		} else {
			int x = (i - 24) / 2;

			if (x < 8)
				v = x == 3 ? 0x3fe0000000000000 : 0x3ff0000000000000 | v >> 12;
			b->xmm[i - 24] = v;
		}
	}
	b->evolve = EVOLVE_ROUNDS;
	b->hold = hold;
	burn();
	for (i = 0; i < 16; i++) {
		/* rbx rcx rsp rbp r10..r15 are only read */
		if (0xfc3a >> i & 1)
			check(b, gpr[i], b->gpr[i], b->out_gpr[i]);
		d = mix(d, b->out_gpr[i]);
	}
	for (i = 0; i < 8; i++) {
		if (i & 1)
			check(b, st[i], b->st[i], b->out_st[i]);
		d = mix(d, b->out_st[i]);
	}
	for (i = 0; i < 32; i++) {
		if (0xf4da >> (i / 2) & 1)
			check(b, xmm[i / 2], b->xmm[i], b->out_xmm[i]);
		d = mix(d, b->out_xmm[i]);
	}
	check(b, "mxcsr", USER_MXCSR, b->mxcsr & 0xffc0);
	check(b, "fcw", USER_FCW, b->fcw);
	if (b->io)
		io_round(b);
	b->digest = d;
}

static void bad(const struct block *b)
{
	asm volatile("cli");
	lock();
	put("compute bad what=");
	put(b->what);
	put(" cpu=");
	put_dec(b->cpu);
	put(" round=");
	put_dec(b->round);
	put(" expected=");
	put_hex(b->expected, 16);
	put(" found=");
	put_hex(b->found, 16);
	put("\n");
	finish(EXIT_BAD);
}

static void kernel_round(struct block *b)
{
	static const char *const names[6] = { "kernel-rbx", "kernel-rbp", "kernel-r12", "kernel-r13", "kernel-r14", "kernel-r15" };
	u64 found[6];

	b->digest = mix(b->digest, kernel_mix(b->digest, b->gpr, found));
	for (int i = 0; i < 6; i++)
		check(b, names[i], b->gpr[i], found[i]);
}

static void timer_set(u32 lvt, u32 count)
{
	lapic_write(0x320, LAPIC_LVT_MASKED);
	lapic_write(0x380, 0);
	lapic_write(0x320, lvt);
	lapic_read(0x320);
	if (count)
		lapic_write(0x380, count);
}

/* Arms one of the four timers and sleeps until it has come. A periodic timer goes
 * on through the next round's work, until that arms another. */
static void timer_round(struct block *b)
{
	volatile u64 *count;
	u64 until = 1;
	u32 kind = b->round & 3;

	if ((kind == 2 && b->cpu) || (kind == 3 && !has_deadline))
		kind = 0;
	asm volatile("cli" ::: "memory");
	count = &irq_count[b->cpu][kind];
	if (kind == 1)
		until = 3;
	until += *count;
	switch (kind) {
	case 0:
		timer_set(VEC_ONESHOT, tick * 1000);
		break;
	case 1:
		timer_set(VEC_PERIODIC | LAPIC_LVT_PERIODIC, tick * 1000);
		break;
	case 2:
		timer_set(VEC_ONESHOT | LAPIC_LVT_MASKED, 0);
		pit_oneshot(tick * 1193 / 1000);
		break;
	case 3:
		timer_set(VEC_DEADLINE | LAPIC_LVT_DEADLINE, 0);
		wrmsr(0x6e0, rdtsc() + tick * 2000);
		break;
	}
	while (*count < until)
		asm volatile("sti; hlt; cli" ::: "memory");
	asm volatile("sti" ::: "memory");
	b->digest = mix(b->digest, 1);
}

static void memory_round(struct state *s)
{
	struct block *b = &s->block;
	u32 slot = b->round % RING;
	volatile u64 *page = (void *)(PAGES + (b->cpu * RING + slot) * 4096);

	if (b->round >= RING) {
		u64 first = page[0];

		for (u32 i = 0; i < WORDS; i++)
			check(b, "memory", scramble(s->history[slot] + i), page[32 * i]);
		b->digest = mix(b->digest, first);
	}
	s->history[slot] = b->digest;
	for (u32 i = 0; i < WORDS; i++)
		page[32 * i] = scramble(b->digest + i);
}

static void compute_cpu(u32 cpu)
{
	struct state *s = &states[cpu];
	struct block *b = &s->block;

	b->cpu = cpu;
	b->digest = scramble(seed + (cpu + 1) * GOLDEN);
	b->io = io;
	b->mmio = mmio;
	wrmsr(0xc0000100, (uptr)b);	/* FS base */
	asm volatile("sti" ::: "memory");
	for (b->round = 0; b->round < rounds; b->round++) {
		run_user(user_round, b);
		asm volatile("sti" ::: "memory");
		kernel_round(b);
		if (io)
			io_round(b);
		timer_round(b);
		memory_round(s);
		if (b->what)
			bad(b);
		if (verbose && b->round % 16 == 15) {
			asm volatile("cli" ::: "memory");
			lock();
			put("compute cpu=");
			put_dec(cpu);
			put(" round=");
			put_dec(b->round);
			put("\n");
			unlock();
			asm volatile("sti" ::: "memory");
		}
	}
	asm volatile("cli" ::: "memory");
	timer_set(VEC_ONESHOT | LAPIC_LVT_MASKED, 0);
	results[cpu] = b->digest;
}

void payload_irq(u32 cpu, u32 vector) { (void)cpu, (void)vector; }

void payload_main(void)
{
	const struct arg args[] = {
		{ "rounds", &rounds, 1, 1ull << 32, 0, 0 },
		{ "seed", &seed, 0, ~0ull, 0, 0 },
		{ "cpus", &cpus, 1, MAX_CPUS, 0, 0 },
		{ "io", &io, 0, 1, 0, 0 },
		{ "mmio", &mmio, 0, 0xfffff000, 0, 0 },
		{ "verbose", &verbose, 0, 1, 0, 0 },
		{ "spin", &hold, 0, ~0ull, 0, 0 },
		{ "tick", &tick, 50, 50000, 0, 0 },
	};
	u32 eax = 1, ebx, ecx, edx;
	u64 result, room = (u64)MAX_CPUS * RING * 4096;

	rounds = 64;
	seed = 1;
	cpus = 1;
	hold = 20000;
	tick = 1000;
	mmio = 0xd0000000;
	args_parse(cmdline(), args, sizeof args / sizeof *args);
	states = (void *)(PAGES + room);
	if ((mmio & 4095) || !ram_covers(PAGES, room + MAX_CPUS * sizeof(struct state))) {
		put("payload-error arg=mmio or too little memory\n");
		finish(EXIT_ARGS);
	}
	for (u64 *p = (u64 *)states; p < (u64 *)&states[cpus]; p++)
		*p = 0;
	asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx));
	has_deadline = ecx >> 24 & 1;
	ioapic_route(0, VEC_PIT);	/* the PIT is on pin 0 or 2, by the VMM's routes */
	ioapic_route(2, VEC_PIT);
	cpus_run(cpus, compute_cpu, 0);
	result = scramble(seed);
	for (u32 i = 0; i < cpus; i++)
		result = mix(result, results[i]);
	put("compute result=");
	put_hex(result, 16);
	put("\n");
}
