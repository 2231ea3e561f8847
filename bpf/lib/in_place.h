/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Writing to a packet in place, which takes half of the time that a helper takes. Before each run
 * of a program that does so the kernel calls a function if the packet is a clone, also one of no
 * Service. So this is a program of its own, to which the fast path jumps with a packet that it
 * translates. The rest of tc.c writes by helpers, and so does the fast path where the program is
 * missing: a kernel forgets the entries of an array of programs that no process and no pin holds.
 */
#ifndef EBPFPROXY_IN_PLACE_H
#define EBPFPROXY_IN_PLACE_H

#include "rewrite.h"
#include "scratch.h"

/* bcc has a macro of this name instead. */
static void (*tail_call)(void *ctx, void *programs, u32 index) = (void *)BPF_FUNC_tail_call;

/*
 * Updates the transport checksum in place; @difference is that of all that it covers. UDP never has
 * 0 there. Returns the difference of the checksum itself.
 */
static __always_inline u64 update_check(__sum16 *check, u64 difference, bool is_udp)
{
	const u16 old = *check;
	u16 new = csum_fold((u16)~old + difference);

	if (is_udp && !new)
		new = 0xffff;
	*check = new;
	return (u64)(u16)~old + new;
}

static __always_inline __sum16 *check_at(void *l4, u8 proto)
{
	return l4 + (proto == IPPROTO_TCP ? TCP_CHECK : UDP_CHECK);
}

/*
 * In the sum of the whole packet (CHECKSUM_COMPLETE), IPv4's header makes up for its addresses
 * itself, by its own checksum; and so nothing does for what they change in the transport checksum.
 */
static __always_inline bool write4(struct __sk_buff *skb, const struct nat *nat)
{
	struct ipv4_header *ip = (void *)(long)skb->data + L3_OFFSET;
	u32 *ports = (void *)(ip + 1), new_ports = nat->sport | (u32)nat->dport << 16;
	const u32 src = nat->src.word[3], dst = nat->dst.word[3];
	u64 addresses, difference;

	if ((void *)ports + sizeof(struct tcp_header) > (void *)(long)skb->data_end)
		return false;
	addresses = (u64)(u32)~ip->src + (u32)~ip->dst + src + dst;
	ip->check = csum_fold((u16)~ip->check + addresses);
	ip->src = src;
	ip->dst = dst;
	difference = (u64)(u32) ~*ports + new_ports;
	*ports = new_ports;
	difference += update_check(check_at(ports, ip->proto), addresses + difference,
				   ip->proto != IPPROTO_TCP);
	difference = (difference & 0xffffffff) + (difference >> 32);
	bpf_csum_update(skb, (difference & 0xffffffff) + (difference >> 32));
	return true;
}

/* IPv6's addresses and ports are made up for by the transport checksum alone, which covers both. */
static __always_inline bool write6(struct __sk_buff *skb, const struct nat *nat)
{
	struct ipv6_header *ip = (void *)(long)skb->data + L3_OFFSET;
	u32 *ports = (void *)(ip + 1), new_ports = nat->sport | (u32)nat->dport << 16;
	const u32 *old = ip->src.word, *new = nat->src.word;
	u64 difference;

	if ((void *)ports + sizeof(struct tcp_header) > (void *)(long)skb->data_end)
		return false;
	difference = (u64)(u32) ~*ports + new_ports;
#pragma clang loop unroll(full)
	for (u32 i = 0; i < 2 * sizeof(struct inet_addr) / sizeof(*old); i++)
		difference += (u64)(u32)~old[i] + new[i];
	ip->src = nat->src;
	ip->dst = nat->dst;
	*ports = new_ports;
	update_check(check_at(ports, ip->next), difference, ip->next != IPPROTO_TCP);
	return true;
}

/*
 * Writes what the fast path has found, @s->entry, to a packet that it has read. The kernel drops a
 * clone for which it has no memory.
 */
static __always_inline bool write_in_place(struct __sk_buff *skb)
{
	const struct scratch *s = scratch();

	if (!s)
		return false;
	return skb->protocol == bpf_htons(ETH_P_IP) ? write4(skb, &s->entry)
						    : write6(skb, &s->entry);
}

/* Says if a packet can be written to in place: it has a checksum, which is finished. */
static __always_inline bool may_write_in_place(const struct packet *p)
{
	const u32 *words = p->flow.src.word;
	u64 sum = (u64)words[3] + words[7];

	if (!p->is_v4) {
#pragma clang loop unroll(full)
		for (u32 i = 0; i < 3; i++)
			sum += (u64)words[i] + words[4 + i];
	}
	return p->l4_check && is_check_finished(p, sum);
}

#endif
