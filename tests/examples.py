"""How many examples hypothesis makes: all in `make test`, a tenth in `make test-fast`."""

from __future__ import annotations

from hypothesis import settings

FAST = "fast"


def examples(count: int) -> int:
    return count // 10 if settings.get_current_profile_name() == FAST else count
