/* SPDX-License-Identifier: Apache-2.0 */
/* compute.elf io=1: accesses that leave the guest, so that it is often cut in the
 * middle of one: single, by strings, wide, and across the edge of two devices. */
#include "compute.h"

#define SCRATCH	0x3ff
#define MAGIC	0x74726976

/* The boot CPU alone: there is one scratch register. */
static void ports(struct block *b)
{
	u64 x = scramble(b->digest);
	u8 value = x;
	u32 i;
	void *p;
	u64 n;

	outb(SCRATCH, value);
	check(b, "scratch", value, inb(SCRATCH));
	for (i = 0; i < 16; i++)
		b->buffer[i] = x >> (4 * (i & 15));
	p = b->buffer;
	n = 16;
	asm volatile("rep outsb" : "+S"(p), "+c"(n) : "d"(SCRATCH) : "memory");
	check(b, "outsb", b->buffer[15], inb(SCRATCH));
	value = b->buffer[15];
	p = b->buffer + 16;
	n = 24;
	asm volatile("rep insb" : "+D"(p), "+c"(n) : "d"(SCRATCH) : "memory");
	for (i = 16; i < 40; i++)
		check(b, "insb", value, b->buffer[i]);
	inw(SCRATCH - 1);
	inl(SCRATCH - 3);
	outw(SCRATCH - 1, x);
	outb(SCRATCH, value ^ 0xff);
	check(b, "scratch", value ^ 0xff, inb(SCRATCH));
}

static void window(struct block *b)
{
	uptr at = b->mmio;
	void *from = (void *)at, *to = b->buffer + 40;
	u64 n = 4;

	check(b, "mmio", MAGIC, *(volatile u32 *)at);
	*(volatile u32 *)(at + 0x14) = b->round & 1;	/* DeviceFeaturesSel */
	*(volatile u32 *)(at + 0x24) = 0;		/* DriverFeaturesSel */
	(void)*(volatile u64 *)at;
	(void)*(volatile u16 *)(at + 4);
	(void)*(volatile u8 *)(at + 8);
	(void)*(volatile u32 *)(at + 0xffe);
	*(volatile u32 *)(at + 0xffe) = 0;
	(void)*(volatile u64 *)(at + 0xffc);
	asm volatile("rep movsl" : "+S"(from), "+D"(to), "+c"(n) :: "memory");
	check(b, "mmio-movs", MAGIC, *(u32 *)(b->buffer + 40));
	check(b, "mmio", MAGIC, *(volatile u32 *)at);
}

void io_round(struct block *b)
{
	if (!b->cpu)
		ports(b);
	if (b->mmio)
		window(b);
}
