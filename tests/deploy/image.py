"""``deploy/Dockerfile`` without a container engine: its steps in clean Debian roots (mmdebstrap, chroot).

A strict reader: it fails on any instruction, option or base image that is not in use there. Stages are overlays over
one root or over another stage, as layers are. The steps use this machine's settings of package registries, as a
builder's; no result contains them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.deploy.objects import DEPLOY
from tests.deploy.runtime import install

TOP = DEPLOY.parent
DOCKERFILE = DEPLOY / "Dockerfile"
BASE = "debian:bookworm-slim"
#: The slim image leaves these out (debuerreotype's .slimify-excludes), except copyrights.
_SLIM = ["/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*"]
#: Settings of package registries of this machine, if any.
_LENT = [
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/pip.conf",
    "/root/.config/pip/pip.conf",
    *map(str, Path("/etc/apt/apt.conf.d").glob("99*")),
    "/opt/wheels",
    "/opt/pypi",
    "/opt/pypi-more",
]
_VARIABLES = re.compile(r"PIP_\w+|\w+_proxy|\w+_PROXY")
_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
#: Debian's package has its own elsewhere.
_LENT_AUTHORITIES = "/mnt/ca-certificates.crt"


class Step(NamedTuple):
    instruction: str
    argument: str


def read(text: str) -> list[Step]:
    """Returns the instructions without comments, with continued lines joined."""
    joined = re.sub(r"\\\n", "", re.sub(r"(?m)^#.*\n", "", text))
    found = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        instruction, _, argument = line.partition(" ")
        found.append(Step(instruction, argument.strip()))
    return found


class Image(NamedTuple):
    root: Path
    environment: dict[str, str]
    entrypoint: list[str]
    command: list[str]


class _Stage:
    def __init__(self, layers: list[Path], root: Path, below: _Stage | None) -> None:
        """``layers``: the lowest last; ``root`` is where they are mounted."""
        self.layers = layers
        self.root = root
        self.folder = Path("/")
        self.environment: dict[str, str] = dict(below.environment) if below is not None else {}
        self.entrypoint: list[str] = below.entrypoint if below is not None else []
        self.command: list[str] = below.command if below is not None else []


@contextmanager
def built(folder: Path) -> Iterator[dict[str, Image]]:
    """Yields the stages by name, each with its root and settings, mounted below ``folder`` until the end."""
    install("mmdebstrap", "mmdebstrap")
    base = folder / "base"
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        # Otherwise usrmerge is installed, which needs all of Perl.
        "--include=usr-is-merged",
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        *(f"--dpkgopt=path-exclude={each}" for each in _SLIM),
    ]
    subprocess.run([*command, "bookworm", str(base)], check=True)
    # The published image has no package lists, and neither may this one.
    for part in ("var/lib/apt/lists", "var/cache/apt"):
        shutil.rmtree(base / part)
        (base / part).mkdir()
    stages: dict[str, _Stage] = {}
    with ExitStack() as mounts:
        stage: _Stage | None = None
        for step in read(DOCKERFILE.read_text()):
            if step.instruction == "FROM":
                image, _, name = step.argument.partition(" AS ")
                assert name, "a stage has no name"
                assert image == BASE or image in stages, f"there is no {image}"
                below = stages.get(image)
                layers = below.layers if below is not None else [base]
                place = folder / name
                root = mounts.enter_context(_layer(layers, place))
                stage = stages[name] = _Stage([place / "up", *layers], root, below)
            else:
                assert stage is not None
                _execute(step, stage, stages)
        yield {
            name: Image(each.root, each.environment, each.entrypoint, each.command)
            for name, each in stages.items()
        }


@contextmanager
def _layer(below: list[Path], folder: Path) -> Iterator[Path]:
    for name in ("up", "work", "root"):
        (folder / name).mkdir(parents=True)
    options = f"lowerdir={':'.join(map(str, below))},upperdir={folder}/up,workdir={folder}/work"
    with _mounted(folder / "root", "-t", "overlay", "-o", options, "root"):
        yield folder / "root"


@contextmanager
def _mounted(place: Path, *arguments: str) -> Iterator[None]:
    subprocess.run(["mount", *arguments, str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-R", str(place)], check=True)


def _execute(step: Step, stage: _Stage, stages: dict[str, _Stage]) -> None:
    argument = step.argument
    match step.instruction:
        case "RUN":
            run(stage.root, ["sh", "-c", f"cd {stage.folder} && {argument}"], stage.environment, lend=True)
        case "COPY":
            _copy(argument.split(), stage, stages)
        case "WORKDIR":
            stage.folder = Path(argument)
            _below(stage.root, stage.folder).mkdir(parents=True, exist_ok=True)
        case "ENV":
            name, equals, value = argument.partition("=")
            assert equals and " " not in value
            stage.environment[name] = value
        case "ENTRYPOINT":
            stage.entrypoint = json.loads(argument)
        case "CMD":
            stage.command = json.loads(argument)
        case _:
            raise AssertionError(f"cannot do {step.instruction}")


def _copy(words: list[str], stage: _Stage, stages: dict[str, _Stage]) -> None:
    *sources, target = words
    context, ignore = TOP, _ignored()
    if sources[0].startswith("--"):
        assert sources[0].startswith("--from=")
        context, ignore = stages[sources.pop(0).removeprefix("--from=")].root, []
    assert target.endswith("/")
    place = _below(stage.root, stage.folder / target)
    for source in sources:
        path = _below(context, Path(source))
        if path.is_dir():
            shutil.copytree(
                path, place, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignore)
            )
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)


def _ignored() -> list[str]:
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().split()
    assert all(line.startswith("**/") for line in lines)
    return [line.removeprefix("**/") for line in lines]


def _below(root: Path, path: Path) -> Path:
    return root / str(path).lstrip("/")


def run(
    root: Path, command: list[str], environment: dict[str, str] | None = None, *, lend: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a command in the root, with /proc and /dev, and with settings of registries for ``lend``.

    Raises AssertionError with its output.
    """
    variables = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    variables |= {"DEBIAN_FRONTEND": "noninteractive"} if lend else {}
    if lend:
        variables |= {name: value for name, value in os.environ.items() if _VARIABLES.fullmatch(name)}
        variables["PIP_CERT"] = _LENT_AUTHORITIES
    with ExitStack() as mounts:
        mounts.enter_context(_mounted(root / "proc", "-t", "proc", "proc"))
        mounts.enter_context(_mounted(root / "dev", "--rbind", "--make-rslave", "/dev"))
        for path, place in [*((each, each) for each in _LENT), (_AUTHORITIES, _LENT_AUTHORITIES)]:
            if lend and Path(path).exists():
                mounts.enter_context(_lent(Path(path), _below(root, Path(place))))
        done = subprocess.run(
            ["chroot", str(root), *command],
            env={**variables, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
    assert not done.returncode, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


@contextmanager
def _lent(path: Path, place: Path) -> Iterator[None]:
    """Mounts a file or folder of this machine in a root, and removes it with its folders afterwards."""
    made = [each for each in (place, *place.parents) if not each.exists()]
    if path.is_dir():
        place.mkdir(parents=True, exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    try:
        with _mounted(place, "--bind", "-o", "ro", str(path.resolve())):
            yield
    finally:
        for each in made:
            if each.is_dir():
                if not any(each.iterdir()):
                    each.rmdir()
            else:
                each.unlink(missing_ok=True)


def megabytes(root: Path) -> float:
    """Returns the size of all files of the root, without file systems mounted below it."""
    done = subprocess.run(
        ["du", "-sx", "--apparent-size", "-B1", str(root)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[0]) / 1e6
