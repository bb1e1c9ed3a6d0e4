"""Near-duplicates: texts that say the same thing in almost the same words.

Candidates come from the vectors and from full text; whether two of them are one is decided by
rules that would rather keep two cubes than lose one. The same words have to stand there in the same
order, as far as they say something; numbers, names, negations and everything that the metadata
says of whom it is about have to agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.errors import ArgumentError
from memos.lifecycle.words import content_of, words

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.memories.declarative import DeclarativeMemory
    from memos.records.scope import Scope

# Metadata that may differ between two cubes that say the same: when and where it was said.
_CIRCUMSTANCES = words(
    """
    timestamp datetime date time event_time said_at at day session session_id thread thread_id
    conversation conversation_id turn turn_id message_id index n source url page line stale
    """
)
# A text that begins with one of these has its beginning moved: "In May Ada moved".
_LEADS = words("in on at since from by during after before until for with")
_LEAST = 0.85  # similarity of candidates
_NEAREST = 8  # candidates of one cube on each path
_LONGEST = 2000  # characters; longer texts are documents, which change in small places


@dataclass(frozen=True)
class Pair:
    """Two cubes that say the same.

    Args:
        first, second: ids, the older one first.
        similarity:    of their vectors; None where they have none.
        why:           what they share, in words.
    """

    first: str
    second: str
    similarity: float | None
    why: str


def same_statement(one: str, other: str) -> str | None:
    """Why two texts say the same; None where they may not.

    They do where, without the words of FILLERS (articles, "really", ...), the same words stand
    in the same order, in any case and punctuation, contractions spelled out; or where one begins
    with the phrase that the other ends with ("In May Ada moved." - "Ada moved in May."). Every
    number, name, negation, tense and preposition is such a word.
    """
    if max(len(one), len(other)) > _LONGEST or ("?" in one) != ("?" in other):
        return None
    a, b = content_of(one), content_of(other)
    if len(a) < 2 or len(a) != len(b):
        return None
    if a == b:
        return "the same words in the same order"
    for x, y in ((a, b), (b, a)):
        for cut in range(1, len(x) - 1):
            if x[0] in _LEADS and x[cut:] + x[:cut] == y:
                return "the same words, a phrase moved from the beginning to the end"
    return None


def same_circumstances(one: MemCube, other: MemCube) -> bool:
    """Whether the metadata and access lists of two cubes let them be one."""
    if one.acl != other.acl or one.kind != other.kind or one.expires_at != other.expires_at:
        return False
    return all(
        one.metadata.get(key) == other.metadata.get(key)
        for key in one.metadata.keys() | other.metadata.keys()
        if key not in _CIRCUMSTANCES
    )


def why_same(one: MemCube, other: MemCube) -> str | None:
    """Why two cubes are one; None where they may not be."""
    if not isinstance(one.content, str) or not isinstance(other.content, str):
        return None
    why = same_statement(one.content, other.content)
    return why if why is not None and same_circumstances(one, other) else None


def pairs_of(memory: DeclarativeMemory, connection: Connection, seqs: Iterable[int]) -> list[Pair]:
    """The near-duplicates of these cubes among all that are in the indexes.

    Cost: a search by vector and one by words for each cube.
    """
    check_kind(memory)
    scope = memory.scope()
    mine = memory.table.load(connection, list(seqs), scope)
    found: dict[tuple[int, int], Pair] = {}
    for seq, cube in mine.items():
        near = _candidates(memory, connection, seq, cube, scope)
        others = memory.table.load(connection, list(near), scope)
        for other, that in others.items():
            key = (min(seq, other), max(seq, other))
            if key in found:
                continue
            why = why_same(cube, that)
            if why is not None:
                first, second = (cube, that) if seq < other else (that, cube)
                found[key] = Pair(first.id, second.id, near[other], why)
    return [found[key] for key in sorted(found)]


def groups_of(pairs: Sequence[Pair]) -> list[list[str]]:
    """The ids of cubes that are one, oldest first: who is linked by pairs is in one group."""
    group: dict[str, list[str]] = {}
    for pair in pairs:
        a, b = group.get(pair.first, [pair.first]), group.get(pair.second, [pair.second])
        if a is not b:
            merged = a + [one for one in b if one not in a]
            group.update(dict.fromkeys(merged, merged))
    return [one for first, one in group.items() if one[0] == first]


def check_kind(memory: Any) -> None:
    """Raise ArgumentError for a memory whose cubes are no statements that can be one."""
    if memory.kind != "text":
        raise ArgumentError(
            f"memory {memory.name!r}: near-duplicates are looked for in memories of kind text, "
            f"this is of kind {memory.kind}: its cubes stand for their places as well"
        )


def _candidates(
    memory: DeclarativeMemory, connection: Connection, seq: int, cube: MemCube, scope: Scope
) -> dict[int, float | None]:
    """Numbers of cubes that may say the same -> similarity, where there are vectors."""
    found: dict[int, float | None] = {}
    search = memory.embedded.search_or_none()
    if search is not None:
        own = search.rows(connection, [seq]).get(seq)
        if own is not None:
            keys, scores = search.search(connection, own, _NEAREST, scope)
            for key, score in zip(keys.tolist(), scores.tolist(), strict=True):
                if score >= _LEAST or search.metric != "cosine":
                    found[int(key)] = round(float(score), 4)
    said = " ".join(content_of(str(cube.content))[:16])
    allowed = scope.allowed(connection, memory.table.memory)
    keys, _ = memory.table.fulltext.search(connection, said, _NEAREST, allowed)
    for key in keys.tolist():
        found.setdefault(int(key), None)
    found.pop(seq, None)
    return found
