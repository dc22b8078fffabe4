/* SPDX-License-Identifier: Apache-2.0 */
/* What every payload needs: COM1 by polling, the way out, the command line. */
#include "lib.h"

#define COM1 0x3f8

void console_init(void)
{
	outb(COM1 + 1, 0);	/* no interrupts */
	outb(COM1 + 3, 0x80);
	outb(COM1 + 0, 1);	/* 115200 baud */
	outb(COM1 + 1, 0);
	outb(COM1 + 3, 0x03);	/* 8n1 */
	outb(COM1 + 2, 0x01);	/* FIFO on, interrupt at the first byte */
	outb(COM1 + 4, 0x0b);
}

void put_char(char c)
{
	while (!(inb(COM1 + 5) & 0x20))
		pause();
	outb(COM1, c);
}

void put(const char *s)
{
	while (*s)
		put_char(*s++);
}

void put_dec(uptr v)
{
	char buf[24];
	int i = sizeof buf;

	buf[--i] = 0;
	do {
		buf[--i] = '0' + v % 10;
		v /= 10;
	} while (v);
	put(buf + i);
}

void put_hex(u64 v, int digits)
{
	while (digits--)
		put_char("0123456789abcdef"[(v >> (4 * digits)) & 15]);
}

void finish(u32 code)
{
	outl(0xf4, code);
	for (;;)
		asm volatile("cli; hlt");
}

int same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

int args_number(const char *s, u64 *value)
{
	u64 v = 0;
	int base = 10;

	if (s[0] == '0' && s[1] == 'x')
		s += 2, base = 16;
	if (!*s)
		return 0;
	for (; *s; s++) {
		u32 d;

		if (*s >= '0' && *s <= '9')
			d = *s - '0';
		else if (base == 16 && *s >= 'a' && *s <= 'f')
			d = *s - 'a' + 10;
		else if (base == 16 && *s >= 'A' && *s <= 'F')
			d = *s - 'A' + 10;
		else
			return 0;
		if (base == 16) {
			if (v >> 60)
				return 0;
			v = (v << 4) | d;
		} else {
			if (v > 1844674407370955161ull || (v == 1844674407370955161ull && d > 5))
				return 0;
			v = v * 10 + d;
		}
	}
	*value = v;
	return 1;
}

static int choose(const char *choices, const char *word, u64 *value)
{
	u64 index = 0;

	for (;; index++) {
		const char *w = word;

		while (*choices && *choices != '|' && *choices == *w)
			choices++, w++;
		if (!*w && (!*choices || *choices == '|')) {
			*value = index;
			return 1;
		}
		while (*choices && *choices != '|')
			choices++;
		if (!*choices++)
			return 0;
	}
}

/* The command line is copied: the original may lie where a payload writes. */
static char line[2048];

static void bad_arg(const char *key, const char *value)
{
	put("payload-error arg=");
	put(key);
	if (value) {
		put("=");
		put(value);
	}
	put("\n");
	finish(EXIT_ARGS);
}

static int take(const struct arg *a, const char *value)
{
	u64 v;

	if (a->text) {
		*a->text = value;
		return 1;
	}
	if (a->choices)
		return choose(a->choices, value, a->value);
	if (!args_number(value, &v) || v < a->min || v > a->max)
		return 0;
	*a->value = v;
	return 1;
}

void args_parse(const char *cmdline, const struct arg *args, int count)
{
	u32 n = 0;
	int first = 1;
	char *p = line;

	while (cmdline[n]) {
		if (n == sizeof line - 1)
			bad_arg("(too long)", 0);
		line[n] = cmdline[n];
		n++;
	}
	line[n] = 0;
	for (;; first = 0) {
		char *key, *value = 0;
		int i;

		while (*p == ' ')
			p++;
		if (!*p)
			return;
		key = p;
		while (*p && *p != ' ') {
			if (*p == '=' && !value) {
				*p = 0;
				value = p + 1;
			}
			p++;
		}
		if (*p)
			*p++ = 0;
		if (!value) {
			if (first)	/* a loader may put the image's name here */
				continue;
			bad_arg(key, 0);
		}
		for (i = 0; i < count; i++)
			if (same(args[i].key, key))
				break;
		if (i == count || !take(&args[i], value))
			bad_arg(key, value);
	}
}
