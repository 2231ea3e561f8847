"""A stand-in for the API server: lists, pages, streaming lists and watches over real HTTP(S), and faults.

It answers as ``tests/data/recordings/responses.json`` shows a real one does.
"""

from tests.apiserver.faults import Fault
from tests.apiserver.server import ApiServer
from tests.apiserver.store import Store

__all__ = ["ApiServer", "Fault", "Store"]
