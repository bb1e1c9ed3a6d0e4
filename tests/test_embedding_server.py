"""Embedders: a real server on this machine, its answers and its mistakes."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from memos.errors import ArgumentError, BackendError
from memos.records.embedding import OpenAIEmbedder, resolve

from .embedding_help import vector_of, vectors_of

KEY = "sk-very-secret-0123456789"


class Server(http.server.ThreadingHTTPServer):
    """Answers with ``vector_of``; before that, once each, with what stands in ``script``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        self.server.paths.append(self.path)
        data = [
            {"object": "embedding", "index": i, "embedding": vector_of(text)}
            for i, text in enumerate(body["input"])
        ]
        status, headers, answer = 200, {}, json.dumps({"data": data[::-1]})
        if self.server.script:
            step = self.server.script.pop(0)
            if callable(step):
                answer = json.dumps(step(data))
            elif isinstance(step, tuple):
                status, headers, answer = step
            elif isinstance(step, str):
                answer = step
            elif isinstance(step, float):
                time.sleep(step)
            else:  # hangs up in the middle of its answer
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"data"')
                return
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.encode())))
            self.end_headers()
            self.wfile.write(answer.encode())
        except ConnectionError:  # the client did not wait so long, which is what is tested
            self.close_connection = True

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.server.keys.append(self.headers.get("Authorization"))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def client(server: Server, **options: Any) -> OpenAIEmbedder:
    return OpenAIEmbedder(server.url, "m", **{"backoff_s": 0.001, "timeout_s": 10.0, **options})


def test_server_batches_order_and_progress(server: Server) -> None:
    embedder = client(server, batch_size=4, extra={"dimensions": 8})
    texts = [f"text {i}" for i in range(10)]
    calls: list[tuple[int, int]] = []
    got = embedder.embed(texts, progress=lambda *call: calls.append(call))
    np.testing.assert_array_equal(got, vectors_of(texts))
    assert got.dtype == np.float32
    assert calls == [(4, 10), (8, 10), (10, 10)]
    assert server.paths == ["/v1/embeddings"] * 3
    assert server.requests[2] == {
        "model": "m",
        "input": texts[8:],
        "encoding_format": "float",
        "dimensions": 8,
    }
    assert server.keys == [None] * 3
    assert embedder.dim == 8
    assert embedder.embed([]).shape == (0, 8)
    assert len(server.requests) == 3


def test_server_is_asked_for_its_dim_once(server: Server) -> None:
    embedder = client(server)
    assert (embedder.dim, embedder.dim) == (8, 8)
    assert len(server.requests) == 1
    assert client(server, dim=5).dim == 5
    assert len(server.requests) == 1


def test_server_prefixes_and_empty_texts(server: Server) -> None:
    embedder = client(server, prefixes={"query": "ask: "})
    embedder.embed(["a", ""], "query")
    embedder.embed(["a", ""])
    assert [r["input"] for r in server.requests] == [["ask: a", "ask: "], ["a", " "]]
    assert embedder.identity != client(server).identity
    assert client(server, identity="mine").identity == "mine"


