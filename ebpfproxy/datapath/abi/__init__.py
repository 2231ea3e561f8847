"""Structs and maps as programs and agent share them: the only place that knows bytes."""
