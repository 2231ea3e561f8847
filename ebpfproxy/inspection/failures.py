"""What can go wrong when a node is looked at, and what is said then."""

from __future__ import annotations

import errno
import os

from ebpfproxy.datapath.dump import NothingPinnedError
from ebpfproxy.datapath.kernel.libbpf import BpfError
from ebpfproxy.datapath.kernel.probe import UnsupportedKernelError, has_capability, missing_capabilities
from ebpfproxy.datapath.kernel.roots import RootError
from ebpfproxy.datapath.programs.loader import LoadError


class ClosedNamespacesError(Exception):
    """Pods cannot be looked for: this process may not enter their network namespaces."""


#: Errors that a user can act on.
FAILURES = (
    NothingPinnedError,
    UnsupportedKernelError,
    LoadError,
    RootError,
    BpfError,
    PermissionError,
    ClosedNamespacesError,
)


class QuestionError(Exception):
    """What somebody asks cannot be understood, or names nothing; the message is for them."""


class WrongNamespaceError(Exception):
    """This is another network namespace than the agent's: its devices and routes are not here."""


def told(error: BaseException) -> str:
    """One of :data:`FAILURES` in one line."""
    if isinstance(error, BpfError):
        return f"{error.strerror}{_why_refused() if error.errno == errno.EPERM else ''}"
    if isinstance(error, PermissionError):
        return f"{error}{_why_denied(error)}"
    return str(error)


def _why_refused() -> str:
    if missing := missing_capabilities():
        return f" (this process lacks {', '.join(missing)})"
    return " (root is needed, and no seccomp profile that refuses it)"


def _why_denied(error: PermissionError) -> str:
    if os.geteuid():
        return "; root is needed"
    # Other processes' namespaces and files; files of other users; else system calls.
    if str(error.filename).startswith("/proc/"):
        needed = "CAP_SYS_PTRACE"
    else:
        needed = "CAP_DAC_OVERRIDE" if error.errno == errno.EACCES else "CAP_SYS_ADMIN"
    if has_capability(needed):
        return " (a seccomp or AppArmor profile refuses it)"
    return f" (this process lacks {needed})"
