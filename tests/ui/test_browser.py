"""The page in Chromium, on a lab node with a real agent: what is seen, by keyboard alone, light, dark and narrow.

EBPFPROXY_PICTURES names a folder that keeps the pictures, to be looked at.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.datapath.programs.attach import attachments, program_id
from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.lab import Lab, clients, manifests
from tests.lab.browser import Browser, needs_chromium
from tests.lab.waiting import until
from tests.ui.server import Ui

pytestmark = [pytest.mark.root, needs_chromium]

WEB = SERVICE_IPS["v4"]
EVIL = "<img src=x onerror=\"window.hacked='zone'\"><script>window.hacked='script'</script>"
_PICTURES = os.environ.get("EBPFPROXY_PICTURES", "")
QUESTION = "explain?from=shop/client&to=shop/elsewhere:http"
VIEWS = [
    "services",
    "services/shop/web",
    "services/shop/odd",
    "live",
    "refusals",
    "explain",
    QUESTION,
    "check",
    "node",
]


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


def go(page: Browser, view: str) -> None:
    """Goes to a view, and waits for what it is about."""
    address = f"#/{view}"
    page.evaluate(f"void (location.hash = {address!r})")
    link = f"#/{re.split('[/?]', view)[0]}"
    page.wait("document.querySelector('nav a[aria-current]')?.hash", lambda found: found == link)
    page.wait("!document.querySelector('main').ariaBusy && document.querySelectorAll('h1').length === 1")


def rows(page: Browser, at: str = "main") -> list[list[str]]:
    """The cells of all rows of tables."""
    found: list[list[str]] = page.evaluate(
        f"[...document.querySelectorAll('{at} tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    )
    return found


def without_complaints(page: Browser) -> None:
    assert page.complaints == []


# -- what is seen


def test_the_key_leaves_the_address_and_stays_with_the_browser(page: Browser, ui: Ui) -> None:
    assert page.evaluate("location.hash") == "#/services"
    assert ui.key not in page.evaluate("document.documentElement.outerHTML")
    assert not [url for url in page.requests if ui.key in url.partition("#")[0]]
    page.open("about:blank")
    page.open(ui.address.partition("#")[0])
    page.wait_text("shop/web")
    without_complaints(page)


def test_without_the_key_the_page_says_what_is_missing(page: Browser, ui: Ui) -> None:
    page.evaluate("localStorage.clear()")
    page.open("about:blank")
    page.open(ui.address.partition("#")[0])
    page.wait_text("open the one that ebpfproxy ui has printed")
    assert "shop/web" not in page.text
    # The right address mends it without a new tab, also where the frame's own question is answered last.
    page.evaluate(
        "(() => { const real = window.fetch; window.fetch = async (url, options) => {"
        " if (url === 'api/status') await new Promise((done) => setTimeout(done, 2000));"
        " return real(url, options); }; })()"
    )
    page.evaluate(f"void (location.hash = '#key={ui.key}')")
    page.wait_text("shop/web")
    assert "has printed" not in page.text


def test_a_wrong_key_does_not_replace_the_right_one(page: Browser, ui: Ui) -> None:
    """Any page of another site can have a link to this one, with any key."""
    page.evaluate("void (location.hash = '#key=wrong')")
    page.wait("location.hash", lambda found: found == "#/services")
    page.open("about:blank")
    page.open(f"{ui.address.partition('#')[0]}#key=wrong")
    page.wait_text("shop/web")
    assert page.evaluate("localStorage.getItem('ebpfproxy-key')") == ui.key
    assert page.evaluate("location.hash") == "#/services"


def test_an_error_stays_while_other_questions_are_answered(page: Browser) -> None:
    """Of one view, while the frame's own question goes well; it goes with the view."""
    page.evaluate(
        "(() => { const real = window.fetch; window.undo = () => { window.fetch = real; };"
        " window.answered = 0; window.fetch = async (url, options) => {"
        " if (url.startsWith('api/services')) return new Response('{\"error\": \"no such maps\"}', {status: 503});"
        " const found = await real(url, options); window.answered += url === 'api/status'; return found; }; })()"
    )
    page.wait_text("no such maps")
    page.evaluate("window.answered = 0")
    page.wait("window.answered", lambda answered: answered >= 2)
    assert "no such maps" in page.text
    go(page, "node")
    assert "no such maps" not in page.text
    page.evaluate("window.undo()")


