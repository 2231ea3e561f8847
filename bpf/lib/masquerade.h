/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Masquerading: the address and port of this node that stand for a client.
 *
 * Ports come from a range outside of ip_local_port_range: a connection that the node itself opens
 * to the same backend cannot have one of them. Where there is no such range
 * (MASQUERADE_PORTS_SHARED), the node's sockets are looked up before a port is taken.
 */
#ifndef EBPFPROXY_MASQUERADE_H
#define EBPFPROXY_MASQUERADE_H

#include "conntrack.h"
#include "timeout.h"

#define MASQUERADE_RANGE (MASQUERADE_LAST - MASQUERADE_FIRST + 1)
/* This many ports are tried for one that no flow has, and this many of those for sockets. */
#define FLOW_TRIES   12
#define SOCKET_TRIES 4
/* Tries are spread over the range, since taken ports come in rows. */
#define MASQUERADE_STEP 7919

static __always_inline bool is_masquerade_port(__be16 port)
{
	return (u16)(bpf_ntohs(port) - MASQUERADE_FIRST) < MASQUERADE_RANGE;
}

#define TCP_STATE_LISTEN 10

/*
 * Says if a socket of this host has the port that the reply @s->key goes to. A listening socket has
 * no connection to lose. A datagram socket need not be connected to use the backend. The kernel has
 * no lookup for UDP-Lite and SCTP.
 */
static __always_inline bool is_of_own_socket(struct __sk_buff *skb, struct scratch *s)
{
	const struct flow *reply = &s->key;
	struct bpf_sock_tuple *tuple = (void *)reply;
	u32 size = sizeof(tuple->ipv6);
	struct bpf_sock *sock;
	bool is_used = true;

	/* What the stack has of it would be another state for the verifier, at each try. */
	_Static_assert(offsetof(struct flow, dst) == offsetof(typeof(tuple->ipv6), daddr) &&
			       offsetof(struct flow, sport) ==
				       offsetof(typeof(tuple->ipv6), sport) &&
			       offsetof(struct flow, dport) == offsetof(typeof(tuple->ipv6), dport),
		       "a flow begins as such a tuple does");
	if (addr_is_v4(&reply->dst)) {
		tuple = (void *)s->begun.ends4;
		tuple->ipv4.saddr = reply->src.word[3];
		tuple->ipv4.daddr = reply->dst.word[3];
		tuple->ipv4.sport = reply->sport;
		tuple->ipv4.dport = reply->dport;
		size = sizeof(tuple->ipv4);
	}
	if (reply->proto == IPPROTO_UDP) {
		sock = bpf_sk_lookup_udp(skb, tuple, size, BPF_F_CURRENT_NETNS, 0);
	} else if (reply->proto == IPPROTO_TCP) {
		/* Unlike bpf_sk_lookup_tcp() this also finds sockets in TIME_WAIT. */
		sock = bpf_skc_lookup_tcp(skb, tuple, size, BPF_F_CURRENT_NETNS, 0);
		if (sock)
			is_used = sock->state != TCP_STATE_LISTEN;
	} else {
		return false;
	}
	if (!sock)
		return false;
	bpf_sk_release(sock);
	return is_used;
}

/* Says if a flow is closed, and no other CPU is giving its port away. */
static __always_inline u64 is_closed_unclaimed(const struct nat *nat)
{
	const u8 seen = nat->seen;

	_Static_assert(SEEN_RST << 1 == SEEN_CLAIMED, "one shift");
	return (has_closed(seen) << 1 & ~seen) / SEEN_CLAIMED;
}

/* Says if packets with the same key become the same by both entries: they are of one client. */
static __always_inline u64 becomes_same(const struct nat *nat, const struct nat *other)
{
	const word *a = (const word *)nat, *b = (const word *)other;
	const u64 differs = (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) |
			    (nat->sport ^ other->sport) | (nat->dport ^ other->dport);

	return is_zero(differs >> 1 | (differs & 1));
}

/*
 * Looks from @start on for a port that no reply direction has, or one that has been closed for long
 * enough, and leaves it in @s->key. Another one that is closed is kept in @s->begun.
 */
