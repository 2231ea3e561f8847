"""``python -m tests.lab``: removes what killed labs left behind."""

from tests.lab.lab import clean_dead_labs

for name in clean_dead_labs():
    print(f"removed the leftovers of lab {name}")
