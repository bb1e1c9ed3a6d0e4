"""What rights and audit records cost.

Access: retrieval from a text memory of 100,000 cubes with vectors, by the owner and by principals
who may read a share of them: every cube has an access list. ``overhead`` is how much longer the
median query takes than the owner's, over the same questions, asked in turns. ``first_s`` is the
principal's first query, which looks at every cube; ``after_add_ms`` one after a cube was added.

Audit: ``append_us`` is one record of five cubes into the log; ``get_us`` what ``mos.get`` takes
longer with the log than without.
"""

from __future__ import annotations

import random
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

UNITS, DIM, QUESTIONS, ROUNDS = 100_000, 384, 60, 3
SHARES = {"all": 1.0, "90 %": 0.9, "half": 0.5, "10 %": 0.1, "1 %": 0.01}
_LETTERS = "bcdfghklmnprstvz"


def word(i: int) -> str:
    return "".join(_LETTERS[i // 16**k % 16] + "aeiou"[(i + k) % 5] for k in range(3))


def text(rng: random.Random) -> str:
    """25 words, common and rare ones as in a language."""
    return " ".join(word(int(20_000 * rng.random() ** 3)) for _ in range(25))


class Directions:
    """An embedder without a model: its topic, and something of each text's own."""

    identity, dim = "directions", DIM

    def embed(self, texts: Any, kind: str = "document") -> Any:
        import numpy

        rows = []
        for one in texts:
            rng = numpy.random.default_rng(zlib.crc32(one.encode()))
            topic = numpy.random.default_rng(zlib.crc32(one.split()[0].encode()) % 1000)
            rows.append(topic.standard_normal(DIM) + 0.7 * rng.standard_normal(DIM))
        return numpy.asarray(rows, numpy.float32)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from memos import MOS, GeneralTextMemory

    rng = random.Random(1)
    with MOS(tmp_path_factory.mktemp("rights") / "m") as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=Directions(), on_duplicate="keep"))
        items = []
        for _ in range(UNITS):
            draw = rng.random()
            readers = [f"user:{name}" for name, share in SHARES.items() if draw < share]
            items.append({"content": text(rng), "acl": {"read": readers}})
        mos.add_many("notes", items)
        mos.retrieve(query=text(rng))
        search = mos.memory("notes").embedded.search_or_none()
        with mos.records.database.read() as connection:
            search.index(connection).build()
        yield mos


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


@pytest.mark.parametrize("who", SHARES)
def test_access(benchmark: Any, filled: Any, who: str) -> None:
    mos, rng = filled, random.Random(2)
    view = mos.as_principal(f"user:{who}")
    questions = [" ".join(text(rng).split()[:6]) for _ in range(QUESTIONS)]
    mos.retrieve(query=questions[0])
    first_s = milliseconds(lambda: view.retrieve(query=questions[0])) / 1000

    def run() -> tuple[list[float], list[float]]:
        owners, theirs = [], []
        for question in questions * ROUNDS:
            owners.append(milliseconds(lambda q=question: mos.retrieve(query=q, limit=10)))
            theirs.append(milliseconds(lambda q=question: view.retrieve(query=q, limit=10)))
        return owners, theirs

    owners, theirs = benchmark.pedantic(run, rounds=1)
    mos.add("notes", text(rng), acl={"read": [f"user:{who}"]})
    mos.retrieve(query=questions[1])
    after_add_ms = milliseconds(lambda: view.retrieve(query=questions[1]))
    owner_ms, principal_ms = statistics.median(owners), statistics.median(theirs)
    benchmark.extra_info |= {
        "who": who,
        "share": SHARES[who],
        "units": UNITS,
        "owner_ms": owner_ms,
        "principal_ms": principal_ms,
        "overhead": principal_ms / owner_ms - 1,
        "first_s": first_s,
        "after_add_ms": after_add_ms,
    }


def test_audit(benchmark: Any, tmp_path: Path) -> None:
    from memos import MOS, GeneralTextMemory

    def opened(name: str, audit: bool | None) -> Any:
        mos = MOS(tmp_path / name, audit=audit)
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
        for i in range(1000):
            mos.add("notes", f"text {i}", id=f"{i:036d}")
        return mos

    plain, audited = opened("plain", None), opened("audited", True)
    ids = [f"{i:036d}" for i in range(1000)]
    body = b"x" * 400

    def run() -> tuple[float, float, float]:
        log = audited.audit._log
        appended = statistics.median(milliseconds(lambda: log.append(body)) for _ in range(5000))
        gets = []
        for mos in (plain, audited):
            times = [milliseconds(lambda i=i, mos=mos: mos.get(i, "notes")) for i in ids * 3]
            gets.append(statistics.median(times))
        return appended, gets[0], gets[1]

    appended, without, with_audit = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info |= {
        "append_us": 1000 * appended,
        "get_us": 1000 * (with_audit - without),
        "get_without_us": 1000 * without,
    }
    for mos in (plain, audited):
        mos.close()
