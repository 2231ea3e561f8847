/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Services for packets that no local socket chose a backend for (BPF_PROG_TYPE_SCHED_CLS): clients
 * outside, SCTP, kernel clients, VMs, sandboxed pods.
 *
 * At ingress, before netfilter and routing, a frontend becomes a backend; at egress, after them,
 * the backend's answers become the frontend's. lib/conntrack.h has the picture. A packet of no
 * Service passes after two reads of a filter, unchanged.
 *
 * loopback.c has what is otherwise at the loopback device (AT_LOOPBACK).
 */
#include "lib/compat.h"
#include "lib/addr.h"
#include "lib/maps.h"
#include "lib/options.h"
#include "lib/service.h"
#include "lib/packet.h"
#include "lib/filter.h"
#include "lib/conntrack.h"
#include "lib/rewrite.h"
#include "lib/reject.h"
#include "lib/masquerade.h"
#include "lib/service_cidr.h"
#include "lib/stale.h"

/* A pod or VM of this node, as detectLocalMode defines it. */
static __always_inline bool from_local_pod(struct __sk_buff *skb, const struct packet *p)
{
	u32 ifindex = ifindex_of(skb), *flags;
	struct device *device;

	if (PODS_BY_CIDR) {
		struct cidr_key key = { .length = 128, .addr = p->flow.src };

		flags = map_lookup(cidrs, &key);
		return flags && *flags & CIDR_PODS;
	}
	device = map_lookup(devices, &ifindex);
	return device && device->flags & DEVICE_PODS;
}

static __always_inline struct service *find_service(const struct target *to, u8 scope)
{
	struct service *svc = service_by_address(to, SCOPE_INTERNAL), *other;

	if (!svc && addr_is_this_node(&to->addr))
		svc = service_by_node_port(to, SCOPE_INTERNAL);
	if (!svc || scope == SCOPE_INTERNAL || !(svc->flags & SERVICE_TWO_SCOPES))
		return svc;
	other = svc->kind == KIND_NODE_PORT ? service_by_node_port(to, scope)
					    : service_by_address(to, scope);
	return other ? other : svc;
}

/*
 * Says if packets are a connected datagram socket's whose backend has gone. Then @to becomes what
 * the socket had asked for.
 */
static __always_inline bool is_redirected(const struct flow *flow, struct target *to)
{
	struct redirect *redirect;
	struct flow key;

	if (flow->proto != IPPROTO_UDP)
		return false;
	key = *flow;
	key.stage = STAGE_INGRESS;
	redirect = map_lookup(sock_redirects, &key);
	if (!redirect)
		return false;
	to->addr = redirect->frontend;
	to->port = redirect->frontend_port;
	return true;
}

/* A socket may also have asked for a NodePort at the node's loopback. */
static __always_inline struct service *redirected_service(const struct target *to)
{
	struct service *svc = service_by_address(to, SCOPE_INTERNAL);

	return svc ? svc : service_by_node_port(to, SCOPE_INTERNAL);
}

/* A source that no client can have (RFC 1812, 5.3.7): an answer to it would go astray. */
static __always_inline bool is_martian(const struct inet_addr *src)
{
	u32 first;

	if (!addr_is_v4(src))
		return addr_is_loopback(src) || !(src->word[0] | src->word[1] | src->word[2]) ||
		       (bpf_ntohl(src->word[0]) >> 24) == 0xff;
	first = bpf_ntohl(src->word[3]) >> 24;
	return first == 0 || first == 127 || (first >= 224 && first < 240) ||
	       src->word[3] == 0xffffffff;
}

/* A packet's client is its address; of a flow, for Maglev, its port and the Service's, too. */
static __always_inline void set_client(struct client *client, const struct packet *p)
{
	u64 *cookie = map_lookup(client_namespaces, &p->flow.src);

	/* A pod of this node, and the node, is the same client in packets as at the socket. */
	if (AT_LOOPBACK) {
		set_namespace(client, CONSTANT(HOST_NETNS_COOKIE));
	} else if (cookie) {
		set_namespace(client, *cookie);
	} else {
		client->addr = p->flow.src;
		client->kind = CLIENT_ADDRESS;
	}
	client->flow = (u32)bpf_ntohs(p->flow.sport) << 16 | bpf_ntohs(p->flow.dport);
	client->frontend = p->flow.dst;
}

