"""From hits to text for a prompt: no repetition, a token budget, citations."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memos.cube import Hit, MemCube
from memos.errors import ArgumentError
from memos.retrieval.query import SPEAKER_KEYS, words_of
from memos.retrieval.times import time_of

_SAME = 0.9  # share of words in common, from which two texts say the same
_SHORTEST = 8  # words; a shorter beginning of a text is not worth its citation
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_TEXT_KEYS = ("text", "content", "value", "description")


@dataclass(frozen=True)
class Citation:
    """Where a piece of the context comes from.

    Args:
        number:     in the text, as [1].
        id, memory, version: of the cube.
        start, end: of the piece in ``Context.text``, its number included.
        tokens:     of the piece.
        is_cut:     only the beginning of the cube's text is there.
    """

    number: int
    id: str
    memory: str
    version: int
    start: int
    end: int
    tokens: int
    is_cut: bool = False


@dataclass(frozen=True)
class Context:
    """Text for a prompt.

    Args:
        text:      the pieces, a line each.
        citations: in the order of the text.
        tokens:    of the text.
        left_out:  (id, why) of hits that are not in it.
        query:     that it answers; ``hits``: that it was made of, best first.
    """

    text: str
    citations: tuple[Citation, ...] = ()
    tokens: int = 0
    left_out: tuple[tuple[str, str], ...] = ()
    query: str = ""
    hits: tuple[Hit, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Piece:
    hit: Hit
    text: str
    is_cut: bool = False


def synthesise(
    query: str,
    hits: Sequence[Hit],
    budget_tokens: int,
    count_tokens: Any = None,
    *,
    order: str = "time",
) -> Context:
    """The best hits that fit, as text with citations.

    Args:
        query:         kept in the context, for ``explain``.
        hits:          best first.
        budget_tokens: of the text, citations included.
        count_tokens:  a function from text to a number of tokens, or a tokenizer with ``encode``;
            None: four characters a token.
        order:         "time": hits of one section or day follow one another as they were said,
            the best section first; "rank": best first.

    Returns:
        The context. A hit that repeats a better one, or does not fit, is in ``left_out``. The best
        hit is cut at a sentence where it does not fit as a whole.
    """
    if not isinstance(budget_tokens, int) or isinstance(budget_tokens, bool) or budget_tokens < 0:
        raise ArgumentError(f"budget_tokens: a number from 0 wanted, got {budget_tokens!r}")
    if order not in ("time", "rank"):
        raise ArgumentError(f"order: 'time' or 'rank' wanted, got {order!r}")
    count = counter(count_tokens)
    pieces: list[_Piece] = []
    left_out: list[tuple[str, str]] = []
    seen: list[frozenset[str]] = []
    left = budget_tokens
    for hit in hits:
        text = text_of(hit)
        words = frozenset(words_of(text))
        if any(_repeats(words, other) for other in seen):
            left_out.append((hit.id, "repeats another"))
            continue
        piece = _Piece(hit, _label(hit) + " ".join(text.split()))
        # The number a piece gets is not known yet: no number is longer than the last one.
        cost = _cost(count, len(hits), piece.text)
        if cost > left and not pieces:
            piece = _Piece(hit, _beginning(piece.text, left, count, len(hits)), is_cut=True)
            cost = _cost(count, len(hits), piece.text)
        if cost > left or not piece.text:
            left_out.append((hit.id, "does not fit"))
            continue
        pieces.append(piece)
        seen.append(words)
        left -= cost
    if order == "time":
        pieces = _by_time(pieces)
    text, citations = _written(pieces, count)
    return Context(text, citations, count(text) if text else 0, tuple(left_out), query, tuple(hits))


def _written(
    pieces: Sequence[_Piece], count: Callable[[str], int]
) -> tuple[str, tuple[Citation, ...]]:
    lines, citations, start = [], [], 0
    for number, piece in enumerate(pieces, 1):
        hit, line = piece.hit, f"[{number}] {piece.text}"
        end = start + len(line)
        tokens = _cost(count, number, piece.text)
        citations.append(
            Citation(number, hit.id, hit.memory, hit.versions, start, end, tokens, piece.is_cut)
        )
        lines.append(line)
        start = end + 1
    return "\n".join(lines), tuple(citations)


def counter(count_tokens: Any) -> Callable[[str], int]:
    """A function from text to a number of tokens. Raises ArgumentError."""
    if count_tokens is None:
        return lambda text: -(-len(text) // 4)
    if hasattr(count_tokens, "encode"):
        return lambda text: len(count_tokens.encode(text))
    if callable(count_tokens):
        return lambda text: int(count_tokens(text))
    raise ArgumentError(
        "count_tokens: a function, or a tokenizer with encode wanted, got "
        f"{type(count_tokens).__name__}"
    )


def text_of(cube: MemCube) -> str:
    """The content as text: itself, its text field, or JSON."""
    content = cube.content
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        for key in _TEXT_KEYS:
            if isinstance(content.get(key), str):
                return str(content[key])
    return json.dumps(content, ensure_ascii=False, default=str)


def _cost(count: Callable[[str], int], number: int, piece: str) -> int:
    return count(f"[{number}] {piece}\n")


def _label(hit: MemCube) -> str:
    """Who and when, where the metadata says so."""
    named = (v for key, v in hit.metadata.items() if key.lower() in SPEAKER_KEYS)
    who = next((value for value in named if isinstance(value, str)), None)
    at, when = time_of(hit.metadata), None
    if at is not None:
        date = datetime.datetime.fromtimestamp(at, datetime.timezone.utc)
        when = f"{date.day} {date:%B %Y}"
    label = ", ".join(part for part in (who, when) if part)
    return f"{label}: " if label else ""


def _repeats(words: frozenset[str], other: frozenset[str]) -> bool:
    return len(words & other) >= _SAME * max(len(words | other), 1)


def _beginning(piece: str, budget: int, count: Callable[[str], int], number: int) -> str:
    """As many whole sentences as fit, else as many words; empty where hardly any do."""
    for parts in (_SENTENCE.split(piece), piece.split(" ")):
        low, high = 0, len(parts)
        while low < high:
            middle = (low + high + 1) // 2
            if _cost(count, number, " ".join(parts[:middle]) + " ...") <= budget:
                low = middle
            else:
                high = middle - 1
        found = " ".join(parts[:low])
        if len(found.split()) >= _SHORTEST:
            return found + " ..."
    return ""


def _by_time(pieces: Sequence[_Piece]) -> list[_Piece]:
    groups: dict[tuple[Any, ...], list[_Piece]] = {}
    for piece in pieces:
        groups.setdefault(_group(piece.hit), []).append(piece)
    return [
        piece
        for group in groups.values()
        for piece in sorted(group, key=lambda p: (_time(p.hit), p.hit.created_at, p.hit.id))
    ]


def _group(hit: MemCube) -> tuple[Any, ...]:
    if hit.parent_id is not None:
        return (hit.memory, "parent", hit.parent_id)
    at = time_of(hit.metadata)
    return (hit.memory, "id", hit.id) if at is None else (hit.memory, "day", at // 86400)


def _time(hit: MemCube) -> float:
    at = time_of(hit.metadata)
    return hit.created_at if at is None else at
