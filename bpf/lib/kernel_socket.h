/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The cookie of a socket, its network namespace, and whether MPTCP has made it are read here. Calls
 * of helpers for them take as long as all else that is done for a socket of no Service. Where the
 * kernel lets programs read its structures (bpf_rdonly_cast(), which costs nothing, Linux 6.2),
 * they read the socket itself. The agent finds the fields in the kernel's BTF.
 */
#ifndef EBPFPROXY_KERNEL_SOCKET_H
#define EBPFPROXY_KERNEL_SOCKET_H

#include "compat.h"
#include "options.h"
#include "types.h"

/* bcc declares the result as u32 and would cut it. */
static u64 (*whole_socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;

/* No header of bcc declares these. */
static void *(*skc_to_mptcp_sock)(void *sk) = (void *)BPF_FUNC_skc_to_mptcp_sock;
static const u8 *(*rdonly_cast)(const void *sk, u64 type) = KERNEL_FUNCTION(RDONLY_CAST);

/* Says if a socket's fields can be read; see Features in datapath/kernel/probe.py. */
#define HAVE_SOCKET_FIELDS (CONSTANT(RDONLY_CAST) != 0)

static __always_inline u64 cookie_of(u64 key)
{
	return key & ((1ULL << ORIGIN_KIND_SHIFT) - 1);
}

/*
 * Returns the cookie without its highest byte: see enum origin_kind. The socket gets one if it has
 * none.
 */
static __always_inline u64 get_socket_cookie(void *ctx)
{
	return cookie_of(whole_socket_cookie(ctx));
}

static __always_inline u64 field_cookie(const void *sk)
{
	return cookie_of(*(const volatile u64 *)(rdonly_cast(sk, CONSTANT(SOCK_COMMON)) +
						 CONSTANT(SKC_COOKIE)));
}

/*
 * Returns the cookie of a socket that nothing may be recorded of; 0 where it has none yet, so that
 * nothing is.
 */
static __always_inline u64 cookie_if_any(struct bpf_sock_addr *ctx)
{
	return HAVE_SOCKET_FIELDS ? field_cookie(socket_of(ctx)) : get_socket_cookie(ctx);
}

/* The same for a socket that is closed (BPF_PROG_TYPE_CGROUP_SOCK). */
static __always_inline u64 closed_cookie_if_any(struct bpf_sock *ctx)
{
	return HAVE_SOCKET_FIELDS ? field_cookie(ctx) : get_socket_cookie(ctx);
}

/* Returns the cookie of a socket that has one already in most cases. */
static __always_inline u64 known_socket_cookie(struct bpf_sock_addr *ctx)
{
	u64 cookie = HAVE_SOCKET_FIELDS ? field_cookie(socket_of(ctx)) : 0;

	return cookie ? cookie : get_socket_cookie(ctx);
}

static __always_inline u64 netns_cookie(struct bpf_sock_addr *ctx)
{
	const u8 *net;

	if (!HAVE_SOCKET_FIELDS)
		return bpf_get_netns_cookie(ctx);
	net = *(const u8 *volatile *)(rdonly_cast(socket_of(ctx), CONSTANT(SOCK_COMMON)) +
				      CONSTANT(SKC_NET));
	return *(const volatile u64 *)(net + CONSTANT(NET_COOKIE));
}

/*
 * Returns the MPTCP socket that a TCP socket of the kernel's is a subflow of, as a number; 0 for
 * the sockets of applications.
 */
static __always_inline u64 mptcp_socket_of(struct bpf_sock_addr *ctx)
{
	if (HAVE_SOCKET_FIELDS &&
	    !*(const volatile u8 *)(rdonly_cast(socket_of(ctx), CONSTANT(TCP_SOCK)) +
				    CONSTANT(TCP_IS_MPTCP)))
		return 0;
	return (u64)skc_to_mptcp_sock(socket_of(ctx));
}

/*
 * Says if a socket has IP_UNICAST_IF (ip(7)): the device by which it sends what it is not bound to.
 * Where fields cannot be read nothing tells.
 */
static __always_inline bool has_unicast_device(struct bpf_sock_addr *ctx)
{
	return HAVE_SOCKET_FIELDS &&
	       *(const volatile u32 *)(rdonly_cast(socket_of(ctx), CONSTANT(INET_SOCK)) +
				       CONSTANT(INET_UC_INDEX));
}

#endif
