"""The pipeline: stages, signals, graph expansion, rights, and what is kept between queries."""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos.errors import ArgumentError, NotFoundError
from memos.retrieval import (
    Candidates,
    CrossEncoder,
    Expand,
    Fuse,
    LateInteraction,
    PageRank,
    Pipeline,
    Query,
    Rerank,
    TextSearch,
    VectorSearch,
    explain,
)
from memos.retrieval.pagerank import walk
from memos.retrieval.query import words_of
from memos.retrieval.rerank import max_similarity
from tests.retrieval_source import ListSource, Row

NOW = 1.7e9
DIM = 64


def embed(text: str) -> Any:
    """A vector of the words: equal words, equal direction."""
    vector = numpy.full(DIM, 1e-3)
    for word in words_of(text):
        vector += numpy.random.default_rng(zlib.crc32(word.encode())).standard_normal(DIM)
    return vector / numpy.linalg.norm(vector)


def embed_tokens(text: str) -> Any:
    return numpy.stack([embed(word) for word in words_of(text)] or [embed("")])


def pipeline(*stages: Any) -> Pipeline:
    return Pipeline(stages or None, clock=lambda: NOW)


def source(texts: list[str], **more: Any) -> ListSource:
    found = ListSource(embed, **more)
    found.put(*(Row(i, text, created_at=NOW) for i, text in enumerate(texts, 1)))
    return found


def seqs(results: list[Any]) -> list[int]:
    return [result.seq for result in results]


FILLER = ["rain falls on the roof", "the train is late", "a green door", "we ate soup at noon"]


def test_the_text_that_fits_comes_first() -> None:
    memory = source([*FILLER, "my dog Rex likes bones", "cats sleep"])
    assert seqs(pipeline().rank("Which bones does the dog like?", memory))[0] == 5
    hit = pipeline().run("Which bones does the dog like?", memory, 2)[0]
    assert (hit.id, hit.content, hit.memory) == ("5", "my dog Rex likes bones", "list")


@pytest.mark.parametrize("texts", [[], ["one"], ["", " ", "?"]])
def test_small_stores(texts: list[str]) -> None:
    memory = source(texts)
    for query in ("one", "", "?", "when did one?"):
        results = pipeline().run(query, memory)
        assert len(results) <= len(texts)
        assert all(numpy.isfinite(hit.score) for hit in results)


def test_without_an_embedder_words_are_enough() -> None:
    memory = ListSource(None)
    memory.put(Row(1, "soup"), Row(2, "bread and soup"), Row(3, "tea"))
    results = pipeline().rank("bread soup", memory)
    assert seqs(results) == [2, 1]
    assert "dense" not in results[0].signals


def test_a_score_is_the_sum_of_what_its_signals_add() -> None:
    memory = dialogue()
    memory.relate(2, "about", 5, 0.5)
    for late in (False, True):
        stages = [TextSearch(), VectorSearch(), Fuse(), Expand(), Rerank(), PageRank()]
        chain = pipeline(*stages, *([CrossEncoder(lambda q, t: [len(x) for x in t])] * late))
        results = chain.rank("When did Ada swim in May 2023?", memory, None)
        assert len(results) == len(memory.rows)
        for result in results:
            total = sum(signal.adds for signal in result.signals.values())
            assert result.score == pytest.approx(total)


# Who, when and what.


def dialogue() -> ListSource:
    """Ada and Ben talk on two days."""
    found = ListSource(embed)
    lines = [
        ("Ada", "2023-05-08", "Hello Ben, how are you?"),
        ("Ben", "2023-05-08", "Ada, did you swim in the lake?"),
        ("Ada", "2023-05-08", "Yes, the lake was cold"),
        ("Ben", "2023-05-08", "I swim in the lake too"),
        ("Ada", "2023-09-02", "We went sailing last week"),
        ("Ben", "2023-09-02", "The lake was warm"),
        ("Ada", "2023-09-02", "I swim in the lake no more"),
        ("Ben", "2023-09-02", "What a pity"),
    ]
    for i, (who, day, text) in enumerate(lines, 1):
        metadata = {"speaker": who, "timestamp": f"{day}T10:00"}
        found.put(Row(i, text, metadata, thread=day, created_at=NOW, context=f"{who} {day}"))
    return found


def test_what_a_speaker_said_stands_above_what_they_were_told() -> None:
    results = pipeline().rank("Does Ada swim in the lake?", dialogue())
    assert set(seqs(results)[:2]) == {3, 7}
    by_seq = {result.seq: result.signals for result in results}
    assert by_seq[7]["subject"].value == 1
    assert by_seq[4]["subject"].value == 0
    assert by_seq[2]["question"].value == 1
    assert by_seq[3]["answer"].value > 0  # the turn before asks about swimming


