/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Guards NodePorts (BPF_PROG_TYPE_CGROUP_SOCK_ADDR): bind() to one fails in the host's namespace.
 * The hooks see the port that the caller asked for. Port 0, for which the kernel chooses, is left
 * alone: the kernel does not choose again when a hook refuses. The hooks are attached only where
 * the option asks for them.
 */
#include "lib/compat.h"
#include "lib/decision_socket.h"
#include "lib/options.h"
#include "lib/service.h"
#include "lib/socket.h"

static __always_inline bool is_any(const struct inet_addr *addr)
{
	return !(addr->word[0] | addr->word[1] | addr->word[3]) &&
	       (!addr->word[2] || addr->word[2] == V4_MAPPED);
}

/*
 * The IPv6 address :: also covers IPv4 unless the socket is IPV6_V6ONLY, which a hook cannot see.
 */
static __always_inline bool is_node_port(const struct target *to, bool any)
{
	const struct target v4 = { addr_of_v4(0), to->port, to->proto };

	return service_by_node_port(to, SCOPE_INTERNAL) ||
	       (any && service_by_node_port(&v4, SCOPE_INTERNAL));
}

static __always_inline int handle_bind(struct bpf_sock_addr *ctx, const struct inet_addr *addr)
{
	const bool any = is_any(addr);
	struct target to = { *addr, ctx->user_port, service_protocol(ctx->protocol) };

	if (!to.port || !in_host_namespace(ctx))
		return PROCEED;
	if (!any && !addr_is_this_node(addr) && !(NODEPORTS_ON_LOOPBACK && addr_is_loopback(addr)))
		return PROCEED;
	if (!is_node_port(&to, any))
		return PROCEED;
	if (HAVE_SET_RETVAL)
		bpf_set_retval(-EADDRINUSE);
	decision_bind_refused(ctx, &to);
	return REJECT;
}

int bind4(struct bpf_sock_addr *ctx)
{
	const struct inet_addr addr = addr_of_v4(ctx->user_ip4);

	return handle_bind(ctx, &addr);
}

int bind6(struct bpf_sock_addr *ctx)
{
	const struct target to = target6(ctx);

	return handle_bind(ctx, &to.addr);
}
