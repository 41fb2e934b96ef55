"""Names and other texts of users, made fit to be shown."""

import unicodedata
from typing import Any

# Control characters, invisible ones (some turn the direction of writing), surrogates, characters
# that are private or not assigned, and separators of lines.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def clean(text: str) -> str:
    """The text on one line, with what can't be seen written out: a newline is ``\\x0a``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if unicodedata.category(c) in _HIDDEN else c for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def cleaned(value: Any, how=clean) -> Any:
    """A value of JSON with `how` done to all its texts, keys included."""
    if isinstance(value, str):
        return how(value)
    if isinstance(value, dict):
        return {cleaned(key, how): cleaned(item, how) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item, how) for item in value]
    return value


def shortened(text: str, most: int = 60) -> str:
    """The text, without its middle where it is longer than ``most`` characters."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
