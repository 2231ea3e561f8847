"""The page in Chromium: what is seen."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpfproxy.datapath.programs.attach import attachments, program_id
from tests.e2e.outside_client import OutsideClientCluster
from tests.lab import clients
from tests.lab.browser import Browser, needs_chromium
from tests.lab.waiting import until
from tests.ui.page import EVIL, VIEWS, WEB, go, rows, without_complaints
from tests.ui.server import Ui

pytestmark = [pytest.mark.root, needs_chromium]


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
