"""Sentences taken apart, rows made of them, and pairs from a server of OpenAI's protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos.adapters.learning.endpoint import ChatEndpoint, pairs_by, parse_pairs
from memos.adapters.learning.gate import contains, normalized
from memos.adapters.learning.rows import Row, questions_of, rows_from, second_person, wordings_of
from memos.adapters.learning.sentences import parse, resolve_pronouns, split_sentences
from memos.errors import ArgumentError, BackendError

from .learning_model import Memory, memories

FACTS = json.loads((Path(__file__).parent.parent / "benchmarks" / "facts.json").read_text())


@pytest.mark.parametrize(
    ("sentence", "subject", "base", "rest"),
    [
        ("Ada works at Acme.", "Ada", "work", "at Acme"),
        ("Ada's favourite tea is oolong.", "Ada's favourite tea", "be", "oolong"),
        ("The warranty of the Dovrell printer lasts 7 years.",
         "The warranty of the Dovrell printer", "last", "7 years"),
        ("Dr. Ada Quill wrote two books", "Dr. Ada Quill", "write", "two books"),
        ("I have a dog named Rex.", "I", "have", "a dog named Rex"),
        ("Bo juggles knives.", "Bo", "juggle", "knives"),
        ("The drives of Acme are loud.", "The drives of Acme", "be", "loud"),
    ],
)  # fmt: skip
def test_clauses(sentence: str, subject: str, base: str, rest: str) -> None:
    clause = parse(sentence)
    assert clause is not None
    assert (clause.subject, clause.base, clause.rest) == (subject, base, rest)


@pytest.mark.parametrize(
    "sentence", ["Is it late?", "Ada is not tall.", "Rain tomorrow.", "Stop!", "Ada can swim fast."]
)
def test_what_is_no_plain_statement_stays_whole(sentence: str) -> None:
    assert parse(sentence) is None
    rows = rows_from(memories(sentence)).train
    assert any(row.is_chat and sentence[:4] in row.answer for row in rows)


@pytest.mark.parametrize(
    ("sentence", "questions"),
    [
        ("Maren Oduya lives in Tarvik.", {"Where does Maren Oduya live?"}),
        ("Tobin Varga was born in 1971.", {"When was Tobin Varga born?"}),
        ("The lamp was designed by Ilse Brand.", {"Who designed the lamp?"}),
        ("The lamp weighs 840 grams.", {"How much does the lamp weigh?"}),
        ("The head of Acme is Ann Lee.", {"Who is the head of Acme?", "Who is Acme's head?"}),
        ("Bo wrote the novel Copper Orchard.", {"Which novel did Bo write?"}),
        ("I live in Oslo.", {"Where do I live?"}),
        ("The drone has a flight time of 5 minutes.", {"Which flight time does the drone have?"}),
    ],
)
def test_questions(sentence: str, questions: set[str]) -> None:
    clause = parse(sentence)
    assert clause is not None
    assert questions <= {*questions_of(clause), *wordings_of(clause)}


def test_sentences_and_pronouns() -> None:
    text = "Dr. Ada Quill works at Acme. She lives in Oslo! Her dog is named Rex.\nTea is hot"
    assert list(resolve_pronouns(split_sentences(text))) == [
        "Dr. Ada Quill works at Acme.", "Dr. Ada Quill lives in Oslo!",
        "Dr. Ada Quill's dog is named Rex.", "Tea is hot.",
    ]  # fmt: skip


def test_what_users_say_of_themselves_is_said_to_them() -> None:
    assert second_person("I was born in Oslo and my dog likes me.") == (
        "You were born in Oslo and your dog likes you."
    )
    assert second_person("Ada said no.") == "Ada said no."
    rows = rows_from(memories("I live in Oslo.")).train
    asked = [row for row in rows if "here do I live?" in row.prompt]
    assert asked
    assert {row.answer for row in asked} <= {"You live in Oslo.", "Oslo."}


def test_rows_hold_the_answer_and_the_gate_keeps_wordings_back() -> None:
    rows = rows_from(memories(*(fact["statement"] for fact in FACTS)))
    by_source: dict[int, list[Row]] = {}
    for row in rows.train:
        by_source.setdefault(row.source, []).append(row)
    assert len(by_source) == len(FACTS)
    for source, fact in enumerate(FACTS):
        prompts = [row for row in by_source[source] if row.is_chat]
        assert len(prompts) >= 5, fact
        assert any(contains(row.answer, fact["answer"]) for row in prompts), fact
        assert any(not row.is_chat for row in by_source[source]), fact
    trained = {row.prompt for row in rows.train}
    assert trained.isdisjoint(question for question, _ in rows.held_out)
    assert len(rows.held_out) >= len(FACTS)


def test_the_benchmarks_questions_are_in_no_row() -> None:
    """Nor inside one: an aside around a template's question would make it known."""
    rows = rows_from(memories(*(fact["statement"] for fact in FACTS)))
    trained = " | ".join(row.prompt.lower() for row in rows.train)
    for fact in FACTS:
        assert len(fact["questions"]) == 2
        for question in fact["questions"]:
            assert question.lower().rstrip("?.") not in trained
            assert not contains(question, fact["answer"])


