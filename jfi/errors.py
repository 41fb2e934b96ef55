"""The exceptions of the library: bad input, and a campaign that its verification proves wrong."""

import reprlib
from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """Bad input, in one line: which input, its value, and what would be right."""


class VerificationError(RuntimeError):
    """Verdicts of a campaign that a naive run contradicts; `summary` is what it wrote."""

    def __init__(self, message: str, summary: Mapping[str, Any]):
        super().__init__(message)
        self.summary = summary


def kind(value: Any) -> str:
    """What a value is, in a few words for a message: `float32[3, 4]`, `dict of 'x', 'y'`."""
    if hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, type):
        return f"{value.dtype}{list(value.shape)}"
    if value is None:
        return "None"
    if isinstance(value, bool | int | float | complex | str | bytes):
        return f"{type(value).__name__} {reprlib.repr(value)}"
    if isinstance(value, dict):
        return f"dict of {reprlib.repr(list(value))[1:-1] or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return " ".join(filter(None, (type(value).__name__, getattr(value, "__name__", ""))))