/* Who serves a new flow; NULL where nobody may or can: then @verdict is what becomes of it. */
static __always_inline struct backend *backend_for(const struct packet *p, struct scratch *s,
						   u32 *id, int *verdict)
{
	const struct service *svc = &s->service;
	struct backend *backend = NULL;

	if (svc->flags & SERVICE_SOURCES && !source_allowed(svc, &p->flow.src)) {
		*verdict = drop(EVENT_SOURCE_RANGE);
		return NULL;
	}
	if (needs_client_key(svc))
		set_client(&s->client, p);
	switch (choose(svc, &s->client, id, &backend)) {
	case VERDICT_TRANSLATE:
		return backend;
	case VERDICT_REFUSE:
		*verdict = rejection(EVENT_NO_ENDPOINT);
		return NULL;
	default:
		*verdict = drop(EVENT_NO_LOCAL);
		return NULL;
	}
}

static __always_inline bool is_at_local_device(struct __sk_buff *skb)
{
	u32 ifindex = ifindex_of(skb);
	struct device *device = map_lookup(devices, &ifindex);

	return device && device->flags & DEVICE_LOCAL;
}

/* Says if what passes here passes our program at a device below, too, at the same stage. */
static __always_inline bool is_seen_below(struct __sk_buff *skb, enum stage stage)
{
	const u32 below = stage == STAGE_INGRESS ? DEVICE_INGRESS_BELOW : DEVICE_EGRESS_BELOW;
	u32 ifindex = ifindex_of(skb);
	struct device *device = map_lookup(devices, &ifindex);

	return device && device->flags & below;
}

/*
 * Says if an entry is for the program below alone, such as at a bridge's port. On the bridge a
 * translated packet of a Service's flow looks like one of the direct flow; and at the port a
 * translated reply of the direct flow would look like one of the Service's flow.
 */
static __always_inline bool is_left_to_below(struct __sk_buff *skb, const struct packet *p,
					     const struct nat *nat)
{
	return is_of_direct_flow(nat, &p->flow) && is_seen_below(skb, p->flow.stage);
}

/*
 * Says if a packet only answers. Networks outside overlap with Service CIDRs (10.96.0.0/12): a host
 * there that asks this node, or a pod by its own address, is answered; nobody asks it. kube-proxy
 * has the same rule (ct state new).
 */
