"""From hits to text for a prompt: budget, citations, order, repetitions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos.cube import Hit
from memos.errors import ArgumentError
from memos.retrieval import explain, synthesise


def hit(id: str, content: Any, **more: Any) -> Hit:
    return Hit(id=id, kind="text", content=content, memory="m", **more)


def words(text: str) -> int:
    return len(text.split())


def test_pieces_carry_who_and_when_and_citations_lead_back() -> None:
    context = synthesise(
        "q",
        [
            hit("a", "I like\nsoup.", metadata={"speaker": "Ada", "timestamp": "2023-05-08T10:00"}),
            hit("b", {"text": "Bread is baked."}, versions=3),
            hit("c", {"rows": [1]}),
        ],
        100,
    )
    assert str(context) == "[1] Ada, 8 May 2023: I like soup.\n[2] Bread is baked.\n[3] " + (
        '{"rows": [1]}'
    )
    assert [(c.number, c.id, c.version) for c in context.citations] == [
        (1, "a", 1),
        (2, "b", 3),
        (3, "c", 1),
    ]
    assert [context.text[c.start : c.end] for c in context.citations] == context.text.split("\n")
    assert context.left_out == ()


def test_a_repetition_is_left_out() -> None:
    hits = [hit("a", "The dog eats bones."), hit("b", "the dog eats BONES"), hit("c", "A cat.")]
    context = synthesise("q", hits, 100)
    assert [c.id for c in context.citations] == ["a", "c"]
    assert context.left_out == (("b", "repeats another"),)


def test_one_day_or_section_is_told_in_order_the_best_one_first() -> None:
    day = {"may": "2023-05-08T%02d:00", "june": "2023-06-01T%02d:00"}
    hits = [
        hit("2", "two", metadata={"timestamp": day["june"] % 9}),
        hit("4", "four", metadata={"timestamp": day["may"] % 11}),
        hit("1", "one", metadata={"timestamp": day["june"] % 8}),
        hit("6", "six", parent_id="s", created_at=2.0),
        hit("3", "three", metadata={"timestamp": day["may"] % 10}),
        hit("5", "five", parent_id="s", created_at=1.0),
    ]
    assert [c.id for c in synthesise("q", hits, 100).citations] == list("123456")
    ranked = synthesise("q", hits, 100, order="rank").citations
    assert [c.id for c in ranked] == [h.id for h in hits]


def test_the_best_hit_is_cut_where_it_does_not_fit() -> None:
    long = "One two three four five six. Seven eight nine ten eleven twelve. " + "More. " * 50
    context = synthesise("q", [hit("a", long), hit("b", "Short.")], 16, words)
    assert context.text == (
        "[1] One two three four five six. Seven eight nine ten eleven twelve. More. More. ..."
    )
    assert context.citations[0].is_cut
    assert context.tokens <= 16
    assert context.left_out == (("b", "does not fit"),)
    assert synthesise("q", [hit("a", long), hit("b", "Short.")], 3, words).citations[0].id == "b"
    assert synthesise("q", [hit("a", long)], 0).text == ""


class Tokenizer:
    def encode(self, text: str) -> list[int]:
        return [0, *map(ord, text)]


@given(
    st.lists(st.text(alphabet="abcdefgh .", max_size=60), max_size=12),
    st.integers(0, 60),
    st.sampled_from([None, words, Tokenizer()]),
    st.sampled_from(["time", "rank"]),
)
def test_never_more_than_the_budget(texts: list[str], budget: int, count: Any, order: str) -> None:
    hits = [hit(str(i), text) for i, text in enumerate(texts)]
    context = synthesise("q", hits, budget, count, order=order)
    assert context.tokens <= budget
    told = [c.id for c in context.citations]
    assert sorted(told + [id for id, _ in context.left_out]) == sorted(h.id for h in hits)
    by_id = {h.id: " ".join(h.content.split()) for h in hits}
    for i, citation in enumerate(context.citations, 1):
        piece = context.text[citation.start : citation.end]
        text = by_id[citation.id]
        body = piece.removeprefix(f"[{i}] ")
        assert body == text or (citation.is_cut and text.startswith(body.removesuffix(" ...")))
    if order == "rank":
        assert told == sorted(told, key=int)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ArgumentError, match="budget_tokens: a number from 0 wanted, got -1"):
        synthesise("q", [], -1)
    with pytest.raises(ArgumentError, match="order: 'time' or 'rank' wanted, got 'size'"):
        synthesise("q", [], 1, order="size")
    with pytest.raises(ArgumentError, match="count_tokens: a function"):
        synthesise("q", [], 1, 7)


def test_a_context_can_be_explained() -> None:
    hits = [hit("a", "soup", score=2.0), hit("b", "soup", score=1.0)]
    told = explain(synthesise("q", hits, 100))
    assert [h.id for h in told.hits] == ["a", "b"]
    assert "left out: b: repeats another" in str(told)
