"""What texts say: near-duplicates that are one, facts that end others, insights worth keeping."""

from __future__ import annotations

import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory, MemCube, TreeTextMemory
from memos.adapters.learning.endpoint import ChatEndpoint
from memos.errors import ArgumentError, BackendError
from memos.lifecycle.duplicates import same_statement
from memos.lifecycle.extract import Insight, by_model, by_rules, told_of
from memos.lifecycle.facts import fact_of, intervals
from memos.records.check import check
from memos.records.validity import holding, holds_at

SAME = [
    ("Ada lives in Paris.", "ada lives in paris"),
    ("Ada lives in Paris.", "Ada really lives in Paris!"),
    ("I don't like mushrooms.", "I do not like mushrooms."),
    ("The meeting is at 3 pm.", "Meeting is at 3 pm"),
    ("In May Ada moved to Rome.", "Ada moved to Rome in May."),
    ("He has two cats.", "He has 2 cats."),
    ("I'm allergic to peanuts", "I am allergic to peanuts."),
    ("Oh, the Wi-Fi password is tulip42.", "The wi-fi password is tulip42"),
    ("Ich wohne in Köln.", "ich wohne in Köln"),
    ("猫は 魚が 好き", "猫は 魚が 好き。"),
]
# Pairs that an embedder finds alike, and that say different things.
DIFFERENT = [
    ("Ada lives in Paris.", "Ada does not live in Paris."),
    ("I like mushrooms.", "I don't like mushrooms."),
    ("Ada never eats fish.", "Ada eats fish."),
    ("Ada has two cats.", "Ada has three cats."),
    ("The code is 4711.", "The code is 4712."),
    ("It costs 1.50 euros.", "It costs 150 euros."),
    ("The flight is at 3:15.", "The flight is at 3:51."),
    ("It is -5 degrees outside.", "It is +5 degrees outside."),
    ("Revenue grew by 5%.", "Revenue grew by 5."),
    ("The price is $5.", "The price is €5."),
    ("Ada lives in Paris.", "Bob lives in Paris."),
    ("Ada lives in Paris.", "Ada lives in London."),
    ("Ada gave Bob the key.", "Bob gave Ada the key."),
    ("Bob is taller than Ada.", "Ada is taller than Bob."),
    ("Man bites dog.", "Dog bites man."),
    ("From Paris to Rome by train.", "From Rome to Paris by train."),
    ("Call before noon.", "Call after noon."),
    ("The shop is open on Monday.", "The shop is open until Monday."),
    ("Ada is the director.", "Ada was the director."),
    ("Ada will pay.", "Ada may pay."),
    ("You must pay.", "You must not pay."),
    ("All rooms are free.", "Some rooms are free."),
    ("Only Ada has a key.", "Ada has a key."),
    ("Ada likes tea.", "Does Ada like tea?"),
    ("Ada likes tea.", "Ada likes tea?"),
    ("Ada likes hot tea.", "Ada likes cold tea."),
    ("Increase the dose.", "Decrease the dose."),
    ("Take the left road.", "Take the right road."),
    ("Ada likes tea and coffee.", "Ada likes tea or coffee."),
    ("Ada likes tea.", "Ada likes tea with milk."),
    ("My sister is ill.", "My brother is ill."),
    ("Turn it on.", "Turn it off."),
    ("She can't come.", "She can come."),
    ("He hardly sleeps.", "He sleeps."),
    ("x = y", "x > y"),
    ("C is fine.", "C++ is fine."),
    ("f(a) - b", "f(a) + b"),
]  # fmt: skip


@pytest.fixture
def mos() -> Iterator[MOS]:
    now = itertools.count(1.7e9)
    with MOS(clock=lambda: next(now)) as made:
        for name in ("notes", "long"):
            made.register_memory(GeneralTextMemory(name, embedder=None, clock=lambda: next(now)))
        yield made
        assert check(made.records) == []


# Near-duplicates.


