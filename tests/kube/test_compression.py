"""gzip of lists, and of streams from 1.37 on (WatchListCompression)."""

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
def test_lists_and_streams_are_requested_and_read_with_gzip(
    server: ApiServer, streaming: bool, fault: str | None
) -> None:
    """A response that ends early is a broken connection: the next request gets all objects."""
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


def test_interrupted_compressed_watch_resumes_at_its_resource_version(server: ApiServer) -> None:
    server.compresses_streams = True
    follower = Follower(server)
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    server.fail("cut")
    server.store.put("services", objects.service("later", "10.96.0.3"))
    follower.until(lambda: "later" in follower.names)
    follower.reflector.stop()
