/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Forwarding of what only passes through this node, before the kernel makes a packet buffer of it
 * (BPF_PROG_TYPE_XDP): the client is outside, and the backend is on another node.
 *
 * The program follows flows that are forwarded from the hook (NAT_BYPASS). tc creates them, as the
 * first packet of a flow has everything to be decided about, and tc follows them, too: a packet
 * that cannot be forwarded here completely passes unchanged, and tc does what it does without this
 * program. So a packet's way never depends on which hook has seen the packets before it.
 */
#include "lib/compat.h"
#include "lib/conntrack.h"
#include "lib/fib.h"
#include "lib/filter.h"
#include "lib/frame.h"
#include "lib/measure_packet.h"
#include "lib/next_hop.h"
#include "lib/verdict.h"
#include "lib/xdp.h"

/* Returns the entry of a flow that is forwarded from the hook, NULL where its packet is left to tc.
 */
static __always_inline struct nat *forwarded_flow(const struct packet *p)
{
	struct nat *in_map, *nat = &scratch_of(p)->entry;

	if (!flow_of_interest(&p->flow.src, &p->flow.dst))
		return NULL;
	in_map = conntrack_read(&p->flow, nat);
	if (!in_map || !(nat->flags & NAT_BYPASS) || flow_verdict_of(p, in_map) != FLOW_FORWARD)
		return NULL;
	return in_map;
}

/* Forwards a packet of the flow @in_map, unless something about it is unusual. */
static __always_inline int forward_packet(struct xdp_md *ctx, const struct packet *p,
					  const struct xdp_device *device, struct nat *in_map)
{
	const struct nat *nat = &scratch_of(p)->entry;
	const u32 in = ctx->ingress_ifindex;
	struct ethernet_header *ethernet;
	struct bpf_fib_lookup fib;

	/* Without a link address of the next hop the kernel has to ask for it, or to verify it. */
	if (fib_result_of(ctx, in, &nat->src, &nat->dst, p->l3_length, &fib) != FIB_NEIGHBOUR ||
	    next_hop_is_due(next_hop_of(&fib), coarse_now(scratch_of(p))) ||
	    !xdp_can_send(device, in, fib.ifindex) || !frame_rewrite(ctx, p, nat))
		return XDP_PASS;
	conntrack_track(p, in_map, nat);
	measure_packet(p);
	if (MEASURE_TRAFFIC)
		measure_size(p, p->l3_length, 1);
	ethernet = frame_at(ctx, 0);
	if (reaches_beyond(ctx, ethernet + 1))
		return XDP_ABORTED;
	__builtin_memcpy(ethernet->dst, fib.dmac, sizeof(ethernet->dst));
	__builtin_memcpy(ethernet->src, fib.smac, sizeof(ethernet->src));
	count(EVENT_XDP);
	return fib.ifindex == in && device->flags & XDP_SENDS_BACK ? XDP_TX
								   : bpf_redirect(fib.ifindex, 0);
}

int forward(struct xdp_md *ctx)
{
	struct packet *p = packet_of(STAGE_INGRESS);
	const struct xdp_device *device;
	struct nat *in_map;

	if (!p || !frame_read_addresses(ctx, p) || !address_of_interest(&p->flow.dst) ||
	    !frame_read_ports(ctx, p) || p->hops <= 1)
		return XDP_PASS;
	in_map = forwarded_flow(p);
	if (!in_map)
		return XDP_PASS;
	device = xdp_device_of(ctx->ingress_ifindex);
	if (!device || !frame_is_to(ctx, device->link_address))
		return XDP_PASS;
	return forward_packet(ctx, p, device, in_map);
}
