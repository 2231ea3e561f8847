"""The page in Chromium, on a lab node with a real agent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outside_client import OutsideClientCluster
from tests.lab import Lab, manifests
from tests.lab.browser import Browser
from tests.ui.page import EVIL
from tests.ui.server import Ui


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        # A zone may be any text, and so may the reasons that the agent makes of it.
        odd = {**made.endpoint_on_a(), "zone": EVIL, "hints": {"forZones": [{"name": EVIL}]}}
        manifests.write(
            made.manifests / "odd.yaml",
            manifests.service("odd", clusterIPs=["10.96.8.2"], trafficDistribution="PreferClose"),
            manifests.slice_of("odd", [odd, made.endpoint_on_b(ready=False)]),
        )
        made.agent("--measure-connections", "--measure-traffic").start()
        yield made


@pytest.fixture(scope="module")
def ui(cluster: OutsideClientCluster) -> Iterator[Ui]:
    made = Ui(cluster.a)
    yield made
    assert made.end() == (0, "")


@pytest.fixture(scope="module")
def browser(cluster: OutsideClientCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(cluster.a, tmp_path_factory.mktemp("chromium") / "profile")
    yield made
    made.close()


@pytest.fixture
def page(browser: Browser, ui: Ui) -> Browser:
    browser.size(1200, 800)
    browser.prefer("light")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open("about:blank")
    browser.open(ui.address)
    browser.wait_text("shop/web")
    browser.wait("document.getElementById('health').innerText", lambda text: text == "● healthy")
    return browser
