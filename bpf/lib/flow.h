/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Creating flows: the first packet of a flow gets a backend, and inserts the entries by which the
 * packets after it are translated. lib/conntrack.h describes these entries.
 */
#ifndef EBPFPROXY_FLOW_H
#define EBPFPROXY_FLOW_H

#include "conntrack.h"
#include "decision_packet.h"
#include "device.h"
#include "direct_flow.h"
#include "dsr.h"
#include "frontend.h"
#include "masquerade.h"
#include "options.h"
#include "route.h"
#include "stale.h"
#include "unserved.h"
#include "xdp.h"

/*
 * Says if masqueradeAll applies: clients of a frontend with externalTrafficPolicy Local keep their
 * address, since in kube-proxy the option is about cluster IPs alone. Other external traffic is
 * masqueraded there in any case.
 */
static __always_inline bool masquerades_all(const struct service *svc)
{
	return MASQUERADE_ALL && !(svc->flags & SERVICE_TWO_SCOPES);
}

/*
 * Says if the backend must not see the client's address: its reply would not come through us, or
 * kube-proxy hides it. Policy Local keeps it for external traffic alone; at a cluster IP every
 * client outside is masqueraded. The backend of a pod of another node may be next to it.
 */
static __always_inline bool must_masquerade(const struct scratch *s, const struct packet *p,
					    const struct backend *backend)
{
	const struct service *svc = &s->service;

	if (masquerades_all(svc) || addr_equal(&p->flow.src, &backend->addr))
		return true;
	if (s->client_location == POD_OF_THIS_NODE ||
	    (s->client_location == POD_OF_OTHER_NODE && svc->kind == KIND_CLUSTER_IP))
		return false;
	return svc->kind == KIND_CLUSTER_IP || !(svc->flags & SERVICE_LOCAL);
}

/*
 * Says if a socket has left this flow to us because it uses its port and the same backend for
 * another frontend, with packets that never come here.
 */
static __always_inline bool is_port_taken(const struct flow *flow)
{
	const struct clash_key key = {
		.frontend = flow->dst,
		.frontend_port = flow->dport,
		.client_port = flow->sport,
	};

	return service_protocol(flow->proto) == IPPROTO_UDP && map_lookup(port_clashes, &key);
}

/* Rejects a datagram of a connected socket whose frontend is no Service's any more. */
static __always_inline int frontend_gone(const struct packet *p)
{
	/* There is no entry: it would be reported with that of the packet before it. */
	scratch_of(p)->entry.service_id = NOBODY;
	return rejection(EVENT_BACKEND_GONE);
}

/*
 * Sets what the entries of a new flow have before its backend is chosen: the epoch among it, so
 * that the next packet notices a backend that departs meanwhile.
 */
static __always_inline void init_flow(struct scratch *s, const struct service *svc)
{
	s->nat.service_id = svc->id;
	s->nat.seen = 0;
	s->nat.epoch = (u16)epoch_of(svc->id);
	s->nat.last = s->nat.created = coarse_now(s);
	if (MEASURE_CONNECTIONS)
		s->nat.created = bpf_ktime_get_ns();
}

/* Sets the original direction's entry of a new flow from its first packet and the backend. */
static __always_inline void init_entry(struct scratch *s, const struct packet *p,
				       const struct backend *backend, u32 backend_id)
{
	const struct flow *flow = &p->flow;

	s->key = *flow;
	s->nat.backend_id = backend_id;
	s->nat.src = flow->src;
	s->nat.dst = backend->addr;
	s->nat.sport = flow->sport;
	s->nat.dport = backend->port;
	s->nat.flags = 0;
	s->nat.end = s->nat.acked = 0;
	if (p->tcp_flags)
		note_sequence(p, &s->nat, &s->nat);
}

/*
 * Says if a new flow with its client's own port has to leave the reply direction to another flow of
 * that client. A port below 1024 it keeps where that one is closed: see create_host_flow().
 */
