"""The compiler's process: ``python -m ebpfproxy.datapath.loader`` loads and pins programs, and exits.

It reads a :class:`LoadRequest` as JSON from standard input and inherits the maps' file descriptors. Clang
and LLVM live and die here; the agent never holds them. What the compiler or the verifier has to say goes
to standard error as they say it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from ebpfproxy.datapath import bpf


class LoadRequest(msgspec.Struct, frozen=True):
    """``programs``: function, program type, attach type and pin. The pins' folders exist, on a bpffs."""

    source: str
    headers: str
    cflags: list[str]
    programs: list[tuple[str, int, int, str]]


def main() -> None:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=LoadRequest)
    os.environ["BCC_KERNEL_SOURCE"] = request.headers
    try:
        from bcc import BPF  # noqa: PLC0415 - only this process may load LLVM
    except ImportError as error:
        raise SystemExit(f"bcc is missing ({error}): install the distribution's python3-bpfcc") from None
    try:
        module = BPF(src_file=request.source, cflags=request.cflags)
    except Exception:
        raise SystemExit(2) from None
    for name, program_type, attach_type, pin in request.programs:
        print(f"program {name}:", file=sys.stderr, flush=True)
        # Kernels before 6.6 know no attach type for tc: theirs is a filter's matter.
        expected = -1 if program_type == bpf.PROG_SCHED_CLS else attach_type
        try:
            function = module.load_func(name, program_type, None, expected)
        except Exception as error:
            raise SystemExit(str(error)) from None
        bpf.pin(function.fd, Path(pin))


if __name__ == "__main__":
    main()
