"""What tests of adopted networks share."""

import os

import pytest

from jfi import tuning

# Keras reads it when it is imported.
os.environ.setdefault("KERAS_BACKEND", "jax")


@pytest.fixture(autouse=True)
def own_ways(monkeypatch):
    """The engine chooses its ways as for any network (`tests/jfi/conftest.py` forces others)."""
    monkeypatch.setattr(tuning, "folder", lambda: None)  # nothing is kept from test to test
