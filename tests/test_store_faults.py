"""Ten thousand faults over frames and segments: each a counted miss or the right bytes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from memos.kv import Entry, KVIdentity, KVStore, Tenant
from memos.kv._crypto import TenantKeys
from memos.kv._folder import Folder
from memos.kv.frame import REASONS, open_payload, parse
from memos.kv.segment import scan

from .store_help import SMALL, P, entries_for, misses, report

FRAME = 4096
KEY = bytes(range(32))
REVISED = dataclasses.replace(SMALL, revision="2")
RECODED = dataclasses.replace(SMALL, codec="k:int8-g64,v:int8-g32")  # the same number of bytes
FAULTS = 6000  # for each kind of store
PER_ROUND = 4


@dataclasses.dataclass
class Place:
    """Where a block was stored before anything happened to it."""

    tenant: str
    identity: KVIdentity
    entry: Entry
    path: Path
    offset: int


class Bench:
    """A store of 4 segments of 2 tenants and 3 identities, and its bytes as they were."""

    def __init__(self, path: Path, encryption_key: bytes | None) -> None:
        self.path = path
        self.encryption_key = encryption_key
        self.places: list[Place] = []
        with KVStore(path, encryption_key=encryption_key) as store:
            for name, identity, start in (
                ("ada", SMALL, 0),
                ("ada", REVISED, 0),
                ("ada", RECODED, 0),
                ("bob", SMALL, 0),
            ):
                tenant = store.tenant(name)
                before = set(path.rglob("*.kvs"))
                entries = entries_for(tenant, range(start, start + 5 * P + 2), identity)
                assert tenant.put(entries, identity) == 6
                (segment,) = set(path.rglob("*.kvs")) - before
                for i, entry in enumerate(entries):
                    self.places.append(Place(name, identity, entry, segment, i * FRAME))
        self.pristine = {place.path: place.path.read_bytes() for place in self.places}
        self.data: dict[Path, bytearray] = {}
        # A reader that knew the folder before the fault, and keeps nothing in memory.
        self.old = self.open()
        self.reset()

    def open(self) -> KVStore:
        return KVStore(self.path, mode="r", host_bytes=0, encryption_key=self.encryption_key)

    def reset(self) -> None:
        self.data = {path: bytearray(data) for path, data in self.pristine.items()}

    def write(self) -> None:
        """Put the changed files in place, whole; add what is new."""
        for path, data in self.data.items():
            if data != self.pristine.get(path):
                fd = os.open(path, os.O_WRONLY | os.O_CREAT)
                os.pwrite(fd, data, 0)
                os.ftruncate(fd, len(data))
                os.close(fd)
        for path in self.pristine:
            if path not in self.data:
                path.unlink()

    def restore(self) -> None:
        for path in self.data:
            if path not in self.pristine:
                path.unlink()
        for path, data in self.pristine.items():
            if self.data.get(path) != data:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT)
                os.pwrite(fd, data, 0)
                os.ftruncate(fd, len(data))
                os.close(fd)
        self.reset()

    def in_range(self, path: Path, start: int, stop: int) -> list[Place]:
        return [
            p
            for p in self.places
            if p.path == path and p.offset < stop and start < p.offset + FRAME
        ]


Fault = Callable[[Bench, random.Random], list[Place]]


def flip_bit(bench: Bench, rng: random.Random) -> list[Place]:
    place = rng.choice(bench.places)
    # As often in the header as in the payload; the padding is not covered by any check.
    at = place.offset + rng.choice([rng.randrange(512), 512 + rng.randrange(112)])
    bench.data[place.path][at] ^= 1 << rng.randrange(8)
    return [place]


def scribble(bench: Bench, rng: random.Random) -> list[Place]:
    place = rng.choice(bench.places)
    start = place.offset + rng.randrange(FRAME)
    size = min(rng.randrange(1, 3 * FRAME), len(bench.data[place.path]) - start)
    bench.data[place.path][start : start + size] = rng.randbytes(size)
    return bench.in_range(place.path, start, start + size)


def zero(bench: Bench, rng: random.Random) -> list[Place]:
    place = rng.choice(bench.places)
    start = place.offset + rng.choice([0, rng.randrange(FRAME)])
    size = rng.choice([8, 512, FRAME, rng.randrange(1, 3 * FRAME)])
    size = min(size, len(bench.data[place.path]) - start)
    bench.data[place.path][start : start + size] = bytes(size)
    return bench.in_range(place.path, start, start + size)


def truncate(bench: Bench, rng: random.Random) -> list[Place]:
    path = rng.choice(bench.places).path
    size = len(bench.data[path])
    cut = rng.choice([rng.randrange(size), rng.randrange(0, size, FRAME)])
    del bench.data[path][cut:]
    return bench.in_range(path, cut, size)


def grow(bench: Bench, rng: random.Random) -> list[Place]:
    bench.data[rng.choice(bench.places).path] += rng.randbytes(rng.randrange(1, 2 * FRAME))
    return []


def cut_out(bench: Bench, rng: random.Random) -> list[Place]:
    """A frame, or any range, is missing: what follows has moved."""
    place = rng.choice(bench.places)
    size = rng.choice([FRAME, rng.randrange(1, FRAME)])
    end = len(bench.data[place.path])
    del bench.data[place.path][place.offset : place.offset + size]
    return bench.in_range(place.path, place.offset, end)


def swap_frames(bench: Bench, rng: random.Random) -> list[Place]:
    one, two = rng.sample(bench.places, 2)
    a, b = slice(one.offset, one.offset + FRAME), slice(two.offset, two.offset + FRAME)
    x, y = bench.data[one.path], bench.data[two.path]
    x[a], y[b] = y[b], x[a]
    return [one, two]


def copy_part(bench: Bench, rng: random.Random) -> list[Place]:
    """Header, payload, header fields or all of another block: also another model's or tenant's.

    The source may suffer too: its header appears twice, and the later one counts.
    """
    source, target = rng.sample(bench.places, 2)
    start, stop = rng.choice(
        [(0, 512), (0, 480), (512, FRAME), (0, FRAME), (256, 288), (96, 128), (160, 224), (16, 96)]
    )
    data = bench.data[source.path][source.offset + start : source.offset + stop]
    at = target.offset + start
    bench.data[target.path][at : at + len(data)] = data
    return [source, target]


def change_field(bench: Bench, rng: random.Random) -> list[Place]:
    """A header field takes a plausible or an extreme value."""
    place = rng.choice(bench.places)
    at, size = rng.choice(
        [(8, 2), (10, 2), (12, 4), (16, 8), (24, 8), (32, 4), (36, 4), (56, 4), (65, 3), (80, 8)]
    )
    old = int.from_bytes(bench.data[place.path][place.offset + at :][:size], "little")
    values = [0, 1, old + 1, old - 1, old * 2, old ^ 16, 2 ** (8 * size) - 1, 2 ** (8 * size - 1)]
    value = rng.choice(values) % 2 ** (8 * size)
    start = place.offset + at
    bench.data[place.path][start : start + size] = value.to_bytes(size, "little")
    return [place]


def swap_files(bench: Bench, rng: random.Random) -> list[Place]:
    one, two = rng.sample(sorted(bench.pristine), 2)
    bench.data[one], bench.data[two] = bench.data[two], bench.data[one]
    return [place for place in bench.places if place.path in (one, two)]


def copy_file(bench: Bench, rng: random.Random) -> list[Place]:
    """A segment under another number, in its own tenant's folder or in another's."""
    source, beside = rng.choice(sorted(bench.pristine)), rng.choice(sorted(bench.pristine))
    bench.data[beside.with_name(f"{rng.randrange(10, 10**8):08d}.kvs")] = bench.data[source][:]
    return []


def lose_file(bench: Bench, rng: random.Random) -> list[Place]:
    path = rng.choice(sorted(bench.pristine))
    bench.data.pop(path, None)
    return [place for place in bench.places if place.path == path]


FRAME_FAULTS: list[Fault] = [flip_bit, scribble, zero, swap_frames, copy_part, change_field]
FILE_FAULTS: list[Fault] = [truncate, grow, cut_out, swap_files, copy_file, lose_file]


def ask(store: KVStore, place: Place, outcome: Counter[str]) -> bool:
    """Ask for one block: the right bytes, or one counted miss."""
    tenant = store.tenant(place.tenant)
    before = misses(store)
    got = tenant.get([place.entry.key], place.identity, place.entry.token_ids)
    if got:
        assert bytes(got[0]) == place.entry.payload, "wrong bytes were served"
        assert misses(store) == before
        outcome["right bytes"] += 1
        return True
    assert misses(store) == before + 1, "a miss was not counted"
    outcome["miss"] += 1
    return False


@pytest.mark.parametrize("encryption_key", [None, KEY], ids=["plain", "encrypted"])
def test_faults(
    tmp_path: Path,
    encryption_key: bytes | None,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    rng = random.Random(20240607 + (encryption_key is not None))
    bench = Bench(tmp_path / "s", encryption_key)
    outcome: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    while faults.total() < FAULTS:
        hurt: list[Place] = []
        if rng.random() < 0.8:
            for fault in rng.choices(FRAME_FAULTS, k=PER_ROUND):
                hurt += fault(bench, rng)
                faults[fault.__name__] += 1
        else:
            fault = rng.choice(FILE_FAULTS)
            hurt += fault(bench, rng)
            faults[fault.__name__] += 1
        bench.write()
        keys = {(place.entry.key, place.tenant) for place in hurt}
        with bench.open() as fresh:
            for place in bench.places:
                served = ask(fresh, place, outcome)
                assert served or (place.entry.key, place.tenant) in keys, "an unhurt block is lost"
            reasons.update(fresh.stats()["misses"])
        for place in hurt:
            ask(bench.old, place, outcome)
        reasons.update(bench.old.stats()["misses"])
        bench.old.close()
        bench.restore()
        bench.old = bench.open()
        for place in rng.sample(bench.places, 2):
            assert ask(bench.old, place, Counter())
    bench.old.close()
    assert set(reasons) <= set(REASONS)
    assert {"absent", "header", "payload", "gone", "truncated", "key"} <= set(reasons)
    record_property("faults", faults.total())
    record_property("outcome", dict(outcome))
    report(
        request,
        f"{faults.total()} faults ({dict(faults)}): {dict(outcome)}; misses {dict(reasons)}; "
        "0 wrong",
    )


def test_a_writer_lives_with_faults(tmp_path: Path) -> None:
    """It opens a damaged folder, stores the lost blocks again and keeps its quota."""
    rng = random.Random(5)
    for round in range(25):
        bench = Bench(tmp_path / str(round), None)
        bench.old.close()
        for fault in [*rng.choices(FRAME_FAULTS, k=3), rng.choice(FILE_FAULTS)]:
            fault(bench, rng)
        bench.write()
        quota = 30 * FRAME
        with KVStore(bench.path, disk_bytes=quota, durable=False) as store:
            for place in bench.places:
                ask(store, place, Counter())
            for name, identity in {(p.tenant, p.identity) for p in bench.places}:
                mine = [p.entry for p in bench.places if (p.tenant, p.identity) == (name, identity)]
                store.tenant(name).put(mine, identity)
            assert all(ask(store, place, Counter()) for place in bench.places)
            assert store.stats()["disk"]["bytes"] <= quota
            files = bench.path.rglob("*.kvs")
            assert sum(512 * path.stat().st_blocks for path in files) <= quota
        with KVStore(bench.path, disk_bytes=quota, durable=False) as store:
            assert store.verify().is_clean
            assert all(ask(store, place, Counter()) for place in bench.places)
        shutil.rmtree(bench.path)


def _keys(path: Path, tenant: Tenant) -> TenantKeys:
    keys = Folder(path, None, False).load_keys(tenant.id)
    assert keys is not None
    return keys


def test_frame_reader_fuzz(tmp_path: Path) -> None:
    """Random bytes and headers that only the key's holder could forge: never an exception."""
    rng = random.Random(3)
    with KVStore(tmp_path / "s", durable=False) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(4 * P))
        tenant.put(entries, SMALL)
        keys = _keys(tmp_path / "s", tenant)
        (path,) = (tmp_path / "s").rglob("*.kvs")
        whole = path.read_bytes()
        seen: Counter[str] = Counter()
        for _ in range(1500):
            data = bytearray(whole)
            if rng.random() < 0.5:
                data = bytearray(rng.randbytes(rng.choice([0, 1, 511, 512, 4096, 9000])))
                data[:8] = rng.choice([b"MEMOSKVF", bytes(8), data[:8]])
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(0, 300)
                data[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, rng.randbytes(8)])
            if len(data) >= 512 and rng.random() < 0.7:
                data[480:512] = keys.header_mac(bytes(data[:480]))
            header = parse(data, keys)
            if isinstance(header, str):
                seen[header] += 1
            else:
                payload = open_payload(header, data, keys)
                seen[payload if isinstance(payload, str) else "ok"] += 1
            path.write_bytes(data)
            with open(path, "rb") as file:
                ranges = [(at, size) for at, size, _ in scan(file.fileno(), len(data), keys)]
            assert all(size > 0 for _, size in ranges)
            assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ranges))
            with KVStore(tmp_path / "s", mode="r") as reader:
                mine = reader.tenant()
                for entry in entries:
                    for view in mine.get([entry.key], SMALL):
                        assert view == entry.payload
                reader.verify()
        assert set(seen) <= {*REASONS, "ok"}
        assert len(seen) >= 6


