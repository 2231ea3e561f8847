/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the kernel's own headers would give, and bcc's do not. */
#ifndef EBPFPROXY_COMPAT_H
#define EBPFPROXY_COMPAT_H

#include <linux/types.h>

#define IPPROTO_UDP	17
#define IPPROTO_UDPLITE 136

#define ECONNREFUSED 111
#define EHOSTUNREACH 113

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define bpf_htonl(x) __builtin_bswap32(x)
#define bpf_ntohl(x) __builtin_bswap32(x)
#else
#define bpf_htonl(x) (x)
#define bpf_ntohl(x) (x)
#endif

#endif