@pytest.mark.parametrize(("one", "other"), SAME)
def test_texts_that_say_the_same(one: str, other: str) -> None:
    assert same_statement(one, other) is not None
    assert same_statement(other, one) is not None


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_texts_that_must_not_become_one(one: str, other: str) -> None:
    assert same_statement(one, other) is None
    assert same_statement(other, one) is None


def test_no_tricky_pair_is_merged_and_every_plain_one_is(mos: MOS) -> None:
    for one, other in DIFFERENT:
        mos.add("notes", one)
        mos.add("notes", other)
    mos.merge_duplicates("notes")
    merged = [cube for cube in mos.memory("notes").cubes(None) if cube.source == "merge"]
    assert merged == []
    for one, other in SAME:
        mos.add("long", one)
        mos.add("long", other)
    found = mos.merge_duplicates("long")
    pairs = {frozenset(mos.get(id).content for id in cube.derived_from) for cube in found}
    assert {frozenset(pair) for pair in SAME if pair[0] != pair[1]} <= {
        frozenset(pair) for pair in pairs
    } | {frozenset(pair) for pair in SAME[:2]}
    assert len(mos.memory("long").cubes(None)) == len(found) == len(SAME) - 1  # Ada's are one


def test_metadata_keeps_apart_what_it_says_of_whom(mos: MOS) -> None:
    for metadata in ({"user_id": "a"}, {"user_id": "b"}, {"speaker": "Bob"}, {}):
        mos.add("notes", "I live in Paris.", metadata)
    mos.add("notes", "I live in Paris!", acl={"read": ["user:ann"]})
    assert mos.find_duplicates("notes") == []
    mos.add("notes", "I live in Paris!", {"user_id": "a", "timestamp": "2024-01-01", "page": 3})
    (pair,) = mos.find_duplicates("notes")
    assert pair.why == "the same words in the same order"
    (cube,) = mos.merge_duplicates("notes")
    assert cube.metadata["user_id"] == "a"


def test_a_merge_keeps_its_sources_says_why_and_can_be_taken_back(mos: MOS) -> None:
    friend = mos.add("notes", "Bob is a friend.")
    one = mos.add("notes", "Ada likes tea.", {"said": 1, "page": 1}, importance=0.3)
    two = mos.add(
        "notes", "Ada likes tea!", {"said": 1, "page": 2}, importance=0.9,
        relations=[{"type": "told_by", "target": friend.id}],
    )  # fmt: skip
    mos.get(one.id)
    before = [(h.id, h.score) for h in mos.retrieve("notes", "who likes tea")]
    states = [mos.get(id).state for id in (one.id, two.id)]
    versions = [mos.get(id).digest for id in (one.id, two.id)]
    (made,) = mos.merge_duplicates("notes")
    assert (made.importance, made.metadata) == (0.9, {"said": 1, "page": 2})
    assert made.derived_from == (one.id, two.id)
    assert {(e.type, e.target) for e in made.relations} == {
        ("merged_from", one.id), ("merged_from", two.id), ("told_by", friend.id),
    }  # fmt: skip
    hits = mos.retrieve("notes", "who likes tea")
    assert hits[0].id == made.id
    assert {one.id, two.id} & {hit.id for hit in hits} == set()
    told = str(mos.explain(hits[0]))
    assert f"merged from {one.id}: the same words in the same order" in told
    assert mos.get(one.id).state == "MERGED"
    assert [cube.id for cube in mos.undo_merge(made.id)] == [one.id, two.id]
    assert [mos.get(id).state for id in (one.id, two.id)] == states
    assert [mos.get(id).digest for id in (one.id, two.id)] == versions
    after = [(h.id, h.score) for h in mos.retrieve("notes", "who likes tea")]
    assert [id for id, _ in after] == [id for id, _ in before]
    with pytest.raises(ArgumentError, match="made by a merge"):
        mos.undo_merge(one.id)


def test_a_merge_that_has_changed_since_is_not_taken_back(mos: MOS) -> None:
    mos.add("notes", "Ada likes tea.")
    mos.add("notes", "Ada likes tea!")
    (made,) = mos.merge_duplicates("notes")
    mos.update("notes", made.id, "Ada likes green tea.")
    with pytest.raises(ArgumentError, match="would be lost"):
        mos.undo_merge(made.id)


