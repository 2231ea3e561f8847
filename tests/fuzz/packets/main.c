/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mutated packets through loaded packet programs (BPF_PROG_TEST_RUN), and a check of each result.
 *
 *   packets WORLD COUNT SEED VIOLATIONS
 *
 * WORLD is a text of lines: programs, frontends, backends, networks, seeds; see read_world(). Its
 * frames are changed, and what programs make of them is sent again and answered, so that flows come
 * into being. Nothing here shares code with the programs under test. The rules are in check.c,
 * translation.c, option.c and rejection.c.
 *
 * Prints counts as JSON. Each packet whose result is wrong goes to VIOLATIONS, as a line of rule,
 * program, verdict, packet before and after.
 */
#include <stdio.h>
#include <stdlib.h>

#include "packets.h"

#define WORST	   1000 /* so many violations end a run */
#define FILL_EVERY 4000 /* packets: more of them are rejected than the limit allows */

static void print_counts(void)
{
	printf("{\"unserved\": %lu, \"packets\": %lu, \"bytes\": %lu, \"unsure_packets\": %lu, "
	       "\"unsure_bytes\": %lu, \"violations\": {",
	       findings.unserved, findings.packets, findings.bytes, findings.unsure_packets,
	       findings.unsure_bytes);
	for (int i = 0, any = 0; i < RULE_COUNT; i++)
		if (findings.by_rule[i])
			printf("%s\"%d\": %lu", any++ ? ", " : "", i, findings.by_rule[i]);
	printf("}, \"programs\": [");
	for (uint32_t i = 0; i < world.program_count; i++) {
		const struct program *p = &world.programs[i];

		printf("%s{\"name\": \"%s\", \"runs\": %lu, \"passed\": %lu, \"dropped\": %lu, "
		       "\"rejected\": %lu, \"translated\": %lu, \"forwarded\": %lu, "
		       "\"refused\": %lu, \"option_sent\": %lu, \"option_taken\": %lu}",
		       i ? ", " : "", p->name, p->runs, p->passed, p->dropped, p->rejected,
		       p->translated, p->forwarded, p->refused, p->option_sent, p->option_taken);
	}
	printf("]}\n");
}

int main(int count, char **words)
{
	uint64_t runs;

	if (count != 5) {
		fprintf(stderr, "packets WORLD COUNT SEED VIOLATIONS\n");
		return 2;
	}
	make_crc_table();
	read_world(words[1]);
	runs = strtoull(words[2], NULL, 10);
	seed_random(strtoull(words[3], NULL, 10));
	findings.report = fopen(words[4], "w");
	if (!findings.report)
		die(words[4]);
	fill_limit();
	for (uint64_t i = 0; i < runs && findings.violations < WORST; i++) {
		struct program *p = &world.programs[rnd(world.program_count)];
		const struct frame in = mutated(p);
		struct result r;

		if (one_in(FILL_EVERY))
			fill_limit();
		if (test_run(p, &in, &r))
			check(p, &in, &r);
	}
	fclose(findings.report);
	print_counts();
	return 0;
}
