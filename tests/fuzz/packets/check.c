/* SPDX-License-Identifier: Apache-2.0 */
/* The rules, those of translations and rejections excepted, and the report of what breaks them. */
#include <stdio.h>
#include <string.h>

#include "packets.h"

struct findings findings;

void violated(enum rule rule, const struct program *p, const struct frame *in,
	      const struct result *r)
{
	findings.violations++;
	findings.by_rule[rule]++;
	if (findings.by_rule[rule] > 10)
		return;
	fprintf(findings.report, "%d %s %d ", rule, p->name, r->verdict);
	for (uint32_t i = 0; i < in->length; i++)
		fprintf(findings.report, "%02x", in->b[i]);
	fputc(' ', findings.report);
	for (uint32_t i = 0; i < r->out.length; i++)
		fprintf(findings.report, "%02x", r->out.b[i]);
	fputc('\n', findings.report);
	fflush(findings.report);
}

static void check_result(struct program *p, const struct view *v, const struct frame *in,
			 const struct result *r)
{
	const struct view w = read_frame(&r->out, l3_of(p));
	const bool is_changed = r->out.length != in->length || memcmp(in->b, r->out.b, in->length);
	const int pass = p->kind == KIND_XDP ? 2 : -1;

	if (p->kind == KIND_XDP ? r->verdict < 2 || r->verdict > 4
				: r->verdict != -1 && r->verdict != 2 && r->verdict != 7) {
		violated(RULE_VERDICT, p, in, r);
		return;
	}
	if (v->has_option && world.accepts_dsr && p->is_ingress && p->kind != KIND_XDP &&
	    check_option(p, v, in, r))
		return;
	if (!may_be_served(p, v)) {
		findings.unserved++;
		if (r->verdict != pass)
			violated(RULE_DROPPED, p, in, r);
		else if (is_changed)
			violated(RULE_NO_SERVICE, p, in, r);
	}
	if (p->kind != KIND_XDP && r->verdict == 2) {
		/* A redirect is advice that no counter has. */
		p->dropped += !v->is_redirect;
		if (v->has_ports)
			note_unseen(v);
		return;
	}
	if (!is_changed) {
		p->passed++;
		return;
	}
	if (p->kind != KIND_XDP && is_rejection(v, in, &w, &r->out)) {
		p->rejected++;
		if (v->has_ports)
			note_unseen(v);
		check_rejection(p, v, &w, in, r);
		return;
	}
	if (p->kind == KIND_XDP && r->verdict == pass)
		violated(RULE_FORWARD, p, in, r);
	p->translated++;
	p->forwarded += r->verdict != pass;
	if (v->version)
		check_translation(p, v, in, r);
	keep_frames(p, in, &r->out, r->verdict != pass);
}

void check(struct program *p, const struct frame *in, const struct result *r)
{
	const struct view v = read_input(p, in);

	check_result(p, &v, in, r);
	/* Later fragments have its ports, and may begin its flow at another hook. */
	if (v.is_fragment && v.has_ports)
		note_unseen(&v);
}
