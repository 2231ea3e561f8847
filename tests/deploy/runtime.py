"""Containers of the DaemonSet, started with Debian's runc as by a kubelet and containerd.

The image's root is this machine's own unless a test has made the image. Everything else is as the pod's specification says:
user, capabilities, no new privileges, read-only root, volumes, arguments and variables; with what the runtime
adds by itself: its own process namespace, masked and read-only paths of /proc and /sys, its default seccomp
profile. That is CRI-O's and podman's, from Debian's package; containerd's knows CAP_BPF as well.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.deploy.objects import Object, Objects, container, pod_spec
from tests.lab.waiting import READY_SECONDS

TOP = Path(__file__).parents[2]
_PROFILE = "usr/share/containers/seccomp.json"
_KEPT_PROFILE = TOP / ".kernels/seccomp.json"
_ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
#: containerd masks these and makes those read-only, unless a container is privileged.
_MASKED = [
    "acpi",
    "asound",
    "kcore",
    "keys",
    "latency_stats",
    "timer_list",
    "timer_stats",
    "sched_debug",
    "scsi",
]
_READ_ONLY = ["bus", "fs", "irq", "sys", "sysrq-trigger"]
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_NO_EXEC = ["nosuid", "noexec", "nodev"]


def install(package: str, program: str) -> None:
    """Installs Debian's package where the program is missing."""
    if shutil.which(program) is None:
        command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", package]
        subprocess.run(["apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )


@functools.cache
def default_seccomp() -> str:
    """Returns the published profile for all architectures and capabilities; needs Debian's registry."""
    if Path("/", _PROFILE).exists():
        return Path("/", _PROFILE).read_text()
    _KEPT_PROFILE.parent.mkdir(exist_ok=True)
    with _KEPT_PROFILE.with_suffix(".lock").open("w") as lock:
        # Each worker of pytest would download it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _KEPT_PROFILE.exists():
            _download_seccomp(_KEPT_PROFILE)
    return _KEPT_PROFILE.read_text()


def _download_seccomp(path: Path) -> None:
    package = "golang-github-containers-common"
    with tempfile.TemporaryDirectory() as folder:
        # apt downloads as another user.
        Path(folder).chmod(0o777)
        done = subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=False)
        if done.returncode:
            subprocess.run(["apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
        (deb,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(deb), f"{folder}/root"], check=True)
        part = path.with_suffix(".part")
        shutil.copy(Path(folder, "root", _PROFILE), part)
        part.rename(path)


def seccomp_for(capabilities: Iterable[str]) -> Object:
    """Returns RuntimeDefault for a container with these capabilities."""
    profile = json.loads(default_seccomp())
    held = set(capabilities)
    rules = []
    for rule in profile["syscalls"]:
        includes, excludes = rule.get("includes", {}), rule.get("excludes", {})
        if _ARCHITECTURE not in includes.get("arches", [_ARCHITECTURE]):
            continue
        if not set(includes.get("caps", ())) <= held or held & set(excludes.get("caps", ())):
            continue
        kept = {"names": rule["names"], "action": rule["action"]}
        if rule.get("args"):
            kept["args"] = rule["args"]
        if "errnoRet" in rule:
            kept["errnoRet"] = rule["errnoRet"]
        rules.append(kept)
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [f"SCMP_ARCH_{platform.machine().upper()}"],
        "syscalls": rules,
    }


class Container:
    """A container of the pod. ``volumes``: where this machine has each (a file, or a folder).

    ``capabilities``: instead of the specification's, to see what is missed; ``seccomp``: likewise, or the file of a profile.
    ``app_armor``: a profile that the kernel has, as with ``localhostProfile``.
    ``mounts``: folders of a test, read only, at the same path. ``variables``: of fields and ConfigMaps; those
    that are left out are not set. ``account``: a folder with a service account's token and certificates,
    mounted if the pod wants them. ``image``: the root of the image.
    """

    def __init__(
        self,
        objects: Objects,
        name: str,
        folder: Path,
        *,
        volumes: Mapping[str, Path],
        variables: Mapping[str, str],
        network: str | None = None,
        arguments: Iterable[str] = (),
        mounts: Iterable[Path] = (),
        capabilities: Iterable[str] | None = None,
        seccomp: bool | Path = True,
        app_armor: str = "",
        account: Path | None = None,
        image: Path | None = None,
    ) -> None:
        self._spec = container(objects, name)
        self._pod = pod_spec(objects)
        self._volumes = volumes
        self._variables = variables
        self.id = f"{folder.parent.name}-{folder.name}"
        self._folder = folder
        self._bundle = folder / "bundle"
        self._state = ["runc", "--root", str(folder / "runc")]
        wanted = self._spec["securityContext"]["capabilities"]
        assert wanted["drop"] == ["ALL"]
        self.capabilities = (
            [f"CAP_{each}" for each in wanted["add"]] if capabilities is None else [*capabilities]
        )
        self._image = image or Path("/")
        self._mounts = [*mounts] if image else [TOP, *mounts]
        self._seccomp = seccomp
        self._app_armor = app_armor
        self._account = account
        self._network = network
        self._arguments = arguments
        (self._bundle / "root").mkdir(parents=True)
        (self._bundle / "config.json").write_text(json.dumps(self.configuration()))

    @property
    def command(self) -> list[str]:
        """Runs the container to its end."""
        # Only runc sees the overlay, which ends with it.
        script = (
            'mount -t tmpfs over "$1/over" && mkdir "$1/over/up" "$1/over/work" && '
            'mount -t overlay -o "lowerdir=$2,upperdir=$1/over/up,workdir=$1/over/work" root '
            '"$1/bundle/root" && shift 2 && exec "$@"'
        )
        (self._folder / "over").mkdir(exist_ok=True)
        alone = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh"]
        run = [*self._state, "run", "--bundle", str(self._bundle), self.id]
        return [*alone, str(self._folder), str(self._image), *run]

    def run(self, timeout: float = READY_SECONDS) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(self.command, capture_output=True, text=True, timeout=timeout, check=False)
        finally:
            self.remove()

    def execute(self, *command: str, terminal: bool = False) -> str:
        """Runs it as ``kubectl exec`` does; ``terminal``: as with ``-it``."""
        wanted = [*self._state, "exec", *(["--tty"] if terminal else []), self.id, *command]
        if terminal:
            wanted = ["script", "--quiet", "--return", "--command", shlex.join(wanted), "/dev/null"]
        done = subprocess.run(wanted, capture_output=True, text=True, timeout=READY_SECONDS, check=False)
        assert not done.returncode, done.stdout + done.stderr
        return done.stdout

    def volume(self, name: str) -> Path:
        """Returns the folder of an emptyDir."""
        return self._folder / "volumes" / name

    def signal(self, name: str) -> None:
        subprocess.run([*self._state, "kill", self.id, name], check=True)

    def remove(self) -> None:
        subprocess.run([*self._state, "delete", "--force", self.id], check=False, capture_output=True)

    # -- configuration for runc

    def configuration(self) -> Object:
        security = self._spec["securityContext"]
        names = ["bounding", "effective", "permitted"]
        variables = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            **self._environment(),
        }
        arguments = [self._expand(each) for each in self._spec.get("args", ())]
        linux: Object = {
            "namespaces": [{"type": each} for each in ("pid", "ipc", "mount")],
            "cgroupsPath": f"/{self.id}",
            "maskedPaths": [f"/proc/{each}" for each in _MASKED] + ["/sys/firmware"],
            "readonlyPaths": [f"/proc/{each}" for each in _READ_ONLY],
        }
        if self._network is not None:
            linux["namespaces"].append({"type": "network", "path": f"/run/netns/{self._network}"})
        profile = {**self._pod["securityContext"], **security}["seccompProfile"]
        assert profile == {"type": "RuntimeDefault"}
        if isinstance(self._seccomp, Path):
            linux["seccomp"] = json.loads(self._seccomp.read_text())
        elif self._seccomp:
            linux["seccomp"] = seccomp_for(self.capabilities)
        return {
            "ociVersion": "1.0.2",
            "process": {
                "terminal": False,
                "user": {"uid": security["runAsUser"], "gid": security["runAsGroup"]},
                "args": [*self._spec["command"], *arguments, *self._arguments],
                "env": [f"{name}={value}" for name, value in variables.items()],
                "cwd": "/",
                "capabilities": dict.fromkeys(names, self.capabilities),
                "noNewPrivileges": not security["allowPrivilegeEscalation"],
                "apparmorProfile": self._app_armor,
            },
            "root": {"path": "root", "readonly": security["readOnlyRootFilesystem"]},
            "mounts": self._all_mounts(),
            "linux": linux,
        }

    def _environment(self) -> dict[str, str]:
        found = {}
        for each in self._spec.get("env", ()):
            if "value" in each:
                found[each["name"]] = each["value"]
            elif each["name"] in self._variables:
                found[each["name"]] = self._variables[each["name"]]
            else:
                assert each["valueFrom"]["configMapKeyRef"]["optional"]
        return found

    def _expand(self, text: str) -> str:
        for name, value in self._environment().items():
            text = text.replace(f"$({name})", value)
        assert "$(" not in text
        return text

    def _all_mounts(self) -> list[Object]:
        taken = {each["mountPath"] for each in self._spec.get("volumeMounts", ())}
        own = [
            _mount("/proc", "proc", "proc"),
            _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount(
                "/dev/pts", "devpts", "devpts", *_NO_EXEC[:2], "newinstance", "ptmxmode=0666", "mode=0620"
            ),
            _mount("/dev/shm", "tmpfs", "shm", *_NO_EXEC, "mode=1777", "size=65536k"),
            _mount("/sys", "sysfs", "sysfs", *_NO_EXEC, "ro"),
            _mount("/sys/fs/cgroup", "cgroup", "cgroup", *_NO_EXEC, "relatime", "ro"),
            _mount("/run", "tmpfs", "tmpfs", "nosuid", "mode=755"),
        ]
        mounts = [each for each in own if each["destination"] not in taken]
        mounts += [self._volume_mount(each) for each in self._spec.get("volumeMounts", ())]
        if self._account is not None and self._pod["automountServiceAccountToken"]:
            mounts.append(_mount(_ACCOUNT, "bind", str(self._account), "rbind", "rprivate", "ro"))
        # A checkout or a lab's folder may be below one of the volumes.
        return mounts + [
            _mount(str(path), "bind", str(path), "rbind", "rprivate", "ro") for path in self._mounts
        ]

    def _volume_mount(self, mount: Object) -> Object:
        (volume,) = (each for each in self._pod["volumes"] if each["name"] == mount["name"])
        propagation = {None: "rprivate", "HostToContainer": "rslave"}[mount.get("mountPropagation")]
        source = self._volumes.get(mount["name"])
        if source is None:
            assert "emptyDir" in volume, f"no folder for the volume {mount['name']}"
            source = self.volume(mount["name"])
            source.mkdir(parents=True, exist_ok=True)
        access = "ro" if mount.get("readOnly") else "rw"
        return _mount(mount["mountPath"], "bind", str(source), "rbind", propagation, access)


def _mount(destination: str, kind: str, source: str, *options: str) -> Object:
    return {"destination": destination, "type": kind, "source": source, "options": [*options]}


def write_config_map(objects: Objects, folder: Path) -> Path:
    """Writes the volume of the ConfigMap."""
    (volume,) = (each for each in pod_spec(objects)["volumes"] if each["name"] == "config")
    folder.mkdir()
    data: dict[str, Any] = objects["ConfigMap", volume["configMap"]["name"]]["data"]
    for item in volume["configMap"]["items"]:
        (folder / item["path"]).write_text(data[item["key"]])
    return folder
