"""Filters against a plain evaluator of the same language; what is out of it is a clear error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos.errors import ArgumentError
from memos.memories.text import GeneralTextMemory
from memos.records.check import check
from memos.records.store import Records


def memory_of(*metadata: dict[str, Any]) -> GeneralTextMemory:
    memory = GeneralTextMemory("notes", embedder=None, clock=lambda: 1000.0)
    memory.bind(Records(None))
    memory.add_many(
        {"content": "x", "id": str(i), "metadata": one} for i, one in enumerate(metadata)
    )
    return memory


def found(memory: GeneralTextMemory, filters: Any) -> set[str]:
    return {cube.id for cube in memory.cubes(limit=None, filters=filters)}


# The language in plain Python.


def scalars(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar of the metadata with its path; the lists on the way are transparent."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from scalars(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from scalars(inner, path)
    else:
        yield path, value


def same(one: Any, other: Any) -> bool:
    return type_of(one) == type_of(other) and one == other


def type_of(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return type(value).__name__
    if isinstance(value, str):
        return "string"
    return "number" if isinstance(value, float) or -(2**63) <= value < 2**63 else "large"


ORDER = {
    "$gt": lambda a, b: a > b,
    "$gte": lambda a, b: a >= b,
    "$lt": lambda a, b: a < b,
    "$lte": lambda a, b: a <= b,
}


def matches(metadata: dict[str, Any], filters: dict[str, Any]) -> bool:
    return all(holds(metadata, key, value) for key, value in filters.items())


def holds(metadata: dict[str, Any], key: str, value: Any) -> bool:
    if key == "$and":
        return all(matches(metadata, one) for one in value)
    if key == "$or":
        return any(matches(metadata, one) for one in value)
    if key == "$not":
        return not matches(metadata, value)
    operators = value if isinstance(value, dict) else {"$eq": value}
    there = [scalar for path, scalar in scalars(metadata) if path == key]
    below = any(path.startswith(key + ".") for path, _ in scalars(metadata))
    return all(one(there, below, name, wanted) for name, wanted in operators.items())


def one(there: list[Any], below: bool, name: str, wanted: Any) -> bool:
    if name == "$exists":
        return wanted == bool(there or below)
    if name in ("$in", "$nin"):
        return any(same(a, b) for a in there for b in wanted) == (name == "$in")
    if name in ("$eq", "$ne"):
        return any(same(a, wanted) for a in there) == (name == "$eq")
    return any(type_of(a) == type_of(wanted) and ORDER[name](a, wanted) for a in there)


# Random metadata, random filters.

KEYS = st.sampled_from(["a", "b", "a.b", "b.a.b", "", "%", "a'b", 'a"b', "a\0", "\u00e9"])
NAMES = st.sampled_from(["a", "b", "", "%", "a'b", 'a"b', "a\0", "\u00e9"])
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0.0, -0.0, 1.0, 1.5, -1.5, 1e300, 2.0**53, 2**53 + 1, 2**63 - 1, -(2**63)]),
    st.sampled_from([2.0**63, 5e-324]),
)
LARGE = st.sampled_from([2**63, -(2**63) - 1, 10**30])
STRINGS = st.sampled_from(["", "a", "A", "b", "1", "true", "null", "%", "_", "a'--", "\0", "a\0b"])
STRINGS |= st.sampled_from(["\u00e9", "e\u0301", "\ud7ff", "\U0001f600", "x" * 256, "x" * 257])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, LARGE, STRINGS)
METADATA = st.dictionaries(
    NAMES,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
        max_leaves=4,
    ),
    max_size=4,
)
OPERATORS = st.one_of(
    st.builds(lambda n, v: {n: v}, st.sampled_from(["$eq", "$ne"]), SCALARS),
    st.builds(lambda n, v: {n: v}, st.sampled_from(sorted(ORDER)), NUMBERS | STRINGS),
    st.builds(lambda n, v: {n: v}, st.sampled_from(["$in", "$nin"]), st.lists(SCALARS, max_size=4)),
    st.booleans().map(lambda v: {"$exists": v}),
    st.builds(lambda a, b: {"$gte": a, "$lt": b}, NUMBERS, NUMBERS),
)
LEAVES = st.dictionaries(KEYS, SCALARS | OPERATORS, max_size=3)
FILTERS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda many: {"$and": many}),
        st.lists(inner, min_size=1, max_size=3).map(lambda many: {"$or": many}),
        inner.map(lambda one: {"$not": one}),
        st.builds(lambda a, b: {**a, "$not": b}, LEAVES, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=50)
@given(
    st.lists(METADATA, min_size=1, max_size=6, unique_by=repr),
    st.lists(FILTERS, min_size=5, max_size=10),
)
def test_filters_mean_what_they_say(many: list[dict[str, Any]], filters: list[Any]) -> None:
    memory = GeneralTextMemory("notes", embedder=None, on_duplicate="keep")
    memory.bind(Records(None))
    memory.add_many({"content": "x", "id": str(i), "metadata": m} for i, m in enumerate(many))
    for one_filter in filters:
        wanted = {str(i) for i, metadata in enumerate(many) if matches(metadata, one_filter)}
        assert found(memory, one_filter) == wanted, one_filter
        assert found(memory, {"$not": one_filter}) == {str(i) for i in range(len(many))} - wanted
    assert check(memory.records) == []
    memory.records.close()


@settings(max_examples=40)
@given(METADATA, METADATA, FILTERS)
def test_filters_follow_an_update(
    old: dict[str, Any], more: dict[str, Any], one_filter: dict[str, Any]
) -> None:
    memory = memory_of(old)
    memory.update("0", metadata=more)
    now = {**old, **more}
    assert memory.get("0").metadata == now
    assert found(memory, one_filter) == ({"0"} if matches(now, one_filter) else set())
    memory.delete("0")
    assert found(memory, one_filter) == set()
    memory.records.close()


def test_the_examples_of_the_docstring() -> None:
    memory = memory_of(
        {"user_id": "u1", "stars": 3, "lang": ["de", "fr"], "author": {"name": "Ann"}},
        {"user_id": "u2", "stars": 5.0, "lang": "en", "email": None},
    )
    assert found(memory, {"user_id": "u1"}) == {"0"}
    assert found(memory, {"stars": {"$gte": 3, "$lt": 5}}) == {"0"}
    assert found(memory, {"stars": 5}) == {"1"}
    assert found(memory, {"lang": {"$in": ["de", "en"]}}) == {"0", "1"}
    assert found(memory, {"email": {"$exists": True}}) == {"1"}
    assert found(memory, {"$or": [{"lang": "fr"}, {"stars": {"$gt": 4}}]}) == {"0", "1"}
    assert found(memory, {"author.name": "Ann"}) == {"0"}
    assert found(memory, {"author": {"$exists": True}}) == {"0"}
    assert found(memory, {"@importance": {"$gte": 0.5}, "stars": {"$ne": 3}}) == {"1"}
    assert found(memory, {}) == found(memory, None) == {"0", "1"}


def test_types_stay_apart() -> None:
    values = [1, True, "1", "true", None, "null", 0, False, "", 1.5, 2**63, str(2**63)]
    memory = memory_of(*({"v": value, "i": i} for i, value in enumerate(values)))
    for i, value in enumerate(values):
        assert found(memory, {"v": value}) == {str(i)}
        assert found(memory, {"v": {"$nin": [value]}}) == {str(j) for j in range(12)} - {str(i)}
    assert found(memory, {"v": 1.0}) == {"0"}
    assert found(memory, {"v": {"$gt": -math.inf, "$lt": math.inf}}) == {"0", "6", "9"}
    assert found(memory, {"v": {"$gte": ""}}) == {"2", "3", "5", "8", "11"}


def test_64_bits_are_exact() -> None:
    memory = memory_of({"v": 2**63 - 1}, {"v": 2**63 - 2}, {"v": 2.0**63}, {"v": -(2**63)})
    assert found(memory, {"v": 2**63 - 1}) == {"0"}
    assert found(memory, {"v": {"$gt": 2**63 - 2}}) == {"0", "2"}
    assert found(memory, {"v": {"$lte": -(2**63)}}) == {"3"}


FIELDS = [
    ({"@id": "0"}, {"0"}),
    ({"@id": {"$in": ["0", "1", "7"]}}, {"0", "1"}),
    ({"@id": {"$gt": "0"}}, {"1"}),
    ({"@kind": "text"}, {"0", "1"}),
    ({"@kind": {"$ne": "text"}}, set()),
    ({"@source": "web"}, {"0"}),
    ({"@source": {"$ne": "web"}}, {"1"}),
    ({"@source": None}, {"1"}),
    ({"@source": {"$in": [None, "web"]}}, {"0", "1"}),
    ({"@source": {"$nin": [None]}}, {"0"}),
    ({"@source": {"$exists": False}}, {"1"}),
    ({"@source": {"$gt": "a"}}, {"0"}),
    ({"$not": {"@source": {"$gt": "a"}}}, {"1"}),
    ({"@importance": 0.9}, {"0"}),
    ({"@importance": {"$lt": 1}}, {"0", "1"}),
    ({"@created_at": {"$lte": 1000}}, {"0", "1"}),
    ({"@expires_at": {"$gt": 1}}, {"0"}),
    ({"@expires_at": None}, {"1"}),
    ({"@thread": "t"}, {"0"}),
    ({"@importance": {"$lt": 10**400}}, {"0", "1"}),
    ({"@importance": {"$gt": -(2**70)}}, {"0", "1"}),
]


@pytest.mark.parametrize(("filters", "wanted"), FIELDS)
def test_fields(filters: dict[str, Any], wanted: set[str]) -> None:
    memory = GeneralTextMemory("notes", embedder=None, clock=lambda: 1000.0)
    memory.bind(Records(None))
    memory.add("a", id="0", source="web", importance=0.9, ttl_s=5, thread="t")
    memory.add("b", id="1")
    assert found(memory, filters) == wanted


# What is text to others is text to us.

HOSTILE = [
    "' OR 1=1 --",
    '"; DROP TABLE cubes; --',
    "%",
    "_",
    "\\",
    "a\0b",
    "\0",
    ":memory",
    "?",
    "$ne",
    "{}",
    "\u202e\u0000\uffff",
    "x" * 100_000,
    "x" * 100_000 + "y",
    "\U0010ffff",
]


def test_hostile_strings_are_strings() -> None:
    memory = memory_of(*({"v": text, "k": {f"k{text}": 1}} for text in HOSTILE))
    for i, text in enumerate(HOSTILE):
        assert memory.get(str(i)).metadata == {"v": text, "k": {f"k{text}": 1}}
        assert found(memory, {"v": text}) == {str(i)}
        assert found(memory, {"v": {"$in": [text]}}) == {str(i)}
        assert found(memory, {f"k.k{text}": 1}) == {str(i)}
        assert found(memory, {f"k.k{text}": {"$exists": True}}) == {str(i)}
        assert found(memory, {"@id": text, "@source": text}) == set()
    assert len(memory.cubes(limit=None)) == len(HOSTILE)


LONE = "a\ud800b"


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.add(LONE),
        lambda m: m.add("x", {"v": LONE}),
        lambda m: m.add("x", {LONE: 1}),
        lambda m: m.add("x", id=LONE),
        lambda m: m.add("x", source=LONE),
        lambda m: m.add("x", thread=LONE),
        lambda m: m.add("x", derived_from=[LONE]),
        lambda m: m.add("x", relations=[{"type": LONE, "target": "0"}]),
        lambda m: m.add("x", acl={"read": [LONE]}),
        lambda m: m.update("0", LONE),
        lambda m: m.update("0", metadata={"v": LONE}),
        lambda m: m.update("0", author=LONE),
        lambda m: m.get(LONE),
        lambda m: m.history(LONE),
        lambda m: m.relate("0", LONE, "0"),
        lambda m: m.cubes(filters={"v": LONE}),
        lambda m: m.cubes(filters={"v": {"$in": ["a", LONE]}}),
        lambda m: m.cubes(filters={LONE: 1}),
        lambda m: m.cubes(filters={LONE: {"$exists": True}}),
        lambda m: m.cubes(filters={"@id": LONE}),
    ],
)
def test_lone_surrogates_are_refused(call: Any) -> None:
    memory = memory_of({"v": 1})
    with pytest.raises(ArgumentError, match=r"\\ud800|surrogates"):
        call(memory)
    assert [cube.versions for cube in memory.cubes()] == [1]
    assert check(memory.records) == []


# Out of the language.

NESTED: Any = {"a": 1}
for _ in range(33):
    NESTED = {"$not": NESTED}

MALFORMED = [
    ([], "a dict wanted, got \\[\\]"),
    ("a", "a dict wanted, got 'a'"),
    ({1: 2}, "keys that are strings wanted, got 1"),
    ({"$and": []}, "\\$and wants a list of filters"),
    ({"$or": {"a": 1}}, "\\$or wants a list of filters"),
    ({"$or": [{"a": 1}, 7]}, "a dict wanted, got 7"),
    ({"$not": [{"a": 1}]}, "a dict wanted"),
    ({"$nor": [{"a": 1}]}, "got '\\$nor'"),
    ({"$eq": 1}, "got '\\$eq'"),
    ({"a": {}}, "'a' wants an operator"),
    ({"a": {"b": 1}}, "'a' wants one of .*, got 'b'"),
    ({"a": {"$regex": "x"}}, "'a' wants one of .*, got '\\$regex'"),
    ({"a": {"$gt": 1, "x": 2}}, "'a' wants one of .*, got 'x'"),
    ({"a": {1: 2}}, "'a' wants one of .*, got 1"),
    ({"a": [1]}, "'a' \\$eq wants a string, number"),
    ({"a": b"x"}, "'a' \\$eq wants a string, number"),
    ({"a": float("nan")}, "'a' \\$eq wants a string, number"),
    ({"a": {"$in": "ab"}}, "'a' \\$in wants a list"),
    ({"a": {"$in": {"b": 1}}}, "'a' \\$in wants a list"),
    ({"a": {"$nin": [[1]]}}, "'a' \\$nin wants a string, number"),
    ({"a": {"$gt": None}}, "'a' \\$gt wants a string or a 64-bit number"),
    ({"a": {"$gt": True}}, "'a' \\$gt wants a string or a 64-bit number"),
    ({"a": {"$lt": 2**63}}, "'a' \\$lt wants a string or a 64-bit number"),
    ({"a": {"$exists": 1}}, "'a' \\$exists wants true or false"),
    ({"a": 10**5000}, "'a' \\$eq wants at most"),
    ({"@nobody": 1}, "one of @id, .* got '@nobody'"),
    ({"@id": 1}, "'@id' \\$eq wants a string"),
    ({"@id": {"$in": [1]}}, "'@id' \\$in wants a string"),
    ({"@importance": "1"}, "'@importance' \\$eq wants a number"),
    ({"@importance": True}, "'@importance' \\$eq wants a number"),
    ({"@importance": {"$gt": float("nan")}}, "'@importance' \\$gt wants a number"),
    ({"@source": {"$gt": None}}, "'@source' \\$gt wants a string"),
    (NESTED, "at most 32 dicts"),
    ({"$or": [{"a": 1}] * 300}, "at most 500 conditions"),
    ({f"k{i}": 1 for i in range(501)}, "at most 500 conditions"),
    ({"a": {"$in": list(range(10_001))}}, "and 10,000 values"),
]


@pytest.mark.parametrize(("filters", "message"), MALFORMED, ids=[m for _, m in MALFORMED])
def test_malformed_filters_are_named(filters: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"filters: .*{message}"):
        memory_of({"a": 1}).cubes(filters=filters)


def test_the_largest_filters_run() -> None:
    memory = memory_of({"a": 7}, {"a": "x"}, {"b": 1})
    many = [*range(9_990), *"xyzuvw"]
    assert found(memory, {"a": {"$in": many}}) == {"0", "1"}
    assert found(memory, {"a": {"$nin": many}}) == {"2"}
    assert found(memory, {"@id": {"$in": [str(i) for i in range(2, 9_000)]}}) == {"2"}
    assert found(memory, {"$or": [{"a": 7}, *({"c": i} for i in range(247))]}) == {"0"}
    assert found(memory, {"$and": [{"a": 7}, *({"c": {"$ne": i}} for i in range(120))]}) == {"0"}
    assert found(memory, {f"k{i}": {"$exists": False} for i in range(250)}) == {"0", "1", "2"}
    deep: Any = {"a": 7}
    for _ in range(32):
        deep = {"$not": deep}
    assert found(memory, deep) == {"0"}
    deep = {"a": 7}
    for _ in range(16):
        deep = {"$or": [{"b": 1}, {"$and": [deep, {"a": {"$exists": True}}]}]}
    assert found(memory, deep) == {"0", "2"}


@pytest.mark.parametrize(
    "metadata",
    [
        {"v": float("nan")},
        {"v": float("inf")},
        {"v": {1: 2}},
        {"v": b"x"},
        {"v": {1, 2}},
        {"v": object()},
        {"v": 10**5000},
        {1: 2},
        [("a", 1)],
    ],
)
def test_metadata_that_is_no_json_is_refused(metadata: Any) -> None:
    memory = memory_of({})
    for call in (lambda: memory.add("y", metadata), lambda: memory.update("0", metadata=metadata)):
        with pytest.raises(ArgumentError, match="metadata: "):
            call()
    assert len(memory.cubes()) == 1


def test_metadata_of_any_depth_is_stored_or_refused() -> None:
    memory = memory_of()
    for depth in (90, 99, 101, 900, 5_000, 100_000):
        value: Any = 1
        for _ in range(depth):
            value = {"a": value}
        if depth < 100:
            assert memory.add("x", value).metadata == value
            assert len(found(memory, {".".join("a" * depth): 1})) == 1
        else:
            with pytest.raises(ArgumentError, match="metadata: at most 100"):
                memory.add("x", value)
    value = {}
    value["self"] = [value]
    with pytest.raises(ArgumentError, match="metadata: at most 100"):
        memory.add("x", value)
