"""jfi.engine.rounding: what rounding two compiled programs may differ by."""

import numpy as np

from jfi.engine import rounding


def test_close_is_relative_to_the_largest_logit():
    a = np.array([[1e6, 0], [1, 0], [np.nan, 1], [np.inf, 1], [np.inf, 1], [2, 1]], np.float32)
    b = np.array([[1e6, 1], [1, 1], [np.nan, 1], [np.inf, 1], [np.nan, 1], [np.nan, 1]], np.float32)
    assert rounding.close(a, b).tolist() == [True, False, True, True, True, False]
