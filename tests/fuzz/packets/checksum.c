/* SPDX-License-Identifier: Apache-2.0 */
/* Checksums, from RFC 1071 and RFC 9260, appendix A. */
#include <arpa/inet.h>

#include "packets.h"

uint64_t sum16(const uint8_t *p, uint32_t length)
{
	uint64_t sum = 0;

	for (; length > 1; p += 2, length -= 2)
		sum += get16(p);
	return length ? sum + (p[0] << 8) : sum;
}

uint64_t pseudo(const struct view *v, const uint8_t *b, uint32_t length, uint8_t proto)
{
	const uint32_t size = v->version == 4 ? 4 : 16, at = v->l3 + (v->version == 4 ? 12 : 8);

	return sum16(b + at, 2 * size) + proto + (length >> 16) + (length & 0xffff);
}

static uint16_t folded(uint64_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

uint16_t checksum(uint64_t sum)
{
	return ~folded(sum);
}

static uint32_t crc_table[256];

void make_crc_table(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (int bit = 0; bit < 8; bit++)
			crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
		crc_table[i] = crc;
	}
}

/* The CRC of an SCTP packet whose checksum counts as 0, in the order of its bytes. */
uint32_t crc32c(const uint8_t *p, uint32_t length)
{
	uint32_t crc = ~0U;

	for (uint32_t i = 0; i < length; i++)
		crc = crc >> 8 ^ crc_table[(crc ^ (i >= 8 && i < 12 ? 0 : p[i])) & 0xff];
	return htonl(__builtin_bswap32(~crc));
}
