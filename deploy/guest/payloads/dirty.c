/* SPDX-License-Identifier: Apache-2.0 */
/* dirty.elf: writes the iteration number that the host gives it to pages, for
 * ever, so that a dirty tracker can be proved right. README.md has the protocol. */
#include "cpu.h"

#define CONTROL	((volatile u64 *)0x200000)
#define MAGIC	0x545249444f4c4f43ull

enum { MAGIC_WORD, ITERATION, STOP, COUNTS = 8 };

struct job {
	u64 cpu, x;
};

static u64 pages, base, stride, pattern, user, seed, cpus, writes, delay, rep, module;
static struct job jobs[MAX_CPUS];

/* Copied for the cases that matter for speed: kernel code may be emulated. */
static inline __attribute__((always_inline)) void write_pages(const struct job *job, int random, int fill, u64 pauses)
{
	volatile u64 *control = CONTROL, *count = control + COUNTS + job->cpu;
	u64 first = base + (fill ? 0 : 8 * job->cpu), step = stride, n_pages = pages, end = first + n_pages * step;
	u64 limit = writes ? writes : ~0ull, n = 0, x = job->x, at = first;

	while (n != limit) {
		u64 left = limit - n < 64 ? limit - n : 64;

		n += left;
		for (; left; left--) {
			if (control[STOP]) {
				n -= left;
				limit = n;
				break;
			}
			if (random) {
				x ^= x << 13;
				x ^= x >> 7;
				x ^= x << 17;
				at = first + (((x >> 32) * n_pages) >> 32) * step;
			}
			if (fill) {
				void *to = (void *)at;
				u64 words = 512;

				asm volatile("rep stosq" : "+D"(to), "+c"(words) : "a"(control[ITERATION]) : "memory");
			} else {
				*(volatile u64 *)at = control[ITERATION];
			}
			if (!random) {
				at += step;
				if (at == end)
					at = first;
			}
			for (u64 i = pauses; i; i--)
				pause();
		}
		*count = n;
	}
}

/* Runs at CPL 0 or 3. */
static void dirty_loop(void *job)
{
	if (rep || delay)
		write_pages(job, pattern, rep, delay);
	else if (pattern)
		write_pages(job, 1, 0, 0);
	else
		write_pages(job, 0, 0, 0);
}

static void dirty_cpu(u32 cpu)
{
	if (user)
		run_user(dirty_loop, &jobs[cpu]);
	else
		dirty_loop(&jobs[cpu]);
}

static void ready(void)
{
	put("dirty ready\n");
	CONTROL[MAGIC_WORD] = MAGIC;
}

static int module_right(const struct mb_module *m)
{
	u32 x = m->end - m->start;

	for (u32 at = m->start; at != m->end; at++) {
		x = x * 1664525 + 1013904223;
		if (*(u8 *)(uptr)at != x >> 24)
			return 0;
	}
	return 1;
}

static void modules_check(void)
{
	const struct mb_module *m = (void *)(uptr)mb()->mods_addr;
	int right = mb()->flags & 8 && mb()->mods_count;

	for (u32 i = 0; right && i < mb()->mods_count; i++)
		right = module_right(&m[i]);
	put(right ? "module ok\n" : "module bad\n");
	if (!right)
		finish(EXIT_BAD);
}

void payload_irq(u32 cpu, u32 vector) { (void)cpu, (void)vector; }

void payload_main(void)
{
	const struct arg args[] = {
		{ "pages", &pages, 1, 1ull << 32, 0, 0 },
		{ "base", &base, 0, 1ull << 40, 0, 0 },
		{ "stride", &stride, 8, 1ull << 30, 0, 0 },
		{ "pattern", &pattern, 0, 0, "seq|rand", 0 },
		{ "mode", &user, 0, 0, "kernel|user", 0 },
		{ "seed", &seed, 0, ~0ull, 0, 0 },
		{ "cpus", &cpus, 1, MAX_CPUS, 0, 0 },
		{ "writes", &writes, 0, ~0ull, 0, 0 },
		{ "delay", &delay, 0, ~0ull, 0, 0 },
		{ "rep", &rep, 0, 1, 0, 0 },
		{ "module", &module, 0, 1, 0, 0 },
	};

	pages = 256;
	base = 0x1000000;
	stride = 4096;
	seed = 1;
	cpus = 1;
	args_parse(cmdline(), args, sizeof args / sizeof *args);
	if ((base & 7) || (stride & 7) || (rep && ((base | stride) & 4095)) || base < 0x201000
	    || !ram_covers(base, (pages - 1) * stride + 4096)) {
		put("payload-error arg=pages,base,stride\n");
		finish(EXIT_ARGS);
	}
	if (module)
		modules_check();
	for (u32 i = 0; i < 512; i++)
		CONTROL[i] = 0;
	for (u32 i = 0; i < cpus; i++) {
		jobs[i].cpu = i;
		jobs[i].x = scramble(seed + (i + 1) * GOLDEN);
		if (!jobs[i].x)
			jobs[i].x = GOLDEN;
	}
	cpus_run(cpus, dirty_cpu, ready);
	put("dirty done\n");
}