static __always_inline bool is_reply_taken(const struct scratch *s, const struct nat *other)
{
	const u64 is_reserved = is_less(bpf_ntohs(s->key.dport), 1024);

	if (becomes_same(other, &s->nat))
		return false;
	return !(is_closed_unclaimed(other) &
		 (is_past_time_wait(other, s->nat.last) | is_reserved));
}

/* Inserts the reply direction's entry in @s with the client's own port. */
static __always_inline enum insert insert_reply(struct scratch *s)
{
	const struct nat *other = &s->other;
	bool known;

	/* Where one direction is new the other one is, too, with few exceptions. */
	if (!s->has_entry) {
		enum insert done = conntrack_put(s, false);

		if (done != INSERT_TAKEN)
			return done;
	}
	known = conntrack_read(&s->key, &s->other);
	/* The same flow may begin anew. */
	if (known && is_reply_taken(s, other))
		return INSERT_TAKEN;
	return conntrack_put(s, known);
}

/*
 * Inserts the Service pair of a packet's flow, the reply direction first: without it a reply
 * would not be translated. @s->nat is the original direction's entry, before and after the call;
 * then with the port that the backend will see. A port of ours is taken where another flow has the
 * key of the reply (the client reaches the same backend through another frontend from this port),
 * and with
 * @fresh.
 */
static __always_inline enum insert insert_pair(struct __sk_buff *skb, struct scratch *s,
					       const struct flow *flow, bool fresh)
{
	const struct nat *others;
	struct flow reply;
	enum insert done;

	invert_entry(s, flow);
	done = fresh ? INSERT_TAKEN : insert_reply(s);
	/* With DSR a client's port stays: its next packet may find that the other flow has ended.
	 */
	if (done == INSERT_TAKEN && !(DSR_SENDS && s->nat.flags & NAT_DSR))
		done = take_port(skb, s, entry_of(s));
	if (done != INSERT_DONE)
		return done;
	reply = s->key;
	invert_entry(s, &reply);
	done = insert_original(s, s->has_entry);
	if (done == INSERT_DONE) {
		load_count_flow(s->nat.backend_id);
		return done;
	}
	/* Another CPU may have inserted the pair, for another packet of the flow. */
	others = conntrack_lookup(&s->key);
	if (!others || !is_reverse(others, &reply))
		conntrack_take_back(&reply);
	return done;
}

/*
 * Handles a packet to a frontend that opens no flow and belongs to none. On an address of this node
 * it goes to the host, where a socket may own it; elsewhere it must not be routed on.
 */
static __always_inline int no_flow(struct __sk_buff *skb, const struct packet *p,
				   const struct service *svc)
{
	struct bpf_fib_lookup fib;
	enum fib_result route;

	if (svc->flags & SERVICE_SOURCES && !source_allowed(svc, &p->flow.src))
		return drop(EVENT_SOURCE_RANGE);
	if (may_be_migrating(p))
		return drop(EVENT_NO_FLOW);
	if (!is_cluster_ip(&p->flow.dst)) {
		route = fib_result_of(skb, ifindex_of(skb), &p->flow.src, &p->flow.dst, 0, &fib);
		/* Without a device the packet is not routed on. */
		if (route == FIB_LOCAL || (route == FIB_OUT && !fib.ifindex))
			return PASS;
	}
	return rejection(EVENT_NO_FLOW);
}

/*
 * Finds out if the backend of a new flow is to see the client's address, and otherwise leaves in @s
 * what it sees. A flow that is forwarded from here has that in its one pair.
 */
