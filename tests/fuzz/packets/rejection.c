/* SPDX-License-Identifier: Apache-2.0 */
/* The rules of rejections, which are resets and ICMP errors, and the limit of the errors. */
#include <linux/bpf.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "packets.h"

/* The limit of ICMP errors: net.ipv4.icmp_msgs_burst, and one each millisecond. */
#define ERRORS_AT_ONCE 50
#define ERROR_EVERY    1000000ULL

static uint64_t limited_since, errors_since;

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

/* Gives the programs all tokens back, so that errors go on being checked. */
void fill_limit(void)
{
	const uint32_t zero = 0;
	const uint64_t never = 0;
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.map_fd = world.limit_map;
	attr.key = (uintptr_t)&zero;
	attr.value = (uintptr_t)&never;
	limited_since = now_ns();
	errors_since = 0;
	if (syscall(__NR_bpf, BPF_MAP_UPDATE_ELEM, &attr, sizeof(attr)))
		die("the limit of ICMP errors");
}

/* Counts an error; returns false where it is one too many. The programs' clock goes by steps. */
static bool within_limit(void)
{
	struct timespec step;

	clock_getres(CLOCK_MONOTONIC_COARSE, &step);
	return ++errors_since <=
	       ERRORS_AT_ONCE + 1 + (now_ns() - limited_since + step.tv_nsec) / ERROR_EVERY;
}

bool is_rejection(const struct view *v, const struct frame *in, const struct view *w,
		  const struct frame *out)
{
	if (!w->version || w->version != v->version || !same_addr(&v->src, &w->dst) ||
	    !same_addr(&v->dst, &w->src))
		return false;
	if (v->proto == TCP)
		return w->proto == TCP && w->l4 + 20 == out->length && out->b[w->l4 + 13] & RST &&
		       v->l4 + 20 <= in->length && !(in->b[v->l4 + 13] & RST);
	if (w->proto != (v->version == 4 ? ICMP : ICMP6) || out->length < w->l4 + 8)
		return false;
	if (out->b[w->l4] != (v->version == 4 ? 3 : 1) ||
	    out->b[w->l4 + 1] != (v->version == 4 ? 3 : 4))
		return false;
	return v->proto != w->proto || out->length != in->length || !v->is_error;
}

static void check_contents(const struct program *p, const struct view *v, const struct view *w,
			   const struct frame *in, const struct result *r)
{
	const uint8_t *b = in->b, *o = r->out.b;
	const uint32_t length = r->out.length - w->l4;

	if (w->l3 + w->l3_length != r->out.length ||
	    (w->version == 4 && checksum(sum16(o + w->l3, 20))))
		violated(RULE_REJECT_IP, p, in, r);
	/* A test run's packet has a link layer, behind which the kernel would make room. */
	if (p->kind == KIND_RAW && w->proto != TCP)
		return;
	if (checksum(sum16(o + w->l4, length) +
		     (w->proto == ICMP ? 0 : pseudo(w, o, length, w->proto))))
		violated(RULE_REJECT_CHECK, p, in, r);
	if (v->is_error || v->is_later)
		violated(RULE_REJECT_REJECTED, p, in, r);
	if (w->proto == TCP) {
		const uint8_t flags = b[v->l4 + 13];
		const uint32_t data = end_of(v, in) - v->l4 - (b[v->l4 + 12] >> 4) * 4;
		const bool acks = flags & ACK;

		if (get16(o + w->l4) != get16(b + v->l4 + 2) ||
		    get16(o + w->l4 + 2) != get16(b + v->l4))
			violated(RULE_REJECT_ENDS, p, in, r);
		if (acks ? get32(o + w->l4 + 4) != get32(b + v->l4 + 8)
			 : get32(o + w->l4 + 8) !=
				    get32(b + v->l4 + 4) + data + !!(flags & SYN) + !!(flags & FIN))
			violated(RULE_REJECT_NUMBERS, p, in, r);
	} else {
		const uint32_t quoted = v->l3_length < 128 ? v->l3_length : 128;

		if (length != 8 + quoted || memcmp(o + w->l4 + 8, b + v->l3, quoted))
			violated(RULE_REJECT_QUOTE, p, in, r);
	}
}

void check_rejection(const struct program *p, const struct view *v, const struct view *w,
		     const struct frame *in, const struct result *r)
{
	check_contents(p, v, w, in, r);
	if (w->proto != TCP && p->kind != KIND_LOOPBACK && !within_limit())
		violated(RULE_REJECT_LIMIT, p, in, r);
}