static __always_inline bool is_answer(const struct packet *p)
{
	return p->proto == IPPROTO_TCP ? (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN
				       : has_asked(&p->flow.dst);
}

/* TCP shows by its flags who asks; of other protocols it is noted who does. */
static __always_inline void note_asker(struct __sk_buff *skb, const struct packet *p)
{
	struct scratch *s = scratch();

	if (!s || skb->pkt_type != PACKET_HOST || !in_service_cidr(&p->flow.src) ||
	    is_at_local_device(skb))
		return;
	asker_key(&s->key, &p->flow.src);
	conntrack_note(s, SEEN_REPLY);
}

/*
 * A packet that leaves this node untranslated. It is looked at here and not where it came in, so
 * that another proxy's rules in netfilter come first, and what the node itself has is found by
 * routing.
 */
static __always_inline int leave_unserved(struct __sk_buff *skb, const struct packet *p)
{
	if (!in_service_cidr(&p->flow.dst) || is_at_local_device(skb) || is_answer(p))
		return PASS;
	count_unallocated(&p->flow.dst, UNALLOCATED_PACKET);
	return drop(EVENT_NO_SUCH_SERVICE);
}

/* Packets to an address of ours with nothing there. */
static __always_inline int no_service(struct __sk_buff *skb, const struct packet *p)
{
	if (is_cluster_ip(&p->flow.dst))
		return rejection(EVENT_NO_SUCH_PORT);
	return p->flow.stage == STAGE_EGRESS ? leave_unserved(skb, p) : PASS;
}

/* Whether the backend must not see the client: it would not answer through us, or policy says so.
 */
static __always_inline bool must_masquerade(struct __sk_buff *skb, const struct service *svc,
					    bool is_inside, const struct packet *p,
					    const struct backend *backend)
{
	if (MASQUERADE_ALL || addr_equal(&p->flow.src, &backend->addr))
		return true;
	/* A pod of another node counts by its address; its backend may be beside it there. */
	if (is_inside)
		return PODS_BY_CIDR && svc->kind != KIND_CLUSTER_IP &&
		       !(svc->flags & SERVICE_TWO_SCOPES) && !is_at_local_device(skb);
	return !(svc->flags & SERVICE_LOCAL);
}

/*
 * Says if a socket has left this flow to us because its port is in use for another frontend with
 * the same backend: packets of that one never come here.
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

static __always_inline int not_inserted(enum insert done)
{
	return drop(done == INSERT_FULL ? EVENT_TABLE_FULL : EVENT_PORTS_TAKEN);
}

/* What all entries of a new flow have. */
static __always_inline void start_flow(struct scratch *s, const struct service *svc, u32 backend_id)
{
	u32 id = svc->id;
	u64 *epoch = map_lookup(epochs, &id);

	s->nat.service_id = id;
	s->nat.backend_id = backend_id;
	s->nat.seen = 0;
	s->nat.epoch = epoch ? (u16)*epoch : 0;
	s->nat.last = s->nat.created = bpf_ktime_get_coarse_ns();
}

/* The entry of a new flow's questions, as far as its first packet and the backend tell. */
static __always_inline void new_entry(struct scratch *s, const struct packet *p,
				      const struct backend *backend)
{
	const struct flow *flow = &p->flow;

	s->key = *flow;
	s->nat.src = flow->src;
	s->nat.dst = backend->addr;
	s->nat.sport = flow->sport;
	s->nat.dport = backend->port;
	s->nat.flags = 0;
	s->nat.end = s->nat.acked = 0;
	if (p->tcp_flags)
		note_sequence(p, &s->nat);
}

/*
 * Inserts the entry of answers in @s. Where another flow of the client's port has the key (it asks
 * the same backend through another frontend), another port is taken, and left in @s->key.
 */
static __always_inline enum insert insert_answers(struct __sk_buff *skb, struct scratch *s)
{
	struct nat *known = conntrack_lookup(&s->key);
	enum insert done;

	/* Of this very flow, which begins anew. */
	if (known && known->sport == s->nat.sport && known->dport == s->nat.dport &&
	    addr_equal(&known->src, &s->nat.src)) {
		*known = s->nat;
		return INSERT_DONE;
	}
	done = conntrack_insert(s, false);
	return done == INSERT_TAKEN ? take_port(skb, s) : done;
}

/*
 * Makes a flow's Service pair, answers first: a question without a way back would be lost. @s->nat
 * has the questions' half; it is there again afterwards, with the port that the backend will see.
 * @fresh: a port of ours is taken in any case.
 */
static __always_inline enum insert insert_pair(struct __sk_buff *skb, struct scratch *s,
					       const struct flow *flow, bool fresh)
{
	struct flow answers;
	enum insert done;

	invert_entry(s, flow);
	done = fresh ? take_port(skb, s) : insert_answers(skb, s);
	if (done != INSERT_DONE)
		return done;
	answers = s->key;
	invert_entry(s, &answers);
	done = conntrack_insert(s, true);
	if (done == INSERT_DONE)
		load_count_flow(s->nat.backend_id);
	else
		map_delete(conntrack, &answers);
	return done;
}

static __always_inline int create_bypass_flow(struct __sk_buff *skb, const struct packet *p,
					      struct scratch *s, const struct inet_addr *node)
{
	enum insert done;

	s->nat.src = *node;
	s->nat.flags = NAT_BYPASS;
	done = insert_pair(skb, s, &p->flow, true);
	if (done != INSERT_DONE)
		return not_inserted(done);
	if (rewrite(skb, p, &s->nat, true))
		return drop(EVENT_REWRITE);
	return send_out(skb, &s->nat.src, &s->nat.dst);
}

/* Of the device by which the packet came: what came in must go out in one piece. */
static __always_inline u16 mtu_of(struct __sk_buff *skb)
{
	u32 ifindex = ifindex_of(skb);
	struct device *device = map_lookup(devices, &ifindex);

	return device ? device->mtu : 0;
}

/*
 * A packet of no flow of ours that kube-proxy, behind this hook, is to see: while connections that
 * it began live on, and while our programs come to the node's devices one by one, or leave them.
 */
static __always_inline bool defer_to_kube_proxy(const struct packet *p)
{
	u32 any = 0;
	struct device *node = map_lookup(devices, &any);

	if (!node || !(node->flags & (HANDOVER_MODE | NO_NEW_FLOWS)))
		return false;
	return node->flags & NO_NEW_FLOWS ||
	       (p->flow.proto == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN);
}

/*
 * Says if a packet can be the first of a flow. What is not, and of no known flow, may be the answer
 * to a connection of this node's own. SCTP's peers ask each other every 30 s if they are there: by
 * that an association whose flow was lost goes on, as with netfilter's conntrack.
 */
static __always_inline bool can_open(struct __sk_buff *skb, const struct packet *p)
{
	u8 chunk;

	if (p->flow.proto == IPPROTO_TCP)
		return (p->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
	if (p->flow.proto == IPPROTO_SCTP)
		return !p->is_later_fragment &&
		       !bpf_skb_load_bytes(skb, p->l4 + SCTP_CHUNK, &chunk, sizeof(chunk)) &&
		       (chunk == SCTP_INIT || chunk == SCTP_HEARTBEAT);
	return true;
}

/*
 * A packet to a frontend that opens no flow and is of none. On an address of this node it is the
 * host's, whose socket may have it; elsewhere it must not be routed on.
 */
static __always_inline int no_flow(struct __sk_buff *skb, const struct packet *p,
				   const struct service *svc)
{
	struct bpf_fib_lookup fib;
	enum fib_result way;

	if (svc->flags & SERVICE_SOURCES && !source_allowed(svc, &p->flow.src))
		return drop(EVENT_SOURCE_RANGE);
	if (!is_cluster_ip(&p->flow.dst)) {
		way = fib_result_of(skb, &p->flow.src, &p->flow.dst, 0, &fib);
		/* Without a device nothing is routed on. */
		if (way == FIB_LOCAL || (way == FIB_OUT && !fib.ifindex))
			return PASS;
	}
	return rejection(EVENT_NO_FLOW);
}

/*
 * Says if a packet that goes to no frontend opens a flow whose answers would be taken for those of
 * a Service: the client asks a backend directly, from the port by which it asks a Service there.
 * At a bridge the same is true of what the program at its port has made of the Service's packet.
 */
static __always_inline bool is_direct_clash(struct __sk_buff *skb, const struct packet *p)
{
	const struct flow *flow = &p->flow;
	const struct flow key = {
		.src = flow->dst,
		.dst = flow->src,
		.sport = flow->dport,
		.dport = flow->sport,
		.proto = flow->proto,
		.stage = STAGE_EGRESS,
	};
	const struct nat *answers;

	if (!flow_of_interest(&key.src, &key.dst) || is_seen_below(skb, STAGE_INGRESS) ||
	    !can_open(skb, p))
		return false;
	answers = conntrack_lookup(&key);
	/* An entry without NAT_REPLY is of what this host itself asks. */
	return answers && answers->flags & NAT_REPLY && !is_reverse(answers, flow);
}

/* Gives the later of two such flows another port, as netfilter's NAT does (null binding). */
static __always_inline int create_direct_flow(struct __sk_buff *skb, const struct packet *p)
{
	struct scratch *s = scratch();
	enum insert done;

	if (!s)
		return PASS;
	s->nat.src = p->flow.src;
	s->nat.dst = p->flow.dst;
	s->nat.sport = p->flow.sport;
	s->nat.dport = p->flow.dport;
	s->nat.service_id = s->nat.backend_id = NOBODY;
	s->nat.seen = 0;
	s->nat.epoch = 0;
	s->nat.end = s->nat.acked = 0;
	s->nat.last = s->nat.created = bpf_ktime_get_coarse_ns();
	if (p->tcp_flags)
		note_sequence(p, &s->nat);
	done = insert_source(skb, s, &p->flow);
	if (done != INSERT_DONE)
		return not_inserted(done);
	return rewrite(skb, p, &s->nat, false) ? drop(EVENT_REWRITE) : PASS;
}

/* A new flow of a client beyond a device: the Service's pair, and the masquerade's if need be. */
static __always_inline int create_flow(struct __sk_buff *skb, struct packet *p)
{
	struct target to = { p->flow.dst, p->flow.dport, service_protocol(p->flow.proto) };
	const bool is_of_interest = port_of_interest(to.port);
	const bool is_inside = from_local_pod(skb, p);
	struct scratch *s = scratch();
	struct bpf_fib_lookup fib;
	struct inet_addr node = {};
	struct backend *backend;
	struct service *svc;
	enum insert done;
	bool is_masked;
	enum fib_result way;
	int verdict;
	u32 id;

	if (defer_to_kube_proxy(p))
		return PASS;
	svc = is_of_interest ? find_service(&to, is_inside ? SCOPE_INTERNAL : SCOPE_EXTERNAL)
			     : NULL;
	if (!svc && is_of_interest && is_redirected(&p->flow, &to)) {
		svc = redirected_service(&to);
		if (!svc)
			return rejection(EVENT_BACKEND_GONE);
	}
	if (!svc)
		return is_direct_clash(skb, p) ? create_direct_flow(skb, p) : no_service(skb, p);
	if (!s || svc->flags & SERVICE_OWN)
		return PASS;
	s->service = *svc;
	svc = &s->service;
	if (is_martian(&p->flow.src))
		return pass(EVENT_MARTIAN);
	if (!can_open(skb, p))
		return no_flow(skb, p, svc);
	backend = backend_for(p, s, &id, &verdict);
	if (!backend)
		return verdict;

	start_flow(s, svc, id);
	new_entry(s, p, backend);
	is_masked = must_masquerade(skb, svc, is_inside, p, backend);
	if (is_masked) {
		way = fib_result_of(skb, &p->flow.src, &backend->addr, mtu_of(skb), &fib);
		is_masked = leads_out(way) && masquerade_address(fib.ifindex, p->is_v4, &node);
		if (BYPASS_NETFILTER && is_masked && way != FIB_MTU_EXCEEDED && fib.ifindex &&
		    p->hops > 1)
			return create_bypass_flow(skb, p, s, &node);
	}
	done = insert_pair(skb, s, &p->flow, is_port_taken(&p->flow));
	if (done != INSERT_DONE)
		return not_inserted(done);
	if (rewrite(skb, p, &s->nat, false))
		return drop(EVENT_REWRITE);
	if (is_masked) {
		done = masquerade(skb, s, p->flow.proto, &node);
		if (done != INSERT_DONE) {
			/* Without it the next packet would show the client to the backend. */
			struct nat *nat = conntrack_lookup(&p->flow);

			if (nat)
				conntrack_forget(&p->flow, nat);
			return not_inserted(done);
		}
	}
	return PASS;
}

/* The Service that this host asks. What has an address of the node itself goes by the loopback. */
static __always_inline struct service *service_of_host(const struct target *to)
{
	if (!AT_LOOPBACK)
		return service_by_address(to, SCOPE_INTERNAL);
	return addr_is_loopback(&to->addr) ? service_by_node_port(to, SCOPE_INTERNAL)
					   : find_service(to, SCOPE_INTERNAL);
}

/*
 * Leaves in @node the address by which this host asks @backend; false where there is no way to it.
 * A backend that has an address of the host itself is asked by that one, as by a socket.
 */
static __always_inline bool host_address(struct __sk_buff *skb, const struct packet *p,
					 const struct backend *backend, struct inet_addr *node)
{
	const bool is_loopback = AT_LOOPBACK && addr_is_loopback(&p->flow.src);
	struct bpf_fib_lookup fib;
	enum fib_result way;

	/* No route begins at ::1; so far @node is the unspecified address. */
	way = fib_result_of(skb, is_loopback ? node : &p->flow.src, &backend->addr, 0, &fib);
	if (NODEPORTS_ON_LOOPBACK && way == FIB_LOCAL) {
		*node = backend->addr;
		return true;
	}
	return leads_out(way) && masquerade_address(fib.ifindex, p->is_v4, node);
}

/* Says if the sender takes only what comes by this device. */
static __always_inline bool is_bound_to_device(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	if (!sk)
		return false;
	sk = bpf_sk_fullsock(sk);
	return sk && sk->bound_dev_if;
}

/* A new flow of this host, by a client that no socket hook saw. One pair does all. */
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
			return rejection(EVENT_BACKEND_GONE);
	}
	if (!svc)
		return AT_LOOPBACK ? PASS : no_service(skb, p);
	if (!s || svc->flags & SERVICE_OWN)
		return PASS;
	s->service = *svc;
	svc = &s->service;
	backend = backend_for(p, s, &id, &verdict);
	if (!backend)
		return verdict;
	if (!host_address(skb, p, backend, &node))
		return drop(EVENT_UNROUTABLE);
	start_flow(s, svc, id);
	new_entry(s, p, backend);
	s->nat.src = node;
	s->nat.flags = NAT_HOST;
	if (AT_LOOPBACK && is_bound_to_device(skb))
		s->nat.flags |= NAT_BOUND;
	/*
	 * A socket of this host to the backend itself may have the client's port, now or later.
	 * Below 1024 it does not come by chance, and servers may insist on it (NFS).
	 */
	is_fresh = bpf_ntohs(p->flow.sport) >= 1024 || !addr_equal(&p->flow.src, &node) ||
		   addr_equal(&backend->addr, &node) || is_port_taken(&p->flow);
	done = insert_pair(skb, s, &p->flow, is_fresh);
	if (done != INSERT_DONE)
		return not_inserted(done);
	if (rewrite(skb, p, &s->nat, false))
		return drop(EVENT_REWRITE);
	return send_out(skb, &s->nat.src, &s->nat.dst);
}

