"""Purges: of what a cube said no byte is left, in any file of the folder."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest

from memos import MOS, GeneralTextMemory, GraphMemory, TreeTextMemory, VectorMemory
from memos.errors import ArgumentError, NotFoundError, StoreError
from memos.records import vectors
from memos.records.check import check


class Words:
    """An embedder whose vectors are different noise for every text."""

    identity, dim = "words", 32

    def embed(self, texts: Any, kind: str = "document", progress: Any = None) -> Any:
        return numpy.stack(
            [numpy.random.default_rng(list(text.encode())).normal(size=32) for text in texts]
        ).astype(numpy.float32)


def bytes_of_vector(text: str) -> list[bytes]:
    """What of its vector would be recognised: the first numbers, in both widths."""
    (row,) = Words().embed([text])
    scaled = row / numpy.linalg.norm(row)
    return [v[:8].astype(kind).tobytes() for v in (row, scaled) for kind in ("<f4", "<f2")]


def holders(folder: Path, needles: list[bytes]) -> list[tuple[str, bytes]]:
    """(file, what) for whatever of this stands in any file of a folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            low = data.lower()
            found += [
                (str(path.relative_to(folder)), needle)
                for needle in needles
                if needle in data or needle.lower() in low
            ]
    return found


@pytest.fixture
def _indexes_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_SAVE_FROM", 1)


def filled(mos: MOS) -> list[str]:
    """Cubes around the one that is purged."""
    others = [{"content": f"Nothing to hide in room {i}.", "metadata": {"i": i}} for i in range(40)]
    return [cube.id for cube in mos.add_many("notes", others)]


SECRETS = [
    b"zarquon", b"vogsphere", b"slartibart", b"magrathea", b"krikkit", b"gargleblaster",
    b"betelgeuse", b"hooloovoo", b"trillian",
]  # fmt: skip


def secret_life(mos: MOS, others: list[str]) -> str:
    """A cube that says secrets in every place where a cube can say something."""
    cube = mos.add(
        "notes", "The code is Zarquon.", {"planet": "Vogsphere", "deep": {"name": ["Slartibart"]}},
        source="magrathea.txt", creator="krikkit", thread="gargleblaster",
        relations=[{"type": "near", "target": others[0], "properties": {"to": "betelgeuse"}}],
    )  # fmt: skip
    mos.update("notes", cube.id, "The other code is Hooloovoo.", author="krikkit")
    mos.archive(cube.id, why="trillian said so")
    mos.get(cube.id)
    return cube.id


@pytest.mark.usefixtures("_indexes_on_disk")
@pytest.mark.parametrize("state", ["hot", "archived", "deleted", "reopened"])
def test_no_byte_is_left(tmp_path: Path, state: str) -> None:
    folder = tmp_path / "store"
    needles = [*SECRETS]
    for text in ("The code is Zarquon.", "The other code is Hooloovoo."):
        needles += bytes_of_vector(text)
    with MOS(folder) as mos:
        notes = mos.register_memory(GeneralTextMemory("notes", embedder=Words()))
        others = filled(mos)
        id = secret_life(mos, others)
        digests = [bytes.fromhex(version.digest) for version in mos.history(id)]
        with mos.records.database.read() as connection:
            seq = notes.table.ids(connection, [id])[id]
            (digest,) = connection.exec_driver_sql(
                "SELECT digest FROM cubes WHERE seq = ?", (seq,)
            ).one()
        needles += [*digests, digest]
        assert mos.retrieve("notes", "hooloovoo")[0].id == id
    assert {path.split("/")[0] for path, _ in holders(folder, needles)} == {
        "records.sqlite", "indexes",
    }  # fmt: skip
    there = {needle for _, needle in holders(folder, needles)}
    assert set(SECRETS) <= there
    assert there & set(bytes_of_vector("The code is Zarquon."))
    with MOS(folder) as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=Words()))
        mos.retrieve("notes", "room 3")  # the index is read from its file
        if state == "archived":
            mos.archive(id)
        elif state == "deleted":
            mos.delete("notes", id)
        if state != "reopened":
            done = mos.purge(id)
            assert (done.memory, done.cubes, done.derived) == ("notes", 1, ())
            assert holders(folder, needles) == []
    if state == "reopened":
        with MOS(folder) as mos:
            mos.register_memory(GeneralTextMemory("notes", embedder=Words()))
            mos.purge(id)
    assert holders(folder, needles) == []
    with MOS(folder) as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=Words()))
        assert check(mos.records) == []
        assert len(mos.retrieve("notes", "nothing to hide", 100)) == 40
        with pytest.raises(NotFoundError):
            mos.get(id)
        with pytest.raises(ArgumentError, match="exists"):
            mos.add("notes", "Again.", id=id)
        (tomb,) = mos.history(id)
        assert (tomb.content, tomb.metadata, tomb.state) == ("", {}, "DELETED")
        assert [(t.new, t.why) for t in mos.transitions(id)][-1] == ("DELETED", "")
        mos.purge(id)  # once more does no harm
    assert holders(folder, needles) == []