static __always_inline void find_source(struct __sk_buff *skb, struct scratch *s,
					const struct packet *p, const struct backend *backend)
{
	/* What is not forwarded from here the kernel itself finds too big. */
	const u16 size = BYPASS_NETFILTER || FORWARDS_AT_XDP || DSR_SENDS ? s->mtu : 0;
	enum dsr_mode dsr = DSR_NONE;
	struct bpf_fib_lookup fib;
	enum fib_result route;

	s->begun.is_masked = false;
	s->begun.is_fresh = is_port_taken(&p->flow);
	if (must_masquerade(s, p, backend)) {
		route = fib_result_of(skb, ifindex_of(skb), &p->flow.src, &backend->addr, size,
				      &fib);
		if (route == FIB_MTU_EXCEEDED)
			fib_result_of(skb, ifindex_of(skb), &p->flow.src, &backend->addr, 0, &fib);
		if (is_thrown(skb, &p->flow.src, &backend->addr, route, &fib))
			route = FIB_OUT;
		s->begun.is_masked = leads_out(route) &&
				     masquerade_address(fib.ifindex, p->is_v4, &s->begun.node);
		if (DSR_SENDS && s->begun.is_masked && !s->begun.is_fresh)
			dsr = dsr_mode_of(skb, s, p, backend, route, &fib);
		if (dsr != DSR_NONE) {
			s->begun.is_masked = false;
			if (dsr == DSR_DIRECTLY)
				start_dsr(s, p);
		} else if (s->begun.is_masked && route != FIB_MTU_EXCEEDED && fib.ifindex &&
			   p->hops > 1 &&
			   (BYPASS_NETFILTER ||
			    (FORWARDS_AT_XDP && is_for_xdp(ifindex_of(skb), fib.ifindex, p)))) {
			s->nat.src = s->begun.node;
			s->nat.flags = NAT_BYPASS;
			s->begun.is_fresh = true;
		}
	}
	if (s->has_rules && !(s->nat.flags & NAT_BYPASS) &&
	    is_routed_by_source(skb, &p->flow.src, &p->flow.dst, &backend->addr))
		s->nat.flags |= NAT_ROUTED;
	/* The verifier walks on from here once, and not once for each result. */
	asm volatile("" ::: "memory");
}

/*
 * Creates the flow of a client beyond a device: the Service's pair, and a masquerade's if needed.
 */
static __always_inline int create_flow(struct __sk_buff *skb, struct packet *p)
{
	struct target to = { p->flow.dst, p->flow.dport, service_protocol(p->flow.proto) };
	const bool is_of_interest = port_of_interest(to.port);
	struct scratch *s = scratch();
	struct backend *backend;
	struct service *svc;
	enum insert done;
	int verdict;
	u32 id;

	if (!s || defer_to_kube_proxy(p))
		return PASS;
	if (is_of_interest)
		locate_client(skb, s, p);
	svc = is_of_interest ? find_service(&to) : NULL;
	if (svc && svc->flags & SERVICE_TWO_SCOPES && s->client_location != POD_OF_THIS_NODE)
		svc = outside_service(svc, &to);
	if (!svc && is_of_interest && is_redirected(&p->flow, &to)) {
		svc = redirected_service(&to);
		if (!svc)
			return frontend_gone(p);
	}
	if (!svc)
		return is_direct_clash(skb, p) ? create_direct_flow(skb, p) : no_service(skb, p);
	if (svc->flags & SERVICE_OWN)
		return PASS;
	s->service = *svc;
	svc = &s->service;
	if (is_martian(&p->flow.src))
		return pass(EVENT_MARTIAN);
	if (!can_open_flow(skb, p))
		return no_flow(skb, p, svc);
	init_flow(s, svc);
	backend = backend_for(p, s, &id, &verdict);
	if (!backend)
		return verdict;

	init_entry(s, p, backend, id);
	find_source(skb, s, p, backend);
	if (s->begun.is_masked && !(s->nat.flags & NAT_BYPASS))
		s->nat.seen = SEEN_MASKED;
	done = insert_pair(skb, s, &p->flow, s->begun.is_fresh);
	if (done != INSERT_DONE)
		return insert_failed(s, done);
	s->entry = s->nat;
	if (!s->begun.is_masked) {
		forget_masquerade(s, p->flow.proto);
	} else if (!(s->nat.flags & NAT_BYPASS)) {
		done = masquerade(skb, s, p->flow.proto, &s->begun.node);
		if (done != INSERT_DONE)
			return insert_failed(s, done);
	}
	decision_created(p, svc, id);
	return TRANSLATE;
}

