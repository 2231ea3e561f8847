"""Drift: what somebody else has changed of what the agent has written, and how it is repaired.

``compare`` is pure. ``checker`` reads the maps and compares; ``repair`` writes them, in the order in which a
change is published; ``findings`` names differences in words.
"""
