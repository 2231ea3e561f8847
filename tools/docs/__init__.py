"""What in the documents is made from the code.

``python -m tools.docs`` (as root: metrics are asked of real maps) writes docs/commands.md and the parts of
other files between ``<!-- made: NAME -->`` and ``<!-- end -->``.
"""
