/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Direct server return: the backend's node answers a client outside the cluster itself, with the
 * frontend's address. Requests keep the client's address; the first of a flow carries the frontend
 * to the backend's node in an option (dsr_option.h). A client c reaches backend b through
 * frontend f (conntrack.h has the other kinds of entries):
 *
 *	               key                  becomes
 *	where c's      c -> f  at ingress   c -> b
 *	packets come   b -> c  at ingress   f -> c, which no packet needs
 *	at b's node    c -> f  at ingress   c -> b, but what comes in is c -> b
 *	               b -> c  at egress    f -> c
 *
 * The second pair is the same as if c's packets had come in at b's node. The first node forwards
 * from the hook, as its netfilter would take half a connection for an invalid one. What cannot have
 * the option, or would lose its replies, is masqueraded as without DSR.
 *
 * Nobody can tell who has sent an option: the packet has the client's address. So one is believed
 * if it could be right: it comes from no pod of this node and through no tunnel, is for a backend
 * on this node, and names a frontend that Services have for clients outside. That of a NodePort has
 * any address but a loopback, multicast or unspecified one, as no program knows the addresses of
 * other nodes. A wrong one makes a backend's replies to the address and port that the packet came
 * from have such a frontend's address, also those of a connection that the client has opened to the
 * backend itself.
 */
#ifndef EBPFPROXY_DSR_H
#define EBPFPROXY_DSR_H

#include "conntrack.h"
#include "device.h"
#include "direct_flow.h"
#include "dsr_option.h"
#include "dsr_state.h"
#include "fib.h"
#include "frontend.h"
#include "masquerade.h"

/* Verdicts of open_dsr_flow(): the packet follows its flow, or goes to the backend as it is. */
#define DSR_FOLLOW	 0xfc
#define DSR_STRIP_OPTION 0xfb

/* What becomes of a flow that would be masqueraded. */
enum dsr_mode {
	DSR_NONE,     /* masqueraded as without DSR */
	DSR_LOCAL,    /* the backend is a pod of this node: replies come through us */
	DSR_DIRECTLY, /* they do not */
};

static __always_inline bool is_next_hop(const struct bpf_fib_lookup *fib,
					const struct inet_addr *addr)
{
	const u32 *hop = fib->ipv6_dst;

	if (fib->family == AF_INET)
		return addr_is_v4(addr) && fib->ipv4_dst == addr->word[3];
	return !((hop[0] ^ addr->word[0]) | (hop[1] ^ addr->word[1]) | (hop[2] ^ addr->word[2]) |
		 (hop[3] ^ addr->word[3]));
}

/*
 * Says if the client reaches the same backend from this port through another frontend, or has until
 * a moment ago.
 */
static __always_inline bool is_dsr_clash(struct scratch *s, const struct flow *flow,
					 const struct backend *backend)
{
	s->key.src = backend->addr;
	s->key.dst = flow->src;
	s->key.sport = backend->port;
	s->key.dport = flow->sport;
	s->key.proto = flow->proto;
	s->key.stage = STAGE_INGRESS;
	s->key.pad = 0;
	return conntrack_read(&s->key, &s->other) && !is_reverse(&s->other, flow) &&
	       !(is_closed_unclaimed(&s->other) & is_past_time_wait(&s->other, s->nat.last));
}

/*
 * Decides about a new flow, from the @route to its backend. The backend's own node is no client: it
 * would drop packets with its own address. It is the next hop to its pods, unless a tunnel leads
 * there.
 */
static __always_inline enum dsr_mode
dsr_mode_of(struct __sk_buff *skb, struct scratch *s, const struct packet *p,
	    const struct backend *backend, enum fib_result route, const struct bpf_fib_lookup *fib)
{
	const struct service *svc = &s->service;
	u32 out = fib->ifindex;
	const struct device *device;

	if (MASQUERADE_ALL || svc->kind == KIND_CLUSTER_IP ||
	    s->client_location != OUTSIDE_CLUSTER || addr_equal(&p->flow.src, &backend->addr))
		return DSR_NONE;
	device = out ? map_lookup(devices, &out) : NULL;
	if (!device || device->flags & DEVICE_TUNNEL)
		return DSR_NONE;
	if (device->flags & DEVICE_LOCAL)
		return DSR_LOCAL;
	if ((p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP) || route == FIB_MTU_EXCEEDED ||
	    p->hops <= 1 || !has_room_for_option(p) || skb->gso_size ||
	    p->l3_length + dsr_option_size(p) > s->mtu || is_next_hop(fib, &p->flow.src) ||
	    is_dsr_clash(s, &p->flow, backend))
		return DSR_NONE;
	return DSR_DIRECTLY;
}

