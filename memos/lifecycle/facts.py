"""Facts that hold until others take their place: "lives in Paris" until "moved to Berlin".

A statement is read as (subject, attribute, value) where the attribute can have one value at a time:
where somebody lives or works, a name, a birthday, a favourite. The older one of two that differ
gets metadata valid_to, the newer one valid_from: both stay, and each holds in its time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.lifecycle.words import speaker_of, tokens_of, words
from memos.records.states import FROZEN, MERGED
from memos.records.validity import VALID_FROM, VALID_TO, interval_of

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.memories.declarative import DeclarativeMemory

_TIME_KEYS = ("timestamp", "datetime", "date", "time", "event_time", "said_at", "at")


@dataclass(frozen=True)
class Fact:
    """What a statement says: of its subject the attribute is the value, from ``since`` on.

    Args:
        is_over: it says that this does not hold any more.
    """

    subject: str
    attribute: str
    value: str
    is_over: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Statements with one key are about the same thing."""
        return self.subject, self.attribute


_SUBJECT = r"(?P<subject>[\w'’-]+(?:\s+[\w'’-]+){0,3}?)"
_NOW = r"(?:\s+(?:now|currently|still|has|have|just|recently|'ve|'s))*"
_OVER = r"(?P<over>\s+(?:no longer|used to|does not|do not|doesn['’]t|don['’]t)(?:\s+anymore)?)?"
_VALUE = r"(?P<value>[^,.;!?]+)"
_PATTERNS = tuple(
    (attribute, re.compile(rf"^{_SUBJECT}{_NOW}{_OVER}\s+{verb}\s+{_VALUE}", re.IGNORECASE))
    for attribute, verb in (
        ("home", r"(?:lives?|living|resides?|is living|am living|is based|am based)\s+(?:in|at)"),
        ("home", r"(?:moved|relocated)\s+(?:from\s+[\w\s-]+?\s+)?to"),
        ("employer", r"(?:works?|is working|am working|is employed)\s+(?:at|for|with|by)"),
        ("employer", r"(?:joined|started (?:working )?at|started (?:working )?for)"),
        ("job", r"(?:works?|is working|am working)\s+as"),
        ("spouse", r"(?:is|am|got)\s+(?:now\s+)?married\s+to"),
    )
)
_OF = re.compile(
    r"^(?:the\s+)?(?P<attribute>[\w\s-]+?)\s+of\s+(?P<subject>[\w\s'’-]+?)\s+"
    r"is(?:\s+(?:now|currently))?\s+(?P<value>[^,.;!?]+)",
    re.IGNORECASE,
)
_OWNED = re.compile(
    r"^(?:(?P<subject>[\w\s-]+?)['’]s?|(?P<mine>my))\s+(?P<attribute>[\w\s-]+?)\s+"
    r"is(?:\s+(?:now|currently))?\s+(?P<value>[^,.;!?]+)",
    re.IGNORECASE,
)
# Attributes of which there is one at a time, whatever stands before them.
_SINGLE = words(
    """
    name birthday address email phone number age job employer boss manager wife husband partner
    spouse hometown home city country password capital deadline time zone timezone language
    president director ceo headquarters height weight salary title
    """
)
_LESS = words("the a an now currently in at on since today again anymore")


def fact_of(text: str, speaker: str | None = None) -> Fact | None:
    """What a statement says of an attribute with one value at a time; None for any other one.

    Args:
        speaker: who "I" is.
    """
    plain = " ".join(text.split()).strip().rstrip(".!")
    if not plain or plain.endswith("?"):
        return None
    for attribute, pattern in _PATTERNS:
        match = pattern.match(plain)
        if match is not None:
            subject = _subject(match["subject"], speaker)
            if subject is None:
                return None
            return Fact(subject, attribute, _value(match["value"]), match["over"] is not None)
    match = _OWNED.match(plain)
    if match is not None:
        subject = _subject(match["subject"] or "I", speaker)
        return _single(subject, match["attribute"], match["value"])
    match = _OF.match(plain)
    if match is not None:
        return _single(_subject(match["subject"], speaker), match["attribute"], match["value"])
    return None


def fact_of_cube(cube: MemCube) -> Fact | None:
    """As ``fact_of``, with the speaker that the metadata names."""
    if not isinstance(cube.content, str):
        return None
    speaker = speaker_of(cube.metadata)
    return fact_of(cube.content, speaker.lower() if speaker else None)