def test_a_refused_check_says_why_in_its_place(page: Browser) -> None:
    page.evaluate(
        "(() => { const real = window.fetch; window.undo = () => { window.fetch = real; };"
        " window.fetch = (url, options) => url === 'api/check'"
        ' ? Promise.resolve(new Response(\'{"error": "no such maps"}\', {status: 503})) : real(url, options); })()'
    )
    go(page, "check")
    page.wait("document.querySelector('main .bad')?.innerText", lambda text: text == "no such maps")
    assert page.evaluate("document.getElementById('trouble').hidden")
    page.evaluate("window.undo()")


def test_services_are_searched_as_one_types(page: Browser) -> None:
    assert [row[0] for row in rows(page)] == [
        "shop/elsewhere",
        "shop/empty",
        "shop/odd",
        "shop/second",
        "shop/web",
    ]
    page.press("/")
    page.type("second")
    page.wait("document.querySelectorAll('main tbody tr').length", lambda found: found == 1)
    assert page.evaluate("location.hash") == "#/services?q=second"
    page.type(" nothing")
    page.wait_text("No Service matches.")
    without_complaints(page)


def test_a_service_shows_why_each_endpoint_is_in_or_out(page: Browser, cluster: OutsideClientCluster) -> None:
    go(page, "services/shop/elsewhere")
    page.wait_text("policy Local: it is on node-b")
    go(page, "services/shop/odd")
    page.wait_text("not ready")
    found = {row[0]: row for row in rows(page) if len(row) == 8}
    used, left = found[f"{cluster.w1.address}:8080"], found[f"{cluster.w2.address}:8080"]
    assert (used[1], left[1], left[2]) == ("✓ 100 %", "✗ none", "not ready")
    without_complaints(page)


def test_text_of_others_is_text(page: Browser) -> None:
    go(page, "services/shop/odd")
    page.wait_text(EVIL)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    without_complaints(page)


def test_text_cannot_become_markup_even_by_an_error_of_ours(page: Browser) -> None:
    """The policy has the browser refuse it."""
    page.evaluate(
        "(() => { try { document.body.innerHTML = '<b>x</b>'; window.done = 'set'; }"
        " catch (error) { window.done = error.name; } })()"
    )
    assert page.evaluate("window.done") == "TypeError"
    page.evaluate(
        "void document.body.append(Object.assign(document.createElement('img'), {src: 'http://192.0.2.1/x'}))"
    )
    page.wait("performance.now() > 0")
    until(lambda: page.evaluate("1") and any("Content Security Policy" in each for each in page.complaints))


def _comm(name: str, host: str, port: int) -> None:
    """Connects as a process that has a name of its own choice."""
    Path("/proc/self/comm").write_text(name)
    clients.connect_error(host, port)


def test_decisions_come_as_they_are_made(page: Browser, cluster: OutsideClientCluster) -> None:
    go(page, "live")
    page.wait("document.querySelector('main [role=status]').innerText", lambda text: text == "tracing")
    cluster.client.call(clients.ask_tcp, WEB, 80)
    cluster.client.call(_comm, "<i>\u202ex", "10.96.0.20", 80)
    page.wait("document.querySelectorAll('main tbody tr').length", lambda found: found == 2)
    refused, chosen = rows(page)
    assert chosen[2:4] == ["shop/web:http", f"{WEB}:80"]
    assert chosen[4].startswith("⇒ 10.244.")
    assert refused[2] == "shop/empty:http"
    assert refused[4] == "✗ refused: no-endpoint"
    # A character that turns the direction of text is shown as what it is.
    assert refused[5].startswith("<i>\ufffdx[")
    assert page.evaluate("document.querySelectorAll('main i').length") == 0
    without_complaints(page)


def tracing(cluster: OutsideClientCluster) -> bool:
    """Programs that report decisions are attached: those beside that of report.c."""
    pins = cluster.a.bpf_root / "ebpfproxy"
    attached = {each.program_id for each in attachments(pins)}
    loaded = pins.glob("v*/progs-*/report_decision")
    return any(program_id(each.with_name("connect4")) in attached for each in loaded)


def test_nothing_is_traced_that_nobody_looks_at(page: Browser, cluster: OutsideClientCluster) -> None:
    until(lambda: not tracing(cluster))
    go(page, "live")
    page.wait("document.querySelector('main [role=status]').innerText", lambda text: text == "tracing")
    assert tracing(cluster)
    page.evaluate("[...document.querySelectorAll('button')].find(each => each.innerText === 'Pause').click()")
    until(lambda: not tracing(cluster))
    page.evaluate("[...document.querySelectorAll('button')].find(each => each.innerText === 'Go on').click()")
    until(lambda: tracing(cluster))
    # A tab behind another is not looked at.
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "void document.dispatchEvent(new Event('visibilitychange'))"
    )
    until(lambda: not tracing(cluster))
    page.evaluate("delete document.hidden; void document.dispatchEvent(new Event('visibilitychange'))")
    until(lambda: tracing(cluster))
    go(page, "node")
    until(lambda: not tracing(cluster))
    # On a Service's own page it begins with a click.
    go(page, "services/shop/web")
    page.wait_text("Live decisions")
    assert not tracing(cluster)
    page.evaluate("void document.querySelector('summary').click()")
    page.wait_text("tracing")
    cluster.client.call(clients.connect_error, "10.96.0.20", 80)
    cluster.client.call(clients.ask_tcp, WEB, 80)
    page.wait("document.querySelectorAll('details tbody tr').length", lambda found: found == 1)
    assert rows(page, "details")[0][2] == "shop/web:http"
    go(page, "services")
    until(lambda: not tracing(cluster))
    without_complaints(page)


