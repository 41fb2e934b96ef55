"""The one exception of bad input."""


class InputError(ValueError):
    """Bad input, in one line: which input, its value, and what would be right."""