/*
 * Sets @node to the address from which this host reaches @backend; returns false where there is no
 * route. If the backend has an address of this host, that one is used, as by a socket.
 */
static __always_inline bool host_address(struct __sk_buff *skb, const struct packet *p,
					 const struct backend *backend, struct inet_addr *node)
{
	const struct inet_addr *src = &p->flow.src;
	/*
	 * The kernel's helper finds no route from ::1, a link-local or a multicast address, and
	 * does not tell that from one to this host; so far @node is the unspecified address.
	 */
	const struct inet_addr *from = is_martian(src) || addr_is_link_local6(src) ? node : src;
	struct bpf_fib_lookup fib;
	enum fib_result route;

	route = fib_result_of(skb, ifindex_of(skb), from, &backend->addr, 0, &fib);
	if (is_thrown(skb, from, &backend->addr, route, &fib))
		route = FIB_OUT;
	if (NODEPORTS_ON_LOOPBACK && route == FIB_LOCAL) {
		*node = backend->addr;
		return true;
	}
	return leads_out(route) && masquerade_address(fib.ifindex, p->is_v4, node);
}

/* Says if the sending socket is bound to a device. */
static __always_inline bool is_bound_to_device(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	if (!sk)
		return false;
	sk = bpf_sk_fullsock(sk);
	return sk && sk->bound_dev_if;
}

/* Creates a flow of this host itself, for a client that no socket hook saw. One pair does all. */
static __always_inline int create_host_flow(struct __sk_buff *skb, struct packet *p)
{
	struct target to = { p->flow.dst, p->flow.dport, service_protocol(p->flow.proto) };
	struct service *svc = service_of_host(&to);
	struct scratch *s = scratch();
	struct inet_addr node = {};
	struct backend *backend;
	enum insert done;
	bool is_fresh;
	int verdict;
	u32 id;

	if (defer_to_kube_proxy(p))
		return PASS;
	if (!svc && is_redirected(&p->flow, &to)) {
		svc = redirected_service(&to);
		if (!svc)
			return frontend_gone(p);
	}
	if (!svc)
		return AT_LOOPBACK ? PASS : no_service(skb, p);
	if (!s || svc->flags & SERVICE_OWN)
		return PASS;
	s->service = *svc;
	svc = &s->service;
	init_flow(s, svc);
	backend = backend_for(p, s, &id, &verdict);
	if (!backend)
		return verdict;
	init_entry(s, p, backend, id);
	if (!host_address(skb, p, backend, &node)) {
		/* It is reported with the Service. */
		s->entry.service_id = svc->id;
		return drop(EVENT_UNROUTABLE);
	}
	s->nat.src = node;
	s->nat.flags = NAT_HOST;
	if (AT_LOOPBACK && is_bound_to_device(skb))
		s->nat.flags |= NAT_BOUND;
	/*
	 * A socket of this host may have the client's port towards the backend itself, now or
	 * later. Ports below 1024 are never chosen by chance, and servers may insist on them (NFS).
	 */
	is_fresh = bpf_ntohs(p->flow.sport) >= 1024 || !addr_equal(&p->flow.src, &node) ||
		   addr_equal(&backend->addr, &node) || is_port_taken(&p->flow);
	done = insert_pair(skb, s, &p->flow, is_fresh);
	s->entry = s->nat;
	if (done != INSERT_DONE)
		return insert_failed(s, done);
	decision_created(p, svc, id);
	return TRANSLATE;
}

#endif
