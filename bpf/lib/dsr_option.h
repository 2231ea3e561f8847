/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The option that carries the frontend's address and port to the backend's node: an IPv4 option, or
 * an IPv6 destination option. Type, length and layout are those of Cilium's DSR
 * (loadBalancer.dsrDispatch=opt), which captures and firewalls may know. Port and address are in
 * network byte order here.
 */
#ifndef EBPFPROXY_DSR_OPTION_H
#define EBPFPROXY_DSR_OPTION_H

#include "packet.h"
#include "rewrite.h"

/* Unassigned number 26, class 0, in all fragments (RFC 791, 3.1). */
#define DSR_OPTION4 0x9a
/* Unassigned number 27: a node that does not know it skips it (RFC 8200, 4.2). */
#define DSR_OPTION6 0x1b

struct dsr_option4 {
	u8 type;
	u8 size;
	__be16 port;
	__be32 addr;
};

/* A whole extension header. */
struct dsr_option6 {
	u8 next;
	u8 length; /* in 8 bytes, the first 8 not counted */
	u8 type;
	u8 size;
	struct inet_addr addr;
	__be16 port;
	u16 pad;
};

#define DSR_OPTION6_LENGTH (sizeof(struct dsr_option6) / 8 - 1)
#define DSR_OPTION6_SIZE   (sizeof(struct dsr_option6) - offsetof(struct dsr_option6, addr))

struct dsr_headers4 {
	struct ipv4_header ip;
	struct dsr_option4 option;
};

struct dsr_headers6 {
	struct ipv6_header ip;
	struct dsr_option6 option;
};

static __always_inline u32 dsr_option_size(const struct packet *p)
{
	return p->is_v4 ? sizeof(struct dsr_option4) : sizeof(struct dsr_option6);
}

/*
 * Says if nothing but the option would lie between the IP header and that of TCP or UDP. The header
 * has a length, unlike that of BIG TCP.
 */
static __always_inline bool has_room_for_option(const struct packet *p)
{
	const u32 plain = p->is_v4 ? sizeof(struct ipv4_header) : sizeof(struct ipv6_header);

	return p->l4 == L3_OFFSET + plain && !p->is_fragment && p->l3_length > plain;
}

/* Returns IPv4's checksum once the option is there or gone, with the header otherwise the same. */
static __always_inline __sum16 dsr_check4(const struct dsr_headers4 *h, __be16 old_length,
					  u8 old_version_ihl, bool is_added)
{
	const u16 *option = (const u16 *)&h->option;
	u64 sum = (u16)~h->ip.check + (u16)~old_length + h->ip.length;
	u32 at;

	/* The first byte of a word of 16 bits is its lower half on little-endian machines only. */
	sum += bpf_htons((u16)(h->ip.version_ihl << 8)) +
	       (u16)~bpf_htons((u16)(old_version_ihl << 8));
#pragma clang loop unroll(full)
	for (at = 0; at < sizeof(h->option) / 2; at++)
		sum += is_added ? option[at] : (u16)~option[at];
	return csum_fold(sum);
}

/* Adds the option to a packet that has just been rewritten; returns 0 where that succeeds. */
static __always_inline int add_dsr_option(struct __sk_buff *skb, const struct packet *p)
{
	if (p->is_v4) {
		struct dsr_headers4 h;
		__be16 length;

		if (bpf_skb_load_bytes(skb, L3_OFFSET, &h.ip, sizeof(h.ip)))
			return -1;
		h.option.type = DSR_OPTION4;
		h.option.size = sizeof(h.option);
		h.option.port = p->flow.dport;
		h.option.addr = p->flow.dst.word[3];
		length = h.ip.length;
		h.ip.version_ihl = 0x45 + sizeof(h.option) / 4;
		h.ip.length = bpf_htons(bpf_ntohs(length) + sizeof(h.option));
		h.ip.check = dsr_check4(&h, length, 0x45, true);
		if (bpf_skb_adjust_room(skb, sizeof(h.option), BPF_ADJ_ROOM_NET, 0))
			return -1;
		return bpf_skb_store_bytes(skb, L3_OFFSET, &h, sizeof(h), BPF_F_RECOMPUTE_CSUM);
	} else {
		struct dsr_headers6 h;

		if (bpf_skb_load_bytes(skb, L3_OFFSET, &h.ip, sizeof(h.ip)))
			return -1;
		h.option.next = h.ip.next;
		h.option.length = DSR_OPTION6_LENGTH;
		h.option.type = DSR_OPTION6;
		h.option.size = DSR_OPTION6_SIZE;
		h.option.addr = p->flow.dst;
		h.option.port = p->flow.dport;
		h.option.pad = 0;
		h.ip.next = IPPROTO_DSTOPTS;
		h.ip.length = bpf_htons(bpf_ntohs(h.ip.length) + sizeof(h.option));
		if (bpf_skb_adjust_room(skb, sizeof(h.option), BPF_ADJ_ROOM_NET, 0))
			return -1;
		return bpf_skb_store_bytes(skb, L3_OFFSET, &h, sizeof(h), BPF_F_RECOMPUTE_CSUM);
	}
}

