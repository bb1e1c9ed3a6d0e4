"""Filters: a small typed language as Python dicts, compiled to parameterised SQL.

    {"user_id": "u1"}                          equal; a list in the metadata: any element equal
    {"stars": {"$gte": 3, "$lt": 5}}           $eq $ne $gt $gte $lt $lte, numbers or strings
    {"lang": {"$in": ["de", "en"]}}            $in $nin
    {"email": {"$exists": true}}
    {"$or": [{...}, {...}]}                    $and $or $not
    {"author.name": "Ann"}                     a path into the metadata
    {"@importance": {"$gte": 0.5}}             @ names a field of the cube: see FIELDS

Values compare within their type: 3 equals 3.0, but neither "3" nor true. $ne and $nin match also
where the key is missing. Several keys of one dict: all of them; {}: every cube.

Strings order by code points; of those longer than 256 characters that begin alike, one is greater
than the other in no useful order. Integers beyond 64 bits are only equal or not. Empty lists and
dicts in the metadata are as if they were not there, and a list of lists is one list; of a key
that stands there in two ways, {"a": {"b": 1}, "a.b": 2}, any value counts. At most 500 conditions
and 10,000 values, 32 levels deep.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    false,
    not_,
    or_,
    select,
    true,
)

from memos.cube.utf8 import check_utf8
from memos.errors import ArgumentError
from memos.records.schema import cubes, facts

FIELDS = {
    "@id": cubes.c.id,
    "@kind": cubes.c.kind,
    "@state": cubes.c.state,
    "@importance": cubes.c.importance,
    "@source": cubes.c.source,
    "@creator": cubes.c.creator,
    "@thread": cubes.c.thread,
    "@created_at": cubes.c.created_at,
    "@updated_at": cubes.c.updated_at,
    "@expires_at": cubes.c.expires_at,
}
_NUMBERS = {"@importance", "@created_at", "@updated_at", "@expires_at"}
_ORDER = {
    "$gt": lambda column, value: column > value,
    "$gte": lambda column, value: column >= value,
    "$lt": lambda column, value: column < value,
    "$lte": lambda column, value: column <= value,
}
_OPERATORS = ("$eq", "$ne", *_ORDER, "$in", "$nin", "$exists")

NULL, BOOL, NUMBER, STRING, LARGE = range(5)
_LONGEST = 256  # of a string that is looked up as it is
_MAX_BITS = 10_000  # of an integer
_MAX_DEPTH, _MAX_CONDITIONS, _MAX_VALUES = 32, 500, 10_000


def compile_filter(filters: Mapping[str, Any] | None, memory: Any) -> ColumnElement[bool]:
    """SQL that is true for the cubes of ``memory`` (its number, or a column) that match.

    Raises ArgumentError, which names the part that is out of the language.
    """
    return _Compiler(memory).compile({} if filters is None else filters, 0)


def facts_of(metadata: Mapping[str, Any]) -> set[tuple[str, int, int | float, str]]:
    """(key, type, number, string) of every scalar, with paths for what lies deeper."""
    return set(_scalars("", metadata))


def values_beginning(
    connection: Connection,
    memory: int,
    words: Iterable[str],
    limit: int = 16,
    is_readable: Callable[[Iterable[int]], bool] | None = None,
) -> list[tuple[str, str]]:
    """(key, value) of the different strings in the metadata that begin with one of the words.

    Words are tried as they are, in lower case and with a capital letter. Cost: one index lookup
    for each value found and each word, whatever the number of cubes.

    Args:
        is_readable: whether one of these cubes, which have a value, may be read; None: all.
    """
    # Asked a dozen times for every query: SQLAlchemy takes six times as long as the lookup.
    look_up = connection.connection.cursor().execute
    found: dict[tuple[str, str], None] = {}
    for word in words:
        for prefix in dict.fromkeys((word, word.lower(), word[:1].upper() + word[1:])):
            last, left = ("", ""), limit
            for _ in range(limit if is_readable is None else _MOST_VALUES):
                at = (memory, STRING, prefix, last[1], last[0])
                row = look_up(_NEXT_VALUE, at).fetchone()
                if row is None or not row[1].startswith(prefix):
                    break
                last = (row[0], row[1])
                if is_readable is not None:
                    have = look_up(_WHO_HAS, (memory, STRING, row[1], row[0]))
                    if not is_readable(one[0] for one in have):
                        continue
                found[last] = None
                left -= 1
                if not left:
                    break
    return list(found)


_NEXT_VALUE = (
    "SELECT key, string FROM facts WHERE memory = ? AND type = ? AND string >= ? "
    "AND (string, key) > (?, ?) ORDER BY string, key LIMIT 1"
)
_WHO_HAS = "SELECT seq FROM facts WHERE memory = ? AND type = ? AND string = ? AND key = ?"
_MOST_VALUES = 256  # looked at, of which a principal may see some


def _scalars(path: str, value: Any) -> Iterator[tuple[str, int, int | float, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _scalars(f"{path}.{key}" if path else key, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _scalars(path, inner)
    else:
        yield (path, *_typed(value))


def _typed(value: Any) -> tuple[int, int | float, str]:
    if value is None:
        return NULL, 0, ""
    if isinstance(value, bool):
        return BOOL, int(value), ""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return LARGE, 0, str(value)
    if isinstance(value, int | float):
        return NUMBER, value, ""
    if len(value) > _LONGEST:
        name = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16)
        return STRING, 0, value[:_LONGEST] + name.hexdigest()
    return STRING, 0, value


class _Compiler:
    """Of one filter for one memory; counts what it is made of."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._conditions = self._values = 0

    def compile(self, filters: Any, depth: int) -> ColumnElement[bool]:
        if not isinstance(filters, Mapping):
            raise ArgumentError(f"filters: a dict wanted, got {filters!r}")
        if depth > _MAX_DEPTH:
            raise ArgumentError(f"filters: at most {_MAX_DEPTH} dicts inside one another wanted")
        parts: list[ColumnElement[bool]] = []
        for key, value in filters.items():
            if not isinstance(key, str):
                raise ArgumentError(f"filters: keys that are strings wanted, got {key!r}")
            self._count(key, 1, 0)
            if key in ("$and", "$or"):
                if not isinstance(value, list | tuple) or not value:
                    raise ArgumentError(f"filters: {key} wants a list of filters, got {value!r}")
                self._count(key, len(value), 0)
                inner = [self.compile(item, depth + 1) for item in value]
                parts.append(and_(*inner) if key == "$and" else or_(*inner))
            elif key == "$not":
                parts.append(not_(self.compile(value, depth + 1)))
            elif key.startswith("$"):
                raise ArgumentError(
                    f"filters: $and, $or, $not or a metadata key wanted, got {key!r}"
                )
            elif isinstance(value, Mapping):
                if not value:
                    raise ArgumentError(
                        f"filters: {key!r} wants an operator such as $gte, got {{}}"
                    )
                self._count(key, len(value), 0)
                parts += [self._leaf(key, name, wanted) for name, wanted in value.items()]
            else:
                parts.append(self._leaf(key, "$eq", value))
        return and_(true(), *parts)

    def _count(self, key: str, conditions: int, values: int) -> None:
        self._conditions += conditions
        self._values += values
        if self._conditions > _MAX_CONDITIONS or self._values > _MAX_VALUES:
            raise ArgumentError(
                f"filters: at most {_MAX_CONDITIONS} conditions and {_MAX_VALUES:,} values "
                f"wanted, got more by {key!r}"
            )

    def _leaf(self, key: str, name: Any, value: Any) -> ColumnElement[bool]:
        if name not in _OPERATORS:
            raise ArgumentError(
                f"filters: {key!r} wants one of {', '.join(_OPERATORS)}, got {name!r}"
            )
        check_utf8(key, f"filters: {key!r}")
        if name in ("$in", "$nin"):
            if not isinstance(value, list | tuple | set | frozenset):
                raise ArgumentError(f"filters: {key!r} {name} wants a list, got {value!r}")
            self._count(key, 0, len(value))
            found = self._one_of(key, name, value)
            return found if name == "$in" else not_(found)
        self._count(key, 0, 1)
        if name in ("$eq", "$ne"):
            found = self._one_of(key, name, [value])
            return found if name == "$eq" else not_(found)
        if name == "$exists" and not isinstance(value, bool):
            raise ArgumentError(f"filters: {key!r} $exists wants true or false, got {value!r}")
        if key.startswith("@"):
            column = _column(key)
            if name == "$exists":
                return column.is_not(None) if value else column.is_(None)
            return and_(column.is_not(None), _ORDER[name](column, _of_field(key, name, value)))
        seqs = select(facts.c.seq).where(facts.c.memory == self._memory)
        if name == "$exists":
            inside = and_(facts.c.key > key + ".", facts.c.key < key + "/")  # "/" follows "."
            found = cubes.c.seq.in_(seqs.where(or_(facts.c.key == key, inside)))
            return found if value else not_(found)
        kind, number, string = _value(key, name, value)
        seqs = seqs.where(facts.c.key == key, facts.c.type == kind)
        if kind == NUMBER:
            seqs = seqs.where(_ORDER[name](facts.c.number, number), facts.c.string == "")
        else:
            seqs = seqs.where(facts.c.number == 0, _ORDER[name](facts.c.string, string))
        return cubes.c.seq.in_(seqs)

    def _one_of(self, key: str, name: str, values: Iterable[Any]) -> ColumnElement[bool]:
        """Whether the key has one of these values: one lookup for each type among them."""
        if key.startswith("@"):
            column = _column(key)
            given = [value if value is None else _of_field(key, name, value) for value in values]
            same = column.in_([value for value in given if value is not None])
            found = and_(column.is_not(None), same)
            return or_(found, column.is_(None)) if None in given else found
        numbers: dict[int, list[Any]] = {}
        strings: dict[int, list[str]] = {}
        for value in values:
            kind, number, string = _value(key, name, value)
            if kind in (STRING, LARGE):
                strings.setdefault(kind, []).append(string)
            else:
                numbers.setdefault(kind, []).append(number)
        seqs = select(facts.c.seq).where(facts.c.memory == self._memory, facts.c.key == key)
        parts: list[ColumnElement[bool]] = [false()]
        for kind, some in numbers.items():
            typed = seqs.where(facts.c.type == kind, facts.c.string == "")
            parts.append(cubes.c.seq.in_(typed.where(facts.c.number.in_(some))))
        for kind, texts in strings.items():
            typed = seqs.where(facts.c.type == kind, facts.c.number == 0)
            parts.append(cubes.c.seq.in_(typed.where(facts.c.string.in_(texts))))
        return or_(*parts)


