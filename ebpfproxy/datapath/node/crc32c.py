"""Tables by which a CRC32c moves over zeros: for SCTP's checksum (``crc32c_zeros`` in bpf/lib/rewrite.h).

A CRC is linear, so its way over 2^k bytes of zeros is a 32 x 32 matrix over GF(2); each is written as four
tables of 256 words, one for each byte of the CRC. RFC 9260, appendix A; polynomial 0x1EDC6F41, reflected.
"""

from __future__ import annotations

from array import array

from ebpfproxy.datapath.abi.schema import CRC_STEPS

_POLYNOMIAL = 0x82F63B78


def _over_one_byte(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
    return crc


def _apply(columns: list[int], vector: int) -> int:
    result = 0
    for i, column in enumerate(columns):
        if vector >> i & 1:
            result ^= column
    return result


def zeros_tables() -> bytes:
    """The content of the ``crc32c`` map, words in host order."""
    columns = [_over_one_byte(1 << i) for i in range(32)]
    words = array("I")
    for _ in range(CRC_STEPS):
        for byte in range(4):
            table = [0] * 256
            for value in range(1, 256):
                lowest = value & -value
                table[value] = table[value ^ lowest] ^ columns[8 * byte + lowest.bit_length() - 1]
            words.extend(table)
        columns = [_apply(columns, column) for column in columns]
    return words.tobytes()