/*
 * Says if the frontend that a flow asks is still its service's: an address or port may have been
 * given to another. Connections stay with the one that they have.
 */
static __always_inline bool is_owner(const struct flow *flow, u32 service_id)
{
	struct target to = { flow->dst, flow->dport, service_protocol(flow->proto) };
	struct service *svc = find_service(&to, SCOPE_INTERNAL);

	if (!svc && is_redirected(flow, &to))
		svc = redirected_service(&to);
	return svc && svc->id == service_id;
}

/*
 * Says if a flow's original direction leads to a backend that has left the Service, or by a
 * frontend that is not.
 */
static __always_inline bool is_stale(const struct flow *flow, struct nat *nat, bool opens)
{
	struct backend *backend = backend_known(nat->backend_id, &nat->dst, nat->dport,
						service_protocol(flow->proto));
	u64 epoch;

	if (!backend)
		return true;
	/* Nor does a new connection go where none may: its client may have lost the old one unseen.
	 */
	if (opens && backend->state != BACKEND_ACTIVE)
		return true;
	epoch = epoch_of(nat->service_id);
	if (nat->epoch == (u16)epoch)
		return false;
	if (has_departed(nat->service_id, nat->backend_id, flow->proto == IPPROTO_TCP && !opens))
		return true;
	if ((opens || service_protocol(flow->proto) == IPPROTO_UDP) &&
	    !is_owner(flow, nat->service_id))
		return true;
	nat->epoch = (u16)epoch;
	return false;
}

