"""``python -m tests.apiserver``: the stand-in in its own process. Its first line is its URL.

Beside what ``tests.apiserver.control`` lists, ``POST /control/churn?rate=1000&seconds=10`` changes one endpoint of
another Service ``rate`` times a second, with the trigger-time annotation set to now, and responds when that is done;
with ``--recordings``, ``POST /control/replay?speed=10`` replays the recording (without ``speed`` at once).
"""

from __future__ import annotations

import argparse
import ssl
import time
from collections.abc import Mapping
from pathlib import Path

from tests.apiserver import ApiServer, Store, fill
from tests.apiserver.control import Query


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.apiserver")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--services", type=int, default=10)
    parser.add_argument("--endpoints", type=int, default=10, help="of each Service")
    parser.add_argument("--node", default="node-a")
    parser.add_argument(
        "--bench-service",
        metavar="IP=BACKEND",
        action="append",
        default=[],
        help="one more, on the load's ports; for each family at most once",
    )
    parser.add_argument(
        "--bench-node-port", metavar="PORT=BACKEND", action="append", default=[], help="likewise, a NodePort"
    )
    parser.add_argument("--recordings", type=Path, metavar="DIR", help="a recorded cluster instead of load")
    parser.add_argument("--pages", action="store_true", help="no streaming lists")
    parser.add_argument(
        "--token", action="append", help="a bearer token that is good; without it, anybody is"
    )
    parser.add_argument("--tls-cert", type=Path, help="HTTPS")
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--client-ca", type=Path, help="certificates of whom are credentials")
    return parser.parse_args()


def _tls(options: argparse.Namespace) -> ssl.SSLContext | None:
    if options.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options.tls_cert, options.tls_key)
    if options.client_ca is not None:
        context.load_verify_locations(options.client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def main() -> None:
    options = _options()
    store = Store()
    if options.recordings is not None:
        fill.fill_from_recordings(store, options.recordings)
    else:
        fill.fill(store, options.services, options.endpoints, options.node)
    for text in options.bench_service:
        fill.add_bench_service(store, *text.split("="))
    for number, text in enumerate(options.bench_node_port, 1):
        port, _, backend = text.partition("=")
        fill.add_bench_node_port(store, int(port), backend, number)
    server = ApiServer(
        store,
        host=options.host,
        port=options.port,
        tokens=set(options.token) if options.token else None,
        tls=_tls(options),
        streaming_list=not options.pages,
    )

    def churn(query: Query, body: bytes) -> Mapping[str, object]:
        rate, seconds = float(query["rate"]), float(query["seconds"])
        return fill.churn(store, options.services, options.endpoints, rate, seconds)

    def replay(query: Query, body: bytes) -> Mapping[str, object]:
        return {"changes": fill.replay(store, options.recordings, float(query.get("speed", "0")))}

    server.control.actions |= {"churn": churn} if options.recordings is None else {"replay": replay}
    with server:
        print(server.url, flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
