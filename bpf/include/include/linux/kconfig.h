/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The one option that bcc's helpers ask for. */
#define CONFIG_BPF_SYSCALL 1
