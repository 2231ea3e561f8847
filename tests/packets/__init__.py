"""Whole packets through the loaded programs (BPF_PROG_TEST_RUN): bytes in, bytes out, one sentence a test."""
