"""gzip: lists of real servers, and from 1.37 on (WatchListCompression) streams."""

from __future__ import annotations

import pytest

from tests.apiserver import ApiServer, objects
from tests.kube.follower import Follower


def _many(server: ApiServer) -> set[str]:
    names = {f"many-{i}" for i in range(200)}
    for name in names:
        server.store.put("services", objects.service(name, "10.96.0.2"))
    return names | {"a", "b"}


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "pages"])
@pytest.mark.parametrize("fault", [None, "half"])
def test_lists_and_streams_are_asked_for_and_read_compressed(
    server: ApiServer, streaming: bool, fault: str | None
) -> None:
    """One that ends in the middle is a broken connection: everything is there after the next."""
    server.streaming_list, server.compresses_streams = streaming, True
    names = _many(server)
    if fault:
        server.fail(fault, param="sendInitialEvents" if streaming else "limit")
    follower = Follower(server)
    follower.reflector.start()
    follower.until(lambda: follower.names == names)
    server.store.put("services", objects.service("later", "10.96.0.3"))
    follower.until(lambda: "later" in follower.names)
    follower.reflector.stop()
    assert all(headers["Accept-Encoding"] == "gzip" for headers in server.headers)
    assert bool(follower.reflector.status.failures) == bool(fault)


def test_a_compressed_watch_that_is_cut_goes_on_where_it_was(server: ApiServer) -> None:
    server.compresses_streams = True
    follower = Follower(server)
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    server.fail("cut")
    server.store.put("services", objects.service("later", "10.96.0.3"))
    follower.until(lambda: "later" in follower.names)
    follower.reflector.stop()
