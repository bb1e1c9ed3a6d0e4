"""A password or key that no repr, log or dump shows."""

from __future__ import annotations

from typing import NoReturn


class Secret:
    """Holds a text that only ``reveal`` gives back."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself, to be used at once."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __bool__(self) -> bool:
        return bool(self._text)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a password is not dumped")
