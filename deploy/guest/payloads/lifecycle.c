/* SPDX-License-Identifier: Apache-2.0 */
/* lifecycle.elf: the ways in which a guest ends or resets itself, counted through
 * resets in place, and an echo on the console, by polling or by interrupts. */
#include "cpu.h"

#define BOOTS	((volatile u64 *)0x300000)
#define COM1	0x3f8
#define LINE	1024

static u64 times, echo, irq, sleep_type;
static const char *end;
static volatile u32 head, tail;		/* of a ring of received bytes */
static volatile u8 ring[4096];
static char line[LINE + 1];

static void receive(void)
{
	while (inb(COM1 + 5) & 1) {
		u8 c = inb(COM1);

		if (head - tail < sizeof ring)
			ring[head++ % sizeof ring] = c;
	}
}

void payload_irq(u32 cpu, u32 vector)
{
	(void)cpu;
	if (vector == VEC_COM1)
		receive();
}

static char next_byte(void)
{
	asm volatile("cli" ::: "memory");
	while (head == tail) {
		if (irq) {
			asm volatile("sti; hlt; cli" ::: "memory");
		} else {
			pause();
			receive();
		}
	}
	return ring[tail++ % sizeof ring];
}

/* Carriage returns are dropped; what a line has past LINE bytes is, too. */
static void echo_lines(void)
{
	if (irq) {
		ioapic_route(4, VEC_COM1);
		outb(COM1 + 1, 1);
	}
	put("echo ready\n");
	for (;;) {
		u32 n = 0;
		char c;

		while ((c = next_byte()) != '\n')
			if (c != '\r' && n < LINE)
				line[n++] = c;
		line[n] = 0;
		if (same(line, "quit"))
			break;
		put("echo ");
		put(line);
		put("\n");
	}
	outb(COM1 + 1, 0);
	put("echo done\n");
}

static void bad_end(void)
{
	put("payload-error arg=end=");
	put(end);
	put("\n");
	finish(EXIT_ARGS);
}

static int known_end(u64 *value)
{
	static const char *const names[] = { "i8042", "cf9", "triple", "badop", "hlt", "spin", "acpi-s5" };
	const char debug[] = "debug:";

	for (u32 i = 0; i < sizeof names / sizeof *names; i++)
		if (same(end, names[i]))
			return 1;
	for (u32 i = 0; i < 6; i++)
		if (end[i] != debug[i])
			return 0;
	return args_number(end + 6, value) && *value <= 0xffffffff;
}

static void do_end(u32 value)
{
	struct { u16 limit; u64 base; } __attribute__((packed)) none = { 0, 0 };

	if (same(end, "i8042")) {
		outb(0x64, 0xfe);
	} else if (same(end, "cf9")) {
		outb(0xcf9, 6);
	} else if (same(end, "triple")) {
		asm volatile("lidt %0" :: "m"(none));
		*(volatile u64 *)(1ull << 45) = 0;	/* not mapped, and nobody to take it */
	} else if (same(end, "badop")) {
		asm volatile("fwait");			/* kvm-pvm's emulator has none */
	} else if (same(end, "hlt")) {
		for (;;)
			asm volatile("cli; hlt");
	} else if (same(end, "spin")) {
		for (;;)
			pause();
	} else if (same(end, "acpi-s5")) {
		outw(0x604, sleep_type << 10 | 1 << 13);
	} else {
		finish(value);
	}
}

void payload_main(void)
{
	const struct arg args[] = {
		{ "end", 0, 0, 0, 0, &end },
		{ "times", &times, 0, ~0ull, 0, 0 },
		{ "echo", &echo, 0, 1, 0, 0 },
		{ "irq", &irq, 0, 1, 0, 0 },
		{ "sleep", &sleep_type, 0, 7, 0, 0 },
	};
	u64 value = 0;

	times = 1;
	sleep_type = 5;
	args_parse(cmdline(), args, sizeof args / sizeof *args);
	if (end ? !known_end(&value) : !echo) {
		if (!end)
			end = "";
		bad_end();
	}
	++*BOOTS;
	put("lifecycle boot=");
	put_dec(*BOOTS);
	put("\n");
	if (echo)
		echo_lines();
	if (!end)
		finish(0);
	if (*BOOTS > times) {
		put("lifecycle settled\n");
		finish(0);
	}
	do_end(value);
	for (u64 since = rdtsc(); rdtsc() - since < 2000000000;)	/* a reset may take a moment */
		pause();
	put("lifecycle survived end=");
	put(end);
	put("\n");
	finish(EXIT_BAD);
}