def test_a_time_in_the_query_is_matched_with_the_metadata() -> None:
    memory = dialogue()
    found = [
        seqs(pipeline().rank(f"the lake in {month}", memory))[0] for month in ("May", "September")
    ]
    assert found[0] in (2, 3, 4)
    assert found[1] in (6, 7)


def test_a_query_that_asks_when_prefers_a_text_that_says_when() -> None:
    results = pipeline().rank("When did they go?", dialogue(), None)
    by_seq = {result.seq: result.signals["when"].value for result in results}
    assert by_seq == {i: float(i == 5) for i in range(1, 9)}


def test_only_what_someone_said_can_be_a_question() -> None:
    memory = ListSource(embed)
    memory.put(Row(1, "How does it work?"), Row(2, "How does it work?", {"role": "user"}))
    results = pipeline().rank("how does it work", memory)
    assert {r.seq: r.signals["question"].value for r in results} == {1: 0, 2: 1}


def test_importance_and_recency() -> None:
    memory = ListSource(embed)
    memory.put(
        Row(1, "the bell rings", importance=0.2, created_at=NOW),
        Row(2, "the bell rings", importance=0.9, created_at=NOW),
        Row(3, "the bell rings", created_at=NOW - 90 * 86400),
        Row(4, "the bell rings", created_at=NOW + 9e9),
    )
    results = pipeline().rank("bell", memory)
    assert seqs(results) == [2, 4, 3, 1]
    weight = {result.seq: result.signals["importance"].value for result in results}
    assert weight == {1: pytest.approx(-0.6), 2: pytest.approx(0.8), 3: 0, 4: 0}
    recency = {result.seq: result.signals["recency"] for result in results}
    assert recency[3].value == pytest.approx(1 / 8)
    assert recency[4].value == 1
    wants_latest = pipeline().rank("latest bell", memory)[0].signals["recency"]
    assert wants_latest.weight > recency[4].weight


def test_other_metadata_that_the_query_names_counts() -> None:
    memory = ListSource(embed)
    memory.put(Row(1, "it is warm", {"city": "Oslo"}), Row(2, "it is warm", {"city": ["Rome"]}))
    memory.put(Row(3, "snow", {"city": "Rome"}))
    results = pipeline().rank("warm in Rome", memory)
    assert results[0].seq == 2
    assert {r.seq: r.signals["named"].value for r in results} == {1: 0, 2: 1, 3: 1}


# The graph.


