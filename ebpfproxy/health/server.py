"""Paths to functions, served at one address, which may be taken for a while."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from ebpfproxy.config.bind_address import BindAddressError, parse_bind_address
from ebpfproxy.health.http import END_SECONDS, Answer, HttpThread, listen, text_answer
from ebpfproxy.health.listeners import Listen
from ebpfproxy.logs import get_logger

log = get_logger(__name__)

Page = Callable[[], Answer]

_NOT_FOUND = text_answer("404 page not found\n", 404)


class HttpServer:
    """Serves ``pages`` (path to function) at ``address``. An address in use is retried, and logged once."""

    def __init__(
        self,
        name: str,
        address: str,
        pages: Mapping[str, Page],
        *,
        hard_fail: bool = False,
        listen: Listen = listen,
    ) -> None:
        """Raises BindAddressError. An empty address serves nothing. ``hard_fail``: see :meth:`start`."""
        self._hard_fail = hard_fail
        self._listen = listen
        self._name = name
        self._text = address
        self._address = parse_bind_address(address) if address else None
        self._pages = pages
        self._listener: socket.socket | None = None
        self._thread: HttpThread | None = None
        self._why = ""

    @property
    def name(self) -> str:
        return self._name

    @property
    def failure(self) -> str:
        """The reason why the address was not bound at the start; empty where it was, or there is none."""
        return f"{self._text}: {self._why}" if self._why else ""

    @property
    def port(self) -> int | None:
        """The bound port, None while nothing is bound."""
        return self._listener.getsockname()[1] if self._listener is not None else None

    def start(self) -> None:
        """Raises BindAddressError where the address cannot be bound, and that is not to be tried again."""
        if self._address is None:
            return
        thread = HttpThread(self._name)
        if not self._bind(thread):
            if self._hard_fail:
                thread.stop()
                raise BindAddressError(f"{self._name}: {self._text}: {self._why}")
            log.error("cannot bind, trying again", server=self._name, address=self._text, error=self._why)
            thread.repeat(lambda: self._retry(thread))
        self._thread = thread
        thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._thread.stop(END_SECONDS)

    def _bind(self, thread: HttpThread) -> bool:
        assert self._address is not None
        host, port = self._address
        try:
            # ":10256" and "0.0.0.0:10256" work without IPv6, too; "[::]:10256" asks for it.
            self._listener = self._listen("" if host == "::" and "[" not in self._text else host, port)
        except OSError as error:
            self._why = str(error)
            return False
        thread.add(self._listener, self._respond)
        return True

    def _retry(self, thread: HttpThread) -> bool:
        if not self._bind(thread):
            return False
        log.info("serving now", server=self._name, address=self._text)
        return True

    def _respond(self, path: str) -> Answer:
        page = self._pages.get(path)
        return page() if page is not None else _NOT_FOUND
