"""``python -m tests.lab``: removes the leftovers of killed labs."""

from tests.lab.lab import clean_dead_labs

for name in clean_dead_labs():
    print(f"removed the leftovers of lab {name}")
