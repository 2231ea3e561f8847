/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Forwarding of what only passes through this node, before the kernel makes a packet buffer of it
 * (BPF_PROG_TYPE_XDP): the client is outside, and the backend is on another node.
 *
 * The program follows flows that are forwarded from the hook (NAT_BYPASS). tc creates them, as the
 * first packet of a flow has everything to be decided about, and tc follows them, too: a packet
 * that cannot be forwarded here completely passes unchanged, and tc does what it does without this
 * program. So where a packet goes never depends on which hook has seen the packets before it.
 */
#include "lib/compat.h"
#include "lib/conntrack.h"
#include "lib/fib.h"
#include "lib/filter.h"
#include "lib/frame.h"
#include "lib/hop_cache.h"
#include "lib/measure_packet.h"
#include "lib/next_hop.h"
#include "lib/stale.h"
#include "lib/verdict.h"
#include "lib/xdp.h"

#define UNUSUAL_FLAGS (TCP_SYN | TCP_FIN | TCP_RST)

/* Finds the entry of a packet and its next hop in the caches. */
static __always_inline bool find_cached_hop(struct xdp_md *ctx, const struct packet *p,
					    struct flow_hop *hop)
{
	struct nat *nat = &scratch_of(p)->entry;
	const u64 now = coarse_now(scratch_of(p));
	struct flow_slot *slot = flow_cache_read(&p->flow, nat, now);

	if (!slot || (s64)(now - nat->last) > 0 || !(nat->flags & NAT_BYPASS) ||
	    p->tcp_flags & UNUSUAL_FLAGS || !has_its_backend(nat) ||
	    !hop_cache_read(&p->flow, slot, hop, now) || hop->in != ctx->ingress_ifindex ||
	    p->l3_length > hop->mtu || !frame_is_to(ctx, hop->link_address))
		return false;
	if (p->tcp_flags)
		note_sequence(p, &slot->nat, nat);
	return true;
}

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
	/* An option is added at tc. */
	if (DSR_SENDS && needs_dsr_option(p, nat, coarse_now(scratch_of(p))))
		return NULL;
	return in_map;
}

/* Finds the next hop of a packet with the entry @nat; returns false where it is left to tc. */
static __always_inline bool find_hop(struct xdp_md *ctx, const struct packet *p,
				     const struct nat *nat, struct flow_hop *hop)
{
	const u32 in = ctx->ingress_ifindex;
	const struct xdp_device *device = xdp_device_of(in);
	struct bpf_fib_lookup fib;

	/* Without a link address of the next hop the kernel has to ask for it, or to verify it. */
	if (!device || !frame_is_to(ctx, device->link_address) ||
	    fib_result_of(ctx, in, &nat->src, &nat->dst, p->l3_length, &fib) != FIB_NEIGHBOUR ||
	    next_hop_is_due(next_hop_of(&fib), coarse_now(scratch_of(p))) ||
	    !xdp_can_send(device, in, fib.ifindex))
		return false;
	__builtin_memset(hop, 0, sizeof(*hop));
	hop->in = in;
	hop->out = fib.ifindex;
	__builtin_memcpy(hop->dst, fib.dmac, sizeof(hop->dst));
	__builtin_memcpy(hop->src, fib.smac, sizeof(hop->src));
	__builtin_memcpy(hop->link_address, device->link_address, sizeof(hop->link_address));
	/* Kernels say the route's MTU there. */
	hop->mtu = fib.tot_len;
	hop->sends_back = fib.ifindex == in && device->flags & XDP_SENDS_BACK;
	return true;
}

/*
 * Updates the state of a flow from a packet that is forwarded to @hop. Both are cached, as
 * in the fast path at tc, if the flow has many packets.
 */
static __always_inline void track(const struct packet *p, struct nat *in_map, struct flow_hop *hop)
{
	struct scratch *s = scratch_of(p);
	struct nat *nat = &s->entry;
	const u64 now = coarse_now(s);
	struct flow_slot *slot;

	if (!is_same_entry(in_map, nat))
		return;
	if (p->tcp_flags & UNUSUAL_FLAGS || (s64)(now - nat->last) > (s64)NSEC_PER_SEC ||
	    (!(nat->seen & SEEN_REPLY) &&
	     (nat->flags & NAT_REPLY || (DSR_SENDS && nat->flags & NAT_DSR)))) {
		flow_cache_take(&p->flow, in_map, nat);
		conntrack_track(p, in_map, nat, true);
		return;
	}
	slot = flow_cache_renew(&p->flow, in_map, nat, now);
	if (slot)
		hop_cache_fill(&p->flow, slot, hop, now);
	if (p->tcp_flags)
		note_sequence(p, slot ? &slot->nat : in_map, nat);
}

/* Sends a packet on. */
static __always_inline int send_frame(struct xdp_md *ctx, const struct packet *p,
				      const struct flow_hop *hop)
{
	struct ethernet_header *ethernet;

	if (!frame_rewrite(ctx, p, &scratch_of(p)->entry))
		return XDP_PASS;
	measure_packet(p);
	if (MEASURE_TRAFFIC)
		measure_size(p, p->l3_length, 1);
	ethernet = frame_at(ctx, 0);
	if (reaches_beyond(ctx, ethernet + 1))
		return XDP_ABORTED;
	__builtin_memcpy(ethernet->dst, hop->dst, sizeof(ethernet->dst));
	__builtin_memcpy(ethernet->src, hop->src, sizeof(ethernet->src));
	count(EVENT_XDP);
	return hop->sends_back ? XDP_TX : bpf_redirect(hop->out, 0);
}

int forward(struct xdp_md *ctx)
{
	struct packet *p = packet_of(STAGE_INGRESS);
	struct flow_hop hop;
	struct nat *in_map;

	if (!p || !frame_read_addresses(ctx, p) || !address_of_interest(&p->flow.dst) ||
	    !frame_read_ports(ctx, p) || p->hops <= 1)
		return XDP_PASS;
	if (!find_cached_hop(ctx, p, &hop)) {
		in_map = forwarded_flow(p);
		if (!in_map)
			return XDP_PASS;
		if (!find_hop(ctx, p, &scratch_of(p)->entry, &hop)) {
			/* At tc conntrack has the newest sequence numbers. */
			flow_cache_take(&p->flow, in_map, &scratch_of(p)->entry);
			return XDP_PASS;
		}
		track(p, in_map, &hop);
	}
	return send_frame(ctx, p, &hop);
}
