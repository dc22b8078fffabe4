/* SPDX-License-Identifier: Apache-2.0 */
/* The block that a vCPU's user part works on; FS base points at it in user mode. */
#pragma once
#define B_GPR		0	/* 16 x 8: rax rcx rdx rbx rsp rbp rsi rdi r8..r15 */
#define B_ST		128	/* 8 x 8: st0..st7 as integers */
#define B_XMM		192	/* 16 x 16 */
#define B_OUT		448	/* the same three, as found at the end */
#define B_OUT_ST	(B_OUT + B_ST)
#define B_OUT_XMM	(B_OUT + B_XMM)
#define B_EVOLVE	896	/* loop counters */
#define B_HOLD		904
#define B_RSP		912
#define B_MXCSR		920	/* found at the end */
#define B_FCW		924
#define B_SIZE		928
#define EVOLVE_ROUNDS	1024
#define USER_MXCSR	0x9fc0	/* FTZ and DAZ, all exceptions masked */
#define USER_FCW	0x0f7f	/* 64-bit mantissa, truncation: exact either way */
