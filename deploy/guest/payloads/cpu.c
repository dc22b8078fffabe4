/* SPDX-License-Identifier: Apache-2.0 */
/* The machine under a payload: descriptor tables, traps, interrupt controllers,
 * the other CPUs. Relies on nothing that firmware would have set up. */
#include "cpu.h"

#define LAPIC	0xfee00000ul
#define IOAPIC	0xfec00000ul

struct tss {
	u32 reserved0;
	u64 rsp[3];
	u64 reserved1;
	u64 ist[7];
	u64 reserved2;
	u16 reserved3, iomap_offset;
	u8 iomap[0x400 / 8 + 1];	/* ports below 0x400; a clear bit allows user mode */
} __attribute__((packed));

struct frame {
	u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
	u64 vector, error, rip, cs, rflags, rsp, ss;
};

struct table { u16 limit; u64 base; } __attribute__((packed));

extern u8 kstacks[MAX_CPUS][KSTACK_SIZE], trap_stubs[], trampoline[], trampoline_end[], user_exit[];
extern const u64 boot_gdt[8];
extern volatile u64 boot_stack_pointer;
extern volatile u32 start_cpu;
void user_call(void (*fn)(void *), void *arg, void *stack, u64 *rsp0, u64 rflags);
void user_return(u64 rsp0) __attribute__((noreturn));

static u8 ustacks[MAX_CPUS][USTACK_SIZE] __attribute__((aligned(4096)));
static struct tss tss[MAX_CPUS] __attribute__((aligned(128)));
static u64 gdt[8 + 2 * MAX_CPUS] __attribute__((aligned(16)));
static u64 idt[512] __attribute__((aligned(4096)));
volatile u64 irq_count[MAX_CPUS][8];
static volatile u32 alive[MAX_CPUS], done[MAX_CPUS];
static volatile u32 go;
static void (*volatile work)(u32 cpu);
static volatile u32 print_lock;

