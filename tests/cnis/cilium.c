/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Verdicts as those of Cilium's programs where it does not replace kube-proxy: packets to a pod of
 * this node are sent to its device, all others go on with TC_ACT_OK, by which the programs and
 * filters after this one have no turn. cilium.py says which of Cilium's files that is.
 *
 * PODS is an initializer of the pods of the node, PEER says if packets are sent into the pod, past
 * the egress of its device.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>

static long (*redirect)(unsigned int ifindex, unsigned long long flags) = (void *)23;
static long (*redirect_peer)(unsigned int ifindex, unsigned long long flags) = (void *)155;

struct pod {
	unsigned int addr4;
	unsigned char addr6[16], macs[12];
	unsigned int ifindex;
};

static const struct pod pods[] = { PODS };

static inline __attribute__((always_inline)) int is_equal(const unsigned char *a,
							  const unsigned char *b)
{
#pragma clang loop unroll(full)
	for (int i = 0; i < 16; i++) {
		if (a[i] != b[i])
			return 0;
	}
	return 1;
}

__attribute__((section("tc"), used)) int from_device(struct __sk_buff *skb)
{
	unsigned char *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + sizeof(struct ethhdr) + sizeof(struct ipv6hdr) > end)
		return TC_ACT_OK;
#pragma clang loop unroll(full)
	for (unsigned int i = 0; i < sizeof(pods) / sizeof(*pods); i++) {
		const struct pod *pod = &pods[i];
		struct iphdr *ip4 = (void *)(data + sizeof(struct ethhdr));
		struct ipv6hdr *ip6 = (void *)ip4;

		if (skb->protocol == __builtin_bswap16(ETH_P_IP) && ip4->daddr != pod->addr4)
			continue;
		if (skb->protocol == __builtin_bswap16(ETH_P_IPV6) &&
		    !is_equal((unsigned char *)&ip6->daddr, pod->addr6))
			continue;
		if (skb->protocol != __builtin_bswap16(ETH_P_IP) &&
		    skb->protocol != __builtin_bswap16(ETH_P_IPV6))
			continue;
#pragma clang loop unroll(full)
		for (int at = 0; at < 12; at++)
			data[at] = pod->macs[at];
		return PEER ? redirect_peer(pod->ifindex, 0) : redirect(pod->ifindex, 0);
	}
	return TC_ACT_OK;
}

__attribute__((section("tc/pass"), used)) int pass(struct __sk_buff *skb)
{
	(void)skb;
	return TC_ACT_OK;
}

char licence[] __attribute__((section("license"), used)) = "Dual BSD/GPL";
