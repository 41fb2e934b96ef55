"""What tests of adopted networks share."""

import os

import pytest

from jfi.hardware import tuning

# Keras reads it when it is imported.
os.environ.setdefault("KERAS_BACKEND", "jax")


@pytest.fixture(params=["adopted", pytest.param("campaign", marks=pytest.mark.slow)])
def campaign(request):
    """`check_campaign` where slow tests are asked for; adoption alone in quick ones, which has
    compared the outputs."""
    from adopting import check_campaign

    return check_campaign if request.param == "campaign" else lambda *args, **options: None


@pytest.fixture(autouse=True)
def own_ways(monkeypatch):
    """The engine chooses its ways as for any network (`tests/jfi/conftest.py` forces others)."""
    monkeypatch.setattr(tuning, "folder", lambda: None)  # nothing is kept from test to test