def test_another_process_does_not_bring_a_purged_vector_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "_SAVE_FROM", 1)
    folder = tmp_path / "store"
    with MOS(folder) as one, MOS(folder) as two:
        for mos in (one, two):
            mos.register_memory(GeneralTextMemory("notes", embedder=Words()))
        others = filled(one)
        id = secret_life(one, others)
        two.retrieve("notes", "hooloovoo")
        two.memory("notes").close()  # its index stands in a file, and is in memory again
        two.retrieve("notes", "hooloovoo")
        one.purge(id)
        assert two.retrieve("notes", "room 3")
    needles = bytes_of_vector("The other code is Hooloovoo.")
    assert holders(folder, [*SECRETS, *needles]) == []


def test_a_reader_that_holds_the_log_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    with MOS(folder) as mos, MOS(folder) as other:
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
        id = secret_life(mos, filled(mos))
        with mos.records.database.outside() as connection:
            connection.execute("PRAGMA busy_timeout=50")
        held, let_go = threading.Event(), threading.Event()

        def read() -> None:
            with other.records.database.snapshot():
                other.records.memories()
                held.set()
                let_go.wait(60)

        thread = threading.Thread(target=read)
        thread.start()
        try:
            assert held.wait(60)
            with pytest.raises(StoreError, match="another process reads"):
                mos.purge(id)
        finally:
            let_go.set()
            thread.join()
        mos.purge(id)
        assert holders(folder, SECRETS) == []


def test_what_was_made_of_it_is_named(tmp_path: Path) -> None:
    with MOS(tmp_path / "s") as mos:
        for name in ("notes", "long"):
            mos.register_memory(GeneralTextMemory(name, embedder=None))
        one = mos.add("notes", "Ann likes zarquon.")
        mos.distil("notes", "long")
        two = mos.add("notes", "Ann really likes zarquon.")
        (made,) = mos.merge_duplicates("notes")
        insight = mos.memory("long").cubes()[0]
        done = mos.purge(one.id)
        assert set(done.derived) == {("long", insight.id), ("notes", made.id)}
        assert holders(tmp_path, [b"zarquon"])
        for id in (insight.id, made.id, two.id):
            mos.purge(id)
        assert holders(tmp_path, [b"zarquon"]) == []
        assert check(mos.records) == []


def test_what_hangs_on_it_goes_with_it(tmp_path: Path) -> None:
    with MOS(tmp_path / "s") as mos:
        tree = mos.register_memory(TreeTextMemory("book", embedder=None))
        root = tree.add_document(
            "# Cats\n\n## Zarquon\n\nFood of the hooloovoo.\n\nMagrathea.\n\n## Sleep\n\nLong.\n"
        )
        zarquon, _ = tree.children(root.id)
        gone = tree.children(zarquon.id)[1]
        mos.delete("book", gone.id)
        assert mos.purge(zarquon.id).cubes == 3
        assert holders(tmp_path, [b"zarquon", b"hooloovoo", b"magrathea"]) == []
        assert [cube.content for cube in tree.descendants(root.id)] == ["Sleep", "Long."]
        graph = mos.register_memory(GraphMemory("people", embedder=None))
        nodes = [
            mos.add("people", {"type": "node", "label": "Person", "properties": {"name": name}}).id
            for name in ("Zarquon", "Ada", "Bob")
        ]
        graph.relate(nodes[0], "KNOWS", nodes[1], properties={"since": "hooloovoo"})
        graph.relate(nodes[1], "KNOWS", nodes[0], properties={"since": "magrathea"})
        graph.relate(nodes[1], "LIKES", nodes[2])
        first = next(c for c in graph.cubes(None) if "hooloovoo" in str(c.content))
        mos.delete("people", first.id)
        assert mos.purge(nodes[0]).cubes == 3
        assert holders(tmp_path, [b"zarquon", b"hooloovoo", b"magrathea"]) == []
        assert len(graph.cubes(None)) == 3
        assert check(mos.records) == []


def test_a_whole_memory(tmp_path: Path) -> None:
    with MOS(tmp_path / "s") as mos:
        for name in ("notes", "other"):
            mos.register_memory(GeneralTextMemory(name, embedder=Words()))
        secret_life(mos, filled(mos))
        kept = mos.add("other", "This stays.")
        assert mos.purge(memory="notes").cubes == 41
        assert holders(tmp_path, [*SECRETS, b"nothing to hide"]) == []
        assert mos.retrieve("notes", "code") == []
        assert mos.get(kept.id).content == "This stays."
        mos.add("notes", "A new beginning.")
        assert len(mos.retrieve("notes", "beginning")) == 1
        assert check(mos.records) == []
        for wrong in ({}, {"id": kept.id, "memory": "notes"}):
            with pytest.raises(ArgumentError, match="or memory="):
                mos.purge(**wrong)


