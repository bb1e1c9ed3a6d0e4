"""Passwords and keys stand in no repr, dump, file, export, record or error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory, GraphMemory
from memos.adapters.learning.endpoint import ChatEndpoint
from memos.cube.secret import Secret
from memos.errors import MemosError
from memos.records._embedding_http import OpenAIEmbedder

WORD = "sk-quicksilver-4711"
NOBODY = "127.0.0.1:9"  # the discard port: nothing answers


def attributes(thing: Any, seen: set[int] | None = None, depth: int = 0) -> Iterator[str]:
    """What a logger could print of an object and all that hangs on it."""
    seen = set() if seen is None else seen
    if id(thing) in seen or depth > 6:
        return
    seen.add(id(thing))
    yield repr(thing)
    yield str(thing)
    inside: Any = getattr(thing, "__dict__", None)
    if isinstance(thing, dict):
        inside = thing
    elif isinstance(thing, list | tuple | set):
        inside = dict(enumerate(thing))
    for one in dict(inside or {}).values():
        yield from attributes(one, seen, depth + 1)


def server() -> Any:
    pytest.importorskip("neo4j")
    from memos.records.neo4j import Server

    return Server({"uri": f"bolt://{NOBODY}", "username": "ann", "password": WORD})


def graph() -> Any:
    pytest.importorskip("neo4j")
    params = {"uri": f"bolt://{NOBODY}", "username": "ann", "password": WORD}
    return GraphMemory("people", storage_backend="neo4j", connection_params=params, embedder=None)


HOLDERS = {
    "graph server": server,
    "graph memory": graph,
    "embedder": lambda: OpenAIEmbedder(f"http://{NOBODY}/v1", "m", WORD, retries=0),
    "text memory": lambda: GeneralTextMemory(
        "notes", embedder=OpenAIEmbedder(f"http://{NOBODY}/v1", "m", WORD, dim=4, retries=0)
    ),
    "endpoint": lambda: ChatEndpoint(f"http://{NOBODY}/v1", "m", WORD),
    "secret": lambda: Secret(WORD),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_nothing_shows_a_secret(name: str) -> None:
    holder = HOLDERS[name]()
    shown = list(attributes(holder))
    assert shown
    assert not [text for text in shown if WORD in text]
    for dump in (pickle.dumps, copy.deepcopy):
        said = []
        try:
            dumped = dump(holder)
        except TypeError as error:
            said.append(str(error))
        else:
            assert not [text for text in attributes(dumped) if WORD in text]
            assert not isinstance(dumped, bytes) or WORD.encode() not in dumped
        assert not [text for text in said if WORD in text]


def test_this_test_finds_secrets() -> None:
    class Careless:
        def __init__(self) -> None:
            self.inner = {"auth": ("ann", WORD)}

    assert [text for text in attributes(Careless()) if WORD in text]


def test_no_file_and_no_error_has_a_secret(tmp_path: Path) -> None:
    errors = []
    path = tmp_path / "m"
    with MOS(path, audit=True) as mos:
        mos.register_memory(HOLDERS["text memory"]())
        with pytest.raises(MemosError) as caught:
            mos.add("notes", "text")
        errors.append(caught.value)
        if (people := _graph_or_none()) is not None:
            with pytest.raises(MemosError) as caught:
                mos.register_memory(people)
            errors.append(caught.value)
        for params in ({"uri": f"bolt://ann:{WORD}@host"}, {"uri": WORD}, {"password": WORD}, WORD):
            with pytest.raises(MemosError) as caught:
                GraphMemory("p", storage_backend="neo4j", connection_params=params)
            errors.append(caught.value)
        with pytest.raises(MemosError) as caught:
            OpenAIEmbedder(f"http://ann:{WORD}@host/v1", "m")
        errors.append(caught.value)
        mos.register_memory(GeneralTextMemory("plain", embedder=None))
        mos.add("plain", "text")
        mos.export(tmp_path / "out.memcube", memory="plain")
        told = repr(mos.audit.records())
    for error in errors:
        chain: BaseException | None = error
        while chain is not None:
            assert WORD not in f"{chain!r} {chain}", chain
            chain = chain.__cause__ or chain.__context__
    assert WORD not in told
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) >= 3
    for file in files:
        assert WORD.encode() not in file.read_bytes(), file


def _graph_or_none() -> Any:
    try:
        import neo4j  # noqa: F401
    except ImportError:
        return None
    return graph()


def test_an_encrypted_store_shows_no_key(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = tmp_path / "key"
    from memos.records.keys import MasterKey

    MasterKey.new_file(key)
    secret = key.read_bytes().strip()
    with MOS(tmp_path / "m", key=f"file:{key}", audit=True) as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
        mos.add("notes", "the quicksilver key", id="quicksilver-id")
        mos.get("quicksilver-id")
        assert len(mos.audit.records(id="quicksilver-id")) == 2
        assert mos.audit.verify() == []
        assert secret.decode("ascii", "replace") not in repr(mos.records.database)
    for file in (tmp_path / "m").rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert secret not in data, file
            assert b"quicksilver" not in data, file
