"""Replays a recorded cluster over HTTP, from its initial lists to its final lists."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import pytest

from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.decode import Decoder
from ebpfproxy.kube.objects import Changed, Event, Object, ObjectKey, Replaced, Resource, key_of
from ebpfproxy.kube.watch.reflector import Reflector, Timing
from tests import recordings
from tests.apiserver import ApiServer, fill
from tests.data import RECORDINGS


def without_version(each: Any) -> Any:
    """Removes the resource version, which the stand-in assigns itself."""
    meta = msgspec.structs.replace(each.metadata, resource_version="")
    return msgspec.structs.replace(each, metadata=meta)


def final(resource: Resource) -> dict[ObjectKey, Object]:
    items = recordings.lists("final")[resource]
    page = Decoder(resource).page(json.dumps({"metadata": {}, "items": items}).encode())
    return {key_of(each): without_version(each) for each in page.objects}


@pytest.mark.parametrize("how", ["streaming", "pages", "connections cut", "history compacted"])
def test_objects_equal_the_final_lists_after_all_events(how: str) -> None:
    known: dict[Resource, dict[ObjectKey, object]] = {}

    def sink(event: Event) -> None:
        if isinstance(event, Replaced):
            known[event.resource] = dict(event.objects)
        elif isinstance(event, Changed):
            known[event.resource][event.key] = event.object
        else:
            del known[event.resource][event.key]

    with ApiServer(streaming_list=how != "pages") as server:
        fill.fill_from_recordings(server.store, RECORDINGS)
        connection = ApiConnection.from_options(None, server.url)
        timing = Timing(backoff_first=0.01, backoff_most=0.05)
        watches = [Reflector(connection, resource, sink, timing=timing) for resource in Resource]
        for each in watches:
            each.start()
        deadline = time.monotonic() + 20
        while len(known) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)

        def disturb() -> None:
            if how == "history compacted":
                server.store.compact()
            if how in ("connections cut", "history compacted"):
                server.drop_connections()

        fill.replay(server.store, RECORDINGS, between=disturb)
        wanted = {resource: final(resource) for resource in Resource}
        while {r: {k: without_version(o) for k, o in known[r].copy().items()} for r in Resource} != wanted:
            assert time.monotonic() < deadline, [each.status for each in watches]
            time.sleep(0.02)
        for each in watches:
            each.stop()
        if how == "history compacted":
            assert sum(each.status.lists for each in watches) > 3
