"""Scores, ranks, traces and counts of a principal do not depend on what it may not read.

Two stores go through the same history, one with and one without what the principal may not read:
whatever it asks, both answer the same, to the last digit that arithmetic keeps.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos import MOS, GeneralTextMemory, TreeTextMemory
from tests.access_model import Clock, embed

ANN = "user:ann"
HIDDEN = {"read": ["user:eve"]}
TEXTS = (
    "we swim in the cold lake every june",
    "the letter from Ada is in the vault",
    "who has the key?",
    "Ada has the key of the garden house",
    "bread and letters in winter",
    "two swims in the lake, three in the river",
    "the vault has 2 keys",
)
QUERIES = (
    "Who has the key of the vault?",
    "how many swims in the lake in June",
    "what did Ada say about the letter",
    "zebra",
)

_text = st.sampled_from(TEXTS)
_step = st.one_of(
    st.tuples(
        st.just("add"),
        _text,
        st.sampled_from(("Ada", "Ben", "Adam", "")),
        st.sampled_from(("a", "b", "")),
        st.booleans(),
    ),
    st.tuples(st.just("update"), st.integers(0, 20), _text),
    st.tuples(st.just("delete"), st.integers(0, 20)),
    st.tuples(st.just("relate"), st.integers(0, 20), st.integers(0, 20)),
    st.tuples(st.just("hide"), st.integers(0, 20)),
    st.tuples(st.just("below"), st.integers(0, 20), _text, st.booleans()),
    st.tuples(st.just("ask"), st.sampled_from(QUERIES)),
)


class Pair:
    """The store with everything, and the one with what the principal may read."""

    def __init__(self, embedder: Any) -> None:
        self.clock = Clock()
        self.stores = [self._made(embedder) for _ in range(2)]
        self.hidden: dict[str, bool] = {}
        self.parents: dict[str, str | None] = {}

    def _made(self, embedder: Any) -> MOS:
        mos = MOS(clock=self.clock)
        for kind, name in ((GeneralTextMemory, "notes"), (TreeTextMemory, "book")):
            more = {"embedder": embedder, "on_duplicate": "keep", "clock": self.clock}
            mos.register_memory(kind(name, **more))
        mos.grant(ANN, "read", "*")
        return mos

    def both(self, id: str) -> list[MOS]:
        return self.stores[:1] if self.hidden[id] else self.stores

    def pick(self, nth: int) -> str | None:
        return list(self.hidden)[nth % len(self.hidden)] if self.hidden else None

    def take(self, step: tuple[Any, ...]) -> None:
        self.clock.tick()
        getattr(self, step[0])(*step[1:])

    def add(self, text: str, speaker: str, thread: str, hidden: bool) -> None:
        id = f"n{len(self.parents)}"
        self.hidden[id], self.parents[id] = hidden, None
        metadata = {"speaker": speaker, "topic": text.split()[0]} if speaker else {}
        for mos in self.both(id):
            more = {"acl": HIDDEN} if hidden else {}
            mos.add("notes", text, metadata, id=id, thread=thread or None, **more)

    def below(self, nth: int, text: str, hidden: bool) -> None:
        """Under a cube of the book, or as its root."""
        books = [id for id in self.hidden if id.startswith("b")]
        parent = books[nth % len(books)] if books and nth % 4 else None
        id = f"b{len(self.parents)}"
        self.parents[id] = parent
        own = {"acl": HIDDEN} if hidden else {}
        self.hidden[id] = hidden or (parent is not None and self.hidden[parent])
        for mos in self.both(id):
            mos.add("book", text, id=id, parent_id=parent, **own)

    def update(self, nth: int, text: str) -> None:
        if (id := self.pick(nth)) is not None:
            for mos in self.both(id):
                mos.update("notes" if id[0] == "n" else "book", id, text)

    def delete(self, nth: int) -> None:
        if (id := self.pick(nth)) is not None:
            for mos in self.both(id):
                mos.delete("notes" if id[0] == "n" else "book", id)
            for one in [id, *(other for other in self.parents if self._is_below(other, id))]:
                self.hidden.pop(one, None)

    def _is_below(self, id: str | None, other: str) -> bool:
        while id is not None:
            id = self.parents[id]
            if id == other:
                return True
        return False

    def relate(self, a: int, b: int) -> None:
        one, other = self.pick(a), self.pick(b)
        if one is None or one == other:
            return
        for i, mos in enumerate(self.stores):
            if i == 0 or not (self.hidden[one] or self.hidden[str(other)]):
                mos.relate(one, "supports", str(other))

    def hide(self, nth: int) -> None:
        """What could be read cannot be read any more: in the other store it is gone."""
        id = self.pick(nth)
        if id is None or self.hidden[id]:
            return
        memory = "notes" if id[0] == "n" else "book"
        self.stores[0].update(memory, id, acl=HIDDEN)
        self.stores[1].delete(memory, id)
        for one in [id, *(o for o in self.hidden if self._is_below(o, id))]:
            self.hidden[one] = True

    def ask(self, query: str) -> None:
        answers = []
        for mos in self.stores:
            view = mos.as_principal(ANN)
            hits = view.retrieve(query=query, limit=50)
            context = view.context(query, 60)
            shown = [self._shown(hit) for hit in hits]
            stages = [(s.stage, s.memory, s.candidates) for h in hits for s in h.trace]
            counts = {name: m["cubes"] for name, m in view.stats()["memories"].items()}
            relations = {h.id: sorted((e.type, e.target) for e in h.relations) for h in hits}
            left_out = context.left_out
            answers.append((shown, stages, counts, relations, context.text, left_out))
        assert answers[0] == answers[1]

    @staticmethod
    def _shown(hit: Any) -> Any:
        signals = {
            s.name: (pytest.approx(s.value, abs=1e-5), s.weight)
            for t in hit.trace
            for s in t.signals
        }
        return hit.id, hit.content, pytest.approx(hit.score, abs=1e-4), signals


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(st.lists(_step, min_size=6, max_size=30), st.booleans())
def test_scores_do_not_tell_of_what_is_hidden(steps: list[Any], embeds: bool) -> None:
    pair = Pair(embed if embeds else None)
    for step in [*steps, *(("ask", query) for query in QUERIES)]:
        pair.take(step)
    for mos in pair.stores:
        mos.close()
