/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The first look at a packet: most packets are of no Service and of no flow of ours, as their
 * addresses tell. For those nothing else is read, and nothing is written.
 */
#ifndef EBPFPROXY_PREFILTER_H
#define EBPFPROXY_PREFILTER_H

#include "filter.h"
#include "headers.h"
#include "service_cidr.h"

/*
 * Says if a packet that comes in may be of a Service or of a flow, which outlives its Service.
 * Direct packets to a backend matter where it may have a Service's replies for the client. Errors
 * about its replies come from any router.
 */
static __always_inline bool concerns_ingress(const struct inet_addr *src,
					     const struct inet_addr *dst, u8 proto)
{
	return address_of_interest(dst) || flow_of_interest(src, dst) ||
	       flow_of_interest(dst, src) || proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6;
}

/* Says the same, or that the client may have to be noted, as by handle_ingress(). */
static __always_inline bool may_concern_ingress(const struct inet_addr *src,
						const struct inet_addr *dst, u8 proto)
{
	return concerns_ingress(src, dst, proto) ||
	       (proto != IPPROTO_TCP && may_be_in_service_cidr(src));
}

/* Says if a packet that goes out may be of interest; one of this host @is_own. */
static __always_inline bool may_concern_egress(const struct inet_addr *src,
					       const struct inet_addr *dst, u8 proto, bool is_own)
{
	return flow_of_interest(src, dst) || flow_of_interest(dst, src) ||
	       (is_own && address_of_interest(dst)) || may_be_in_service_cidr(dst) ||
	       proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6 ||
	       (proto != IPPROTO_TCP && address_of_interest(src));
}

static __always_inline bool may_concern(struct __sk_buff *skb, enum stage stage,
					struct inet_addr src, struct inet_addr dst, u8 proto)
{
	return stage == STAGE_INGRESS
		       ? may_concern_ingress(&src, &dst, proto)
		       : may_concern_egress(&src, &dst, proto, !skb->ingress_ifindex);
}

/* Looks at a packet where it lies. One whose header is not in the linear part may be of interest.
 */
static __always_inline bool may_concern_us(struct __sk_buff *skb, enum stage stage)
{
	void *l3 = (void *)(long)skb->data + L3_OFFSET, *end = (void *)(long)skb->data_end;
	const u32 protocol = skb->protocol;
	const struct ipv4_header *ip = l3;
	const struct ipv6_header *ip6 = l3;

	if (protocol == bpf_htons(ETH_P_IP)) {
		return (void *)(ip + 1) > end ||
		       (DSR_ACCEPTS && stage == STAGE_INGRESS && ip->version_ihl > 0x46) ||
		       may_concern(skb, stage, addr_of_v4(ip->src), addr_of_v4(ip->dst), ip->proto);
	}
	if (protocol == bpf_htons(ETH_P_IPV6)) {
		return (void *)(ip6 + 1) > end ||
		       (DSR_ACCEPTS && stage == STAGE_INGRESS && ip6->next == IPPROTO_DSTOPTS) ||
		       may_concern(skb, stage, ip6->src, ip6->dst, ip6->next);
	}
	return false;
}

#endif
