"""Audit records: who read or changed which version of what, why, and how it ended.

A record names cubes by memory, id and version, and never says what is in them: no content, no
metadata, no texts of queries. Of a query, and of the text that went into a prompt, it keeps a
fingerprint under a key of the store, so that who has the text can find the record. The records of
an encrypted store are sealed; their chain is of the sealed ones.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    Connection,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    select,
)

from memos.cube import Hit, MemCube
from memos.cube.sealing import cipher, hkdf, seal, unseal
from memos.errors import AccessError, ArgumentError, NotFoundError, StoreError
from memos.governance.log import Head, Line, Log, lines
from memos.records.schema import store
from memos.records.scope import acting

if TYPE_CHECKING:
    from pathlib import Path

    from memos.records.store import Records

FOLDER = "audit"  # in the store's
OWNER = "owner"  # who acts where no principal does
_LISTED = 1000  # cubes named in one record; of more, how many there were
_ANCHOR_EVERY, _ANCHOR_S = 256, 60.0  # accesses, seconds: the head is written into the store then

tables = MetaData()

head_table = Table(
    "audit_head",
    tables,
    Column("id", Integer, primary_key=True),
    Column("count", Integer, nullable=False),
    Column("hash", Text, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("key", LargeBinary, nullable=False),  # of the fingerprints
)


@dataclass
class Frame:
    """One call of a verb, from outside: what happens inside it is one access."""

    what: str
    memory: str | None = None
    query: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)  # said in every record of it
    read: dict[tuple[str, str], int] = field(default_factory=dict)
    is_told: bool = False  # a record of its changes is written
    actor: Any = field(default_factory=acting.get)


_frame: ContextVar[Frame | None] = ContextVar("memos_audit_frame", default=None)


@dataclass(frozen=True)
class Record:
    """One audit record.

    Args:
        number:  in the log, from 1; ``hash``: of it and all before it, in hex.
        at:      seconds since 1970.
        who:     the principal; "owner" where none acted.
        what:    the verb.
        cubes:   (memory, id, version) of what was read; a fourth item is its score.
        changed: (memory, id, version, state) of what was written.
        why:     the purpose that the view was made with.
        result:  "ok", "refused", "not found", or "failed: " and the kind of error.
        more:    everything else that the record says.
    """

    number: int
    hash: str
    at: float
    who: str
    what: str
    cubes: tuple[tuple[Any, ...], ...]
    changed: tuple[tuple[Any, ...], ...]
    why: str
    result: str
    more: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Every field, as JSON takes it."""
        return {**dataclasses.asdict(self), "more": dict(self.more)}

    def names(self, id: str, memory: str | None = None) -> bool:
        """Whether it is about this cube."""
        return any(
            one[1] == id and memory in (None, one[0]) for one in (*self.cubes, *self.changed)
        )


