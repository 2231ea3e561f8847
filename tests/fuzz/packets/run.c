/* SPDX-License-Identifier: Apache-2.0 */
/* A packet through a program: BPF_PROG_TEST_RUN. */
#include <errno.h>
#include <linux/bpf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "packets.h"

bool test_run(struct program *p, const struct frame *in, struct result *r)
{
	static const uint8_t none[ETHERNET];
	static uint8_t out[4 * ROOM];
	uint32_t start = 0;
	uint8_t context[192] = { 0 };
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.test.prog_fd = p->fd;
	attr.test.data_in = (uintptr_t)in->b;
	attr.test.data_size_in = in->length;
	attr.test.data_out = (uintptr_t)out;
	attr.test.data_size_out = sizeof(out);
	attr.test.ctx_in = (uintptr_t)context;
	attr.test.ctx_size_in = sizeof(context);
	attr.test.repeat = 1;
	if (p->kind == KIND_XDP) {
		attr.test.ctx_size_in = 24;
		memcpy(context + 4, &in->length, 4);
		memcpy(context + 12, &p->ifindex, 4);
	} else {
		memcpy(context + 36, &p->ingress, 4);
		memcpy(context + 40, &p->ifindex, 4);
	}
	p->runs++;
	if (syscall(__NR_bpf, BPF_PROG_TEST_RUN, &attr, sizeof(attr)) < 0) {
		p->refused++;
		r->verdict = errno;
		r->out.length = 0;
		/* The kernel makes no packet of less than an IP header behind a link layer's. */
		if (errno != EINVAL || in->length >= ETHERNET + 40 ||
		    (in->length >= ETHERNET + 20 && get16(in->b + 12) != 0x86dd))
			violated(RULE_RUN, p, in, r);
		return false;
	}
	r->verdict = (int)attr.test.retval;
	if (attr.test.data_size_out > ROOM) {
		fprintf(stderr, "%s made %u bytes of %u\n", p->name, attr.test.data_size_out,
			in->length);
		exit(2);
	}
	r->out.length = attr.test.data_size_out;
	/* What goes from a raw device to the loopback device gets a link layer. */
	if (p->kind == KIND_RAW && r->verdict == 7 && r->out.length >= in->length + ETHERNET &&
	    !memcmp(out, none, ETHERNET)) {
		start = ETHERNET;
		r->out.length -= ETHERNET;
	}
	memcpy(r->out.b, out + start, r->out.length);
	return true;
}
