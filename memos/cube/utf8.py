"""Text that can be stored: a str may hold lone surrogates, UTF-8 holds none."""

from __future__ import annotations

from memos.errors import ArgumentError


def check_utf8(text: str, what: str = "text") -> None:
    """Raises ArgumentError, which names ``what``, for a text with a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise utf8_error(error, what) from None


def utf8_error(error: UnicodeEncodeError, what: str = "text") -> ArgumentError:
    """The caller's mistake behind an error of ``str.encode``."""
    wrong = error.object[error.start]
    return ArgumentError(f"{what}: text that UTF-8 can hold wanted, got the surrogate {wrong!r}")