class Audit:
    """The audit log of a store. Thread-safe; several processes write one log.

    Also what the store tells of reads and changes: see ``read`` and ``before_commit``.
    """

    def __init__(self, records: Records, log: Log, key: bytes, clock: Callable[[], float]) -> None:
        self._records, self._log, self._key, self._clock = records, log, key, clock
        self._cipher = opener_of(records, key)
        self._since_anchor = 0
        self._anchored_at = time.monotonic()

    # What an application asks.

    @property
    def head(self) -> Head:
        """How many records there are, and the hash of the last: to be kept elsewhere."""
        return self._log.head()

    def records(
        self,
        *,
        who: str | None = None,
        what: str | None = None,
        id: str | None = None,
        since: float | None = None,
        limit: int | None = None,
    ) -> list[Record]:
        """Records, oldest first; with a limit the newest so many.

        Cost: reads the whole log.
        """
        needle = None if id is None else json.dumps(id).encode()
        found = [
            record
            for record in self._all(needle)
            if who in (None, record.who)
            and what in (None, record.what)
            and (id is None or record.names(id))
            and (since is None or record.at >= since)
        ]
        return found if limit is None else found[max(len(found) - limit, 0) :]

    def verify(self, head: Head | str | None = None) -> list[str]:
        """What is wrong with the log; an empty list: nothing.

        Args:
            head: a head (or its hash) that was kept elsewhere: it must stand in the log.
        """
        from memos.governance.verify import verify

        with self._records.database.read() as connection:
            known = anchor(connection)
        log = self._log
        return verify(log.folder, log.genesis, known, head, key=log.key).problems

    def fingerprint(self, text: str) -> str:
        """Under which a record names a query or the text of a prompt."""
        data = text.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(data, digest_size=16, key=self._key).hexdigest()

    def prompts(self, text: str) -> list[Record]:
        """Records of the contexts with this text."""
        name = self.fingerprint(text)
        return [r for r in self._all(name.encode()) if r.more.get("prompt") == name]

    # What verbs tell.

    @contextmanager
    def doing(
        self,
        what: str,
        memory: str | None = None,
        query: Any = None,
        detail: Mapping[str, Any] | None = None,
    ) -> Iterator[Done]:
        """The verb that everything inside belongs to, and its record. Inside another: nothing."""
        if _frame.get() is not None:
            yield Done()
            return
        frame, done = Frame(what, memory, self._asked(query), detail or {}), Done()
        token = _frame.set(frame)
        try:
            yield done
        except BaseException as error:
            self._append(frame, frame.read, result=_ending(error))
            raise
        finally:
            _frame.reset(token)
        self._finish(frame, done.result)

    def _finish(self, frame: Frame, result: Any) -> None:
        more = _of_result(result, self.fingerprint)
        cubes = more.pop("cubes", None)
        if cubes is None:
            cubes = _entries(frame.read)
        elif len(frame.read) > len(cubes):
            known = {(one[0], one[1]) for one in cubes}
            cubes += _entries({key: v for key, v in frame.read.items() if key not in known})
        if frame.is_told and not frame.read and not more:
            return
        self._append(frame, cubes, **more)

    # What the store tells.

    def read(self, memory: str, rows: Iterable[Any]) -> None:
        """Cubes were read: rows with id and version."""
        self.used(memory, {row.id: int(row.version) for row in rows})

    def used(self, memory: str, versions: Mapping[str, int], what: str = "read") -> None:
        """Cubes were read or used: id -> version."""
        if not versions:
            return
        frame = _frame.get()
        if frame is None:
            self._append(Frame(what), {(memory, id): v for id, v in versions.items()})
        else:
            for id, version in versions.items():
                frame.read[memory, id] = version

    def before_commit(self, connection: Connection, first: int, last: int) -> None:
        """A transaction with these numbers is about to be committed: no change without a
        record."""
        frame = _frame.get()
        rows = connection.exec_driver_sql(_CHANGED, (first, last)).fetchall()
        changed = [[row[0], row[1], int(row[2]), row[3]] for row in rows]
        told = frame or Frame("change")
        own = {(one[0], one[1]) for one in changed}
        read = {key: version for key, version in told.read.items() if key not in own}
        head = self._append(told, read, changed=changed, anchors=False)
        if frame is not None:
            frame.is_told = True
            frame.read.clear()
        self._anchor(connection, head)

    def undone(self) -> None:
        """A transaction whose record is written was not committed after all."""
        self._append(_frame.get() or Frame("change"), {}, result="failed: undone", anchors=False)

    def close(self) -> None:
        """Write the head into the store, and close the log."""
        if self._since_anchor:
            self.anchor()
        self._log.close()

    def anchor(self) -> None:
        """Write the head into the store: from then on, what is cut off before it is seen."""
        self._since_anchor, self._anchored_at = 0, time.monotonic()
        if self._records.readonly:
            return
        with self._records.database.write() as connection:
            self._anchor(connection, self._log.head())

    # Inside.

    def _append(self, frame: Frame, cubes: Any, anchors: bool = True, **more: Any) -> Head:
        actor = frame.actor
        entries = _entries(cubes) if isinstance(cubes, Mapping) else cubes
        said: dict[str, Any] = {
            "at": self._clock(),
            "who": OWNER if actor is None else actor.principal,
            "what": frame.what,
            "result": more.pop("result", "ok"),
        }
        if frame.memory is not None:
            said["memory"] = frame.memory
        if frame.query is not None:
            said["query"] = frame.query
        said.update((name, value) for name, value in frame.detail.items() if value is not None)
        if actor is not None and actor.purpose:
            said["why"] = actor.purpose
        if len(entries) > _LISTED:
            said["num_cubes"], entries = len(entries), entries[:_LISTED]
        if entries:
            said["cubes"] = entries
        changed = more.get("changed")
        if changed and len(changed) > _LISTED:
            said["num_changed"], more["changed"] = len(changed), changed[:_LISTED]
        said.update((name, value) for name, value in more.items() if value)
        body = _encode(said).encode()
        if self._cipher is not None:
            body = base64.b64encode(seal(self._cipher, body, b"memos audit record"))
        head = self._log.append(body)
        if anchors:
            self._since_anchor += 1
            due = self._since_anchor >= _ANCHOR_EVERY
            if due or time.monotonic() - self._anchored_at > _ANCHOR_S:
                self._anchor_soon()
        return head

    def _anchor_soon(self) -> None:
        """Now, unless this thread is inside a transaction."""
        if not self._records.database.is_inside():
            self.anchor()

    def _anchor(self, connection: Connection, head: Head) -> None:
        values = (head.count, head.hash, self._clock())
        connection.exec_driver_sql(
            "UPDATE audit_head SET count = ?, hash = ?, at = ? WHERE id = 1", values
        )
        self._since_anchor, self._anchored_at = 0, time.monotonic()

    def _asked(self, query: Any) -> str | None:
        if query is None:
            return None
        if isinstance(query, str):
            return self.fingerprint(query)
        if isinstance(query, Mapping):
            return self.fingerprint(json.dumps(query, sort_keys=True, default=str))
        return type(query).__name__

    def _all(self, needle: bytes | None = None) -> Iterator[Record]:
        return records_in(self._log.folder, self._cipher, needle)


