"""``python -m ebpfproxy.datapath.programs.build FOLDER``: the bytecode of all programs for this machine.

The package's build calls it (setup.py). ``make lint`` calls it with ``--strict``: warnings are errors then.
Programs that the folder EBPFPROXY_CACHE_DIR has are copied from there. The Makefile sets it, so that a wheel
takes what the linter has compiled; images and releases are built without it.
"""

from __future__ import annotations

import argparse
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ebpfproxy.datapath.abi.hooks import MODULES
from ebpfproxy.datapath.programs import bytecode, loader


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m ebpfproxy.datapath.programs.build")
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--strict", action="store_true", help="fail if the compiler warned of anything")
    given = arguments.parse_args()
    sources = loader.source_folder()
    recipes = [loader.recipe(sources, module) for module in MODULES]
    _copy_cached(recipes, given.folder)
    # Each compilation is a process of its own.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        made = list(workers.map(lambda recipe: bytecode.compiled(recipe, given.folder), recipes))
    for recipe in recipes:
        # Unlike a node's cache, a package is readable by everyone.
        (given.folder / recipe.digest()).chmod(0o644)
    given.folder.chmod(0o755)
    warnings = [each.warnings for each in made if each.warnings]
    if given.strict and warnings:
        raise SystemExit("\n".join(warnings))


def _copy_cached(recipes: list[bytecode.Recipe], folder: Path) -> None:
    cache = Path(os.environ.get("EBPFPROXY_CACHE_DIR", folder))
    folder.mkdir(parents=True, exist_ok=True)
    for name in (recipe.digest() for recipe in recipes):
        if (cache / name).exists() and not (folder / name).exists():
            shutil.copyfile(cache / name, folder / name)


if __name__ == "__main__":
    main()