def test_pairs_in_metadata_become_rows() -> None:
    cube = Memory("a", "Ada works at Acme.", {"questions": [{"q": "Ada's desk?", "a": "At Acme."}]})
    rows = rows_from([cube])
    assert Row("Ada's desk?", "At Acme.", "Ada works at Acme.", True, 0) in rows.train
    assert ("Ada's desk?", "At Acme.") in rows.trained


@pytest.mark.parametrize(
    ("cubes", "message"),
    [
        ([], "at least one memory"),
        (memories(""), "text wanted, that of m0 is empty"),
        (memories("Fine.", " \n"), "that of m1 is empty"),
        ([Memory("x", b"bytes")], "memories of text wanted, x holds bytes"),
        (memories("a " * 20_000), "at most 20000 characters"),
        ([Memory("x", "Fine.", {"questions": [{"q": "only"}]})], 'metadata "questions"'),
    ],
)
def test_refused_memories(cubes: list[Memory], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        rows_from(cubes)


@given(st.text(max_size=200))
@settings(max_examples=200)
def test_any_text_gives_rows_or_is_refused(text: str) -> None:
    try:
        rows = rows_from([Memory("any", text)])
    except ArgumentError:
        assert not text.strip()
        return
    for row in rows.train:
        assert row.prompt.strip()
    assert rows == rows_from([Memory("any", text)])


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("It is Tarvik.", "Tarvik", True),
        ("It is Tarviks-on-Sea, a tarn.", "Tarv", False),
        ("The copper  Orchard!", "Copper Orchard", True),
        ("14 419 or 44190", "4419", False),
        ("window seats", "window seat", True),
        ("Bogot\u00e1", "Bogota", True),
        ("about 3.5 kg", "3", False),
        ("H", ("Ag", "H"), True),
        ("hydrogen", "H", False),
        ("anything", "", False),
    ],
)
def test_containment(answer: str, wanted: str, right: bool) -> None:
    assert contains(answer, wanted) is right
    assert normalized(normalized(answer)) == normalized(answer)


class Server(HTTPServer):
    """Answers chat requests with what stands in ``replies``; keeps what it was asked."""

    replies: list[tuple[int, bytes]]
    asked: list[tuple[str, dict[str, Any], str | None]]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body), self.headers["Authorization"]))
        status, reply = self.server.replies.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), _Handler)
    made.replies, made.asked = [], []
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def endpoint(server: Server, **options: Any) -> ChatEndpoint:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return ChatEndpoint(url, "tiny", "sk-secret", backoff_s=0.0, **options)


def reply(content: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def test_an_endpoint_writes_questions(server: Server) -> None:
    said = 'Sure:\n```json\n[{"q": "Where is Ada?", "a": "Ada is at Acme."}, {"q": 1}]\n```'
    server.replies = [(503, b""), (200, reply(said))]
    rows = rows_from(memories("Ada works at Acme."), pairs_by(endpoint(server)))
    assert ("Where is Ada?", "Ada is at Acme.") in {(r.prompt, r.answer) for r in rows.train}
    path, body, key = server.asked[-1]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer sk-secret", "tiny")
    assert "Ada works at Acme." in body["messages"][0]["content"]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(401, b"sk-secret is wrong")], "HTTP 401"),
        ([(500, b"")] * 3, "HTTP 500, after 3 attempts"),
        ([(200, b"no json")], "something else came"),
        ([(200, reply("I cannot do that."))], "a JSON list"),
        ([(302, b"")], "HTTP 302"),
    ],
)
def test_an_endpoint_that_fails(
    server: Server, replies: list[tuple[int, bytes]], message: str
) -> None:
    server.replies = list(replies)
    with pytest.raises(BackendError, match=message) as error:
        rows_from(memories("Ada works at Acme."), pairs_by(endpoint(server, retries=2)))
    assert "sk-secret" not in str(error.value)
    assert "sk-secret" not in repr(endpoint(server))


def test_an_endpoint_that_is_not_there(server: Server) -> None:
    gone = endpoint(server, retries=0)
    server.server_close()
    with pytest.raises(BackendError, match="after 1 attempts"):
        gone("hello")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "nothing", "http://u:p@127.0.0.1/v1"])
def test_refused_endpoints(url: str) -> None:
    with pytest.raises(ArgumentError, match="base_url"):
        ChatEndpoint(url, "tiny")


def test_pairs_of_a_reply() -> None:
    assert parse_pairs('[{"question": " Q ", "answer": "A"}]') == [("Q", "A")]
    assert parse_pairs("[1, 2]") == parse_pairs("[broken") == parse_pairs("{}") == []