class Done:
    """What a verb returned, for its record."""

    result: Any = None


# Reading.


def records_in(folder: Path, opener: Any, needle: bytes | None = None) -> Iterator[Record]:
    """The records of a log, oldest first; those only that hold these bytes.

    Args:
        opener: what opens those of an encrypted store, see ``opener_of``; None: they are plain.
    """
    for stored in lines(folder):
        line = _opened(stored, opener)
        if needle is None or needle in line.body:
            record = _record(line)
            if record is not None:
                yield record


def opener_of(records: Records, key: bytes) -> Any:
    """What seals and opens the records of an encrypted store; None: they are plain."""
    if not records.database.is_sealed:
        return None
    return cipher(hkdf(key, b"", b"memos audit records v1"))


def key_of(connection: Connection) -> bytes:
    """The key of the fingerprints."""
    row = select(head_table.c.key).where(head_table.c.id == 1)
    return bytes(connection.execute(row).scalar_one())


def _opened(line: Line, opener: Any) -> Line:
    """A record as it was before it was sealed, in an encrypted store."""
    if opener is None or line.body.startswith(b"{"):  # the end of a segment is plain
        return line
    try:
        body = unseal(opener, base64.b64decode(line.body), b"memos audit record")
    except ValueError:
        body = None
    if body is None:
        raise StoreError(f"audit record {line.number}: it is not what was stored")
    return dataclasses.replace(line, body=body)


# Opening.


def is_on(connection: Connection) -> bool:
    """Whether this store is audited."""
    return anchor(connection) is not None


def anchor(connection: Connection) -> Head | None:
    """The head that the store knows; None: it is not audited."""
    if connection.exec_driver_sql(_THERE).first() is None:
        return None
    columns = (head_table.c.count, head_table.c.hash)
    row = connection.execute(select(*columns).where(head_table.c.id == 1)).first()
    return None if row is None else Head(int(row[0]), str(row[1]))