def test_what_is_measured_is_shown(page: Browser, cluster: OutsideClientCluster) -> None:
    cluster.client.call(clients.ask_tcp, WEB, 80)
    go(page, "services")
    heads = "[...document.querySelectorAll('main thead th')].map(each => each.innerText)"
    page.wait(heads, lambda found: found[5:] == ["p50", "p99", "Bytes in / out"])
    (row,) = (row for row in rows(page) if row[0] == "shop/web")
    assert re.fullmatch(r"[0-9.]+(µs|ms|s)", row[5]) and re.fullmatch(r"[0-9.]+k? / [0-9.]+k?", row[7])
    go(page, "services/shop/web")
    page.wait_text("connect time")
    assert re.search(r"p50 [0-9.]+(µs|ms|s), p99 [0-9.]+(µs|ms|s) \([0-9,]+ connections\)", page.text)
    without_complaints(page)


def test_it_works_through_a_port_forward(
    page: Browser, cluster: OutsideClientCluster, ui: Ui, forwarded: int
) -> None:
    """Also the stream of decisions, whose viewer says that it looks."""
    page.open(f"http://localhost:{forwarded}/#key={ui.key}")
    page.wait_text("shop/web")
    page.evaluate("void (window.setInterval = (act) => setTimeout(act, 500))")
    go(page, "live")
    page.wait("document.querySelector('main [role=status]').innerText", lambda text: text == "tracing")
    cluster.client.call(clients.ask_tcp, WEB, 80)
    page.wait("document.querySelectorAll('main tbody tr').length", lambda found: found == 1)
    page.wait("1", lambda _: any("/api/viewers/" in url for url in page.requests))
    without_complaints(page)