def test_what_is_equal_to_a_merged_cube_is_merged_with_it(mos: MOS) -> None:
    mos.add("notes", "Ada likes tea.", {"page": 1})
    mos.add("notes", "Ada really likes tea.", {"page": 2})
    mos.add("notes", "Ada really likes tea.", {"page": 1})
    third = mos.memory("notes").cubes(1)[0]
    first = mos.memory("notes").cubes()[2]
    (made,) = mos.merge_duplicates("notes", [first.id, mos.memory("notes").cubes()[1].id])
    assert third.id not in made.derived_from or len(made.derived_from) == 3
    assert len(mos.merge_duplicates("notes")) <= 1
    assert len(mos.memory("notes").cubes()) == 1


def test_only_statements_are_looked_at(mos: MOS) -> None:
    mos.register_memory(TreeTextMemory("book", embedder=None))
    with pytest.raises(ArgumentError, match="kind tree"):
        mos.find_duplicates("book")


# Facts.


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("Ada lives in Paris.", ("ada", "home", "paris")),
        ("Ada moved to Berlin in 2021.", ("ada", "home", "berlin")),
        ("Ada has moved from Paris to Berlin.", ("ada", "home", "berlin")),
        ("I live in Rome.", ("ann", "home", "rome")),
        ("Ada works at Acme.", ("ada", "employer", "acme")),
        ("Bob joined Initech last week.", ("bob", "employer", "initech")),
        ("The capital of Kazakhstan is Astana.", ("kazakhstan", "capital", "astana")),
        ("My favorite colour is red.", ("ann", "favourite colour", "red")),
        ("Ada's birthday is 3 May.", ("ada", "birthday", "3 may")),
        ("Ada's car is red.", None),
        ("Ada has two cats.", None),
        ("She lives in Rome.", None),
        ("Does Ada live in Rome?", None),
        ("Ada likes Rome.", None),
    ],
)
def test_facts_with_one_value_at_a_time(text: str, fact: tuple[str, str, str] | None) -> None:
    found = fact_of(text, "ann")
    assert (None if found is None else (*found.key, found.value)) == fact


def at(text: str, when: float, **metadata: Any) -> MemCube:
    return MemCube(f"{text} {when}", "text", text, metadata, created_at=when)


def test_each_fact_ends_where_the_next_one_begins() -> None:
    cubes = [
        at("Ada lives in Paris.", 100.0),
        at("Ada moved to Berlin.", 200.0),
        at("Ada lives in Berlin.", 250.0),
        at("Ada no longer lives in Berlin.", 300.0),
        at("Bob lives in Paris.", 150.0),
        at("Ada moved to Rome.", 400.0, said_at="1970-01-01T00:05:50"),
    ]
    found = {id.rsplit(" ", 1)[0]: value for id, value in intervals(cubes).items()}
    assert found == {
        "Ada lives in Paris.": (None, 200.0),
        "Ada moved to Berlin.": (200.0, 300.0),
        "Ada lives in Berlin.": (250.0, 300.0),
        "Ada moved to Rome.": (350.0, None),
    }
    two_users = [at("Ada lives in Paris.", 1.0, user_id="a"), at("Ada lives in Rome.", 2.0)]
    assert intervals(two_users) == {}


def test_what_holds_when() -> None:
    fact = {"valid_from": 10, "valid_to": 20.0}
    assert [holds_at(fact, when) for when in (9.9, 10, 19.9, 20)] == [False, True, True, False]
    assert holds_at({}, 0)
    assert holds_at({"valid_to": "soon", "valid_from": True}, 5)


