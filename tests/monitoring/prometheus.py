"""A real Prometheus on a lab node: one process with data below the lab's folder and a loopback port."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from tests.lab import LabNode

PORT = 9090


class Prometheus:
    """Scrapes agents every second, the node's own by default, as job kube-proxy, and evaluates rules as often."""

    def __init__(
        self, node: LabNode, *rule_files: Path, targets: Sequence[str] = ("127.0.0.1:10249",)
    ) -> None:
        self._node = node
        folder = node.lab.folder / "prometheus"
        folder.mkdir()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in rule_files],
            "scrape_configs": [
                {
                    "job_name": "kube-proxy",
                    "honor_labels": True,
                    "static_configs": [{"targets": [*targets]}],
                }
            ],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.log = folder / "log"
        command = ["prometheus", f"--config.file={folder}/prometheus.yaml"]
        command += [f"--storage.tsdb.path={folder}/data", "--storage.tsdb.retention.time=1h"]
        command += [f"--web.listen-address=127.0.0.1:{PORT}", "--log.level=warn", "--query.max-concurrency=1"]
        with self.log.open("ab") as log:
            self._process: subprocess.Popen[bytes] = node.popen(
                command, stdout=log, stderr=log, env={**os.environ, "GOMAXPROCS": "1", "GOMEMLIMIT": "256MiB"}
            )

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)

    def ask(self, path: str, **parameters: str) -> Any:
        """Returns the data of a response. Raises AssertionError with the server's message for an error."""
        answer = self._node.call(_get, f"/api/v1/{path}?{urlencode(parameters)}")
        assert answer["status"] == "success", f"{parameters or path}: {answer.get('error')}"
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Returns the current samples of an expression."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def history(self, expression: str, seconds: float) -> list[dict[str, Any]]:
        """Returns the samples of an expression in the last seconds, some hundred of each series."""
        now = time.time()
        found: list[dict[str, Any]] = self.ask(
            "query_range",
            query=expression,
            start=str(now - seconds),
            end=str(now),
            step=str(max(1, round(seconds / 300))),
        )["result"]
        return found

    def wait_samples(self, expression: str, number: int | None = None) -> None:
        """Waits until the expression has this number of samples, or any."""

        def is_so() -> bool:
            found = len(self.query(expression))
            return found == number if number is not None else found > 0

        self.until(is_so, f"{expression}: no data, or not {number} samples")

    def rules(self) -> dict[str, dict[str, Any]]:
        """Returns rules by name, with health and state."""
        return {rule["name"]: rule for group in self.ask("rules")["groups"] for rule in group["rules"]}

    def until(self, condition: Callable[[], object], what: str, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                if condition():
                    return
            except OSError:
                pass  # it does not listen yet or is reading its storage
            assert self._process.poll() is None, f"Prometheus has ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"{what}\n{self.log.read_text()}"
            time.sleep(0.2)


def _get(path: str) -> Any:
    """Returns the decoded response. Raises ConnectionError where the server listens but is not ready (503, no JSON)."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read()
    if answer.status == http.HTTPStatus.SERVICE_UNAVAILABLE:
        raise ConnectionError(f"Prometheus is not ready: {text.decode(errors='replace')}")
    return json.loads(text)