def _value(key: str, name: str, value: Any) -> tuple[int, int | float, str]:
    if not isinstance(value, str | int | float | type(None)) or value != value:
        raise ArgumentError(
            f"filters: {key!r} {name} wants a string, number, true, false or null, got {value!r}"
        )
    if isinstance(value, str):
        check_utf8(value, f"filters: {key!r}")
    elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ArgumentError(f"filters: {key!r} {name} wants at most {_MAX_BITS:,} bits of a number")
    kind, number, string = _typed(value)
    if name in _ORDER and kind not in (NUMBER, STRING):
        raise ArgumentError(
            f"filters: {key!r} {name} wants a string or a 64-bit number, got {value!r}"
        )
    return kind, number, string


def _column(key: str) -> ColumnElement[Any]:
    if key not in FIELDS:
        raise ArgumentError(f"filters: one of {', '.join(FIELDS)} wanted, got {key!r}")
    return FIELDS[key]


def _of_field(key: str, name: str, value: Any) -> Any:
    wanted = (int, float) if key in _NUMBERS else (str,)
    if not isinstance(value, wanted) or isinstance(value, bool) or value != value:
        kind = "a number" if key in _NUMBERS else "a string"
        raise ArgumentError(f"filters: {key!r} {name} wants {kind}, got {value!r}")
    if isinstance(value, str):
        check_utf8(value, f"filters: {key!r}")
    elif isinstance(value, int) and value.bit_length() > 63:
        return math.inf if value > 0 else -math.inf
    return value
