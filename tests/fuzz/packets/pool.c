/* SPDX-License-Identifier: Apache-2.0 */
/* Packets that programs have translated: they are sent again, changed, or answered. */
#include <string.h>

#include "packets.h"

#define POOL 4096
/* So few flows of each program get many packets each, and so slowly others take their places. */
#define LASTING 48
#define RENEWAL 256

static struct frame pool[POOL];
static uint32_t pooled;

static struct frame lasting[sizeof(world.programs) / sizeof(*world.programs)][LASTING];
static uint32_t lasting_count[sizeof(lasting) / sizeof(*lasting)];

static uint32_t number_of(const struct program *p)
{
	return p - world.programs;
}

/* Takes a packet of a flow that the program translates, one of the middle of a connection. */
bool frame_of_flow(const struct program *p, struct frame *f)
{
	const uint32_t number = number_of(p);
	struct view v;

	if (!lasting_count[number])
		return false;
	*f = lasting[number][rnd(lasting_count[number])];
	v = read_frame(f, l3_of(p));
	if (v.proto == TCP && v.has_ports && !one_in(16))
		f->b[v.l4 + 13] = ACK;
	f->b[v.l3 + (v.version == 4 ? 8 : 7)] = 64;
	fix_checksums(f, v.l3);
	return true;
}

struct frame any_frame(void)
{
	if (pooled && one_in(2))
		return pool[rnd(pooled < POOL ? pooled : POOL)];
	return world.seeds[rnd(world.seed_count)];
}

static void keep_lasting(uint32_t number, const struct frame *f)
{
	const struct view v = read_frame(f, l3_of(&world.programs[number]));
	const uint32_t count = lasting_count[number];

	if (!v.has_ports || v.is_fragment || v.has_option ||
	    (v.proto == TCP && f->b[v.l4 + 13] & (FIN | RST)))
		return;
	if (count < LASTING)
		lasting[number][lasting_count[number]++] = *f;
	else if (one_in(RENEWAL))
		lasting[number][rnd(LASTING)] = *f;
}

/* @is_sent_on: the program sends it out itself, and its replies come to the same device. */
void keep_frames(const struct program *p, const struct frame *in, const struct frame *out,
		 bool is_sent_on)
{
	const struct view v = read_frame(out, l3_of(p));

	pool[rnd(POOL) % (++pooled < POOL ? pooled : POOL)] = *out;
	keep_lasting(number_of(p), in);
	if (p->kind != KIND_TC || !p->is_ingress || !is_sent_on || !v.has_ports)
		return;
	for (uint32_t i = 0; i < world.program_count; i++) {
		const struct program *other = &world.programs[i];
		struct frame reply = *out, plain;

		if (other->ifindex != p->ifindex || !other->is_ingress || other->kind == KIND_RAW)
			continue;
		if (other != p)
			keep_lasting(i, in);
		if (strip_option(&v, out, &plain))
			reply = plain;
		else
			answer(&v, &reply);
		keep_lasting(i, &reply);
	}
}