@pytest.fixture
def forwarded(cluster: OutsideClientCluster, ui: Ui) -> Iterator[int]:
    """A port of the same loopback that leads to the page."""
    command = [sys.executable, "-m", "tests.ui.forwarder", str(ui.port)]
    process = cluster.a.popen(command, join_cgroup=False, stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()


def test_explain_answers_from_a_form(page: Browser) -> None:
    go(page, "explain")
    page.evaluate("void document.querySelector('main input').focus()")
    page.type("shop/client")
    page.press("Tab")
    page.type("shop/elsewhere:http")
    page.press("Enter")
    page.wait_text("DOES NOT WORK: EHOSTUNREACH")
    assert "policy Local: it is on node-b" in page.text
    address = page.evaluate("location.hash")
    assert address == "#/explain?from=shop%2Fclient&to=shop%2Felsewhere%3Ahttp"
    # The address is the question: it can be sent to somebody.
    go(page, "node")
    page.evaluate(f"void (location.hash = {address!r})")
    page.wait_text("DOES NOT WORK: EHOSTUNREACH")
    page.evaluate("void (location.hash = '#/explain?from=nobody&to=shop/web:http')")
    page.wait_text("no pod 'nobody' on this node")
    # The server refuses that question, and Chromium notes it.
    assert all("400" in each for each in page.complaints)


def test_refusals_and_checks_and_the_node_are_shown(page: Browser, cluster: OutsideClientCluster) -> None:
    cluster.client.call(clients.connect_error, "10.96.0.20", 80)
    go(page, "refusals")
    page.wait_text("shop/empty")
    go(page, "check")
    page.wait(
        "document.body.innerText",
        lambda text: re.search("everything is as it should be|things are wrong", text),
    )
    go(page, "node")
    page.wait_text("endpointslices")
    assert "ebpfproxy 0.1.0 on node-a" in page.text
    without_complaints(page)


def test_everything_comes_from_the_page_itself(page: Browser, ui: Ui) -> None:
    for view in VIEWS:
        go(page, view)
    own = ui.address.partition("#")[0]
    assert {url for url in page.requests if not url.startswith((own, "about:"))} == set()
    assert page.requests


def test_an_ended_server_is_said(page: Browser, cluster: OutsideClientCluster) -> None:
    other = Ui(cluster.a)
    page.open(other.address)
    page.wait_text("shop/web")
    other.end()
    page.wait_text("ebpfproxy ui does not answer")


# -- the keyboard


def focused(page: Browser) -> str:
    return str(
        page.evaluate(
            "document.activeElement.innerText || document.activeElement.id || document.activeElement.tagName"
        )
    )


def test_everything_is_reached_by_keyboard(page: Browser) -> None:
    page.evaluate("document.activeElement.blur()")
    page.press("Tab")
    assert focused(page) == "To the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    seen = []
    for _ in range(6):
        page.press("Tab")
        seen.append(focused(page))
    assert seen == ["Services", "Live", "Refusals", "Explain", "Check", "Node"]
    page.press("Enter")
    page.wait_text("endpointslices")
    # The heading has the focus, for who hears the page.
    assert focused(page) == "Node"
    page.press("/")
    page.wait("document.activeElement.id", lambda found: found == "search")
    page.type("web")
    page.wait("document.querySelectorAll('main tbody tr').length", lambda found: found == 1)
    page.press("Enter")
    assert focused(page) == "shop/web"
    page.press("Enter")
    page.wait_text("Frontends")
    outline = page.evaluate(
        "(() => { const link = document.querySelector('main a'); link.focus({focusVisible: true});"
        " return getComputedStyle(link).outlineStyle; })()"
    )
    assert outline == "solid"


def test_the_focus_stays_where_it_is_when_numbers_change(
    page: Browser, cluster: OutsideClientCluster
) -> None:
    page.press("/")
    page.press("Tab")
    assert focused(page) == "shop/elsewhere"
    before = page.evaluate("document.querySelector('main tbody').innerText")
    cluster.client.call(clients.ask_tcp, WEB, 80)
    page.wait("document.querySelector('main tbody').innerText", lambda text: text != before)
    assert focused(page) == "shop/elsewhere"


def test_parts_have_names_and_roles(page: Browser) -> None:
    for view in VIEWS:
        go(page, view)
        assert page.evaluate("document.title").endswith("· ebpfproxy")
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input, select')].filter(each => !each.labels.length).length"
        )
        assert unnamed == 0
        assert page.evaluate("[...document.querySelectorAll('th')].every(each => each.scope === 'col')")
    assert page.evaluate("document.documentElement.lang") == "en"


# -- how it looks


def _channel(value: float) -> float:
    value /= 255
    return value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2 of two colours, ``rgb(…)``."""
    found = []
    for colour in (one, other):
        red, green, blue = map(_channel, map(float, re.findall(r"[\d.]+", colour)[:3]))
        found.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(found) / min(found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(page: Browser, scheme: str) -> None:
    page.prefer(scheme)
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark is (scheme == "dark")
    for view in VIEWS:
        go(page, view)
        pairs = page.evaluate(
            """[...document.querySelectorAll('body *')].filter(each => each.checkVisibility() && each.innerText).map(each => {
              let behind = each;
              while (behind && getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
              return [each.tagName, getComputedStyle(each).color, getComputedStyle(behind ?? document.body).backgroundColor];
            })"""
        )
        assert [pair for pair in pairs if contrast(pair[1], pair[2]) < 4.5] == []


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_only_tables_are_wider_than_the_page(page: Browser, width: int) -> None:
    page.size(width, 800)
    for view in VIEWS:
        go(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view


#: Whoever looks at them wants all.
_SCREENS = [("light", 1200), ("dark", 390), ("dark", 1200), ("light", 390)]


@pytest.mark.parametrize(("scheme", "width"), _SCREENS if _PICTURES else _SCREENS[:2])
def test_pictures(
    page: Browser, cluster: OutsideClientCluster, tmp_path: Path, scheme: str, width: int
) -> None:
    """Each view has a picture; light and dark are not the same."""
    folder = Path(_PICTURES or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.prefer(scheme)
    page.size(width, 900)
    for view in VIEWS:
        go(page, view)
        if view == "live":
            page.wait_text("tracing")
            for _ in range(8):
                cluster.client.call(clients.ask_tcp, WEB, 80)
            cluster.client.call(clients.connect_error, "10.96.0.20", 80)
            page.wait("document.querySelectorAll('main tbody tr').length", lambda found: found >= 9)
        name = re.sub(r"\W+", "-", view)
        data = page.picture(folder / f"{name}-{scheme}-{width}.png")
        assert data.startswith(b"\x89PNG")
    background: Any = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast(background, "rgb(0, 0, 0)") > 10) is (scheme == "light")