def test_vectors_of_the_application(tmp_path: Path) -> None:
    rows = numpy.random.default_rng(0).normal(size=(5, 16)).astype(numpy.float32)
    needles = [rows[2][:8].tobytes()]
    with MOS(tmp_path / "s") as mos:
        mos.register_memory(VectorMemory("v", dim=16, metric="dot"))
        ids = [mos.add("v", {"vector": row, "text": f"row {i}"}).id for i, row in enumerate(rows)]
        assert holders(tmp_path, needles)
        mos.purge(ids[2])
        assert holders(tmp_path, needles) == []
        assert len(mos.retrieve("v", rows[2], 9)) == 4


def test_adapters_and_kv_blocks(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import DynamicCache

    from memos import KVCacheMemory, ParametricMemory
    from memos.adapters.adapter import Adapter, Factors
    from tests.models import tiny

    def adapter(i: int) -> Adapter:
        generator = torch.Generator().manual_seed(i)
        down, up = (torch.randn(size, generator=generator) for size in ((2, 8), (8, 2)))
        return Adapter({f"model.nr{i}": Factors(down, up, 0.5)}, {"peft_type": "LORA"})

    def weights(i: int) -> list[bytes]:
        factors = adapter(i).factors[f"model.nr{i}"]
        return [factors.down.numpy().tobytes()[:32], factors.up.numpy().tobytes()[:32]]

    model = tiny("llama")
    ids = torch.randint(0, 90, (1, 70), generator=torch.Generator().manual_seed(7))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    key = cache.layers[0].keys[0, 0, 10].contiguous().view(torch.uint8).numpy().tobytes()
    with MOS(tmp_path / "s") as mos:
        mos.register_memory(ParametricMemory("skills", embedder=None))
        cubes = [mos.add("skills", adapter(i), {"name": f"nr{i}"}) for i in range(2)]
        mos.update("skills", cubes[0].id, adapter(2))
        again = mos.add("skills", adapter(2), {"name": "same"})
        assert {path.split("/")[1] for path, _ in holders(tmp_path, weights(0))} == {"adapters"}
        mos.purge(cubes[0].id)
        assert holders(tmp_path, weights(0)) == []
        assert holders(tmp_path, weights(1))
        assert holders(tmp_path, weights(2))  # another cube has it
        mos.purge(again.id)
        assert holders(tmp_path, weights(2)) == []
        memory = KVCacheMemory("kv", model=model, codec="raw", path=tmp_path / "kv")
        mos.register_memory(memory)
        session = mos.add("kv", {"token_ids": ids[0], "cache": cache}, {"word": "zarquon"})
        assert mos.retrieve("kv", ids[0])
        assert holders(tmp_path, [key, b"zarquon"])
        assert mos.purge(session.id).cubes == 1
        assert holders(tmp_path, [key, b"zarquon"]) == []
        mos.add("kv", {"token_ids": ids[0], "cache": cache}, {"word": "zarquon"})
        mos.purge(memory="kv")
        assert holders(tmp_path, [key, b"zarquon"]) == []
        assert mos.retrieve("kv", ids[0]) == []
        memory.close()


def test_random_histories_leave_nothing(tmp_path: Path) -> None:
    """Cubes with words of their own are changed, archived, merged, deleted, and some purged."""
    rng = random.Random(5)
    with MOS(tmp_path / "s") as mos:
        mos.register_memory(GeneralTextMemory("m", embedder=Words()))
        words: dict[str, list[bytes]] = {}
        purged: list[bytes] = []

        def word() -> str:
            return f"q{rng.getrandbits(60):015x}z"

        for _ in range(150):
            living = list(words)
            what = rng.choice(["add", "add", "update", "archive", "get", "delete", "purge"])
            if what == "add" or not living:
                new = word()
                cube = mos.add("m", f"It says {new}.", {"tag": new})
                words[cube.id] = [new.encode()]
                continue
            id = rng.choice(living)
            if what == "purge":
                assert holders(tmp_path, words[id][-1:])
                mos.purge(id)
                purged += words.pop(id)
                assert holders(tmp_path, purged) == []
            elif mos.transitions(id) and mos.transitions(id)[-1].new == "DELETED":
                continue
            elif what == "update":
                new = word()
                mos.update("m", id, f"It says {new}, and more than it said.")
                words[id].append(new.encode())
            elif what == "archive":
                mos.archive(id)
            elif what == "get":
                mos.get(id)
            else:
                mos.delete("m", id)
        assert len(purged) > 10
        assert check(mos.records) == []
    assert holders(tmp_path, purged) == []
