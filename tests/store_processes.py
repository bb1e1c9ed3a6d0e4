"""Processes for test_store_processes.py: light ones, which import memos.kv and nothing else.

    python store_processes.py TASK FOLDER [ARGUMENT]

Each task prints one line of JSON at its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from store_help import SMALL, P, check_get, disk_bytes, entries_for, keys_of

from memos.errors import QuotaError, StoreError
from memos.kv import Entry, KVStore, Session, Tenant, _writing

FRAME = 4096
QUOTA = 24 * FRAME


def chain(tenant: Tenant, number: int) -> list[Entry]:
    """The blocks of put ``number``: 1 to 7 of them, always the same."""
    rng = random.Random(number)
    start = 1000 * number
    return entries_for(tenant, range(start, start + rng.randrange(1, 6 * P + 3)))


# kill: writing processes that are killed at random moments


def write_until_killed(folder: Path, pipe: int, first: int, options: dict[str, Any]) -> None:
    """Say what is about to happen, do it, say that it is done."""
    rng = random.Random(first)

    def say(what: str, number: int) -> None:
        os.write(pipe, f"{what} {number}\n".encode())

    store = KVStore(folder, durable=rng.random() < 0.3, **options)
    tenant = store.tenant()
    for number in range(first, first + 1000):
        entries = chain(tenant, number)
        say("put", number)
        tenant.put(entries, SMALL)
        say("stored", number)
        if number % 3 == 0:
            session = Session(str(number), [number], SMALL.digest, keys_of(entries))
            say("save", number)
            tenant.save_session(session)
            say("saved", number)
        if number % 5 == 4 and number - first >= 4:
            say("delete", number - 3)
            tenant.delete(keys_of(chain(tenant, number - 3)))
            say("deleted", number - 3)
        if number % 7 == 6 and number % 3 == 0:
            say("end", number)
            tenant.delete_session(str(number))
            say("ended", number)


def kill(folder: Path, kills: str) -> dict[str, Any]:
    rng = random.Random(1)
    result: Counter[str] = Counter()
    for round in range(int(kills)):
        # Every folder is written and killed ten times; every fourth has a small quota.
        place = folder / str(round // 10)
        small = (round // 10) % 4 == 3
        options: dict[str, Any] = {"disk_bytes": QUOTA} if small else {}
        _writing.SEGMENT_BYTES = rng.choice([2 * FRAME, 256 << 20])
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            with contextlib.suppress(BaseException):
                write_until_killed(place, write_end, 1 + 1000 * (round % 10), options)
            os._exit(3)
        os.close(write_end)
        time.sleep(rng.choice([rng.uniform(0, 0.01), rng.uniform(0, 0.06)]))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"the writer ended by itself: {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL
        with os.fdopen(read_end) as file:
            said = [line.split() for line in file.read().splitlines()]
        result["kills"] += 1
        result["acknowledged"] += sum(what == "stored" for what, _ in said)
        result["in flight"] += bool(said) and said[-1][0] in ("put", "save", "delete", "end")
        log = place.with_suffix(".log")
        with log.open("a") as file:
            file.writelines(f"{what} {number}\n" for what, number in said)
        result += check_after_kill(place, log, small, options)
    return dict(result)


def check_after_kill(place: Path, log: Path, small: bool, options: dict[str, Any]) -> Counter[str]:
    """What was acknowledged is there, what was in flight may be, nothing else is."""
    result: Counter[str] = Counter()
    must: set[int] = set()
    may: set[int] = set()
    sessions: dict[int, bool | None] = {}  # True: must be there, None: may be
    for line in log.read_text().splitlines():
        what, text = line.split()
        number = int(text)
        if what == "put":
            may.add(number)
        elif what == "stored":
            must.add(number)
            may.discard(number)
        elif what in ("delete", "end"):
            must.discard(number)
            may.add(number)
            if what == "end":
                sessions[number] = None
        elif what in ("deleted", "ended"):
            may.discard(number)
            if what == "ended":
                sessions.pop(number)
        elif what == "save":
            sessions[number] = None
        elif what == "saved":
            sessions[number] = True
    with KVStore(place, durable=False, **options) as store:
        leftovers = [p for p in place.rglob("*") if p.name.startswith((".tmp-", ".deleted-"))]
        assert not leftovers, leftovers
        tenant = store.tenant()
        allowed: set[bytes] = set()
        for number in sorted(must | may):
            entries = chain(tenant, number)
            allowed |= set(keys_of(entries))
            count = check_get(tenant, entries)  # every byte right
            if number in must and not small:
                assert count == len(entries), f"put {number} was acknowledged and is lost"
                result["blocks checked"] += count
        disk = store._state.disk
        assert disk is not None
        assert set(disk.records) <= allowed, "a block that no one stored"
        for number, is_there in sessions.items():
            found = tenant.session(str(number))
            if is_there:
                assert found is not None, f"session {number} was acknowledged and is lost"
            assert found is None or found.token_ids == [number]
        known = {str(number) for number in sessions}
        assert {session.id for session in tenant.sessions()} <= known
        assert store.verify().is_clean
        if small:
            assert disk_bytes(place) <= QUOTA
        assert tenant.put(chain(tenant, 999_999), SMALL) > 0
        tenant.delete(keys_of(chain(tenant, 999_999)))
    return result


# read: a reader beside a writer


def read(folder: Path, until: str) -> dict[str, Any]:
    """Ask for blocks in a circle until the file ``until`` is there, then for all of them."""
    result: Counter[str] = Counter()
    with KVStore(folder, mode="r", host_bytes=40_000) as store:
        tenant = store.tenant()
        chains = [chain(tenant, number) for number in range(30)]
        while not Path(until).exists():
            for entries in chains:
                result["right" if check_get(tenant, entries) else "missed"] += 1
        last = [check_get(tenant, entries) for entries in chains]
        sessions = [session.id for session in tenant.sessions()]
        reasons = store.stats()["misses"]
    return {"gets": dict(result), "last": last, "sessions": sessions, "misses": reasons}


# others


def lock(folder: Path, wait_s: str) -> dict[str, Any]:
    """Be a second writer."""
    start = time.monotonic()
    try:
        with KVStore(folder, wait_s=float(wait_s)):
            error = ""
    except StoreError as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {"error": error, "waited_s": time.monotonic() - start}


@contextlib.contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(folder: Path, kind: str) -> dict[str, Any]:
    """Write until the disk is full; ``kind``: a limit on file sizes, or a small filesystem."""
    errors = []
    with KVStore(folder, durable=False) as store:
        tenant = store.tenant()
        small = entries_for(tenant, range(2 * P))
        tenant.put(small, SMALL)
        tenant.save_session(Session("s", [1], SMALL.digest, keys_of(small)))
        big = entries_for(tenant, range(5000, 5000 + 300 * P))
        before = store.stats()["disk"]["bytes"]
        with file_limit(40_000) if kind == "limit" else contextlib.nullcontext():
            for _ in range(2):
                try:
                    tenant.put(big, SMALL)
                except StoreError as error:
                    errors.append(str(error))
            try:
                tenant.save_session(Session("big", list(range(200_000)), SMALL.digest, []))
            except StoreError as error:
                errors.append(str(error))
        assert store.stats()["disk"]["bytes"] == before
        assert tenant.contains(keys_of(big)) == 0
        temporary = [p.name for p in folder.rglob(".tmp-*")]
        assert check_get(tenant, small) == 2
        assert [s.id for s in tenant.sessions()] == ["s"]
        assert tenant.put(entries_for(tenant, range(900, 900 + P)), SMALL) == 1
    with KVStore(folder, durable=False) as store:
        assert check_get(store.tenant(), small) == 2
        clean = store.verify().is_clean
    return {"errors": errors, "temporary": temporary, "clean": clean}


def readonly(folder: Path, user: str) -> dict[str, Any]:
    """As a user who may not write the folder."""
    os.setgid(int(user))
    os.setuid(int(user))
    errors = []
    try:
        KVStore(folder).close()
    except StoreError as error:
        errors.append(str(error))
    with KVStore(folder, mode="r") as store:
        tenant = store.tenant()
        got = check_get(tenant, chain(tenant, 1))
        sessions = [session.id for session in tenant.sessions()]
        for change in (
            lambda: tenant.put(chain(tenant, 2), SMALL),
            lambda: tenant.delete([bytes(32)]),
            lambda: tenant.delete_session("s"),
            lambda: tenant.save_session(Session("x", [], SMALL.digest, [])),
            lambda: tenant.pin("s"),
            lambda: store.delete_tenant("default"),
            store.sweep,
        ):
            try:
                change()
            except StoreError as error:
                errors.append(str(error))
    return {"errors": errors, "got": got, "sessions": sessions}


def fork(folder: Path, _: str) -> dict[str, Any]:
    """A child does not believe that it holds the lock, and does not keep it."""
    store = KVStore(folder)
    tenant = store.tenant()
    tenant.put(chain(tenant, 1), SMALL)
    tenant.save_session(Session("s", [1], SMALL.digest, []))
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said: dict[str, Any] = {"got": check_get(tenant, chain(tenant, 1))}
            said["sessions"] = [s.id for s in tenant.sessions()]
            for name, change in (
                ("put", lambda: tenant.put(chain(tenant, 2), SMALL)),
                ("save", lambda: tenant.save_session(Session("x", [], SMALL.digest, []))),
            ):
                try:
                    change()
                except StoreError as error:
                    said[name] = str(error)
            os.write(write_end, b"ready\n")
            while os.getppid() != 1 and not (folder / "closed").exists():
                time.sleep(0.005)
            with KVStore(folder) as mine:  # the parent has left, and this child kept nothing
                said["then"] = mine.tenant().put(chain(mine.tenant(), 3), SMALL)
                said["seen"] = check_get(tenant, chain(tenant, 3))
            os.write(write_end, json.dumps(said).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        assert file.readline() == "ready\n"
        tenant.put(chain(tenant, 4), SMALL)  # the parent still writes
        store.close()
        (folder / "closed").touch()
        said = json.loads(file.read())
    os.waitpid(pid, 0)
    return dict(said)


def write(folder: Path, rounds: str) -> dict[str, Any]:
    """Put, delete and evict while others read."""
    refused = 0
    with KVStore(folder, disk_bytes=60 * FRAME, durable=False) as store:
        tenant = store.tenant()
        for number in range(int(rounds)):
            try:
                tenant.put(chain(tenant, number % 30), SMALL)
            except QuotaError:
                refused += 1
            if number % 4 == 3:
                tenant.delete(keys_of(chain(tenant, (number - 2) % 30)))
            if number % 10 == 0:
                tenant.save_session(Session(str(number % 30), [number], SMALL.digest, []))
        held = [tenant.contains(keys_of(chain(tenant, number))) for number in range(30)]
        evictions = store.stats()["disk"]["evictions"]
    return {"held": held, "evictions": evictions, "refused": refused}


if __name__ == "__main__":
    task, folder, argument = sys.argv[1:]
    assert "torch" not in sys.modules
    sys.stdout.write(json.dumps(globals()[task](Path(folder), argument)) + "\n")