def since(cube: MemCube) -> float:
    """From when a cube speaks: valid_from, else when it says that it was said, else its age."""
    start = cube.metadata.get(VALID_FROM)
    if isinstance(start, int | float) and not isinstance(start, bool):
        return float(start)
    for key in _TIME_KEYS:
        value = cube.metadata.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 1e8:
            return float(value)
        if isinstance(value, str) and (at := _parsed(value)) is not None:
            return at
    return cube.created_at


def intervals(cubes: Iterable[MemCube]) -> dict[str, tuple[float | None, float | None]]:
    """id -> (valid_from, valid_to) that cubes should have so that each fact ends where the next
    one of its key begins; only of those that have others now."""
    groups: dict[tuple[str, str, str], list[tuple[float, MemCube, Fact]]] = {}
    for cube in cubes:
        fact = fact_of_cube(cube)
        if fact is not None and fact.value:
            whose = str(cube.metadata.get("user_id", ""))  # two users may know two Adas
            groups.setdefault((whose, *fact.key), []).append((since(cube), cube, fact))
    found: dict[str, tuple[float | None, float | None]] = {}
    for group in groups.values():
        group.sort(key=lambda one: (one[0], one[1].id))
        for i, (start, cube, fact) in enumerate(group):
            if fact.is_over:
                continue
            end = next(
                (at for at, _, other in group[i + 1 :] if _ends(fact, other) and at > start), None
            )
            begins = any(_ends(other, fact) for _, other_cube, other in group[:i])
            wanted = (start if begins else None, end)
            has = interval_of(cube.metadata)
            new_from = wanted[0] if VALID_FROM not in cube.metadata else None
            new_to = end if end is not None and has[1] > end else None
            if new_from is not None or new_to is not None:
                found[cube.id] = (new_from, new_to)
    return found


def settle(
    memory: DeclarativeMemory, connection: Connection, seqs: Iterable[int] | None = None
) -> int:
    """Give the facts of a memory the intervals in which they hold.

    Args:
        seqs: of the cubes that are compared; None: all that are in the indexes.

    Returns:
        How many cubes changed; each has a new version. What is frozen stays as it is.
    """
    scope = memory.scope()
    chosen = memory.table.recent(connection, scope) if seqs is None else list(seqs)
    cubes = {
        cube.id: cube
        for cube in memory.table.load(connection, chosen, scope).values()
        if cube.state not in (FROZEN, MERGED)
    }
    changed = 0
    for id, (start, end) in intervals(cubes.values()).items():
        new: dict[str, Any] = {}
        if start is not None:
            new[VALID_FROM] = start
        if end is not None:
            new[VALID_TO] = end
        memory.update(id, metadata=new, author="memos", source="settle")
        changed += 1
    return changed


def _ends(old: Fact, new: Fact) -> bool:
    """Whether the newer statement says that the older one is over."""
    if new.is_over:
        return not old.is_over and new.value == old.value
    return new.value != old.value


def _single(subject: str | None, attribute: str, value: str) -> Fact | None:
    named = tokens_of(attribute)
    if subject is None or not named or (named[-1] not in _SINGLE and not _favourite(named)):
        return None
    return Fact(subject, " ".join(named).replace("favorite", "favourite"), _value(value))


def _favourite(named: list[str]) -> bool:
    return named[0] in ("favourite", "favorite") and len(named) > 1


def _subject(text: str, speaker: str | None) -> str | None:
    low = " ".join(text.lower().split()).removesuffix("'s").removesuffix("’s")
    low = low.removeprefix("the ")
    if low in ("i", "my", "me"):
        return speaker or "the user"
    if low in ("he", "she", "it", "they", "we", "you", "who", "that", "this", "there"):
        return None  # whoever that is
    return "the user" if low == "user" else low


def _value(text: str) -> str:
    """The value alone: "Berlin in 2021" is Berlin, said of 2021."""
    text = re.split(
        r"\s+(?:in|since|from|until|last|this|on|two|three|because|when|with|and|but|for|as)\s",
        text,
        maxsplit=1,
    )[0]
    return " ".join(token for token in tokens_of(text) if token not in _LESS)


def _parsed(value: str) -> float | None:
    import datetime

    if not re.match(r"\d{4}-\d\d-\d\d(?!\d)", value):
        return None
    try:
        date = datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError:
        return None
    return (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp()
