"""``POST /control/…``: control of the stand-in by tests in other processes, with responses in JSON.

| path | query, and body |
|---|---|
| ``put`` | ``resource``; the object as JSON in the body |
| ``delete`` | ``resource``, ``namespace``, ``name`` |
| ``compact`` | forgets the history: older resource versions get 410 |
| ``rewind`` | ``version``: goes back to that, as from a backup |
| ``fault`` | ``kind``, ``times``, ``resource``, ``param``, ``retry_after``, ``seconds`` of ``faults.Fault`` |
| ``heal`` | no more faults |
| ``drop`` | all connections are reset |
| ``events`` | none; responds with the created Events of events.k8s.io |
| ``tokens`` | ``accept``: the only valid ones from now on, separated by commas |

Callers may add actions (``tests.apiserver.__main__`` adds ``churn`` and ``replay``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.apiserver.server import ApiServer

Query = Mapping[str, str]
Action = Callable[[Query, bytes], Mapping[str, object]]


class ControlError(Exception):
    """A request failed, for the reason in the message."""


class Control:
    def __init__(self, api: ApiServer) -> None:
        self._api = api
        self.actions: dict[str, Action] = {
            "put": self._put,
            "delete": self._delete,
            "compact": self._compact,
            "rewind": self._rewind,
            "fault": self._fault,
            "heal": self._heal,
            "drop": self._drop,
            "events": self._events,
            "tokens": self._tokens,
        }

    def __call__(self, path: str, query: Query, body: bytes) -> Mapping[str, object]:
        """Raises ControlError."""
        action = self.actions.get(path.removeprefix("/control/"))
        if action is None:
            raise ControlError(f"no {path}: /control/ has {', '.join(self.actions)}")
        try:
            return action(query, body)
        except (KeyError, ValueError, TypeError) as error:
            raise ControlError(f"{path}: {error!r}") from error

    def _put(self, query: Query, body: bytes) -> Mapping[str, object]:
        return {"resourceVersion": str(self._api.store.put(query["resource"], json.loads(body)))}

    def _delete(self, query: Query, body: bytes) -> Mapping[str, object]:
        self._api.store.delete(query["resource"], query.get("namespace", ""), query["name"])
        return {}

    def _compact(self, query: Query, body: bytes) -> Mapping[str, object]:
        self._api.store.compact()
        return {}

    def _rewind(self, query: Query, body: bytes) -> Mapping[str, object]:
        self._api.store.rewind(int(query["version"]))
        return {}

    def _fault(self, query: Query, body: bytes) -> Mapping[str, object]:
        convert: dict[str, type] = {"times": int, "retry_after": int, "seconds": float}
        self._api.fail(**{name: convert.get(name, str)(value) for name, value in query.items()})
        return {}

    def _heal(self, query: Query, body: bytes) -> Mapping[str, object]:
        self._api.heal()
        return {}

    def _drop(self, query: Query, body: bytes) -> Mapping[str, object]:
        self._api.drop_connections()
        return {}

    def _events(self, query: Query, body: bytes) -> Mapping[str, object]:
        return {"items": self._api.events.all}

    def _tokens(self, query: Query, body: bytes) -> Mapping[str, object]:
        self._api.tokens = set(query["accept"].split(","))
        return {}
