/* SPDX-License-Identifier: Apache-2.0 */
/* compute.elf's user part: all registers full, integer, SSE2 and x87 work in
 * them, all registers out again. The stack pointer is one of the registers: the
 * block at FS is the only memory used between load and store. */
#include "burn.h"

	.text
	.code64
	/* void burn(void) */
	.globl burn
burn:
	push	%rbx
	push	%rbp
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	mov	%rsp, %fs:B_RSP

	fninit
	movw	$USER_FCW, %fs:B_FCW
	fldcw	%fs:B_FCW
	movl	$USER_MXCSR, %fs:B_MXCSR
	ldmxcsr	%fs:B_MXCSR
	movl	$0, %fs:B_MXCSR
	movl	$0, %fs:B_FCW
	.irp	i, 7, 6, 5, 4, 3, 2, 1, 0
	fildll	%fs:B_ST + 8 * \i
	.endr
	.irp	i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	movups	%fs:B_XMM + 16 * \i, %xmm\i
	.endr
	mov	%fs:B_GPR + 0, %rax
	mov	%fs:B_GPR + 8, %rcx
	mov	%fs:B_GPR + 16, %rdx
	mov	%fs:B_GPR + 24, %rbx
	mov	%fs:B_GPR + 32, %rsp
	mov	%fs:B_GPR + 40, %rbp
	mov	%fs:B_GPR + 48, %rsi
	mov	%fs:B_GPR + 56, %rdi
	.irp	i, 8, 9, 10, 11, 12, 13, 14, 15
	mov	%fs:B_GPR + 8 * \i, %r\i
	.endr

	/* What the digest is made of. */
1:	imul	$0x5851f42d, %rax, %rax
	fadd	%st(1), %st
	addpd	%xmm1, %xmm0
	add	%rbx, %rax
	fxch	%st(2)
	mulpd	%xmm3, %xmm2
	xor	%rax, %rdx
	fsub	%st(3), %st
	subpd	%xmm4, %xmm2
	rol	$7, %rdx
	fxch	%st(4)
	movapd	%xmm6, %xmm8
	add	%rdx, %rsi
	fadd	%st(5), %st
	divpd	%xmm5, %xmm8
	sub	%rsi, %rdi
	fxch	%st(6)
	addpd	%xmm7, %xmm8
	ror	$11, %rdi
	fsub	%st(7), %st
	movapd	%xmm8, %xmm5
	xor	%rdi, %r8
	fchs
	addpd	%xmm2, %xmm0
	lea	1(%r9, %r8), %r9
	addpd	%xmm5, %xmm0
	paddq	%xmm10, %xmm9
	pxor	%xmm9, %xmm11
	decq	%fs:B_EVOLVE
	jnz	1b

	/* Time to be interrupted in: everything done is undone. */
	cmpq	$0, %fs:B_HOLD
	je	3f
2:	add	%rbx, %rax
	fadd	%st(1), %st
	paddq	%xmm12, %xmm9
	sub	%rbx, %rax
	fsub	%st(1), %st
	psubq	%xmm12, %xmm9
	xor	%r10, %rdx
	fxch	%st(5)
	pxor	%xmm13, %xmm11
	rol	$9, %rsi
	mulpd	%xmm3, %xmm2
	not	%rdi
	xchg	%r8, %r9
	bswap	%r12
	xchg	%rsp, %rbp
	xchg	%rsp, %rbp
	bswap	%r12
	xchg	%r8, %r9
	not	%rdi
	ror	$9, %rsi
	addpd	%xmm2, %xmm2
	pxor	%xmm13, %xmm11
	fxch	%st(5)
	xor	%r10, %rdx
	decq	%fs:B_HOLD
	jnz	2b
3:
	mov	%rax, %fs:B_OUT + 0
	mov	%rcx, %fs:B_OUT + 8
	mov	%rdx, %fs:B_OUT + 16
	mov	%rbx, %fs:B_OUT + 24
	mov	%rsp, %fs:B_OUT + 32
	mov	%rbp, %fs:B_OUT + 40
	mov	%rsi, %fs:B_OUT + 48
	mov	%rdi, %fs:B_OUT + 56
	.irp	i, 8, 9, 10, 11, 12, 13, 14, 15
	mov	%r\i, %fs:B_OUT + 8 * \i
	.endr
	.irp	i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	movups	%xmm\i, %fs:B_OUT_XMM + 16 * \i
	.endr
	fnstcw	%fs:B_FCW
	stmxcsr	%fs:B_MXCSR
	.irp	i, 0, 1, 2, 3, 4, 5, 6, 7
	fistpll	%fs:B_OUT_ST + 8 * \i
	.endr
	mov	%fs:B_RSP, %rsp
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbp
	pop	%rbx
	ret

	/* u64 kernel_mix(u64 x, const u64 *sentinels, u64 *found): registers only,
	 * with the six callee-saved ones held through the loop. */
	.globl kernel_mix
kernel_mix:
	push	%rbx
	push	%rbp
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	mov	0(%rsi), %rbx
	mov	8(%rsi), %rbp
	mov	16(%rsi), %r12
	mov	24(%rsi), %r13
	mov	32(%rsi), %r14
	mov	40(%rsi), %r15
	mov	%rdi, %rax
	movabs	$0x5851f42d4c957f2d, %r8
	movabs	$0x14057b7ef767814f, %r9
	mov	$64, %ecx
1:	imul	%r8, %rax
	add	%r9, %rax
	mov	%rax, %r10
	shr	$29, %r10
	xor	%r10, %rax
	rol	$17, %rax
	dec	%ecx
	jnz	1b
	mov	%rbx, 0(%rdx)
	mov	%rbp, 8(%rdx)
	mov	%r12, 16(%rdx)
	mov	%r13, 24(%rdx)
	mov	%r14, 32(%rdx)
	mov	%r15, 40(%rdx)
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbp
	pop	%rbx
	ret

	.section .note.GNU-stack, "", @progbits
