/* SPDX-License-Identifier: Apache-2.0 */
/* Exceptions and interrupts in long mode, and the way to user mode and back. */
#include "layout.h"

	.text
	.code64

/* 256 stubs of 16 bytes: an error code where the CPU pushes none, the vector. */
	.balign 16
	.globl trap_stubs
trap_stubs:
	.set	vector, 0
	.rept	256
	.balign 16
	.if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
	.else
	push	$0
	.endif
	push	$vector
	jmp	trap_common
	.set	vector, vector + 1
	.endr

	.balign 16
trap_common:
	push	%rax
	push	%rcx
	push	%rdx
	push	%rbx
	push	%rbp
	push	%rsi
	push	%rdi
	push	%r8
	push	%r9
	push	%r10
	push	%r11
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	cld
	mov	%rsp, %rdi
	mov	%rsp, %rbx
	and	$-16, %rsp
	call	trap
	mov	%rbx, %rsp
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%r11
	pop	%r10
	pop	%r9
	pop	%r8
	pop	%rdi
	pop	%rsi
	pop	%rbp
	pop	%rbx
	pop	%rdx
	pop	%rcx
	pop	%rax
	add	$16, %rsp
	iretq

/* void user_call(void (*fn)(void *), void *arg, void *stack_top, u64 *rsp0, u64 rflags)
 * runs fn(arg) at CPL 3. fn returns to user_exit, whose ud2 is the way back. */
	.globl user_call
user_call:
	push	%rbx
	push	%rbp
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	mov	%rsp, (%rcx)
	movq	$user_exit, -8(%rdx)
	sub	$8, %rdx
	push	$USER_DS
	push	%rdx
	push	%r8
	push	$USER_CS
	push	%rdi
	mov	%rsi, %rdi
	iretq

	.globl user_exit
user_exit:
	ud2

/* void user_return(u64 rsp0): from the trap handler out of user_call */
	.globl user_return
user_return:
	cli
	mov	%rdi, %rsp
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbp
	pop	%rbx
	ret

	.section .note.GNU-stack, "", @progbits
