"""An encrypted store answers as one that is not, and its folder holds nothing that can be read."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memos import MOS, GeneralTextMemory, GraphMemory, TreeTextMemory, VectorMemory
from memos.errors import MemosError
from memos.records import sealed_image
from memos.records.check import check
from memos.retrieval import Pipeline

from .encryption_help import KEY, MARK, Clock, Embedder, readable, seen, told

WORDS = [MARK + end for end in ("apple", "berry", "cherry", "dates", "elder")]
words = st.sampled_from(WORDS)
texts = st.lists(words, min_size=1, max_size=6).map(" ".join)
values = st.one_of(words, st.integers(-3, 3), st.booleans(), st.none(), st.floats(0, 1))
metadata = st.dictionaries(words, st.one_of(values, st.lists(values, max_size=2)), max_size=3)
places = st.integers(0, 7)
MEMORIES = ("notes", "docs", "vecs", "people")


def memories(clock: Clock) -> list[Any]:
    return [
        GeneralTextMemory("notes", f"{MARK} notes", embedder=Embedder(), clock=clock),
        TreeTextMemory("docs", embedder=None, clock=clock),
        VectorMemory("vecs", dim=4, clock=clock),
        GraphMemory("people", embedder=Embedder(), clock=clock),
    ]


def opened(path: Path | None, clock: Clock, **more: Any) -> MOS:
    mos = MOS(path, clock=clock, **more)
    mos.pipeline = Pipeline(clock=clock)
    for memory in memories(clock):
        mos.register_memory(memory)
    return mos


class Twins(RuleBasedStateMachine):
    """The same history in an encrypted store and in one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.folder = Path(tempfile.mkdtemp())
        self.ids: list[tuple[str, str]] = []

    @initialize()
    def open(self) -> None:
        self.least, sealed_image._LEAST = sealed_image._LEAST, 3
        self.plain = opened(None, self.clock)
        self.sealed = opened(self.folder, self.clock, key=KEY)
        # As another process: it sees what the first one commits.
        self.other = opened(self.folder, self.clock, key=KEY)

    def teardown(self) -> None:
        if hasattr(self, "sealed"):
            for mos in (self.sealed, self.other):
                assert check(mos.records) == []
            assert readable(self.folder) == []
            self.sealed.close()
            self.other.close()
            assert readable(self.folder) == []
            sealed_image._LEAST = self.least
        shutil.rmtree(self.folder)

    def both(self, call: Any) -> Any:
        """The answers, or errors, of both stores to the same call are equal."""
        found = []
        for mos in (self.plain, self.sealed):
            try:
                found.append(call(mos))
            except MemosError as error:
                found.append((type(error), str(error)))
            mos.records.uses.write()  # counted uses wait, else until the store is closed
        assert found[0] == found[1]
        return found[0]

    def any_id(self, place: int) -> tuple[str, str]:
        return self.ids[place % len(self.ids)] if self.ids else ("notes", f"{MARK}none")

    def add(self, memory: str, content: Any, metadata: Any, **more: Any) -> None:
        self.clock.now += 1
        id = f"{MARK}id{len(self.ids)}"
        found = self.both(lambda mos: seen(mos.add(memory, content, metadata, id=id, **more)))
        if isinstance(found, dict) and found["id"] == id:
            self.ids.append((memory, id))

    @rule(text=texts, metadata=metadata, ttl=st.sampled_from([None, None, 20.0]), by=words)
    def add_text(self, text: str, metadata: Any, ttl: float | None, by: str) -> None:
        more = {"source": by, "creator": by, "thread": by, "acl": {"read": [by]}}
        self.add("notes", text, metadata, ttl_s=ttl, **more)

    @rule(text=texts, metadata=metadata, place=places)
    def add_section(self, text: str, metadata: Any, place: int) -> None:
        above = [id for memory, id in self.ids if memory == "docs"]
        parent = above[place % len(above)] if above and place else None
        self.add("docs", text, metadata, parent_id=parent)

    @rule(numbers=st.lists(st.integers(1, 9), min_size=4, max_size=4), text=texts)
    def add_vector(self, numbers: list[int], text: str) -> None:
        self.add("vecs", {"vector": numbers, "text": text}, {"of": text})

    @rule(label=words, name=words)
    def add_node(self, label: str, name: str) -> None:
        self.add("people", {"type": "node", "label": label, "properties": {"name": name}}, {})

    @rule(one=places, other=places, label=words, weight=st.sampled_from([1, 2.5]))
    def add_relationship(self, one: int, other: int, label: str, weight: float) -> None:
        nodes = [id for memory, id in self.ids if memory == "people"]
        if nodes:
            content = {"type": "relationship", "label": label, "properties": {"weight": weight}}
            content |= {
                "source_id": nodes[one % len(nodes)],
                "target_id": nodes[other % len(nodes)],
            }
            self.add("people", content, {})

    @rule(place=places, text=texts, metadata=metadata)
    def update(self, place: int, text: str, metadata: Any) -> None:
        self.clock.now += 1
        memory, id = self.any_id(place)
        content = text if memory in ("notes", "docs") else None
        self.both(lambda mos: seen(mos.update(memory, id, content, metadata, author=text)))

    @rule(place=places)
    def delete(self, place: int) -> None:
        self.clock.now += 1
        self.both(lambda mos: mos.delete(*self.any_id(place)))

    @rule(one=places, other=places, type=words, weight=st.sampled_from([1.0, 3.5]))
    def relate(self, one: int, other: int, type: str, weight: float) -> None:
        self.clock.now += 1
        more = {"weight": weight, "properties": {"by": type}}
        _, a = self.any_id(one)
        _, b = self.any_id(other)
        if self.both(lambda mos: [m.memory for m in (mos.get(a), mos.get(b))]) != ["people"] * 2:
            self.both(lambda mos: mos.relate(a, type, b, **more))

    @rule(seconds=st.sampled_from([5, 50]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def reopen(self) -> None:
        self.sealed.close()
        assert readable(self.folder) == []
        self.sealed = opened(self.folder, self.clock, key=KEY)
        assert check(self.sealed.records) == []

    @rule()
    def swap(self) -> None:
        """The other one writes from now on."""
        self.sealed, self.other = self.other, self.sealed

    @rule()
    def change_keys(self) -> None:
        database: Any = self.sealed.records.database
        for memory in self.sealed.memories.values():
            database.change_key(memory.table.memory)

    @rule()
    def reseal(self) -> None:
        database: Any = self.sealed.records.database
        database.reseal()

    @rule(query=texts, limit=st.integers(1, 6))
    def retrieve(self, query: str, limit: int) -> None:
        for memory in ("notes", "docs", "people", None):
            self.both(lambda mos, m=memory: [seen(h) for h in mos.retrieve(m, query, limit)])
        nearest = [1.0, 2.0, 3.0, len(query)]
        self.both(lambda mos: [seen(hit) for hit in mos.retrieve("vecs", nearest, limit)])

    @rule(key=words, value=values, low=words, place=places)
    def filters(self, key: str, value: Any, low: str, place: int) -> None:
        for wanted in (
            {key: value},
            {key: {"$gte": low}},
            {key: {"$exists": True}},
            {"$not": {key: value}},
            {"@source": key},
            {"@creator": {"$gt": low}},
            {"@id": self.any_id(place)[1]},
        ):
            for name in ("notes", "docs"):
                self.both(
                    lambda mos, n=name, w=wanted: [
                        seen(cube) for cube in mos.memory(n).cubes(filters=w)
                    ]
                )
            self.both(
                lambda mos, w=wanted: [seen(h) for h in mos.retrieve("notes", low, 3, filters=w)]
            )

    @rule(place=places)
    def structure(self, place: int) -> None:
        memory, id = self.any_id(place)
        self.both(lambda mos: seen(mos.get(id)))
        self.both(lambda mos: [told(version) for version in mos.history(id)])
        if memory == "docs":
            for name in ("children", "path", "descendants", "siblings", "ancestors"):
                call = lambda mos, n=name: [seen(c) for c in getattr(mos.memory("docs"), n)(id)]  # noqa: E731
                self.both(call)
        if memory == "people":
            self.both(lambda mos: vars_of(mos.memory("people").neighbourhood(id, 2)))
            self.both(lambda mos: [seen(h) for h in mos.memory("people").pagerank([id])])

    @rule(label=words, name=words)
    def nodes(self, label: str, name: str) -> None:
        query = {"node": {"label": label, "properties": {"name": name}}, "depth": 1}
        self.both(lambda mos: [seen(hit) for hit in mos.retrieve("people", query, 9)])

    @invariant()
    def both_say_the_same(self) -> None:
        if hasattr(self, "sealed"):
            self.both(lambda mos: {m: mos.memory(m).stats() for m in MEMORIES})
            for mos in (self.sealed, self.other):
                found = {m: [seen(c) for c in mos.memory(m).cubes(None)] for m in MEMORIES}
                wanted = {m: [seen(c) for c in self.plain.memory(m).cubes(None)] for m in MEMORIES}
                assert found == wanted


def vars_of(found: Any) -> Any:
    return [
        [seen(cube) for cube in found.nodes],
        [seen(cube) for cube in found.relationships],
        found.distances,
    ]


TestTwins = Twins.TestCase
TestTwins.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
