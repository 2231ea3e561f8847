/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The structs in maps. ebpfproxy/datapath/abi/ describes the same bytes to the agent; a change to
 * either needs a new schema version there.
 *
 * Addresses and ports are in network byte order, everything else in host order. An address of
 * either family has 16 bytes: IPv4 is written as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2). Only the
 * frontend tables, whose keys decide the speed, exist twice.
 */
#ifndef EBPFPROXY_TYPES_H
#define EBPFPROXY_TYPES_H

struct inet_addr {
	__be32 word[4];
};

/* This id belongs to no Service and no backend. */
#define NOBODY 0xffffffffU

#include "decision_types.h"
#include "flow_types.h"
#include "measure_types.h"
#include "node_types.h"
#include "service_types.h"
#include "socket_types.h"

#endif