/* Says if a packet may have the option, before extension headers are walked. */
static __always_inline bool may_have_dsr_option(const struct packet *p)
{
	return p->is_v4 ? p->l4 >= L3_OFFSET + sizeof(struct dsr_headers4)
			: p->proto == IPPROTO_DSTOPTS;
}

/* Reads the option, which lies behind the IP header. Returns false where there is none. */
static __always_inline bool read_dsr_option(struct __sk_buff *skb, const struct packet *p,
					    struct inet_addr *addr, __be16 *port)
{
	if (p->l3_length <= p->l4 - L3_OFFSET)
		return false;
	if (p->is_v4) {
		struct dsr_option4 option;

		if (p->l4 < L3_OFFSET + sizeof(struct dsr_headers4) ||
		    bpf_skb_load_bytes(skb, L3_OFFSET + sizeof(struct ipv4_header), &option,
				       sizeof(option)))
			return false;
		*addr = addr_of_v4(option.addr);
		*port = option.port;
		return option.type == DSR_OPTION4 && option.size == sizeof(option);
	} else {
		struct dsr_option6 option;
		u8 next;

		if (p->l4 < L3_OFFSET + sizeof(struct dsr_headers6) ||
		    bpf_skb_load_bytes(skb, L3_OFFSET + offsetof(struct ipv6_header, next), &next,
				       sizeof(next)) ||
		    bpf_skb_load_bytes(skb, L3_OFFSET + sizeof(struct ipv6_header), &option,
				       sizeof(option)))
			return false;
		*addr = option.addr;
		*port = option.port;
		return next == IPPROTO_DSTOPTS && option.length == DSR_OPTION6_LENGTH &&
		       option.type == DSR_OPTION6 && option.size == DSR_OPTION6_SIZE;
	}
}

/*
 * Takes the option away; returns 0 where that succeeds. Where the kernel refuses it, as with some
 * that it has merged of several, the packet keeps the option, which its receiver skips. Those that
 * are taken apart again have as much data each as they had.
 */
static __always_inline int remove_dsr_option(struct __sk_buff *skb, const struct packet *p)
{
	if (p->is_v4) {
		struct dsr_headers4 h;
		u8 version_ihl;
		__be16 length;

		if (bpf_skb_load_bytes(skb, L3_OFFSET, &h, sizeof(h)))
			return -1;
		length = h.ip.length;
		version_ihl = h.ip.version_ihl;
		h.ip.version_ihl -= sizeof(h.option) / 4;
		h.ip.length = bpf_htons(bpf_ntohs(length) - sizeof(h.option));
		h.ip.check = dsr_check4(&h, length, version_ihl, false);
		if (bpf_skb_adjust_room(skb, -(int)sizeof(h.option), BPF_ADJ_ROOM_NET,
					BPF_F_ADJ_ROOM_FIXED_GSO))
			return 0;
		return bpf_skb_store_bytes(skb, L3_OFFSET, &h.ip, sizeof(h.ip),
					   BPF_F_RECOMPUTE_CSUM);
	} else {
		struct dsr_headers6 h;

		if (bpf_skb_load_bytes(skb, L3_OFFSET, &h, sizeof(h)))
			return -1;
		h.ip.next = h.option.next;
		h.ip.length = bpf_htons(bpf_ntohs(h.ip.length) - sizeof(h.option));
		if (bpf_skb_adjust_room(skb, -(int)sizeof(h.option), BPF_ADJ_ROOM_NET,
					BPF_F_ADJ_ROOM_FIXED_GSO))
			return 0;
		return bpf_skb_store_bytes(skb, L3_OFFSET, &h.ip, sizeof(h.ip),
					   BPF_F_RECOMPUTE_CSUM);
	}
}

#endif
