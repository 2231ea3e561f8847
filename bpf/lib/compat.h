/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Definitions from the kernel's headers that bcc does not have. */
#ifndef EBPFPROXY_COMPAT_H
#define EBPFPROXY_COMPAT_H

#include <linux/types.h>

#define IPPROTO_ICMP	1
#define IPPROTO_TCP	6
#define IPPROTO_UDP	17
#define IPPROTO_ICMPV6	58
#define IPPROTO_SCTP	132
#define IPPROTO_UDPLITE 136
#define IPPROTO_MPTCP	262

/* IPv6 extension headers (RFC 8200, 4; RFC 4302). */
#define IPPROTO_HOPOPTS	 0
#define IPPROTO_ROUTING	 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_AH	 51
#define IPPROTO_DSTOPTS	 60

#define ETH_HLEN	 14
#define ETH_P_IP	 0x0800
#define ETH_P_IPV6	 0x86dd
#define VLAN_ID		 0x0fff /* the number in a tag; 0: it has a priority alone */
#define AF_INET		 2
#define AF_INET6	 10
#define PACKET_HOST	 0
#define LOOPBACK_IFINDEX 1 /* of every network namespace */
#define TC_ACT_SHOT	 2
#define TC_ACT_UNSPEC	 (-1) /* the next program's turn; TCX_NEXT is the same */

#define NSEC_PER_SEC  1000000000ULL
#define NSEC_PER_MSEC 1000000ULL

#define ENOENT	     2
#define EEXIST	     17
#define EADDRINUSE   98
#define ECONNREFUSED 111
#define EHOSTUNREACH 113

/* This is from enum bpf_func_id, Linux 5.19. */
#define BPF_FUNC_skc_to_mptcp_sock 196

/* This is 1 in the program of the loopback device. */
#ifndef AT_LOOPBACK
#define AT_LOOPBACK 0
#endif

#ifndef offsetof
#define offsetof(type, member) __builtin_offsetof(type, member)
#endif

/* Keeps the compiler from reasoning about a variable across this point. */
#define barrier_var(var) asm volatile("" : "+r"(var))

/* Reads memory that is needed soon, so that the CPU waits for several cold lines at once. */
#define touch(pointer) ((void)*(const volatile u8 *)(pointer))

/* Orders what was read before it and what is read after it, on every machine. */
#define memory_barrier()                                                                           \
	({                                                                                         \
		u64 unused_ = 0;                                                                   \
		__sync_lock_test_and_set(&unused_, 1);                                             \
	})

/*
 * Reads skb->ifindex. clang may keep the address of a context's field for a second use; the
 * verifier accepts only the context pointer with an offset in the instruction.
 */
#define ifindex_of(skb)                                                                            \
	({                                                                                         \
		u32 ifindex_;                                                                      \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                              \
			     : "=r"(ifindex_)                                                      \
			     : "r"(skb), "i"(offsetof(struct __sk_buff, ifindex)));                \
		ifindex_;                                                                          \
	})

/* Reads ctx->sk of struct bpf_sock_addr, for the same reason. */
#define socket_of(ctx)                                                                             \
	({                                                                                         \
		struct bpf_sock *sk_;                                                              \
		asm volatile("%0 = *(u64 *)(%1 + %2)"                                              \
			     : "=r"(sk_)                                                           \
			     : "r"(ctx), "i"(offsetof(struct bpf_sock_addr, sk)));                 \
		sk_;                                                                               \
	})

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define bpf_htonl(x) __builtin_bswap32(x)
#define bpf_ntohl(x) __builtin_bswap32(x)
#define bpf_htons(x) ((__be16)__builtin_bswap16(x))
#define bpf_ntohs(x) __builtin_bswap16(x)
#else
#define bpf_htonl(x) (x)
#define bpf_ntohl(x) (x)
#define bpf_htons(x) (x)
#define bpf_ntohs(x) (x)
#endif

#endif
