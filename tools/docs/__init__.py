"""The generator of documents and JSON schemas.

``python -m tools.docs`` (as root, since metrics are read from real maps) writes docs/commands.md, the JSON
schemas below deploy/, and the parts of other files between ``<!-- made: NAME -->`` and ``<!-- end -->``.
"""