def large(*special: Row) -> ListSource:
    """More units than are all candidates."""
    rng = random.Random(1)
    words = [f"w{i}" for i in range(300)]
    found = ListSource(embed)
    rows = [
        Row(i, " ".join(rng.choices(words, k=6)), thread=str(i // 10), created_at=NOW)
        for i in range(1200)
    ]
    found.put(*rows)
    found.put(*special)
    return found


def small_stages(**expand: Any) -> list[Any]:
    return [TextSearch(limit=5), VectorSearch(limit=5), Fuse(), Expand(seeds=5, **expand), Rerank()]


def test_neighbours_and_relations_become_candidates() -> None:
    memory = large(Row(505, "zebra", thread="50"), Row(900, "nothing alike", thread="90"))
    memory.relate(900, "explains", 505, 2.0)
    results = pipeline(*small_stages()).rank("zebra", memory, None)
    assert len(results) < 40
    by_seq = {result.seq: result.signals for result in results}
    r = by_seq[505]["text"].adds + by_seq[505]["dense"].adds
    assert seqs(results)[0] == 505
    assert by_seq[504]["next"].value == pytest.approx(r)
    assert by_seq[506]["previous"].value == pytest.approx(r)
    assert by_seq[900]["related"].value == pytest.approx(2 * r)
    assert by_seq[900]["dense"].value != 0
    weighted = pipeline(*small_stages(types={"explains": 0.5})).rank("zebra", memory, None)
    assert {c.seq: c.signals for c in weighted}[900]["related"].value == pytest.approx(r)


def test_no_path_leads_to_what_may_not_be_seen() -> None:
    memory = large(Row(505, "zebra", thread="50"), Row(900, "nothing alike", thread="90"))
    memory.relate(505, "explains", 900)
    hidden = {504, 900, 3}
    chain = pipeline(*small_stages(), PageRank(), LateInteraction())
    assert hidden & set(seqs(chain.rank("zebra", memory, None)))  # an open query fills the cache
    shown = chain.rank("zebra", memory, None, lambda row: row.seq not in hidden)
    assert hidden.isdisjoint(seqs(shown))
    assert seqs(shown)[0] == 505


def test_the_parent_signal_is_a_z_score_over_groups() -> None:
    memory = ListSource(embed)
    memory.put(*(Row(i, text, parent=i % 4) for i, text in enumerate(FILLER * 3)))
    memory.put(Row(100, "alone"))
    results = pipeline().rank("soup at noon", memory, None)
    values = {r.seq: r.signals["parent"].value for r in results}
    groups = [values[i] for i in range(4)]
    assert all(values[i] == groups[i % 4] for i in range(12))
    assert numpy.mean(groups) == pytest.approx(0, abs=1e-9)
    assert numpy.std(groups) == pytest.approx(1)
    assert values[100] == 0


def test_the_three_best_members_speak_for_a_group() -> None:
    memory = ListSource(embed)
    texts = ["soup", "soup tea", "a", "b", "c", "soup pot", "tea", "d", "e", "f", "g", "h"] * 2
    memory.put(*(Row(i, text, parent=i % 5) for i, text in enumerate(texts)))
    results = pipeline(TextSearch(), VectorSearch(), Fuse(), Expand()).rank("soup", memory, None)
    r = {c.seq: c.signals["text"].adds + c.signals["dense"].adds for c in results}
    groups = [sorted((r[i] for i in r if i % 5 == g), reverse=True) for g in range(5)]
    means = numpy.array([numpy.mean(group[:3]) for group in groups])
    want = (means - means.mean()) / means.std()
    for result in results:
        assert result.signals["parent"].value == pytest.approx(want[result.seq % 5])


def test_every_candidate_has_its_similarity_whatever_path_it_came_by() -> None:
    memory = large(Row(505, "zebra", thread="50"))
    results = pipeline(*small_stages()).rank("zebra w1 w2 w3", memory, None)
    vector, (mean, deviation) = embed("zebra w1 w2 w3"), memory.background(embed("zebra w1 w2 w3"))
    for result in results:
        near = memory.rows[result.seq].vector @ vector
        assert result.signals["dense"].value == pytest.approx((near - mean) / deviation)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
    st.lists(st.floats(0.1, 5), min_size=6, max_size=6),
)
def test_walks_are_those_of_a_dense_matrix(
    edges: list[tuple[int, int]], start: list[float]
) -> None:
    weights = numpy.arange(1.0, len(edges) + 1)
    matrix = numpy.zeros((6, 6))
    for (a, b), weight in zip(edges, weights, strict=True):
        matrix[a, b] += weight
        matrix[b, a] += weight
    p = numpy.array(start) / sum(start)
    for i in range(6):
        matrix[i] = matrix[i] / matrix[i].sum() if matrix[i].any() else p
    want = p
    for _ in range(10):
        want = 0.3 * p + 0.7 * want @ matrix
    got = walk(numpy.array(start), numpy.array(edges), weights, 0.3, 10)
    numpy.testing.assert_allclose(got, want, rtol=1e-9)


def test_page_rank_lifts_what_good_candidates_lead_to() -> None:
    memory = source([*FILLER, "zebra", "x one", "x two"])
    memory.relate(5, "leads to", 6)
    results = pipeline(*pipeline().stages, PageRank()).rank("zebra", memory, None)
    shares = {r.seq: r.signals["pagerank"].value for r in results}
    assert shares[5] > shares[6] > shares[7]


# Late interaction and cross-encoders.


def with_tokens(texts: list[str], pack: bool) -> ListSource:
    found = ListSource(embed, embed_tokens=embed_tokens)
    for i, text in enumerate(texts, 1):
        tokens = embed_tokens(text)
        found.put(Row(i, text, tokens=numpy.packbits(tokens > 0, axis=1) if pack else tokens))
    return found


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 20))
def test_max_similarity_is_that_of_plain_loops(lengths: list[int], q: int, dim: int) -> None:
    rng = numpy.random.default_rng(dim)
    query = rng.standard_normal((q, dim))
    texts = [rng.standard_normal((n, dim)) for n in lengths]

    def cosine(a: Any, b: Any) -> float:
        return float(a @ b / numpy.linalg.norm(a) / numpy.linalg.norm(b))

    def want(pieces: list[Any]) -> list[float]:
        return [numpy.mean([max(cosine(a, b) for b in piece) for a in query]) for piece in pieces]

    numpy.testing.assert_allclose(max_similarity(query, texts), want(texts), atol=1e-5)
    signs = [numpy.where(text > 0, 1.0, -1.0) for text in texts]
    packed = [numpy.packbits(text > 0, axis=1) for text in texts]
    numpy.testing.assert_allclose(max_similarity(query, packed), want(signs), atol=1e-5)


