"""The compiler's process: ``python -m ebpfproxy.datapath.programs.compiler`` compiles one source, and exits.

It reads a :class:`CompileRequest` as JSON from standard input and writes instructions as MessagePack to
standard output: a map from each program's name to its bytes, eight an instruction (struct bpf_insn, in the
byte order of this machine). Clang and LLVM live and die here; the agent never holds them. What the compiler
has to say goes to standard error as it says it. Exit code 3 (NO_COMPILER) says that bcc cannot be imported.
"""

from __future__ import annotations

import os
import sys

import msgspec

NO_COMPILER = 3


class CompileRequest(msgspec.Struct, frozen=True):
    """``programs``: names of functions in the source."""

    source: str
    headers: str
    cflags: list[str]
    programs: list[str]


def main() -> None:
    request = msgspec.json.Decoder(CompileRequest).decode(sys.stdin.buffer.read())
    # Libraries may print; only the result is standard output.
    result = os.dup(1)
    os.dup2(2, 1)
    os.environ["BCC_KERNEL_SOURCE"] = request.headers
    try:
        from bcc import BPF  # noqa: PLC0415 - only this process may load LLVM
    except ImportError as error:
        print(error, file=sys.stderr)
        raise SystemExit(NO_COMPILER) from None
    try:
        module = BPF(src_file=request.source, cflags=request.cflags)
    except Exception:
        raise SystemExit(2) from None
    with os.fdopen(result, "wb") as output:
        output.write(msgspec.msgpack.encode({name: module.dump_func(name) for name in request.programs}))


if __name__ == "__main__":
    main()
