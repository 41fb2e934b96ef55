"""Tables of papers as Markdown."""

from collections.abc import Sequence

import numpy as np


def markdown(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table; integers with separators, None as a dash."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(map(_cell, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value)