def test_the_newer_fact_comes_first_and_the_older_one_is_found_in_its_time(mos: MOS) -> None:
    old = mos.add("notes", "Ada lives in Paris.", {"said_at": 1.5e9})
    mos.add("notes", "Ada likes Paris.", {"said_at": 1.5e9})
    new = mos.add("notes", "Ada moved to Berlin.", {"said_at": 1.6e9})
    assert mos.settle_facts("notes") == 2
    assert mos.settle_facts("notes") == 0
    assert mos.get(old.id).metadata["valid_to"] == mos.get(new.id).metadata["valid_from"] == 1.6e9
    hits = [hit.id for hit in mos.retrieve("notes", "Where in Paris or Berlin does Ada live?")]
    assert hits.index(new.id) < hits.index(old.id)
    for when, id in ((1.55e9, old.id), (1.65e9, new.id)):
        found = mos.retrieve("notes", "where does Ada live", filters=holding(when))
        ids = {hit.id for hit in found}
        assert id in ids
        assert {old.id, new.id} - {id} - ids
    mos.freeze(new.id)
    mos.add("notes", "Ada lives in Rome.", {"said_at": 1.65e9})
    mos.settle_facts("notes")
    assert "valid_to" not in mos.get(new.id).metadata


# Insights.

CHAT = [
    ("Ann", "Hi! I'm Ann and I live in Paris.", ["Ann lives in Paris."]),
    ("Ann", "I really like green tea. Do you?", ["Ann really likes green tea."]),
    ("Ann", "I don't like mushrooms.", ["Ann does not like mushrooms."]),
    ("Ann", "My birthday is on 3 May.", ["Ann's birthday is on 3 May."]),
    ("Ann", "I think I might move to Rome.", []),
    ("Ann", "What should I cook?", []),
    ("Ann", "Thanks for your help!", []),
    ("Ann", "I have a question about Python.", []),
    ("Ann", "It is raining.", []),
    ("Ann", "Bob works at Acme, and my sister is a doctor.",
     ["Bob works at Acme.", "Ann's sister is a doctor."]),
    ("Ann", "The deadline is June 12.", ["The deadline is June 12."]),
    ("Ann", "I can't stand loud music.", ["Ann cannot stand loud music."]),
    (None, "I am allergic to peanuts.", ["The user is allergic to peanuts."]),
]  # fmt: skip


@pytest.mark.parametrize(("speaker", "said", "kept"), CHAT)
def test_rules_keep_what_lasts(speaker: str | None, said: str, kept: list[str]) -> None:
    metadata = {} if speaker is None else {"speaker": speaker}
    assert [one.text for one in by_rules([MemCube("1", "text", said, metadata)])] == kept


def test_what_is_repeated_is_one_insight_with_all_its_sources() -> None:
    said = ["I like tea.", "I really like tea!", "i like tea", "I like coffee."]
    cubes = [MemCube(str(i), "text", one, {"speaker": "Ann"}) for i, one in enumerate(said)]
    cubes.append(MemCube("9", "text", "I like tea.", {"role": "assistant"}))
    tea, coffee = by_rules(cubes)
    assert (tea.sources, coffee.sources) == (("0", "1", "2"), ("3",))
    assert tea.importance > coffee.importance
    assert tea.kind == "preference"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("I'm happy.", "Ann is happy."),
        ("I have a dog and I walk it.", "Ann has a dog and Ann walk it."),
        ("I study law.", "Ann studies law."),
        ("They met me and my dog.", "They met Ann and Ann's dog."),
    ],
)
def test_the_first_person_is_somebody(said: str, told: str) -> None:
    assert told_of(said, "Ann") == told


