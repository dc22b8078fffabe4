/* SPDX-License-Identifier: Apache-2.0 */
/* The first bytes of the 32-bit raw images: flat.bin (entered at its start) and,
 * with KLUDGE, kludge.bin (multiboot-1 with address fields). The header is the
 * same as for an a.out: where the raw file goes, how much of it, what to clear. */
	.section .head, "ax"
	.code32
	.globl start
start:
	jmp	1f
#ifdef KLUDGE
	.balign 4
header:
	.long 0x1BADB002
	.long 0x10003
	.long -(0x1BADB002 + 0x10003)
	.long header, image_start, image_end, bss_end, start
#endif
1:	cli
	cld
	mov	$stack_top, %esp
#ifdef KLUDGE
	push	%ebx
	push	%eax
#else
	/* No loader clears .bss for a flat image. */
	mov	$image_end, %edi
	mov	$bss_end, %ecx
	sub	%edi, %ecx
	xor	%eax, %eax
	rep stosb
#endif
	call	flat_main
1:	cli
	hlt
	jmp	1b

	/* The stack is apart from .bss, which is cleared above. */
	.section .stack, "aw", @nobits
	.balign 16
	.skip	4096
stack_top:
	.section .note.GNU-stack, "", @progbits
