/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Included by bcc; nothing of it is used. */
#define LINUX_VERSION_CODE 0
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
