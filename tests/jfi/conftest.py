"""What tests of the engine share."""

import pytest

from jfi.engine import routes
from jfi.hardware import tuning


@pytest.fixture(autouse=True)
def own_ways(monkeypatch):
    """Networks of tests are so small that a loop would be taken always: the other ways are tested,
    and the loop where it is asked for (`Engine(..., loop=True)`)."""
    monkeypatch.setattr(routes, "EQUATION", 0)
    monkeypatch.setattr(routes, "HOST", 0)
    monkeypatch.setattr(routes, "PROGRAM", 0)
    monkeypatch.setattr(routes, "LINE", 0)
    monkeypatch.setattr(routes, "CLOSE", float("inf"))
    monkeypatch.setattr(tuning, "folder", lambda: None)  # nothing is kept from test to test
