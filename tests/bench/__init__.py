"""Evaluation of benchmark measurements."""