def test_the_key_is_sent_and_shown_nowhere(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for embedder in (client(server), client(server, api_key=KEY)):
        server.script = [(401, {}, f"bad key {KEY} or Bearer {KEY} " * 50)]
        with pytest.raises(BackendError, match=r"HTTP 401: bad key \*\*\*") as caught:
            embedder.embed(["a"])
        shown = repr(embedder) + embedder.identity + str(caught.value) + repr(caught.value)
        for length in (len(KEY), 8):
            assert KEY[:length] not in shown
        assert caught.value.__cause__ is None
    assert server.keys == [f"Bearer {KEY}"] * 2
    client(server, api_key="").embed(["a"])
    assert server.keys[2] is None


@pytest.mark.parametrize("step", [(429, {}, "slow"), (503, {"Retry-After": "0"}, ""), None])
def test_server_that_recovers(server: Server, step: Any) -> None:
    server.script = [step, step]
    np.testing.assert_array_equal(client(server).embed(["a"]), vectors_of(["a"]))
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((429, {}, "slow down"), "HTTP 429: slow down, after 3 attempts"),
        ((500, {}, ""), "HTTP 500, after 3 attempts"),
        (None, "IncompleteRead.*after 3 attempts"),
        (1.0, "no answer within 0.2 s, after 3 attempts"),
    ],
)
def test_server_that_does_not_recover(server: Server, step: Any, message: str) -> None:
    server.script = [step] * 3
    with pytest.raises(BackendError, match=message):
        client(server, retries=2, timeout_s=0.2 if step == 1.0 else 10.0).embed(["a"])
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((400, {}, '{"error": "no such model"}'), "HTTP 400: .*no such model"),
        ((302, {"Location": "/elsewhere"}, ""), "HTTP 302"),
        ('{"data": [{"ind', "Unterminated string"),
        ("[]", "an object with a list 'data'"),
        (lambda d: {"data": d[:1]}, "2 vectors wanted, 1 came"),
        (lambda d: {"data": d + d}, "2 vectors wanted, 4 came"),
        (lambda d: {"data": [d[0], d[0]]}, "indexes 0 to 1 wanted"),
        (lambda d: {"data": [d[0], {**d[1], "index": None}]}, "indexes 0 to 1 wanted"),
        (lambda d: {"data": [d[0], {"index": 1}]}, "unequal length|numbers wanted"),
        (lambda d: {"data": [{**e, "embedding": [1, 2]} for e in d]}, "of 8 numbers .* of 2 came"),
        (lambda d: {"data": [d[0], {**d[1], "embedding": [1]}]}, "unequal length"),
        (lambda d: {"data": [{**e, "embedding": "AAAA"} for e in d]}, "numbers wanted"),
        (lambda d: {"data": [{**e, "embedding": [float("nan")] * 8} for e in d]}, "finite"),
        (lambda d: {"data": [{**e, "embedding": [1e300] * 8} for e in d]}, "finite"),
    ],
)
def test_answers_that_are_not_taken(server: Server, step: Any, message: str) -> None:
    embedder = client(server, dim=8)
    server.script = [step]
    with pytest.raises(BackendError, match=message):
        embedder.embed(["a", "b"])
    assert len(server.requests) == 1, "such an answer would be the same again"
    assert "/elsewhere" not in server.paths
    np.testing.assert_array_equal(embedder.embed(["a", "b"]), vectors_of(["a", "b"]))


def test_a_server_that_leaves_out_the_indexes(server: Server) -> None:
    server.script = [lambda d: {"data": [{"embedding": e["embedding"]} for e in d]}]
    np.testing.assert_array_equal(client(server).embed(["a", "b"]), vectors_of(["a", "b"]))


def test_nobody_listens(server: Server) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_address[1]}"
    with pytest.raises(BackendError, match=r"ConnectionRefusedError.*after 2 attempts"):
        OpenAIEmbedder(url, "m", retries=1, backoff_s=0.001).embed(["a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "ftp://x"}, "base_url: http"),
        ({"base_url": "http://user:secret@x/v1"}, "base_url: no user"),
        ({"base_url": "http://x/v1?key=secret"}, "base_url: no user"),
        ({"api_key": "a\nb"}, "api_key: printable ASCII"),
        ({"batch_size": 0}, "batch_size from 1"),
        ({"prefixes": {"ask": "?"}}, "prefixes: of document, query"),
    ],
)
def test_mistakes_about_a_server(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        OpenAIEmbedder(**{"base_url": "http://x/v1", "model": "m", **arguments})
    assert "secret" not in str(caught.value)


def test_resolving_a_server_asks_it_nothing(server: Server) -> None:
    embedder = client(server)
    assert resolve(embedder) is embedder
    assert not server.requests
