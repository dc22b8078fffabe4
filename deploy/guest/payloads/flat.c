/* SPDX-License-Identifier: Apache-2.0 */
/* flat.bin: a raw image at 1 MiB, entered in 32-bit flat protected mode. */
#include "lib.h"

void flat_main(void)
{
	console_init();
	put("flat ok\n");
	finish(0);
}
