"""What all tests share: programs that one has compiled are there for the others, and next time."""

import os


def pytest_configure(config):
    """Before JAX is imported, and for the scripts that tests start."""
    if hasattr(config, "cache"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("xla")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