static __always_inline bool find_port(struct scratch *s, u32 *start)
{
	/* The verifier walks every try: as little as possible is done in it. */
#pragma clang loop unroll(disable)
	for (int i = 0; i < FLOW_TRIES; i++) {
		const struct nat *nat;
		u64 is_free;

		s->key.dport = bpf_htons((u16)(MASQUERADE_FIRST + *start));
		*start = (*start + MASQUERADE_STEP) % MASQUERADE_RANGE;
		nat = conntrack_lookup(&s->key);
		if (!nat)
			return true;
		is_free = is_closed_unclaimed(nat);
		s->begun.closed_port = select(is_free, s->key.dport, s->begun.closed_port);
		/* The flow begins now. */
		if (is_free & is_past_time_wait(nat, s->nat.last))
			return true;
	}
	return false;
}

/* Takes a port that find_port() has passed, as there is no better one. */
static __always_inline bool find_closed_port(struct scratch *s)
{
	s->key.dport = s->begun.closed_port;
	return s->key.dport;
}

/*
 * Says if the flow that had the port of number @start, and is closed, had the same ends as this
 * one. If the backend has a half of that connection left, it knows this client.
 */
static __always_inline bool find_own_port(struct scratch *s, u32 start)
{
	const struct nat *nat;

	s->key.dport = bpf_htons((u16)(MASQUERADE_FIRST + start));
	nat = conntrack_lookup(&s->key);
	return nat && is_closed_unclaimed(nat) & becomes_same(nat, &s->nat);
}

/*
 * Inserts @s->key and @s->nat. Only one CPU replaces a closed flow's entry. Before it is claimed,
 * another one may do so, and give its element to an open flow with this port or another one.
 */
static __always_inline enum insert insert_with_port(struct scratch *s)
{
	struct nat *closed = conntrack_lookup(&s->key);

	if (!closed)
		return conntrack_put(s, false);
	if (!is_closed(closed) || !claim_entry(closed))
		return INSERT_TAKEN;
	if (conntrack_lookup(&s->key) == closed && is_closed(closed))
		return conntrack_put(s, true);
	release_entry(closed);
	return INSERT_TAKEN;
}

/*
 * Inserts the reply direction's entry of a flow with a free port: @s->key lacks only its dport, the
 * port that stands for the client, and @s->nat is what replies become. Leaves the port in @s->key.
 * The port that the flow had before it was closed, in the entry @known, is tried first.
 */
static __always_inline enum insert take_port(struct __sk_buff *skb, struct scratch *s,
					     const struct nat *known)
{
	u32 start = known ? bpf_ntohs(known->sport) - MASQUERADE_FIRST : bpf_get_prandom_u32();
	volatile u32 *has_own = &s->begun.has_own_port;
	enum insert done;

	start %= MASQUERADE_RANGE;
	*has_own = known && find_own_port(s, start);
	s->begun.closed_port = 0;
#pragma clang loop unroll(disable)
	for (int i = 0; i < SOCKET_TRIES; i++) {
		const bool found = (!i && *has_own) || find_port(s, &start) ||
				   (i == SOCKET_TRIES - 1 && find_closed_port(s));

		if (!found || (MASQUERADE_PORTS_SHARED && is_of_own_socket(skb, s)))
			continue;
		/* Another CPU may have taken the port meanwhile. */
		done = insert_with_port(s);
		if (done != INSERT_TAKEN)
			return done;
	}
	return INSERT_TAKEN;
}

/*
 * Inserts the original direction's entry, @s->key and @s->nat, of a key that the map had when this
 * packet came, if it @was_known. Another CPU may have inserted it since then, for another packet of
 * the flow: that one is replaced, as it would have been by a later packet, and no longer counted.
 * Its reply stays, for the answer to that packet.
 */
static __always_inline enum insert insert_original(struct scratch *s, bool was_known)
{
	const enum insert done = conntrack_put(s, was_known);
	struct nat *others;

	if (done != INSERT_TAKEN)
		return done;
	others = conntrack_read(&s->key, &s->other);
	/* One that began earlier is what a reply has put back: it is counted no more. */
	if (others && (s64)(s->nat.last - s->other.created) < (s64)NSEC_PER_SEC)
		conntrack_end(others, &s->other);
	return conntrack_put(s, true);
}

/*
 * Inserts the pair that gives the flow @key another source. @s->nat is what the original direction
 * becomes; its port is set here. @known is the entry that @key has had so far, NULL where it has
 * none, as @s->is_known says.
 */
