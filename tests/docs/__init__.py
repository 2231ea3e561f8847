"""The documents: what in them is made from the code, and tests that the rest agrees with it.

``python -m tests.docs`` (as root: metrics are asked of real maps) writes docs/commands.md and the parts of
other files between ``<!-- made: NAME -->`` and ``<!-- end -->``.
"""
