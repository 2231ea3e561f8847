"""Packets through the loaded programs (BPF_PROG_TEST_RUN): tests compare verdicts and resulting bytes."""
