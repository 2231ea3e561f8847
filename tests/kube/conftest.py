"""A stand-in with two Services and a follower."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.apiserver import ApiServer, objects
from tests.kube.follower import Follower


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        for name in ("a", "b"):
            made.store.put("services", objects.service(name, "10.96.0.1"))
        yield made


@pytest.fixture(params=["streaming", "pages"])
def follower(request: pytest.FixtureRequest, server: ApiServer) -> Iterator[Follower]:
    """Returns a follower after its first list, for both kinds of list."""
    server.streaming_list = request.param == "streaming"
    made = Follower(server)
    made.reflector.start()
    made.until(lambda: made.names == {"a", "b"})
    made.until(lambda: any(p.get("watch") for _, p in server.requests))
    yield made
    made.reflector.stop()
