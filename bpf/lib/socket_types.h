/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* This is what programs remember of sockets. See types.h. */
#ifndef EBPFPROXY_SOCKET_TYPES_H
#define EBPFPROXY_SOCKET_TYPES_H

/* A frontend that a socket asked for, and the backend that it got. */
struct peer {
	struct inet_addr frontend;
	struct inet_addr backend;
	__be16 frontend_port; /* 0: a free place */
	__be16 backend_port;
	u32 service_id;
	u32 backend_id;
	union {
		u32 epoch; /* as in struct nat; of datagram sockets that are not connected */
		u32 began; /* of a TCP socket that sock_ops.c follows: measure_now() of connect() */
	};
};

/*
 * The highest byte of an origin's key. Cookies are counted from 1; a few are counted down from
 * 2^64, where one is made while another is on the same CPU: their highest byte is left out. A key
 * of 0 is a free slot.
 */
#define ORIGIN_KIND_SHIFT 56

enum origin_kind {
	ORIGIN_RESERVED = 1,	/* the socket's program is about to write it */
	ORIGIN_CONNECTED = 2,	/* what the socket has connected to */
	ORIGIN_UNCONNECTED = 3, /* the first frontend that an unconnected socket has sent to */
	ORIGIN_CLOSED = 4, /* of a closed socket whose connection goes on: see origin_close() */
};

/*
 * sock_origin, an array: a socket's slot is the one at the lower bits of its cookie. It is one
 * cache line, and is taken and freed by a compare-and-swap of its key. Where another socket has the
 * slot, a connected socket's origin goes to the hash sock_origin_overflow, by cookie.
 */
struct origin {
	u64 key; /* cookie, and origin_kind */
	struct peer peer;
	u32 netns; /* the lower half of the network namespace's cookie, which is counted from 1 */
	/* Records of sockets with this slot in other maps: origins, and sockets that have pages. */
	u32 elsewhere;
};

#define PEERS	   4
#define PEER_PAGES 8

/*
 * sock_peers, by socket cookie: what an unconnected socket has sent to after its first frontend. A
 * socket with more frontends than fit has further pages; a page's number is in the key's highest
 * byte.
 */
struct peers {
	struct peer peer[PEERS];
	u32 next;  /* of the last page: whose place is taken when there is none left */
	u32 netns; /* as in struct origin */
};

/*
 * port_clashes: flows that a socket leaves to packets because it uses its port and the only backend
 * for another frontend already. They have to take another port.
 */
struct clash_key {
	struct inet_addr frontend;
	__be16 frontend_port;
	__be16 client_port;
	u32 reserved;
};

/*
 * sock_redirects, by the flow of a connected datagram socket at ingress: its backend is gone, and
 * its packets go to the frontend again. The socket cannot be reconnected from outside, and without
 * a peer it could not send any more.
 */
struct redirect {
	struct inet_addr frontend;
	__be16 frontend_port;
	u16 reserved[3];
	u64 cookie;
};

/*
 * service_choices has so many rows, each with a u64 for every service id. Neighbouring CPUs share a
 * row: a Service that every CPU uses all the time would otherwise have one cache line that wanders
 * between all of them. A row for each CPU would take 64 MB on a machine with 128 of them.
 */
#define CHOICE_ROWS 16

/* service_rejections, by service id. */
struct rejections {
	u64 refused;
	u64 dropped;
};

#endif