@pytest.mark.parametrize("pack", [False, True])
def test_late_interaction_reads_token_by_token(pack: bool) -> None:
    texts = [*FILLER, "red apples and green pears", "green apples and red pears and more of it"]
    memory = with_tokens(texts, pack)
    memory.rows[1].tokens = None
    results = pipeline().rank("green apples", memory, None)
    values = {r.seq: r.signals["late_interaction"].value for r in results}
    assert max(values, key=lambda seq: values[seq]) in (5, 6)
    assert values[1] == 0
    assert {r.signals["dense"].value for r in results if r.seq != 1} == {0.0}
    for result in results:
        assert result.score == pytest.approx(sum(s.adds for s in result.signals.values()))


def test_those_that_were_not_read_again_stay_below() -> None:
    memory = source([*FILLER, "zebra", "zebra zebra", "zebra foal"])
    before = seqs(pipeline().rank("zebra", memory, None))

    def score(query: str, texts: list[str]) -> list[float]:
        assert query == "zebra"
        return [float(len(text)) for text in texts]

    after = pipeline(*pipeline().stages, CrossEncoder(score, top=3, weight=50)).rank(
        "zebra", memory, None
    )
    assert seqs(after)[:3] == [6, 7, 5]
    assert seqs(after)[3:] == before[3:]
    with pytest.raises(ArgumentError, match="3 numbers wanted"):
        pipeline(*pipeline().stages, CrossEncoder(lambda q, t: [1.0], top=3)).rank("zebra", memory)


# Stages are a list.


def test_stages_can_be_read_replaced_and_written_by_the_user() -> None:
    memory = source(FILLER)
    chain = pipeline()
    assert repr(chain) == "Pipeline([text, vector, fuse, expand, rerank, late_interaction])"
    chain.stage("fuse").text = 0.0
    assert chain.rank("soup", memory)[0].signals["text"].weight == 0

    def only_late(query: Query, candidates: Candidates) -> Candidates:
        assert query.text == "soup"
        candidates.keep(candidates.seqs > 2)
        return candidates

    chain.stages.insert(2, only_late)
    result = chain.rank("soup", memory)
    assert seqs(result) == [4, 3]
    assert [stage.stage for stage in result[0].trace][:3] == ["text", "vector", "only_late"]
    assert [stage.candidates for stage in result[0].trace][1:3] == [4, 2]
    chain.replace("rerank", lambda query, candidates: candidates)
    assert "question" not in chain.rank("soup", memory)[0].signals
    with pytest.raises(NotFoundError, match="one of text, vector"):
        chain.stage("colour")
    chain.stages.append(lambda query, candidates: None)
    with pytest.raises(ArgumentError, match="must return Candidates, got NoneType"):
        chain.rank("soup", memory)
    with pytest.raises(ArgumentError, match="query: a text wanted, got int"):
        chain.rank(3, memory)  # type: ignore[arg-type]


def test_vector_and_text_may_change_places() -> None:
    memory = large(Row(505, "zebra", thread="50"))
    stages = small_stages()
    want = pipeline(*stages).rank("zebra w1 w2", memory, None)
    stages[0], stages[1] = stages[1], stages[0]
    got = pipeline(*stages).rank("zebra w1 w2", memory, None)
    assert [(c.seq, c.score) for c in got] == [(c.seq, c.score) for c in want]


def test_several_memories_are_ranked_together() -> None:
    first, second = source(FILLER, name="first"), ListSource(embed, name="second")
    second.put(Row(101, "soup with bread"), Row(102, "tea"))
    hits = pipeline().run("soup bread", [first, second], 3)
    assert (hits[0].memory, hits[0].id) == ("second", "101")
    assert {hit.memory for hit in hits} == {"first", "second"}
    alone = pipeline().rank("soup bread", first, 1)[0].signals["text"].value
    assert (
        alone
        == 1
        > next(h for h in pipeline().rank("soup bread", [first, second]) if h.seq == 4)
        .signals["text"]
        .value
    )
    assert pipeline().run("soup", [], 3) == []