static __always_inline enum insert insert_source(struct __sk_buff *skb, struct scratch *s,
						 const struct flow *key, const struct nat *known)
{
	struct flow reply;
	enum insert done;

	s->nat.flags = NAT_SOURCE;
	s->nat.seen = 0;
	invert_entry(s, key);
	done = take_port(skb, s, known);
	if (done != INSERT_DONE)
		return done;
	reply = s->key;
	invert_entry(s, &reply);
	return insert_original(s, s->is_known);
}

/* A flow's entries do not fit, or no port is free: insert_anyway() goes on from here. */
static __always_inline int insert_failed(struct scratch *s, enum insert done)
{
	s->failed = done;
	return NOT_INSERTED;
}

/* Sets @key to what the original direction, with the entry @nat, has become where it leaves. */
static __always_inline void masquerade_key(struct flow *key, const struct nat *nat, u8 proto)
{
	key->src = nat->src;
	key->dst = nat->dst;
	key->sport = nat->sport;
	key->dport = nat->dport;
	key->proto = proto;
	key->stage = STAGE_EGRESS;
	key->pad = 0;
}

static __always_inline bool is_masquerade(const struct nat *nat)
{
	return (nat->flags & (NAT_SOURCE | NAT_REPLY)) == NAT_SOURCE;
}

/*
 * Keeps a pair, which may have timed out, for a flow that begins @now; returns false where another
 * CPU is ending it, or has. That one looks at the time after it has claimed the entry of the reply
 * direction, which has @key.
 */
static __always_inline bool keep_entry(const struct flow *key, struct nat *original,
				       struct nat *reply, u64 now)
{
	struct nat bits;

	*(volatile u64 *)&original->last = now;
	/* It changes nothing, but is a full barrier. */
	bits.marks = __sync_fetch_and_or(&reply->marks, 0);
	return !(bits.seen & SEEN_CLAIMED) && conntrack_lookup(key) == reply;
}

/*
 * Inserts the pair that masquerades a new flow. @s->nat is what the original direction has become:
 * packets from the client to the backend, which leave with @addr as their source.
 */
static __always_inline enum insert masquerade(struct __sk_buff *skb, struct scratch *s, u8 proto,
					      const struct inet_addr *addr)
{
	const struct nat *known = &s->other;
	struct nat *in_map, *reply;
	struct flow between;

	masquerade_key(&between, &s->nat, proto);
	in_map = conntrack_read(&between, &s->other);
	s->is_known = in_map != NULL;
	/*
	 * A flow that begins anew keeps its port while that is its own: see early_drop.h. A new
	 * connection gets new entries with it, since those of the former one say how that was.
	 */
	if (in_map && is_masquerade(known) && addr_equal(&known->src, addr)) {
		partner_key(&s->key, &between, known);
		reply = conntrack_lookup(&s->key);
		if (reply && is_reverse(reply, &between)) {
			if (proto == IPPROTO_TCP)
				mark_seen(reply, SEEN_RST);
			else if (keep_entry(&s->key, in_map, reply, s->nat.last))
				return INSERT_DONE;
		}
	}
	s->nat.src = *addr;
	return insert_source(skb, s, &between, s->is_known ? known : NULL);
}

/*
 * Says if the pair is there that masquerades a flow with the entry @nat, and has its port: the map
 * may have evicted entries of it, and the port may be another flow's since.
 */
static __always_inline bool has_its_masquerade(struct scratch *s, const struct nat *nat, u8 proto)
{
	const struct nat *original, *reply;
	struct flow between;

	masquerade_key(&between, nat, proto);
	original = conntrack_lookup(&between);
	if (!original || !is_masquerade(original))
		return false;
	partner_key(&s->key, &between, original);
	reply = conntrack_lookup(&s->key);
	/* A packet that leaves puts it back: see conntrack_keep_partner(). */
	return !reply || is_reverse(reply, &between);
}

/*
 * Deletes the pair that masqueraded a former flow of the client with the same backend, which a new
 * flow that keeps the client's address would be masqueraded by.
 */
static __always_inline void forget_masquerade(struct scratch *s, u8 proto)
{
	struct flow between;
	struct nat *known;

	masquerade_key(&between, &s->nat, proto);
	known = conntrack_read(&between, &s->nat);
	if (known && is_masquerade(&s->nat))
		conntrack_forget(&between, known, &s->nat);
}

#endif
