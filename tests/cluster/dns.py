"""A DNS of the cluster: A, AAAA, SRV and PTR of Services, and of the pods of headless ones, from the API server.

Run on a node as ``python -m tests.cluster.dns KUBECTL KUBECONFIG ADDRESS...``; watches with kubectl. It stands for CoreDNS,
of which there is no binary here; the rules are those of the specification (kubernetes/dns, docs/specification.md).
"""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from dnslib import AAAA, CNAME, PTR, QTYPE, RCODE, RR, SRV, A, DNSRecord
from dnslib.server import BaseResolver, DNSLogger, DNSServer, TCPServer, UDPServer

Object = dict[str, Any]

DOMAIN = "cluster.local"
_TTL = 5
_OF_SERVICE = "kubernetes.io/service-name"


class Objects:
    """The current Services and EndpointSlices by namespace and name."""

    def __init__(self, kubectl: str, kubeconfig: str) -> None:
        self._command = [kubectl, f"--kubeconfig={kubeconfig}", "get", "-A", "-o", "json", "--watch"]
        self._found: dict[str, dict[tuple[str, str], Object]] = {"services": {}, "endpointslices": {}}
        for kind in self._found:
            threading.Thread(target=self._follow, args=(kind,), daemon=True).start()

    def services(self) -> list[Object]:
        return [*self._found["services"].values()]

    def service(self, namespace: str, name: str) -> Object | None:
        return self._found["services"].get((namespace, name))

    def slices(self, namespace: str, service: str) -> list[Object]:
        return [
            each
            for (place, _), each in [*self._found["endpointslices"].items()]
            if place == namespace and each["metadata"].get("labels", {}).get(_OF_SERVICE) == service
        ]

    def _follow(self, kind: str) -> None:
        while True:
            found: dict[tuple[str, str], Object] = {}
            self._found[kind] = found
            command = [*self._command, "--output-watch-events", kind]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    self._apply(found, json.loads(line))
            print(f"the watch of {kind} ended; starting it again", flush=True)
            time.sleep(1)

    @staticmethod
    def _apply(found: dict[tuple[str, str], Object], event: Object) -> None:
        thing = event["object"]
        key = thing["metadata"]["namespace"], thing["metadata"]["name"]
        if event["type"] == "DELETED":
            found.pop(key, None)
        else:
            found[key] = thing


class Resolver(BaseResolver):  # type: ignore[misc]
    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def resolve(self, request: DNSRecord, handler: object) -> DNSRecord:
        reply = request.reply()
        name = str(request.q.qname).lower().rstrip(".")
        found = self._records(name)
        if found is None:
            reply.header.rcode = RCODE.NXDOMAIN
            return reply
        wanted = QTYPE[request.q.qtype]
        for record in found:
            kind = type(record).__name__
            if wanted in ("ANY", kind) or kind == "CNAME":
                reply.add_answer(RR(request.q.qname, getattr(QTYPE, kind), rdata=record, ttl=_TTL))
        return reply

    def _records(self, name: str) -> list[Any] | None:
        """Returns None for a name that does not exist."""
        if name.endswith(".arpa"):
            return self._pointers(name) or None
        suffix = f".svc.{DOMAIN}"
        if not name.endswith(suffix):
            return None
        *labels, service_name, namespace = ["", "", *name.removesuffix(suffix).split(".")]
        service = self._objects.service(namespace, service_name)
        labels = [label for label in labels if label]
        if service is None:
            return None
        spec = service["spec"]
        if spec.get("type") == "ExternalName":
            return [CNAME(spec["externalName"])]
        if len(labels) == 2 and labels[0].startswith("_"):
            host = f"{service_name}.{namespace}.svc.{DOMAIN}"
            return [
                SRV(0, 100, port["port"], host)
                for port in spec.get("ports", [])
                if (f"_{port.get('name')}", f"_{port['protocol'].lower()}") == (labels[0], labels[1])
            ] or None
        if spec.get("clusterIP") not in (None, "", "None"):
            return None if labels else [_address(ip) for ip in spec["clusterIPs"]]
        return self._pods(service, labels[0] if labels else None)

    def _pods(self, service: Object, host: str | None) -> list[Any] | None:
        names = service["metadata"]
        unready = service["spec"].get("publishNotReadyAddresses")
        found = [
            _address(ip)
            for each in self._objects.slices(names["namespace"], names["name"])
            for endpoint in each.get("endpoints") or []
            if unready or (endpoint.get("conditions") or {}).get("ready") is not False
            if host is None or endpoint.get("hostname") == host
            for ip in endpoint["addresses"]
        ]
        return found or (None if host else [])

    def _pointers(self, name: str) -> list[Any]:
        return [
            PTR(f"{each['metadata']['name']}.{each['metadata']['namespace']}.svc.{DOMAIN}")
            for each in self._objects.services()
            for ip in each["spec"].get("clusterIPs") or []
            if ip != "None" and ipaddress.ip_address(ip).reverse_pointer == name
        ]


def _address(ip: str) -> Any:
    return AAAA(ip) if ":" in ip else A(ip)


class _UDPServer6(UDPServer):  # type: ignore[misc]
    address_family = socket.AF_INET6


class _TCPServer6(TCPServer):  # type: ignore[misc]
    address_family = socket.AF_INET6


def main() -> None:
    kubectl, kubeconfig, *addresses = sys.argv[1:]
    resolver, errors_only = Resolver(Objects(kubectl, kubeconfig)), DNSLogger("error")
    for address in addresses:
        for server in (_UDPServer6, _TCPServer6) if ":" in address else (UDPServer, TCPServer):
            DNSServer(resolver, address=address, port=53, logger=errors_only, server=server).start_thread()
    print(f"serving at {' '.join(addresses)}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