def test_a_small_memory_is_measured_against_the_largest_one() -> None:
    first, second = source(FILLER, name="first"), ListSource(embed, name="second")
    second.put(Row(101, "the train is late"), Row(102, "a green door"))
    query = "the train is late"
    results = pipeline().rank(query, [first, second], None)
    values = {c.seq: c.signals["dense"].value for c in results}
    assert values[101] == pytest.approx(values[2])  # equal texts, equal values
    assert values[102] == pytest.approx(values[3])
    assert pipeline().rank(query, second)[0].signals["dense"].value == pytest.approx(1)


def test_explain_says_what_counted() -> None:
    memory = dialogue()
    hits = pipeline().run("Does Ada swim in the lake?", memory, 3)
    told = explain(hits)
    assert [hit.id for hit in told.hits] == [hit.id for hit in hits]
    assert [stage.stage for stage in told.hits[0].stages] == [
        *("text", "vector", "fuse", "expand", "rerank", "late_interaction")
    ]
    adds = [abs(signal.adds) for signal in told.hits[0].signals]
    assert adds == sorted(adds, reverse=True)
    assert "subject" in str(told)
    assert str(explain(hits[0])).startswith("text (")
    with pytest.raises(ArgumentError, match="a hit, a list of hits or a context wanted"):
        explain("hit")


# What is kept between queries.

_LINE = st.sampled_from(
    ["swim in the lake", "do you swim?", "we met in June", "three dogs", "the lake is cold", "tea"]
)
_STEP = st.one_of(
    st.tuples(
        st.just("put"),
        st.integers(1, 12),
        _LINE,
        st.sampled_from(["Ada", "Ben"]),
        st.sampled_from(["a", "b", None]),
    ),
    st.tuples(st.just("remove"), st.integers(1, 12)),
    st.tuples(st.just("ask"), st.sampled_from(["When did Ada swim?", "how many dogs", "lake"])),
)


@settings(max_examples=60)
@given(st.lists(_STEP, max_size=25), st.booleans())
def test_a_pipeline_with_a_past_answers_as_a_new_one(steps: list[Any], few: bool) -> None:
    memory = ListSource(embed)
    stages = small_stages() if few else pipeline().stages
    for stage in stages[:2]:
        stage.limit = 2 if few else 200
    old = Pipeline(stages, clock=lambda: NOW)
    for step in steps:
        if step[0] == "put":
            _, seq, text, who, thread = step
            memory.put(Row(seq, text, {"speaker": who}, thread=thread, created_at=NOW))
        elif step[0] == "remove" and step[1] in memory.rows:
            memory.remove(step[1])
        elif step[0] == "ask":
            _compare(old, Pipeline(stages, clock=lambda: NOW), memory, step[1])
    _compare(old, Pipeline(stages, clock=lambda: NOW), memory, "When did Ada swim?")


def _compare(old: Pipeline, new: Pipeline, memory: ListSource, query: str) -> None:
    got, want = (p.rank(query, memory, None) for p in (old, new))
    assert seqs(got) == seqs(want)
    for a, b in zip(got, want, strict=True):
        assert a.score == pytest.approx(b.score)
        assert {n: s.value for n, s in a.signals.items()} == {
            n: pytest.approx(s.value) for n, s in b.signals.items()
        }


@pytest.mark.parametrize("few", [False, True])
def test_links_follow_what_is_removed_moved_and_put_between(few: bool) -> None:
    memory = ListSource(embed)
    lines = ["zebra", "no more", "zebra foal", "a tree", "zebra herd"]
    memory.put(*(Row(i, text, thread="t", created_at=NOW) for i, text in enumerate(lines, 1)))
    stages = small_stages() if few else pipeline().stages
    old = Pipeline(stages, clock=lambda: NOW)
    changes = [
        lambda: memory.remove(2),
        lambda: memory.put(Row(4, "a tree", thread="u", created_at=NOW)),
        lambda: memory.put(Row(2, "between", thread="t", created_at=NOW)),
        lambda: memory.put(Row(6, "at the end", thread="t", created_at=NOW)),
        lambda: memory.put(Row(3, "not striped", thread="t", created_at=NOW)),
    ]
    for change in changes:
        _compare(old, Pipeline(stages, clock=lambda: NOW), memory, "zebra")
        change()
        _compare(old, Pipeline(stages, clock=lambda: NOW), memory, "zebra")


def test_a_text_is_read_once() -> None:
    memory = dialogue()
    chain = pipeline()
    chain.rank("lake", memory)
    first = memory.loads
    chain.rank("Does Ada swim?", memory)
    assert memory.loads == first
    memory.put(Row(9, "new", thread="2023-09-02"))
    chain.rank("lake", memory)
    assert memory.loads - first == 2  # the new one, and the one that stands before it now
