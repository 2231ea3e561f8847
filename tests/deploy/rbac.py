"""The API server's stand-in with authorization: 403 for what no rule of a ClusterRole grants.

``python -m tests.deploy.rbac FOLDER``: FOLDER has ``rules.json`` (of the role), ``token``, ``server.crt`` and
``server.key``; ``pages`` there makes it a server without streaming lists. It prints its port, and writes a
line of ``asked.jsonl`` for every request with credentials: group, resource, verb, field selector, and whether
it was granted. One of its Services has an invalid annotation.
"""

from __future__ import annotations

import json
import ssl
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from tests.apiserver import ApiServer, Store, bodies, fill, objects
from tests.apiserver.handler import PATHS, Handler

SERVICE = "10.96.251.1"


class Asked(NamedTuple):
    group: str
    resource: str
    verb: str
    selector: str = ""
    granted: bool = True


def attributes(method: str, target: str) -> Asked | None:
    """Parses a request as a real server does (RequestInfo); returns None for other paths than resources."""
    split = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(split.query).items()}
    parts = split.path.strip("/").split("/")
    if parts[0] not in ("api", "apis"):
        return None
    group, parts = ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:])
    if parts[:1] == ["namespaces"] and len(parts) > 2:
        parts = parts[2:]
    if not parts:
        return None
    verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(method, "list")
    if method == "GET" and query.get("watch") in ("true", "1"):
        verb = "watch"
    elif method == "GET" and len(parts) > 1:
        verb = "get"
    return Asked(group, parts[0], verb, query.get("fieldSelector", ""))


def grants(rules: list[dict[str, Any]], asked: Asked) -> bool:
    return any(
        asked.group in rule["apiGroups"]
        and asked.resource in rule["resources"]
        and asked.verb in rule["verbs"]
        for rule in rules
    )


class AuthorizingHandler(Handler):
    rules: list[dict[str, Any]]
    log: Path

    def _authorized(self) -> bool:
        asked = attributes(self.command, self.path)
        user = self._user()
        if asked is None or user in (None, "system:anonymous"):
            return True
        granted = grants(self.rules, asked)
        with self.log.open("a") as out:
            out.write(json.dumps(asked._replace(granted=granted)) + "\n")
        if not granted:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            known = asked.resource in PATHS.values()
            self.answer(
                403,
                bodies.forbidden(user, asked.verb, asked.resource)
                if known
                else bodies.status(403, "Forbidden", f"no {asked.verb} of {asked.resource}"),
            )
        return granted

    def do_GET(self) -> None:  # noqa: N802 - the base class's name
        if self._authorized():
            super().do_GET()

    def do_POST(self) -> None:  # noqa: N802
        if self.path.startswith("/control/") or self._authorized():
            super().do_POST()


def main(folder: Path) -> None:
    AuthorizingHandler.rules = json.loads((folder / "rules.json").read_text())
    AuthorizingHandler.log = folder / "asked.jsonl"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    store = Store()
    fill.fill(store, 5, 2, "node-a")
    fill.add_bench_service(store, SERVICE, (folder / "backend").read_text())
    annotated = objects.service("annotated", "10.96.252.1")
    annotated["metadata"]["annotations"] = {"ebpfproxy.io/lb-algorithm": "bogus"}
    store.put("services", annotated)
    server = ApiServer(
        store,
        tokens={(folder / "token").read_text()},
        tls=context,
        streaming_list=not (folder / "pages").exists(),
    )
    server._server.RequestHandlerClass = AuthorizingHandler
    with server:
        print(server.port, flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
