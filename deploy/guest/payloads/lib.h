/* SPDX-License-Identifier: Apache-2.0 */
/* Console, exit, command line and port access; also used by 32-bit payloads. */
#pragma once
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;
typedef unsigned long uptr;

#define EXIT_BAD	0x7d	/* a self-check of the payload failed */
#define EXIT_ARGS	0x7e	/* a bad command line */
#define EXIT_FATAL	0x7f	/* an exception, or the machine lacks something */

struct mb_info {
	u32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr;
	u32 syms[4], mmap_length, mmap_addr;
};
struct mb_module { u32 start, end, string, reserved; };

static inline void outb(u16 port, u8 v) { asm volatile("outb %0, %1" :: "a"(v), "Nd"(port)); }
static inline void outw(u16 port, u16 v) { asm volatile("outw %0, %1" :: "a"(v), "Nd"(port)); }
static inline void outl(u16 port, u32 v) { asm volatile("outl %0, %1" :: "a"(v), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 inw(u16 port) { u16 v; asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline void pause(void) { asm volatile("pause" ::: "memory"); }

void console_init(void);
void put_char(char c);
void put(const char *s);
void put_dec(uptr v);
void put_hex(u64 v, int digits);
void finish(u32 code) __attribute__((noreturn));

/* One key=value of the command line: a number within min..max, or one of the
 * `choices` ("seq|rand": the value is the index), or, if `text`, any string. */
struct arg {
	const char *key;
	u64 *value;
	u64 min, max;
	const char *choices;
	const char **text;
};
void args_parse(const char *cmdline, const struct arg *args, int count);
int args_number(const char *s, u64 *value);
int same(const char *a, const char *b);