def genesis_of(connection: Connection) -> str:
    """Which store a log is of."""
    return str(connection.execute(select(store.c.uuid)).scalar_one())


def open_audit(
    records: Records, wanted: bool | None, clock: Callable[[], float] = time.time
) -> Audit | None:
    """The audit log of a store; None: it has none.

    Args:
        wanted: True: from now on. None: as the store remembers. False: not by this object, which
            must be read-only then.

    Raises:
        ArgumentError: a store in memory, or one that is audited and opened with False for writing.
        StoreError: the log cannot be written.
    """
    with records.database.read() as connection:
        known = is_on(connection)
    if not known and not wanted:
        return None
    if wanted is False:
        if not records.readonly:
            raise ArgumentError("audit: this store is audited; False goes with readonly=True only")
        return None
    if records.folder is None:
        raise ArgumentError("audit: a folder wanted, the records stand in a file beside the store")
    if not known:
        if records.readonly:
            raise StoreError(f"{records.folder}: opened read-only, audit cannot be switched on")
        with records.database.write() as connection:
            tables.create_all(connection)
            if not is_on(connection):
                genesis = genesis_of(connection)
                log = Log(records.folder / FOLDER, genesis)
                head = log.head()
                log.close()
                row = {"id": 1, "count": head.count, "hash": head.hash, "at": clock()}
                connection.execute(head_table.insert(), {**row, "key": os.urandom(32)})
    with records.database.read() as connection:
        genesis, key = genesis_of(connection), key_of(connection)
    log = Log(records.folder / FOLDER, genesis, key, durable=records.database.durable)
    return Audit(records, log, key, clock)


# What stands in a record.


def _entries(read: Mapping[tuple[str, str], int]) -> list[Sequence[Any]]:
    return [[memory, id, version] for (memory, id), version in read.items()]


def _of_result(result: Any, fingerprint: Callable[[str], str]) -> dict[str, Any]:
    """What a record says of what a verb returned."""
    if isinstance(result, Hit):
        return {"cubes": [_scored(result)]}
    if isinstance(result, MemCube):
        return {"cubes": [[result.memory, result.id, result.versions]]}
    if isinstance(result, list) and result and all(isinstance(one, MemCube) for one in result):
        return {"cubes": [_scored(one) for one in result]}
    citations = getattr(result, "citations", None)
    if isinstance(citations, tuple) and hasattr(result, "left_out"):
        return {
            "cubes": [_scored(hit) for hit in result.hits],
            "cited": [[c.memory, c.id, c.version] for c in citations],
            "left_out": [list(pair) for pair in result.left_out],
            "prompt": fingerprint(result.text),
        }
    return {}


def _scored(cube: MemCube) -> list[Any]:
    entry = [cube.memory, cube.id, cube.versions]
    return [*entry, round(float(cube.score), 4)] if isinstance(cube, Hit) else entry


def _ending(error: BaseException) -> str:
    if isinstance(error, AccessError):
        return "refused"
    if isinstance(error, NotFoundError):
        return "not found"
    return f"failed: {type(error).__name__}"


def _record(line: Any) -> Record | None:
    try:
        said = json.loads(line.body)
    except ValueError as error:
        raise StoreError(f"audit record {line.number}: JSON wanted ({error})") from error
    if "who" not in said:
        return None
    return Record(
        number=line.number,
        hash=line.hash,
        at=said.pop("at"),
        who=said.pop("who"),
        what=said.pop("what"),
        cubes=tuple(map(tuple, said.pop("cubes", ()))),
        changed=tuple(map(tuple, said.pop("changed", ()))),
        why=said.pop("why", ""),
        result=said.pop("result"),
        more=said,
    )


_encode = json.JSONEncoder(separators=(",", ":")).encode
_THERE = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'audit_head'"
# From the memories on: the index of changes begins with the memory.
_CHANGED = (
    "SELECT m.name, c.id, c.version, c.state FROM memories AS m "
    "JOIN cubes AS c ON c.memory = m.id AND c.change BETWEEN ? AND ?"
)
