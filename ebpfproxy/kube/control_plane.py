"""Where the control plane is before Services work: what a pod is told is the cluster IP of one.

Candidates, in this order, in a pod with a service account:

1. ``KUBERNETES_SERVICE_HOST``, where somebody set it in the pod: kubelet then still says otherwise in
   ``KUBERNETES_PORT_443_TCP_ADDR``. It is used as it is.
2. The server in the ConfigMap ``cluster-info`` of ``kube-public``, which kubeadm lets everybody read (Role
   kubeadm:bootstrap-signer-clusterinfo): asked for at the address of 4, without a token.
3. The server in kubelet's own kubeconfig, where the pod can read it (kubeadm: /etc/kubernetes/kubelet.conf;
   override: ``EBPFPROXY_KUBELET_KUBECONFIG``): kubelet has to reach it without Services, too.
4. What kubelet says: it works where something else serves that cluster IP, such as a kube-proxy beside us.

The first of 2 to 4 that answers is used: by HTTPS that the service account's CA vouches for, with any HTTP
status; if none of them does, the one that answered last. Where nobody answers that one is kept, else it is
the first that is known: ``ApiConnection`` chooses again after failures, and without 4 nobody tells 2.

2 and 3 are tried at the same time. Where 4 works, a request or two take milliseconds; so they do after an
agent's restart, since the maps serve the cluster IP without it. On a node that has no Services yet nobody
answers packets to it: 2 is then waited for one second where 3 answers, two where it does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import NamedTuple, TypeVar

import msgspec
import yaml

from ebpfproxy.kube import kubeconfig

KUBELET_KUBECONFIG = Path("/etc/kubernetes/kubelet.conf")
CLUSTER_INFO = "/api/v1/namespaces/kube-public/configmaps/cluster-info"

#: :func:`choose` takes so many seconds at most: half of them for the best, the other half for any at all.
SECONDS = 2.0

#: GETs a URL without credentials: the body of a 200, empty for another status. Raises where nobody answers.
Ask = Callable[[str], bytes]

T = TypeVar("T")


class Choice(NamedTuple):
    """A server's URL, who named it, and whether it answers."""

    server: str
    source: str
    answers: bool


class _ConfigMap(msgspec.Struct):
    data: dict[str, str]


_CONFIG_MAP = msgspec.json.Decoder(_ConfigMap)


def choose(
    own: str, ask: Ask, environment: Mapping[str, str] = os.environ, *, last: Choice | None = None
) -> Choice:
    """``own``: the URL of the service account; ``last``: what answered last.

    Returns within :data:`SECONDS`, whoever hangs.
    """
    host = environment.get("KUBERNETES_SERVICE_HOST", "")
    if host != environment.get("KUBERNETES_PORT_443_TCP_ADDR", host):
        return Choice(own, "KUBERNETES_SERVICE_HOST", answers=True)
    path = Path(environment.get("EBPFPROXY_KUBELET_KUBECONFIG", str(KUBELET_KUBECONFIG)))
    kubelets = server_of(path)

    asked = _in_thread(lambda: ask(own + CLUSTER_INFO))
    of_cluster_info = _in_thread(lambda: _answering(_server_of_config_map(asked.result()), ask))
    of_kubelet = _in_thread(lambda: _answering(kubelets, ask))
    of_last = _in_thread(lambda: _answering(last.server if last is not None else None, ask))
    trying: tuple[Future[str | None], ...] = (of_cluster_info, of_kubelet, of_last)
    wait(trying, SECONDS / 2)
    if _result(asked) is None and all(_result(each) is None for each in trying):
        wait(trying, SECONDS / 2)
    if server := _result(of_cluster_info):
        return Choice(server, "ConfigMap kube-public/cluster-info", answers=True)
    if server := _result(of_kubelet):
        return Choice(server, str(path), answers=True)
    last_answers = _result(of_last) is not None
    if last is not None and (last_answers or _result(asked) is None):
        return last._replace(answers=last_answers)
    if _result(asked) is None and kubelets is not None:
        return Choice(kubelets, str(path), answers=False)
    return Choice(own, "service account", answers=_result(asked) is not None)


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Runs it in a thread that nobody waits for: a name may take long to resolve."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, name="control-plane", daemon=True).start()
    return future


def _result(future: Future[T]) -> T | None:
    """Returns None while there is none."""
    return future.result() if future.done() and future.exception() is None else None


def _answering(server: str | None, ask: Ask) -> str | None:
    if server is not None:
        ask(f"{server}/version")
    return server


def server_of(path: Path) -> str | None:
    """Returns the server of a kubeconfig's current context; None where there is none with HTTPS."""
    try:
        return _server_in(path.read_bytes())
    except OSError:
        return None


def _server_of_config_map(body: bytes) -> str | None:
    try:
        return _server_in(_CONFIG_MAP.decode(body).data.get("kubeconfig", "").encode())
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _server_in(text: bytes) -> str | None:
    try:
        server = kubeconfig.server_of(kubeconfig.parse(text))
    except (ValueError, yaml.YAMLError, msgspec.ValidationError, RecursionError):
        return None
    return server.rstrip("/") if server.startswith("https://") else None
