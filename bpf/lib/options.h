/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The agent's options and the kernel's features, filled in when programs are loaded
 * (datapath/programs/loader.py, Options.constants). The verifier does not walk a branch that such a
 * constant excludes, and removes it: one compilation serves every node.
 */
#ifndef EBPFPROXY_OPTIONS_H
#define EBPFPROXY_OPTIONS_H

#include "maps.h"

/* Kernel features. */
#define HAVE_SET_RETVAL CONSTANT(HAVE_SET_RETVAL)
#define HAVE_MPTCP	CONSTANT(HAVE_MPTCP)

/* The slots of sock_origin, which are a power of two, less one. */
#define ORIGIN_SLOT_MASK CONSTANT(ORIGIN_SLOT_MASK)

/* The lines of frontend_cache, which are a power of two, less one. */
#define FRONTEND_LINE_MASK CONSTANT(FRONTEND_LINE_MASK)

/* The slots of flow_cache, which are a power of two, less one. */
#define FLOW_SLOT_MASK CONSTANT(FLOW_SLOT_MASK)

/* Says if this machine reads memory in the order of its instructions, as x86 does. */
#define LOADS_IN_ORDER CONSTANT(LOADS_IN_ORDER)
/* Orders what was read before it and what is read after it. */
#define order_loads()                                                                              \
	({                                                                                         \
		if (!LOADS_IN_ORDER)                                                               \
			memory_barrier();                                                          \
		asm volatile("" : : : "memory");                                                   \
	})

/* The service ids that maps have room for. */
#define SERVICES ((u32)CONSTANT(SERVICES))

/* CPUs whose numbers agree but for so many lower bits share a row of service_choices. */
#define CPUS_OF_A_ROW_SHIFT CONSTANT(CPUS_OF_A_ROW_SHIFT)

/* Options. */
#define NODEPORTS_ON_LOOPBACK	CONSTANT(NODEPORTS_ON_LOOPBACK)
#define POD_SOCKETS		CONSTANT(POD_SOCKETS)
#define MASQUERADE_ALL		CONSTANT(MASQUERADE_ALL)
#define BYPASS_NETFILTER	CONSTANT(BYPASS_NETFILTER)
#define FORWARDS_AT_XDP		CONSTANT(FORWARDS_AT_XDP)
#define DSR_ACCEPTS		CONSTANT(DSR_ACCEPTS)
#define DSR_SENDS		CONSTANT(DSR_SENDS)
#define MASQUERADE_FIRST	((u32)CONSTANT(MASQUERADE_FIRST))
#define MASQUERADE_LAST		((u32)CONSTANT(MASQUERADE_LAST))
#define MASQUERADE_PORTS_SHARED CONSTANT(MASQUERADE_PORTS_SHARED)
#define PODS_BY_CIDR		CONSTANT(PODS_BY_CIDR)
#define TRACE_DECISIONS		CONSTANT(TRACE_DECISIONS)
#define MEASURE_CONNECTIONS	CONSTANT(MEASURE_CONNECTIONS)
#define MEASURE_TRAFFIC		CONSTANT(MEASURE_TRAFFIC)

#endif