/* Makes a new flow one whose replies do not pass this node. */
static __always_inline void start_dsr(struct scratch *s, const struct packet *p)
{
	s->nat.flags = NAT_BYPASS | NAT_DSR;
	/* Nothing shows if datagrams are answered. */
	if (p->proto == IPPROTO_UDP)
		s->nat.seen = SEEN_REPLY;
}

/*
 * Adds the option to a packet that has been rewritten by @nat, if it is one that needs
 * it, and if it fits. One that does not goes without, and takes its turn: the next turn is a second
 * later, and a flow all of whose packets are that large never has the option again. Returns 0
 * unless that fails.
 */
static __always_inline int add_due_dsr_option(struct __sk_buff *skb, const struct packet *p,
					      const struct nat *nat)
{
	u32 ifindex = ifindex_of(skb);
	const struct device *device;

	if (!needs_dsr_option(p, nat, coarse_now(scratch_of(p))) || !has_room_for_option(p) ||
	    skb->gso_size)
		return 0;
	device = map_lookup(devices, &ifindex);
	if (!device || p->l3_length + dsr_option_size(p) > device->mtu)
		return 0;
	return add_dsr_option(skb, p);
}

/*
 * Says if an option cannot be of a node of the cluster: those send none to their own pods' devices,
 * and none through a tunnel, to whose end a pod can send, too.
 */
static __always_inline bool is_from_no_node(struct __sk_buff *skb)
{
	u32 ifindex = ifindex_of(skb);
	const struct device *device = map_at(devices, ifindex);

	return device && device->flags & (DEVICE_LOCAL | DEVICE_TUNNEL);
}

/* Says if a packet goes to a pod of this node, or to this node itself, whatever its routes say. */
static __always_inline bool is_for_this_node(struct __sk_buff *skb, const struct packet *p)
{
	const struct flow *flow = &p->flow;
	const struct device *device;
	struct bpf_fib_lookup fib;
	enum fib_result route;
	u32 out;

	if (addr_is_this_node(&flow->dst))
		return true;
	route = fib_result_of(skb, ifindex_of(skb), &flow->src, &flow->dst, 0, &fib);
	if (route == FIB_LOCAL)
		return true;
	out = fib.ifindex;
	device = leads_out(route) ? map_lookup(devices, &out) : NULL;
	return device && device->flags & DEVICE_LOCAL;
}

/*
 * Finds the Service whose frontend another node may have received a packet at: a NodePort may be
 * that of any address. Returns NULL where no such node would have sent the option.
 */
static __always_inline struct service *dsr_service(const struct target *to)
{
	struct service *svc = service_by_address(to, SCOPE_INTERNAL);

	if (!svc)
		svc = service_by_node_port(to, SCOPE_INTERNAL);
	if (svc && svc->flags & SERVICE_TWO_SCOPES)
		svc = outside_service(svc, to);
	return svc && svc->kind != KIND_CLUSTER_IP && !(svc->flags & (SERVICE_OWN | SERVICE_LOCAL))
		       ? svc
		       : NULL;
}

/* Deletes the pair of a former flow that gave the packets of @key another source. */
static __always_inline void forget_source(struct scratch *s, const struct flow *key)
{
	struct nat *known = conntrack_read(key, &s->nat);

	if (known && is_masquerade(&s->nat))
		conntrack_forget(key, known, &s->nat);
}

/*
 * Inserts the pair of a flow with the frontend of the option, @to: the same as if the client's
 * packet had come in here. Only the node that has chosen the backend counts the flow for it. @known
 * says that the reply's key has an entry.
 */
static __always_inline enum insert insert_dsr_backend(struct scratch *s, const struct packet *p,
						      const struct target *to, u32 service_id,
						      bool known)
{
	const u64 *epoch = map_lookup(epochs, &service_id);
	/* No flow is ended meanwhile. */
	struct flow *flow = &s->unconfirmed.original;
	enum insert done;

	/* What comes in is c -> b, and leaves so: of a direct flow, and of one that was
	 * masqueraded. */
	*flow = p->flow;
	forget_source(s, flow);
	flow->stage = STAGE_EGRESS;
	forget_source(s, flow);
	s->nat.src = p->flow.src;
	s->nat.dst = p->flow.dst;
	s->nat.sport = p->flow.sport;
	s->nat.dport = p->flow.dport;
	s->nat.service_id = service_id;
	s->nat.backend_id = NOBODY;
	s->nat.flags = NAT_DSR_BACKEND;
	s->nat.seen = 0;
	s->nat.epoch = epoch ? (u16)*epoch : 0;
	s->nat.last = s->nat.created = coarse_now(s);
	if (MEASURE_CONNECTIONS)
		s->nat.created = bpf_ktime_get_ns();
	s->nat.end = s->nat.acked = 0;
	if (p->tcp_flags)
		note_sequence(p, &s->nat, &s->nat);
	*flow = p->flow;
	flow->dst = to->addr;
	flow->dport = to->port;
	invert_entry(s, flow);
	done = conntrack_put(s, known);
	if (done != INSERT_DONE)
		return done;
	*flow = s->key;
	invert_entry(s, flow);
	done = insert_original(s, false);
	if (done != INSERT_DONE)
		conntrack_take_back(flow);
	return done;
}