enum course {
	COURSE_FOLLOW,
	COURSE_AGAIN,  /* as if this were the first packet */
	COURSE_REJECT, /* a connection that has lost its backend */
};

/* What becomes of a packet for which there is an entry of questions. */
static __always_inline enum course course_of(const struct packet *p, struct nat *nat)
{
	const bool opens = (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;

	/* A masquerade ends with the flow that it belongs to. */
	if (nat->flags & NAT_REPLY ||
	    (nat->flags & NAT_SOURCE && !is_of_direct_flow(nat, &p->flow)))
		return COURSE_FOLLOW;
	if (!(nat->flags & NAT_SOURCE) && is_stale(&p->flow, nat, opens))
		return p->flow.proto != IPPROTO_TCP || opens ? COURSE_AGAIN : COURSE_REJECT;
	/* A client that uses a port again opens another connection. */
	return opens && is_closed(nat) ? COURSE_AGAIN : COURSE_FOLLOW;
}

/*
 * Hands a packet from a frontend to this host on. It came by the device of its backend; a strict
 * reverse path check (rp_filter=1, RFC 3704, 2.2; nftables' fib) wants it by that of the frontend's
 * route.
 */
static __always_inline int deliver(struct __sk_buff *skb, const struct nat *nat)
{
#if AT_LOOPBACK
	/* With the route that the packet has, it is not by this device for who is bound to it. */
	if (nat->flags & NAT_BOUND)
		return redirect_neigh(LOOPBACK_IFINDEX, NULL, 0, 0);
	(void)skb;
#else
	struct bpf_fib_lookup fib;
	enum fib_result way;

	if (L3_OFFSET != ETH_HLEN && !NODEPORTS_ON_LOOPBACK)
		return PASS;
	way = fib_result_of(skb, &nat->dst, &nat->src, 0, &fib);
	if (NODEPORTS_ON_LOOPBACK && way == FIB_LOCAL)
		return send_to_self(skb);
#if L3_OFFSET == ETH_HLEN
	if (way == FIB_NEIGHBOUR && fib.ifindex != ifindex_of(skb)) {
		u8 macs[12];

		__builtin_memcpy(macs, fib.smac, 6);
		__builtin_memcpy(macs + 6, fib.dmac, 6);
		if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
			return drop(EVENT_REWRITE);
		return bpf_redirect(fib.ifindex, BPF_F_INGRESS);
	}
#endif
#endif
	return PASS;
}

static __always_inline int forward_flow(struct __sk_buff *skb, const struct packet *p,
					struct nat *nat)
{
	const bool forwards = nat->flags & NAT_BYPASS;

	if (is_left_to_below(skb, p, nat))
		return PASS;
	conntrack_track(p, nat);
	if (nat->flags & NAT_OWN)
		return PASS;
	if (forwards && p->hops <= 1)
		return drop(EVENT_HOPS);
	if (rewrite(skb, p, nat, forwards))
		return drop(EVENT_REWRITE);
	/* This host's questions are not where their route begins. */
	if (forwards || (nat->flags & (NAT_HOST | NAT_REPLY)) == NAT_HOST)
		return send_out(skb, &nat->src, &nat->dst);
	if ((nat->flags & (NAT_HOST | NAT_REPLY)) == (NAT_HOST | NAT_REPLY))
		return deliver(skb, nat);
	return PASS;
}

/* False where the packet is of a known flow: then @verdict is what becomes of it. */
static __always_inline bool is_new(struct __sk_buff *skb, const struct packet *p, int *verdict)
{
	struct nat *nat = conntrack_lookup(&p->flow);

	if (!nat)
		return true;
	switch (course_of(p, nat)) {
	case COURSE_FOLLOW:
		*verdict = forward_flow(skb, p, nat);
		return false;
	case COURSE_REJECT:
		conntrack_forget(&p->flow, nat);
		*verdict = rejection(EVENT_BACKEND_GONE);
		return false;
	default:
		conntrack_end(nat);
		return true;
	}
}

/* Packets that are not simply one of a flow with ports. */
static __always_inline int unusual(struct __sk_buff *skb, const struct packet *p,
				   enum parse_result parsed)
{
	switch (parsed) {
	case PARSE_TRUNCATED:
		return pass(EVENT_MALFORMED);
	case PARSE_FIRST_FRAG_UNSEEN:
		return is_cluster_ip(&p->flow.dst) ? drop(EVENT_FRAGMENT) : no_service(skb, p);
	case PARSE_OTHER:
		/* Of ICMP only a ping is answered by an error. */
		if (p->proto == (p->is_v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6) &&
		    p->tcp_flags != (p->is_v4 ? ICMP_ECHO : ICMPV6_ECHO))
			return PASS;
		return no_service(skb, p);
	default:
		return PASS;
	}
}

/*
 * Hands on an error to this host about a packet of its own. Unless it is a client's at the
 * loopback, it stays where it came in: its source may be a router's.
 */
static __always_inline int deliver_error(struct __sk_buff *skb, const struct nat *nat)
{
#if AT_LOOPBACK
	return deliver(skb, nat);
#else
	struct bpf_fib_lookup fib;

	if (NODEPORTS_ON_LOOPBACK && fib_result_of(skb, &nat->dst, &nat->src, 0, &fib) == FIB_LOCAL)
		return send_to_self(skb);
	return PASS;
#endif
}

static __always_inline int translate_error(struct __sk_buff *skb, const struct packet *p)
{
	struct nat *nat = conntrack_lookup(&p->flow);

	if (!nat || nat->flags & NAT_OWN || is_left_to_below(skb, p, nat))
		return PASS;
	if (rewrite_error(skb, p, nat))
		return drop(EVENT_REWRITE);
	if (!(nat->flags & NAT_HOST))
		return PASS;
	return nat->flags & NAT_REPLY ? deliver_error(skb, nat)
				      : send_out(skb, &nat->src, &nat->dst);
}

/*
 * On a pod's device frames to any host are ours: with a bridge behind it they are sent to the
 * bridge's address. On an uplink others' frames are theirs.
 */
static __always_inline bool is_for_us(struct __sk_buff *skb)
{
	return skb->pkt_type == PACKET_HOST || is_at_local_device(skb);
}

static __always_inline int handle_ingress(struct __sk_buff *skb, struct packet *p)
{
	enum parse_result parsed;
	int verdict;

	/* A VLAN's packets come again on the VLAN's own device. */
	if (skb->vlan_present || !read_addresses(skb, p))
		return PASS;
	if (p->proto != IPPROTO_TCP && may_be_in_service_cidr(&p->flow.src))
		note_asker(skb, p);
	/* What asks a backend directly is of interest where a Service has answers from there. */
	if (!address_of_interest(&p->flow.dst) && !flow_of_interest(&p->flow.dst, &p->flow.src))
		return PASS;
	if (!is_for_us(skb))
		return PASS;
	parsed = read_ports(skb, p);
	if (parsed == PARSE_ICMP_ERROR)
		return translate_error(skb, p);
	if (parsed != PARSE_WHOLE && parsed != PARSE_LATER_FRAG)
		return unusual(skb, p, parsed);
	if (flow_of_interest(&p->flow.src, &p->flow.dst) && !is_new(skb, p, &verdict))
		return verdict;
	return create_flow(skb, p);
}

/*
 * A packet past netfilter from an address and port that is a frontend's, and of no flow of ours: a
 * socket of this host has the port, or netfilter's own NAT took it for a pod. While kube-proxy's
 * connections live on behind us it may be the answer of one of those: that begins anew with us.
 */
static __always_inline void note_own(const struct packet *p)
{
	const struct target from = { p->flow.src, p->flow.sport, service_protocol(p->flow.proto) };
	struct scratch *s = scratch();
	struct service *svc;
	struct device *node;
	u32 any = 0;

	if (!s || !port_of_interest(from.port))
		return;
	svc = AT_LOOPBACK ? service_of_host(&from) : find_service(&from, SCOPE_EXTERNAL);
	if (!svc || svc->flags & SERVICE_OWN)
		return;
	node = map_lookup(devices, &any);
	if (!node || !(node->flags & (HANDOVER_MODE | NO_NEW_FLOWS)))
		conntrack_note_own(s, &p->flow);
}

static __always_inline int handle_egress(struct __sk_buff *skb, struct packet *p)
{
	bool is_known, is_mine, may_be_own;
	enum parse_result parsed;
	int verdict;

	if (skb->vlan_present || !read_addresses(skb, p))
		return PASS;
	is_known = flow_of_interest(&p->flow.src, &p->flow.dst);
	/* Only this host's own packets can still have a frontend's address here. */
	is_mine = !skb->ingress_ifindex && address_of_interest(&p->flow.dst);
	/* What TCP answers can be told by its flags. */
	may_be_own = p->proto != IPPROTO_TCP && address_of_interest(&p->flow.src);
	if (!is_known && !is_mine && !may_be_own && !may_be_in_service_cidr(&p->flow.dst) &&
	    p->proto != (p->is_v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return PASS;
	parsed = read_ports(skb, p);
	if (parsed == PARSE_ICMP_ERROR)
		return translate_error(skb, p);
	if (parsed != PARSE_WHOLE && parsed != PARSE_LATER_FRAG)
		return is_mine ? unusual(skb, p, parsed) : leave_unserved(skb, p);
	if (is_known && !is_new(skb, p, &verdict))
		return verdict;
	if (is_mine)
		return create_host_flow(skb, p);
	if (may_be_own)
		note_own(p);
	return leave_unserved(skb, p);
}

#if !AT_LOOPBACK
int from_device(struct __sk_buff *skb)
{
	struct packet *p = packet_of(STAGE_INGRESS);

	return p ? carry_out(skb, p, handle_ingress(skb, p)) : PASS;
}

int to_device(struct __sk_buff *skb)
{
	struct packet *p = packet_of(STAGE_EGRESS);

	return p ? carry_out(skb, p, handle_egress(skb, p)) : PASS;
}
#endif
