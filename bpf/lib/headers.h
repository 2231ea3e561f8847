/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Protocol headers, as they lie in a packet. */
#ifndef EBPFPROXY_HEADERS_H
#define EBPFPROXY_HEADERS_H

#include "addr.h"

struct ipv4_header {
	u8 version_ihl;
	u8 tos;
	__be16 length;
	__be16 id;
	__be16 fragment;
	u8 ttl;
	u8 proto;
	__sum16 check;
	__be32 src;
	__be32 dst;
};

#define IPV4_MORE_FRAGMENTS bpf_htons(0x2000)
#define IPV4_OFFSET	    bpf_htons(0x1fff)

struct ipv6_header {
	__be32 version_class_label;
	__be16 length;
	u8 next;
	u8 hops;
	struct inet_addr src;
	struct inet_addr dst;
};

struct ipv6_extension {
	u8 next;
	u8 length; /* in 8 bytes, the first 8 not counted; AH: in 4 bytes less 2 */
};

struct ipv6_fragment {
	u8 next;
	u8 reserved;
	__be16 offset; /* in 8 bytes, shifted by 3; bit 0: more fragments */
	__be32 id;
};

#define IPV6_MORE_FRAGMENTS bpf_htons(0x0001)
#define IPV6_OFFSET	    bpf_htons(0xfff8)
#define IPV6_EXTENSIONS	    6

struct tcp_header {
	__be16 sport;
	__be16 dport;
	__be32 seq;
	__be32 ack;
	u8 offset; /* of the data, in 4 bytes, in the upper half */
	u8 flags;
	__be16 window;
	__sum16 check;
	__be16 urgent;
};

struct udp_header {
	__be16 sport;
	__be16 dport;
	__be16 length;
	__sum16 check;
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* SCTP's common header precedes the first chunk, whose type is its first byte (RFC 9260, 3). */
#define SCTP_CHUNK     12
#define SCTP_INIT      1
#define SCTP_HEARTBEAT 4

struct icmp_header {
	u8 type;
	u8 code;
	__sum16 check;
	__be32 rest;
};

#define ICMP_ECHO	      8
#define ICMP_UNREACHABLE      3
#define ICMP_SOURCE_QUENCH    4
#define ICMP_REDIRECT	      5
#define ICMP_TIME_EXCEEDED    11
#define ICMP_PARAMETER	      12
#define ICMP_PORT_UNREACHABLE 3
#define ICMP_FRAG_NEEDED      4

#define ICMPV6_ECHO		128
#define ICMPV6_UNREACHABLE	1
#define ICMPV6_TOO_BIG		2
#define ICMPV6_PARAMETER	4 /* errors are 1 to 4 */
#define ICMPV6_PORT_UNREACHABLE 4

#endif
