"""Leaves oom_score_adj and limits out of a container's configuration where this process may not set them.

Then it becomes runc, with the same arguments. Called by the script ``runc`` beside it, without any package.
"""

import json
import os
import resource
import sys
from pathlib import Path


def may_lower_oom_score() -> bool:
    own = Path("/proc/self/oom_score_adj")
    before = own.read_text()
    try:
        own.write_text("-999")
        own.write_text(before)
    except OSError:
        return False
    return True


def may_raise_limits() -> bool:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard + 1))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    except (OSError, ValueError):
        return False
    return True


def main() -> None:
    arguments = sys.argv[1:]
    if "create" in arguments and "--bundle" in arguments:
        path = Path(arguments[arguments.index("--bundle") + 1]) / "config.json"
        configuration = json.loads(path.read_text())
        if not may_lower_oom_score():
            configuration["process"].pop("oomScoreAdj", None)
        if not may_raise_limits():
            configuration["process"].pop("rlimits", None)
        path.write_text(json.dumps(configuration))
    os.execv("/usr/sbin/runc", ["runc", *arguments])


if __name__ == "__main__":
    main()
