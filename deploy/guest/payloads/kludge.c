/* SPDX-License-Identifier: Apache-2.0 */
/* kludge.bin: says what a multiboot loader gave to an image with address fields. */
#include "lib.h"

void flat_main(u32 magic, const struct mb_info *info)
{
	console_init();
	if (magic != 0x2badb002) {
		put("payload-error multiboot magic\n");
		finish(EXIT_FATAL);
	}
	put("kludge ok mem=");
	put_dec(info->flags & 1 ? info->mem_upper : 0);
	put(" cmdline=");
	put(info->flags & 4 ? (const char *)(uptr)info->cmdline : "");
	put(" mods=");
	put_dec(info->flags & 8 ? info->mods_count : 0);
	put("\n");
	finish(0);
}