def test_encrypted_frames_are_bound_to_their_header(tmp_path: Path) -> None:
    """A valid ciphertext under another valid header of the same tenant does not decrypt."""
    with KVStore(tmp_path / "s", encryption_key=KEY, durable=False) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(2 * P))
        tenant.put(entries, SMALL)
        keys = Folder(tmp_path / "s", KEY, False).load_keys(tenant.id)
        assert keys is not None
    (path,) = (tmp_path / "s").rglob("*.kvs")
    data = path.read_bytes()
    one, two = data[:FRAME], data[FRAME:]
    forged = bytearray(two)
    forged[24:32] = one[24:32]
    forged[208:220] = one[208:220]  # even with its nonce and size
    forged[480:512] = keys.header_mac(bytes(forged[:480]))
    forged[512:] = one[512:]
    header = parse(forged, keys)
    assert not isinstance(header, str)
    assert open_payload(header, forged, keys) == "payload"


@pytest.mark.parametrize("encryption_key", [None, KEY], ids=["plain", "encrypted"])
def test_every_bit_of_header_and_payload_counts(
    tmp_path: Path, encryption_key: bytes | None
) -> None:
    with KVStore(tmp_path / "s", encryption_key=encryption_key, durable=False) as store:
        tenant = store.tenant()
        tenant.put(entries_for(tenant, range(P)), SMALL)
        keys = Folder(tmp_path / "s", encryption_key, False).load_keys(tenant.id)
        assert keys is not None
    (path,) = (tmp_path / "s").rglob("*.kvs")
    data = bytearray(path.read_bytes())
    header = parse(data, keys)
    assert not isinstance(header, str)
    for bit in range(8 * (512 + header.stored_bytes)):
        data[bit // 8] ^= 1 << bit % 8
        changed = parse(data, keys)
        if bit < 8 * 512:
            assert changed == "header"
        else:
            assert changed == header
            assert open_payload(header, data, keys) == "payload"
        data[bit // 8] ^= 1 << bit % 8
    assert not isinstance(open_payload(header, data, keys), str)
