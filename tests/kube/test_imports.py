"""Unused packages are not imported: they would cost memory and time at each start."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.apiserver import ApiServer
from tests.apiserver.certificates import Authority
from tests.kube.files import kubeconfig

#: Imports an agent's modules and sends one request.
_AGENT = """
import sys
from pathlib import Path
from ebpfproxy.cli import run
from ebpfproxy.kube import access
from ebpfproxy.kube.client import ApiConnection
folder, kubeconfig = Path(sys.argv[1]), sys.argv[2]
access.TOKEN_FILE, access.CA_FILE = folder / "token", folder / "ca.crt"
connection = ApiConnection.from_options(Path(kubeconfig) if kubeconfig else None, None)
assert connection.call("GET", "/version", read_seconds=10).status == 200
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("has_kubeconfig", [False, True], ids=["service account", "kubeconfig"])
def test_static_credentials_do_not_import_the_kubernetes_package(
    tmp_path: Path, has_kubeconfig: bool
) -> None:
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.pair("server"))
    (tmp_path / "token").write_text("t")
    certificate, key = authority.pair("client")
    user: dict[str, object] = {
        "tokenFile": "token",
        "client-certificate": str(certificate),
        "client-key": str(key),
    }
    with ApiServer(tls=context, tokens={"t"}) as server:
        path = ""
        if has_kubeconfig:
            path = str(
                kubeconfig(tmp_path / "config", server.url, user, **{"certificate-authority": "ca.crt"})
            )
        environment = {
            **os.environ,
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(server.port),
            "EBPFPROXY_KUBELET_KUBECONFIG": str(tmp_path / "none"),
        }
        done = subprocess.run(
            [sys.executable, "-c", _AGENT, str(tmp_path), path],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert "urllib3" in modules
    assert not {"kubernetes", "pyroute2", "rich", "watchfiles"} & set(modules)


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        ("run", {"kubernetes", "pyroute2", "rich", "urllib3", "watchfiles"}),
        ("status", {"asyncio", "kubernetes", "prometheus_client", "pyroute2", "rich", "ssl", "urllib3"}),
        ("service", {"asyncio", "kubernetes", "prometheus_client", "pyroute2", "rich", "ssl", "urllib3"}),
    ],
)
def test_command_does_not_import(command: str, unused: set[str]) -> None:
    """Modules for manifests, tables and old kernels are imported where they are used."""
    script = f"import sys, ebpfproxy.cli.{command}; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not unused & set(output.split())