u64 scramble(u64 x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

u32 this_cpu(void)
{
	uptr sp;

	asm volatile("mov %%rsp, %0" : "=r"(sp));
	return (sp - (uptr)kstacks - 1) / KSTACK_SIZE;
}

/* Only ever held with interrupts off, or where no handler prints. */
void lock(void)
{
	u32 v;

	for (;;) {
		v = 1;
		asm volatile("xchg %0, %1" : "+r"(v), "+m"(print_lock) :: "memory");
		if (!v)
			return;
		while (print_lock)
			pause();
	}
}

void unlock(void)
{
	asm volatile("" ::: "memory");
	print_lock = 0;
}

void lapic_write(u32 reg, u32 v) { *(volatile u32 *)(LAPIC + reg) = v; }
u32 lapic_read(u32 reg) { return *(volatile u32 *)(LAPIC + reg); }

static void ioapic_write(u32 reg, u32 v)
{
	*(volatile u32 *)IOAPIC = reg;
	*(volatile u32 *)(IOAPIC + 0x10) = v;
}

void ioapic_route(u32 pin, u32 vector)
{
	ioapic_write(0x11 + 2 * pin, lapic_read(0x20) & 0xff000000);
	ioapic_write(0x10 + 2 * pin, vector);
}

void pit_oneshot(u32 count)
{
	outb(0x43, 0x30);	/* channel 0, both bytes, mode 0 */
	outb(0x40, count);
	outb(0x40, count >> 8);
}

void trap(struct frame *f)
{
	u32 cpu = this_cpu();
	u64 cr2;

	if (f->vector == 6 && (f->cs & 3) && f->rip == (uptr)user_exit)
		user_return(tss[cpu].rsp[0]);
	if (f->vector >= VEC_ONESHOT && f->vector <= VEC_COM1) {
		irq_count[cpu][f->vector - VEC_ONESHOT]++;
		payload_irq(cpu, f->vector);
		lapic_write(0xb0, 0);
		return;
	}
	if (f->vector == VEC_SPURIOUS)
		return;
	asm volatile("mov %%cr2, %0" : "=r"(cr2));
	put("payload-error vector=");
	put_dec(f->vector);
	put(" rip=0x");
	put_hex(f->rip, 16);
	put(" cr2=0x");
	put_hex(cr2, 16);
	put(" error=0x");
	put_hex(f->error, 8);
	put(" cs=0x");
	put_hex(f->cs, 4);
	put(" cpu=");
	put_dec(cpu);
	put("\n");
	finish(EXIT_FATAL);
}

static void tables_build(void)
{
	for (u32 i = 0; i < 8; i++)
		gdt[i] = boot_gdt[i];
	for (u32 i = 0; i < 256; i++) {
		u64 entry = (uptr)trap_stubs + 16 * i;

		idt[2 * i] = (entry & 0xffff) | KERNEL_CS << 16 | 0x8e00ull << 32 | (entry & 0xffff0000) << 32;
		idt[2 * i + 1] = entry >> 32;
	}
}

static void tables_load(u32 cpu)
{
	struct table t;
	u64 base = (uptr)&tss[cpu];

	tss[cpu].rsp[0] = (uptr)kstacks[cpu] + KSTACK_SIZE;
	tss[cpu].iomap_offset = __builtin_offsetof(struct tss, iomap);
	for (u32 i = 0; i < sizeof tss[cpu].iomap; i++)
		tss[cpu].iomap[i] = i == 0x3f8 / 8 ? 0 : 0xff;
	gdt[8 + 2 * cpu] = (sizeof(struct tss) - 1) | (base & 0xffffff) << 16 | 0x89ull << 40 | (base & 0xff000000) << 32;
	gdt[9 + 2 * cpu] = base >> 32;
	t.limit = sizeof gdt - 1;
	t.base = (uptr)gdt;
	asm volatile("lgdt %0" :: "m"(t));
	t.limit = sizeof idt - 1;
	t.base = (uptr)idt;
	asm volatile("lidt %0" :: "m"(t));
	asm volatile("ltr %w0" :: "r"(TSS_SELECTOR + 16 * cpu));
}

static void lapic_init(void)
{
	wrmsr(0x1b, (rdmsr(0x1b) & 0xfff) | LAPIC | 0x800);
	lapic_write(0xf0, 0x100 | VEC_SPURIOUS);
	lapic_write(0x80, 0);			/* TPR */
	lapic_write(0x320, LAPIC_LVT_MASKED);	/* timer */
	lapic_write(0x350, LAPIC_LVT_MASKED);	/* LINT0 */
	lapic_write(0x360, LAPIC_LVT_MASKED);	/* LINT1 */
	lapic_write(0x370, LAPIC_LVT_MASKED);	/* error */
	lapic_write(0x3e0, 0xb);		/* divide by one */
	lapic_write(0x380, 0);
}

static void pics_mask(void)
{
	outb(0x20, 0x11);	/* spurious ones, if ever, at 0xf0..0xff */
	outb(0x21, 0xf0);
	outb(0x21, 0x04);
	outb(0x21, 0x01);
	outb(0xa0, 0x11);
	outb(0xa1, 0xf8);
	outb(0xa1, 0x02);
	outb(0xa1, 0x01);
	outb(0x21, 0xff);
	outb(0xa1, 0xff);
	for (u32 pin = 0; pin < 24; pin++)
		ioapic_write(0x10 + 2 * pin, 0x10000);
}

void cpu_main(u32 cpu)
{
	if (!cpu) {
		console_init();
		tables_build();
		/* Before LINT0 is masked, or TCG keeps a tick of the firmware's PIT
		 * as an interrupt that nobody can name. */
		pics_mask();
	}
	tables_load(cpu);
	lapic_init();
	if (!cpu) {
		if (mb_magic != 0x2badb002) {
			put("payload-error multiboot magic\n");
			finish(EXIT_FATAL);
		}
		payload_main();
		finish(0);
	}
	alive[cpu] = 1;
	while (!go)
		pause();
	work(cpu);
	done[cpu] = 1;
}

static void icr(u32 cpu, u32 low)
{
	lapic_write(0x310, cpu << 24);
	lapic_write(0x300, low);
	while (lapic_read(0x300) & 0x1000)
		pause();
}

static void cpu_start(u32 cpu)
{
	boot_stack_pointer = (uptr)kstacks[cpu] + KSTACK_SIZE;
	start_cpu = cpu;
	icr(cpu, 0x4500);				/* INIT */
	icr(cpu, 0x4600 | TRAMPOLINE >> 12);		/* SIPI, twice by custom */
	icr(cpu, 0x4600 | TRAMPOLINE >> 12);
	for (u32 spins = 0; !alive[cpu]; spins++) {
		if (spins == 20000000) {
			put("payload-error cpu=");
			put_dec(cpu);
			put(" does not start\n");
			finish(EXIT_FATAL);
		}
		pause();
	}
}

void cpus_run(u32 count, void (*fn)(u32 cpu), void (*started)(void))
{
	work = fn;
	if (count > 1)
		for (u8 *p = trampoline; p < trampoline_end; p++)
			((volatile u8 *)TRAMPOLINE)[p - trampoline] = *p;
	for (u32 i = 1; i < count; i++)
		cpu_start(i);
	if (started)
		started();
	go = 1;
	fn(0);
	for (u32 i = 1; i < count; i++)
		while (!done[i])
			pause();
}

void run_user(void (*fn)(void *), void *arg)
{
	u32 cpu = this_cpu();

	user_call(fn, arg, ustacks[cpu] + USTACK_SIZE, (u64 *)((u8 *)&tss[cpu] + 4), 0x202);
}

const char *cmdline(void)
{
	return mb()->flags & 4 ? (const char *)(uptr)mb()->cmdline : "";
}

/* Is start..start+length mapped by us and RAM by the loader's word? */
int ram_covers(u64 start, u64 length)
{
	u64 end = start + length, at = start;

	if (end < start || end > (u64)map_gib << 30)
		return 0;
	if (!(mb()->flags & 64))
		return mb()->flags & 1 && start >= 0x100000 && end <= 0x100000 + ((u64)mb()->mem_upper << 10);
	while (at < end) {
		uptr p = mb()->mmap_addr, stop = p + mb()->mmap_length;
		u64 before = at;

		while (p < stop) {
			u64 base = *(u64 *)(p + 4), len = *(u64 *)(p + 12);

			if (*(u32 *)(p + 20) == 1 && base <= at && at - base < len)
				at = base + len;
			p += *(u32 *)p + 4;
		}
		if (at == before)
			return 0;
	}
	return 1;
}
