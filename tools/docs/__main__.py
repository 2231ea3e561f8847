"""``python -m tools.docs``: writes generated files, and prints those that changed."""

from __future__ import annotations

from tools.docs.made import wanted

for path, text in wanted().items():
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
        print(f"wrote {path}")