def test_distillation_keeps_insights_with_their_sources(mos: MOS) -> None:
    ids = [
        mos.add("notes", said, {"speaker": "Ann", "user_id": "u1"} if name else {}).id
        for name, said, _ in CHAT
    ]
    job = mos.distil("notes", "long")
    kept = {cube.content: cube for cube in mos.memory("long").cubes(None)}
    assert set(kept) == {one for _, _, some in CHAT for one in some}
    assert (job.state, job.result["new"]) == ("DONE", len(kept))
    tea = kept["Ann really likes green tea."]
    assert tea.derived_from == (ids[1],)
    assert [(e.type, e.target) for e in tea.relations] == [("distilled_from", ids[1])]
    assert tea.metadata["user_id"] == "u1"
    assert tea.metadata["insight"] == "preference"
    assert mos.distil("notes", "long").units == 0  # nothing is new
    again = mos.add("notes", "I really like green tea, you know?", {"speaker": "Ann"})
    mos.add("notes", "I really like green tea!", {"speaker": "Ann", "user_id": "u1"})
    mos.distil("notes", "long")
    (tea,) = [c for c in mos.memory("long").cubes(None) if "green tea" in c.content]
    assert len(tea.relations) == 2
    assert tea.importance > 0.6
    assert again.id not in {e.target for e in tea.relations}  # a question


def test_distilled_facts_end_one_another(mos: MOS) -> None:
    mos.add("notes", "Ada lives in Paris.", {"said_at": 1.5e9})
    mos.distil("notes", "long")
    mos.add("notes", "Ada moved to Berlin.", {"said_at": 1.6e9})
    job = mos.distil("notes", "long")
    assert job.result["ended"] == 2
    found = {cube.content: cube.metadata for cube in mos.memory("long").cubes(None)}
    assert found["Ada lives in Paris."]["valid_to"] == 1.6e9
    assert found["Ada moved to Berlin."]["valid_from"] == 1.6e9


def test_an_extractor_of_the_users_own_and_one_that_fails(mos: MOS) -> None:
    one = mos.add("notes", "The sky is blue.")
    job = mos.distil("notes", "long", extract=lambda cubes: [Insight("Sky: blue.", (one.id,))])
    assert job.state == "DONE"
    assert mos.memory("long").cubes()[0].content == "Sky: blue."

    def broken(cubes: Any) -> Any:
        raise KeyError("no")

    for wrong in (broken, lambda cubes: ["x"], lambda cubes: [Insight("x", ("nobody",))]):
        job = mos.distil("notes", "long", extract=wrong, again=True)
        assert (job.state, job.failed) == ("FAILED", 1)
        assert job.error
    assert len(mos.memory("long").cubes()) == 1


class Server(http.server.BaseHTTPRequestHandler):
    """What an OpenAI-compatible server is asked and answers."""

    asked: list[Any] = []  # noqa: RUF012
    answer = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body["messages"][0]["content"])
        reply = {"choices": [{"message": {"content": self.answer}}]}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[str]:
    Server.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_model_behind_an_endpoint_extracts(mos: MOS, endpoint: str) -> None:
    one = mos.add("notes", "I like tea.", {"speaker": "Ann"})
    mos.add("notes", "Lovely weather.", {"speaker": "Ann"})
    Server.answer = "Sure:\n" + json.dumps(
        [
            {"text": "Ann  likes tea.", "sources": [1, 99], "kind": "preference"},
            {"text": "Nobody said this.", "sources": [7]},
            {"text": "", "sources": [1]},
            "rubbish",
        ]
    )
    extract = by_model(ChatEndpoint(endpoint, "tiny", retries=0))
    job = mos.distil("notes", "long", extract=extract)
    assert job.state == "DONE"
    (cube,) = mos.memory("long").cubes()
    assert (cube.content, cube.derived_from) == ("Ann likes tea.", (one.id,))
    assert "[1] Ann: I like tea." in Server.asked[0]
    Server.answer = "I would rather not."
    with pytest.raises(BackendError, match="JSON list"):
        extract([one])


def test_a_local_model_extracts() -> None:
    from memos.lifecycle.extract import local_model
    from tests.models import tiny

    model = tiny("llama")

    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> Any:
            import torch

            return {"input_ids": torch.tensor([[ord(c) % 90 + 1 for c in text[:40]]])}

        def decode(self, ids: Any, skip_special_tokens: bool) -> str:
            return f"[] {len(ids)}"

    generate = local_model(model, Tokenizer(), max_new_tokens=4)
    assert generate("Which facts?") == "[] 4"
    assert by_model(generate)([MemCube("1", "text", "I like tea.")]) == []