/*
 * Decides about a packet with the option. @known: its reply's key has an entry, of which @s->other
 * is a copy.
 */
static __always_inline int open_dsr_flow(struct __sk_buff *skb, struct packet *p, bool known)
{
	struct scratch *s = scratch_of(p);
	const struct target to = { s->dsr.addr, s->dsr.port, service_protocol(p->proto) };
	const struct nat *reply = &s->other;
	const bool lives = known && !is_closed(reply);
	struct service *svc;

	/* Whichever node it is for: there it would not be known as a pod's. */
	if (is_from_no_node(skb))
		return drop(EVENT_DSR);
	if (is_martian(&p->flow.src))
		return pass(EVENT_MARTIAN);
	if (lives && reply->flags & NAT_DSR_BACKEND && reply->sport == to.port &&
	    addr_equal(&reply->src, &to.addr))
		return DSR_FOLLOW;
	if (!is_for_this_node(skb, p))
		return PASS;
	svc = is_martian(&to.addr) ? NULL : dsr_service(&to);
	if (!svc || !may_be_backend(&p->flow.dst, p->flow.dport))
		return drop(EVENT_DSR);
	s->service = *svc;
	if (svc->flags & SERVICE_SOURCES && !source_allowed(svc, &p->flow.src))
		return drop(EVENT_SOURCE_RANGE);
	/*
	 * The client has another connection with this backend from this port. Its backend answers,
	 * and if there is none any more, the client resets it. Datagrams have no connection.
	 */
	if (!can_open_flow(skb, p) ||
	    (lives && (p->proto == IPPROTO_TCP || !(reply->flags & NAT_DSR_BACKEND))))
		return DSR_STRIP_OPTION;
	return insert_dsr_backend(s, p, &to, s->service.id, known) == INSERT_DONE
		       ? DSR_STRIP_OPTION
		       : drop(EVENT_TABLE_FULL);
}

/* Handles what concerns_dsr() has found. The verifier walks through this once. */
static __always_inline int receive_dsr(struct __sk_buff *skb, struct packet *p)
{
	const struct flow key = reverse_of(&p->flow, STAGE_EGRESS);
	struct scratch *s = scratch_of(p);
	bool known = conntrack_read(&key, &s->other);
	volatile int *kept = &s->verdict;
	struct nat *nat;

	*kept = s->dsr.has_option ? open_dsr_flow(skb, p, known) : DSR_FOLLOW;
	if (*kept != DSR_FOLLOW && *kept != DSR_STRIP_OPTION)
		return *kept;
	/* The entry may just have been evicted. */
	if (*kept == DSR_FOLLOW && known && s->other.flags & NAT_DSR_BACKEND) {
		p->flow.dst = s->other.src;
		p->flow.dport = s->other.sport;
		nat = conntrack_of(p);
		if (nat)
			conntrack_track(p, nat, &s->entry, true);
	}
	if (s->dsr.has_option && !p->is_fragment && remove_dsr_option(skb, p))
		return drop(EVENT_REWRITE);
	return PASS;
}

/* Says if a packet that comes in has the option, or is of a flow whose first packet had it. */
static __always_inline bool concerns_dsr(struct __sk_buff *skb, struct packet *p)
{
	const struct flow key = reverse_of(&p->flow, STAGE_EGRESS);
	struct scratch *s = scratch_of(p);
	const struct nat *reply;

	s->dsr.has_option = (p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP) &&
			    !p->is_later_fragment &&
			    read_dsr_option(skb, p, &s->dsr.addr, &s->dsr.port) &&
			    addr_is_v4(&s->dsr.addr) == p->is_v4;
	/* The verifier forgets how that was found out. */
	asm volatile("" ::: "memory");
	if (s->dsr.has_option)
		return true;
	reply = flow_of_interest(&key.src, &key.dst) ? conntrack_lookup(&key) : NULL;
	if (!reply || !(reply->flags & NAT_DSR_BACKEND))
		return false;
	if (!p->tcp_flags || !is_closed(reply))
		return true;
	/* Without the option a SYN opens a connection with the backend itself. */
	if (can_open_flow(skb, p))
		return false;
	reply = conntrack_lookup(&p->flow);
	return !reply || !is_of_direct_flow(reply, &p->flow);
}

#endif
