/* SPDX-License-Identifier: Apache-2.0 */
/* The way into long mode: multiboot-1 header, 32-bit entry of the boot CPU, the
 * trampoline of the other CPUs, identity map, boot GDT. Everything is mapped
 * user-accessible, with the accessed and dirty bits set beforehand, so that the
 * page tables themselves are never written once the guest runs. */
#include "layout.h"

	.section .multiboot, "a"
	.balign 4
	.long 0x1BADB002
	.long 3				/* modules page-aligned, memory info */
	.long -(0x1BADB002 + 3)

	.text
	.code32
	.globl start
start:
	cli
	cld
	mov	%eax, %ebp
	mov	%ebx, %esi
	mov	$bss_start, %edi
	mov	$bss_end, %ecx
	sub	%edi, %ecx
	shr	$2, %ecx
	xor	%eax, %eax
	rep stosl
	mov	%ebp, mb_magic
	mov	%esi, mb_info

	movl	$pdpt + 0x27, pml4
	movl	$pdpt + 0x1027, pml4 + 8
	mov	$0x80000000, %eax
	cpuid
	cmp	$0x80000001, %eax
	jb	small_pages
	mov	$0x80000001, %eax
	cpuid
	test	$1 << 26, %edx
	jz	small_pages

	/* 1024 pages of 1 GiB */
	movl	$1024, map_gib
	xor	%ecx, %ecx
1:	mov	%ecx, %eax
	shl	$30, %eax
	or	$0xe7, %eax
	mov	%ecx, %edx
	shr	$2, %edx
	mov	%eax, pdpt(, %ecx, 8)
	mov	%edx, pdpt + 4(, %ecx, 8)
	inc	%ecx
	cmp	$1024, %ecx
	jb	1b
	jmp	mapped

small_pages:
	/* 2048 pages of 2 MiB */
	movl	$4, map_gib
	movl	$pd + 0x0027, pdpt
	movl	$pd + 0x1027, pdpt + 8
	movl	$pd + 0x2027, pdpt + 16
	movl	$pd + 0x3027, pdpt + 24
	xor	%ecx, %ecx
1:	mov	%ecx, %eax
	shl	$21, %eax
	or	$0xe7, %eax
	mov	%eax, pd(, %ecx, 8)
	inc	%ecx
	cmp	$2048, %ecx
	jb	1b
mapped:
	lgdt	boot_gdtr
	mov	$boot_stack_pointer, %edi
	movl	$kstacks + KSTACK_SIZE, (%edi)
	movl	$0, start_cpu

	/* Common to all CPUs: from 32-bit flat mode to long mode. */
go_long:
	mov	$0x620, %eax		/* PAE, OSFXSR, OSXMMEXCPT */
	mov	%eax, %cr4
	mov	$pml4, %eax
	mov	%eax, %cr3
	mov	$0xc0000080, %ecx
	xor	%edx, %edx
	mov	$0x100, %eax		/* EFER.LME */
	wrmsr
	mov	$0x80010033, %eax	/* PG, WP, NE, ET, MP, PE */
	mov	%eax, %cr0
	ljmp	$KERNEL_CS, $in_long

	.code64
in_long:
	mov	$KERNEL_DS, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	xor	%eax, %eax
	mov	%eax, %fs
	mov	%eax, %gs
	mov	boot_stack_pointer, %rsp
	mov	start_cpu, %edi
	xor	%ebp, %ebp
	call	cpu_main
1:	cli
	hlt
	jmp	1b

/* Copied to TRAMPOLINE; a CPU comes here in real mode by SIPI. */
	.code16
	.globl trampoline, trampoline_end
trampoline:
	cli
	cld
	mov	%cs, %ax
	mov	%ax, %ds
	lgdtl	tramp_gdtr - trampoline
	mov	$0x11, %eax
	mov	%eax, %cr0
	ljmpl	$KERNEL_CS32, $ap_start
	.balign 4
tramp_gdtr:
	.word	8 * 8 - 1
	.long	boot_gdt
trampoline_end:

	.code32
ap_start:
	mov	$KERNEL_DS, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	jmp	go_long

	.section .rodata
	.balign 8
	.globl boot_gdt
boot_gdt:
	.quad	0
	.quad	0x00cf9b000000ffff	/* 0x08 kernel code, 32 bits */
	.quad	0x00af9b000000ffff	/* 0x10 kernel code, 64 bits */
	.quad	0x00cf93000000ffff	/* 0x18 kernel data */
	.quad	0x00cffb000000ffff	/* 0x20 user code, 32 bits */
	.quad	0x00cff3000000ffff	/* 0x28 user data */
	.quad	0x00affb000000ffff	/* 0x30 user code, 64 bits */
	.quad	0
boot_gdtr:
	.word	8 * 8 - 1
	.long	boot_gdt

	.bss
	.balign 4096
pml4:	.skip	4096
pdpt:	.skip	8192
pd:	.skip	16384
	.globl kstacks
kstacks: .skip	KSTACK_SIZE * MAX_CPUS
	.globl mb_magic, mb_info, map_gib, boot_stack_pointer, start_cpu
mb_magic: .skip	4
mb_info: .skip	4
map_gib: .skip	4
start_cpu: .skip 4
boot_stack_pointer: .skip 8

	.section .note.GNU-stack, "", @progbits
