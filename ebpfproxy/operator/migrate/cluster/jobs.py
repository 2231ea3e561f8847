"""Runs the one-node command on a node, in a pod that is gone afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from ebpfproxy.operator import pod_status
from ebpfproxy.operator.api import Api, ApiError, Object
from ebpfproxy.operator.image import Image
from ebpfproxy.operator.migrate.cluster import work_pod
from ebpfproxy.operator.waiting import Wait

#: This is added to the time that the command may take.
_SPARE_SECONDS = 60.0
_EXISTS = 409


class JobError(Exception):
    """The command did not run, or failed; the message has its last line."""


class Done(msgspec.Struct, frozen=True):
    """A command's output, of both streams, and its exit code."""

    code: int
    text: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]

    @property
    def words(self) -> str:
        """The line that says why it failed: click's, or the last one."""
        errors = [line.removeprefix("Error: ") for line in self.lines if line.startswith("Error: ")]
        return (errors or self.lines or [f"exit code {self.code}, no output"])[-1]


class Jobs:
    """Runs pods in one namespace, with one image. Any thread may use it.

    Methods raise ApiError and JobError.
    """

    def __init__(self, api: Api, namespace: str, image: Image, seconds: float) -> None:
        """``seconds`` bound the start of a container, and each step of the command."""
        self._api, self._namespace, self._image, self._seconds = api, namespace, image, seconds

    def run(
        self,
        node: str,
        arguments: Iterable[str],
        *,
        most: float,
        looks: Callable[[str], None] | None = None,
        good: tuple[int, ...] = (0,),
    ) -> Done:
        """``most`` bounds the command, in seconds. ``looks`` is called with its log while it runs."""
        seconds = most + self._seconds + _SPARE_SECONDS
        command = [*arguments, "--timeout", f"{self._seconds:g}s"]
        manifest = work_pod.manifest(node, self._namespace, self._image, command, seconds=seconds)
        name = str(manifest["metadata"]["name"])
        self._create(name, manifest)
        try:
            done = self._wait(node, name, seconds, looks)
        finally:
            self._api.delete("Pod", self._namespace, name)
        if done.code not in good:
            raise JobError(f"{node}: {done.words}")
        return done

    def _create(self, name: str, manifest: Object) -> None:
        """Deletes a pod that an earlier call left, if it has ended."""
        wait = Wait(self._seconds)
        api = self._api.within(wait)
        for _ in wait:
            try:
                api.create(manifest)
                return
            except ApiError as error:
                if error.status != _EXISTS:
                    raise
            old = api.get("Pod", self._namespace, name)
            if old is None:
                continue
            if pod_status.has_ended(old) or pod_status.cannot_start(old):
                api.delete("Pod", self._namespace, name)
            elif "deletionTimestamp" not in old["metadata"]:
                raise JobError(f"pod {self._namespace}/{name} runs already: another call works on this node")
        raise JobError(f"pod {self._namespace}/{name} is still there after {self._seconds:g} s")

    def _wait(self, node: str, name: str, seconds: float, looks: Callable[[str], None] | None) -> Done:
        where = f"{node}: pod {self._namespace}/{name}"
        to_start = time.monotonic() + self._seconds
        wait = Wait(seconds)
        api = self._api.within(wait)
        for _ in wait:
            pod = api.get("Pod", self._namespace, name)
            if pod is None:
                raise JobError(f"{where} is gone")
            if why := pod_status.cannot_start(pod):
                raise JobError(f"{where} cannot start: {why}")
            if pod_status.has_ended(pod):
                return self._ended(where, name, pod)
            if time.monotonic() >= to_start and not pod_status.has_started(pod):
                raise JobError(f"{where} has not started after {self._seconds:g} s: {self._warning(name)}")
            if looks is not None and pod_status.has_started(pod):
                looks(self._log(api, name))
        raise JobError(f"{where} has not ended in time")

    def _ended(self, where: str, name: str, pod: Object) -> Done:
        code = pod_status.exit_code(pod)
        if code is None:
            raise JobError(f"{where} failed: {pod_status.failure(pod)}")
        try:
            text = self._api.log(self._namespace, name)
        except ApiError as error:
            text = pod_status.message(pod)
            if code == 0 or not text:
                raise JobError(f"{where}: {pod_status.failure(pod) or 'it ended well'}; {error}") from error
        if code and not text.strip():
            raise JobError(f"{where}: {pod_status.failure(pod)}")
        return Done(code, text)

    def _log(self, api: Api, name: str) -> str:
        """Returns the log; empty where it cannot be read now."""
        try:
            return api.log(self._namespace, name)
        except ApiError:
            return ""

    def _warning(self, name: str) -> str:
        """Why a container does not start, such as a volume that cannot be mounted."""
        try:
            warning = pod_status.last_warning(self._api, self._namespace, "Pod", name)
            return warning or "its kubelet says nothing"
        except ApiError as error:
            return str(error)
