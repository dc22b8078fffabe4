/* SPDX-License-Identifier: Apache-2.0 */
/* Numbers that assembly and C share. The selectors lie as Linux has them. */
#pragma once
#define KERNEL_CS32	0x08
#define KERNEL_CS	0x10
#define KERNEL_DS	0x18
#define USER_DS		0x2b
#define USER_CS		0x33
#define TSS_SELECTOR	0x40
#define MAX_CPUS	64
#define KSTACK_SIZE	4096
#define USTACK_SIZE	4096
#define TRAMPOLINE	0x8000
