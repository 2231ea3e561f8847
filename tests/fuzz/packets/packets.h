/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by all files of the program; main.c says what it does. */
#ifndef PACKETS_H
#define PACKETS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define ETHERNET 14
#define ROOM	 2048
#define LARGEST	 1600

enum {
	ICMP = 1,
	TCP = 6,
	UDP = 17,
	ROUTING = 43,
	FRAGMENT = 44,
	AH = 51,
	ICMP6 = 58,
	DSTOPTS = 60,
	SCTP = 132,
	UDPLITE = 136
};

enum { FIN = 1, SYN = 2, RST = 4, ACK = 16 };

typedef struct {
	uint8_t b[16];
} addr;

struct frame {
	uint32_t length;
	uint8_t b[ROOM];
};

struct result {
	int verdict;
	struct frame out;
};

static inline uint16_t get16(const uint8_t *p)
{
	return p[0] << 8 | p[1];
}

static inline uint32_t get32(const uint8_t *p)
{
	return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static inline void put16(uint8_t *p, uint32_t v)
{
	p[0] = v >> 8;
	p[1] = v;
}

static inline void put32(uint8_t *p, uint32_t v)
{
	put16(p, v >> 16);
	put16(p + 2, v);
}

static inline bool same_addr(const addr *a, const addr *b)
{
	return !__builtin_memcmp(a, b, sizeof(*a));
}

/* world.c */

enum kind { KIND_TC, KIND_RAW, KIND_XDP, KIND_LOOPBACK };

struct program {
	char name[32];
	enum kind kind;
	int fd;
	uint32_t ifindex, ingress;
	uint8_t mac[6];
	bool is_ingress, is_of_pods;
	uint64_t runs, passed, dropped, rejected, translated, forwarded, refused;
	uint64_t option_sent, option_taken;
};

struct endpoint {
	addr a;
	uint16_t port;
	uint8_t proto;
	int service;
	/* A frontend: clients outside reach backends of other nodes; ranges say which clients. */
	bool is_outside, has_ranges, is_node_port;
	/* A backend is on this node. */
	bool is_here;
};

struct network {
	addr a;
	int length;
};

extern struct world {
	struct program programs[32];
	struct endpoint frontends[1024], backends[256];
	struct network networks[16];
	addr addresses[256], own[64], here[64];
	struct frame *seeds;
	uint32_t program_count, frontend_count, backend_count, network_count, address_count,
		own_count, here_count, seed_count;
	int limit_map;
	/* The agent's options, the ports that stand for clients, and the MTU of its uplink. */
	bool bypasses, has_xdp, sends_dsr, accepts_dsr;
	uint32_t first_port, last_port, mtu;
} world;

void read_world(const char *path);
void die(const char *what);

/* parse.c */

/* A packet as a receiver reads it. */
struct view {
	int version; /* 0: no IP packet that makes sense */
	uint32_t l3, l3_length, l4;
	uint8_t proto;
	bool is_fragment, is_later, has_ports, is_error, is_redirect, chain_is_known;
	uint32_t fragment_at;
	/* The option of DSR, with the frontend that it names. */
	bool has_option;
	addr option_addr;
	uint16_t option_port;
	addr src, dst;
	uint16_t sport, dport;
	/* An ICMP error quotes a packet. */
	uint32_t inner_l3, inner_l4;
	uint8_t inner_proto;
	addr inner_src, inner_dst;
	uint16_t inner_sport, inner_dport;
};

struct view read_frame(const struct frame *f, uint32_t l3);
struct view read_input(const struct program *p, const struct frame *f);
uint32_t l3_of(const struct program *p);
uint32_t end_of(const struct view *v, const struct frame *f);
uint32_t option_size(const struct view *v);
bool strip_option(const struct view *v, const struct frame *f, struct frame *plain);

/* checksum.c */

void make_crc_table(void);
uint32_t crc32c(const uint8_t *p, uint32_t length);
uint64_t sum16(const uint8_t *p, uint32_t length);
uint64_t pseudo(const struct view *v, const uint8_t *b, uint32_t length, uint8_t proto);
uint16_t checksum(uint64_t sum);

/* model.c */

const struct endpoint *find_frontend(const addr *a, uint16_t port, uint8_t proto);
const struct endpoint *find_backend(const addr *a, uint16_t port, uint8_t proto);
bool may_be_served(const struct program *p, const struct view *v);
bool is_own(const addr *a);
bool is_here(const addr *a);
bool is_elsewhere(const addr *a);
bool in_networks(const addr *a);
bool has_backend_port(uint16_t port);
bool is_service_step(const struct view *v, const struct view *w, bool *is_unsure);

/* flows.c */

/* The two ends of a packet. */
struct ends {
	addr src, dst;
	uint16_t sport, dport;
	uint8_t proto;
};

struct ends ends_of(const struct view *v);
struct ends quoted_ends(const struct view *v);
struct ends reversed(const struct ends *e);
void note_translation(const struct ends *in, const struct ends *out);
bool is_known_translation(const struct ends *in, const struct ends *out);
void note_begun(const struct ends *in);
bool has_begun(const struct ends *in);

/* mutate.c */

void seed_random(uint64_t seed);
uint32_t rnd(uint32_t below);
bool one_in(uint32_t n);
struct frame mutated(const struct program *p);
void fix_checksums(struct frame *f, uint32_t l3);
void answer(const struct view *v, struct frame *f);
void insert(struct frame *f, uint32_t at, const uint8_t *bytes, uint32_t size);
void lengthen(const struct view *v, struct frame *f, int by);

/* pool.c */

bool frame_of_flow(const struct program *p, struct frame *f);
struct frame any_frame(void);
void keep_frames(const struct program *p, const struct frame *in, const struct frame *out,
		 bool is_sent_on);

/* option.c */

void add_option(const struct view *v, struct frame *f);
bool check_option(struct program *p, const struct view *v, const struct frame *in,
		  const struct result *r);
void check_sent_option(struct program *p, const struct view *v, bool is_known,
		       const struct frame *in, const struct result *r);
uint32_t header_residue(const struct view *v, const struct frame *f);

/* run.c */

bool test_run(struct program *p, const struct frame *in, struct result *r);

/* check.c */

enum rule {
	RULE_VERDICT = 1, /* no other verdicts */
	RULE_NO_SERVICE,  /* a packet that no Service has passes unchanged */
	RULE_DROPPED,	  /* a packet that no Service has is not dropped */
	RULE_LENGTH,	  /* a translated packet keeps its length */
	RULE_BYTES,	  /* nothing else is changed: payload, padding, options */
	RULE_IP_CHECK,	  /* IPv4's checksum stays as right or as wrong as it was */
	RULE_CHECK,	  /* so do TCP's, UDP's, SCTP's and ICMP's */
	RULE_NO_CHECK,	  /* a datagram without a checksum stays without, others get none of 0 */
	RULE_INNER_IP,	  /* and those inside ICMP's errors */
	RULE_INNER_CHECK,
	RULE_ENDS,	/* a frontend becomes a backend of its Service, a backend a frontend */
	RULE_HOPS,	/* a hop is counted where the program forwards, at most once */
	RULE_REJECT_IP, /* rejections are packets of their own */
	RULE_REJECT_ENDS,
	RULE_REJECT_CHECK,
	RULE_REJECT_NUMBERS,
	RULE_REJECT_QUOTE,
	RULE_REJECT_REJECTED, /* neither resets nor errors nor fragments are rejected */
	RULE_NOTHING_SERVED,  /* what has no ports within it is not translated */
	RULE_RUN,	      /* the kernel runs it */
	RULE_REJECT_LIMIT,    /* no more ICMP errors than the kernel would send */
	RULE_SOURCE,	      /* a client keeps its address, or gets one of this node's */
	RULE_FORWARD,	      /* what a hook sends on itself is what the options say */
	RULE_OPTION_SENT,  /* the option of DSR is on what begins a flow, and names its frontend */
	RULE_OPTION_TAKEN, /* it is taken from what may have it, and nothing else is changed */
	RULE_OPTION_REFUSED, /* what no node can have sent is dropped */
	RULE_COUNT
};

extern struct findings {
	FILE *report;
	uint64_t violations, unserved, by_rule[RULE_COUNT];
	/* Packets and bytes that Services have to count, and those of which nobody can tell. */
	uint64_t packets, bytes, unsure_packets, unsure_bytes;
} findings;

void violated(enum rule rule, const struct program *p, const struct frame *in,
	      const struct result *r);
void check(struct program *p, const struct frame *in, const struct result *r);

/* translation.c */

void note_unseen(const struct view *v);
void check_translation(struct program *p, const struct view *v, const struct frame *in,
		       const struct result *r);

/* rejection.c */

bool is_rejection(const struct view *v, const struct frame *in, const struct view *w,
		  const struct frame *out);
void check_rejection(const struct program *p, const struct view *v, const struct view *w,
		     const struct frame *in, const struct result *r);
void fill_limit(void);

#endif
