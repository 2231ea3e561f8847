"""A stand-in for the API server: lists, pages, streaming lists and watches over real HTTP(S), and faults.

It responds as a real server does in ``tests/data/recordings/responses.json``.
"""

from tests.apiserver.faults import Fault
from tests.apiserver.server import ApiServer
from tests.apiserver.store import Store

__all__ = ["ApiServer", "Fault", "Store"]
