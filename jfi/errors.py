"""The exceptions of the library: bad input, and a campaign that its verification proves wrong."""

from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """Bad input, in one line: which input, its value, and what would be right."""


class VerificationError(RuntimeError):
    """Verdicts of a campaign that a naive run contradicts; `summary` is what it wrote."""

    def __init__(self, message: str, summary: Mapping[str, Any]):
        super().__init__(message)
        self.summary = summary
