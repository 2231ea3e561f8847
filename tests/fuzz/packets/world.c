/* SPDX-License-Identifier: Apache-2.0 */
/* The world, as a text of lines. */
#include <stdio.h>
#include <stdlib.h>

#include "packets.h"

#define IS_FULL(array, count) ((count) == sizeof(array) / sizeof(*(array)))

struct world world = { .limit_map = -1 };

void die(const char *what)
{
	perror(what);
	exit(2);
}

static uint32_t from_hex(const char *text, uint8_t *to, uint32_t room)
{
	uint32_t count = 0, byte;

	for (; count < room && sscanf(text, "%2x", &byte) == 1; text += 2)
		to[count++] = byte;
	return count;
}

/*
 * Reads the lines of the world: P kind name fd ifindex ingress mac is_ingress is_of_pods; F and B
 * address port protocol service kind; N address length of a Service network; A address to be used
 * in packets; O one of this node's own, H one of its pods; S seed; L fd of the map with the limit
 * of ICMP errors; W options of the agent, first and last port that stand for clients, MTU of the
 * uplink. The kind of a frontend has bits of its own: outside 1, ranges 2, NodePort 4; a backend's
 * is 1 if it is on this node. The options' bits: bypass 1, XDP 2, DSR 4, DSR is accepted 8.
 * Addresses are 16 bytes, those of IPv4 as IPv4-mapped; addresses and seeds are hexadecimal.
 */
void read_world(const char *path)
{
	FILE *file = fopen(path, "r");
	char *line = NULL, a[64], mac[16];
	size_t size = 0;

	if (!file)
		die(path);
	while (getline(&line, &size, file) > 0) {
		struct program *p = &world.programs[world.program_count];
		struct endpoint e;
		int kind, length, ingress, pods;
		unsigned int port, proto, options;

		switch (line[0]) {
		case 'P':
			if (IS_FULL(world.programs, world.program_count) ||
			    sscanf(line, "P %d %31s %d %u %u %15s %d %d", &kind, p->name, &p->fd,
				   &p->ifindex, &p->ingress, mac, &ingress, &pods) != 8)
				goto wrong;
			p->kind = kind;
			p->is_ingress = ingress;
			p->is_of_pods = pods;
			from_hex(mac, p->mac, sizeof(p->mac));
			world.program_count++;
			break;
		case 'F':
		case 'B':
			if (sscanf(line + 1, " %63s %u %u %d %d", a, &port, &proto, &e.service,
				   &kind) != 5)
				goto wrong;
			from_hex(a, e.a.b, sizeof(e.a));
			e.port = port;
			e.proto = proto;
			e.is_outside = e.is_here = kind & 1;
			e.has_ranges = kind & 2;
			e.is_node_port = kind & 4;
			if (line[0] == 'F' && !IS_FULL(world.frontends, world.frontend_count))
				world.frontends[world.frontend_count++] = e;
			else if (line[0] == 'B' && !IS_FULL(world.backends, world.backend_count))
				world.backends[world.backend_count++] = e;
			else
				goto wrong;
			break;
		case 'N':
			if (IS_FULL(world.networks, world.network_count) ||
			    sscanf(line + 1, " %63s %d", a, &length) != 2)
				goto wrong;
			from_hex(a, world.networks[world.network_count].a.b, sizeof(addr));
			world.networks[world.network_count++].length = length;
			break;
		case 'A':
			if (IS_FULL(world.addresses, world.address_count))
				goto wrong;
			from_hex(line + 2, world.addresses[world.address_count++].b, sizeof(addr));
			break;
		case 'O':
			if (IS_FULL(world.own, world.own_count))
				goto wrong;
			from_hex(line + 2, world.own[world.own_count++].b, sizeof(addr));
			break;
		case 'H':
			if (IS_FULL(world.here, world.here_count))
				goto wrong;
			from_hex(line + 2, world.here[world.here_count++].b, sizeof(addr));
			break;
		case 'W':
			if (sscanf(line + 1, " %u %u %u %u", &options, &world.first_port,
				   &world.last_port, &world.mtu) != 4)
				goto wrong;
			world.bypasses = options & 1;
			world.has_xdp = options & 2;
			world.sends_dsr = options & 4;
			world.accepts_dsr = options & 8;
			break;
		case 'L':
			world.limit_map = atoi(line + 2);
			break;
		case 'S':
			world.seeds =
				realloc(world.seeds, (world.seed_count + 1) * sizeof(*world.seeds));
			if (!world.seeds)
				die("seeds");
			world.seeds[world.seed_count].length =
				from_hex(line + 2, world.seeds[world.seed_count].b, LARGEST);
			world.seed_count++;
			break;
		default:
			goto wrong;
		}
	}
	free(line);
	fclose(file);
	return;
wrong:
	fprintf(stderr, "not understood, or one too many: %s", line);
	exit(2);
}
