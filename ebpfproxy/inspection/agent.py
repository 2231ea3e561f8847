"""What the running agent is asked, and what is said where it does not answer."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from ebpfproxy.agent.local_pages import ask_reasons
from ebpfproxy.agent.local_socket import OTHER_VERSION, NoAgentError, ask
from ebpfproxy.datapath.drift.findings import Report
from ebpfproxy.datapath.kernel.roots import is_locked
from ebpfproxy.services.model import ServicePortKey
from ebpfproxy.services.reasons import ServiceReasons

_AGAIN_SECONDS = 0.1
#: Decisions wait in the ring meanwhile.
_SOON_SECONDS = 0.5
_REPORT = msgspec.json.Decoder(Report)


def ask_agent(bpf_root: Path, page: str, seconds: float) -> tuple[Report | None, str]:
    """The agent's report, or why there is none; an agent that is starting is waited for."""
    deadline, silence = time.monotonic() + seconds, ""
    while is_locked(bpf_root) and (left := deadline - time.monotonic()) > 0:
        try:
            reply = ask(bpf_root, page, left)
        except NoAgentError as error:
            silence = str(error)
            time.sleep(_AGAIN_SECONDS)
            continue
        if reply.status == 200:
            report = decode_report(reply.body)
            return report, "" if report is not None else OTHER_VERSION
        return None, reply.body.decode(errors="replace")
    return None, silence if is_locked(bpf_root) else ""


def decode_report(body: bytes) -> Report | None:
    """None for that of another version."""
    try:
        return _REPORT.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def reasons_soon(bpf_root: Path, port: ServicePortKey) -> ServiceReasons | None:
    """The reasons for a traced decision; None where the agent does not answer at once."""
    try:
        return ask_reasons(bpf_root, port.namespace, port.name, _SOON_SECONDS)
    except NoAgentError:
        return None


class AskedOnce:
    """The agent's reasons, each asked for once: a silent agent is not asked again."""

    def __init__(self, bpf_root: Path) -> None:
        self._bpf_root = bpf_root
        self._answers: dict[tuple[str, str], ServiceReasons | None] = {}
        #: Why there are no reasons; empty where the agent answers.
        self.silence = ""

    def service(self, namespace: str, name: str) -> ServiceReasons | None:
        key = namespace, name
        if key not in self._answers and not self.silence:
            try:
                self._answers[key] = ask_reasons(self._bpf_root, namespace, name)
            except NoAgentError as error:
                self.silence = str(error)
        return self._answers.get(key)

    def of_port(self, port: ServicePortKey) -> ServiceReasons | None:
        return self.service(port.namespace, port.name)
