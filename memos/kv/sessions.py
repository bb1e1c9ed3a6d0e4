"""Sessions: which tokens and which blocks belong to one conversation. One SQLite file per tenant.

A row is sealed with the tenant's keys (and encrypted where the store is): a row that was changed,
or moved to another id or tenant, is treated as absent and counted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sqlite3
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memos.errors import ArgumentError, StoreError
from memos.kv._crypto import KEY_BYTES, TenantKeys, token_bytes

# Metadata: what a cache taught about a model that is known by a dict only.
LEARNT = "kv_learnt"
LIST = "kv_acl"  # metadata of a session: who has rights on it; no turn changes it

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id BLOB PRIMARY KEY, meta BLOB NOT NULL, body BLOB NOT NULL,
    updated_at REAL NOT NULL, expires_at REAL, pinned INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS uses (
    key BLOB NOT NULL, session BLOB NOT NULL, PRIMARY KEY (key, session)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS uses_by_session ON uses (session);
"""


@dataclass
class Session:
    """One conversation: its tokens, and the keys of the blocks that hold their K and V.

    ``identity`` is the digest of the KVIdentity the blocks were made for. ``metadata`` is JSON.
    Times are seconds since 1970 by the store's clock; ``save_session`` sets the first two.
    """

    id: str
    token_ids: list[int]
    identity: bytes
    keys: list[bytes]
    metadata: dict[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
    updated_at: float = 0.0
    expires_at: float | None = None
    pinned: bool = False


class OpenTables:
    """Keeps the number of open connections of one store small. Thread-safe."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: dict[SessionTable, None] = {}  # the longest open first

    def opened(self, table: SessionTable) -> None:
        with self._lock:
            self._open[table] = None
            for other in list(self._open)[: max(0, len(self._open) - self._limit)]:
                if other is not table and other.close_if_idle():
                    del self._open[other]


class SessionTable:
    """The sessions of one tenant. Thread-safe: one connection behind one lock.

    ``path`` None keeps them in memory. Every SQLite error arrives as a StoreError.
    """

    def __init__(
        self,
        path: Path | None,
        keys: TenantKeys,
        *,
        writable: bool,
        durable: bool,
        tables: OpenTables,
    ) -> None:
        self._tables = tables
        self._path = path
        self._keys = keys
        self._writable = writable
        self._durable = durable
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self.damaged = 0  # rows that did not unseal

    def save(self, session: Session, also: Iterable[bytes] = ()) -> None:
        """Insert or replace the row and its uses, in one transaction, durable on return. Of the
        uses that it had those of ``also`` stay."""
        row = self._keys.row_id(session.id)
        meta = self._keys.seal(_encode_meta(session), b"meta" + row)
        body = self._keys.seal(_encode_body(session), _body_context(row, session.updated_at))
        values = (row, meta, body, session.updated_at, session.expires_at, session.pinned)
        have, kept = set(session.keys), set(also)
        self._check_space(len(meta) + len(body))
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?)", values)
            had = {key for (key,) in db.execute("SELECT key FROM uses WHERE session = ?", (row,))}
            db.executemany(
                "DELETE FROM uses WHERE key = ? AND session = ?",
                [(k, row) for k in had - have - kept],
            )
            db.executemany("INSERT INTO uses VALUES (?, ?)", [(k, row) for k in have - had])

    def claim(self, name: str, keys: Iterable[bytes]) -> None:
        """A session uses these blocks too, until it is saved."""
        row = self._keys.row_id(name)
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO uses VALUES (?, ?)", [(k, row) for k in keys])

    def release(self, name: str, keys: Iterable[bytes]) -> None:
        """A session does not use these blocks any more."""
        row = self._keys.row_id(name)
        with self._transaction() as db:
            db.executemany(
                "DELETE FROM uses WHERE key = ? AND session = ?", [(k, row) for k in keys]
            )

    def load(self, name: str) -> Session | None:
        """The session of this id, None when there is none or its row is damaged."""
        row = self._keys.row_id(name)
        with self._reading() as db:
            found = db and db.execute("SELECT meta, body FROM sessions WHERE id = ?", (row,))
            values = found.fetchone() if found else None
        return None if values is None else self._decode(row, *values)

    def find(self, metadata: dict[str, Any]) -> list[Session]:
        """All whose metadata has these items, newest first."""
        with self._reading() as db:
            rows = db and db.execute("SELECT id, meta FROM sessions ORDER BY updated_at DESC, id")
            metas = rows.fetchall() if rows else []
        sessions = []
        for row, sealed in metas:
            meta = self._meta(row, sealed)
            if meta is not None and _matches(meta["metadata"], metadata):
                session = self.load(meta["id"])
                if session is not None:
                    sessions.append(session)
        return sessions

    def remove(self, name: str) -> None:
        """Remove the row and its uses; its bytes are overwritten, in the log too."""
        row = self._keys.row_id(name)
        with self._transaction() as db:
            db.execute("DELETE FROM sessions WHERE id = ?", (row,))
            db.execute("DELETE FROM uses WHERE session = ?", (row,))
        if self._path is not None:
            with self._reading() as db:
                assert db is not None
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def keys_of(self, name: str) -> list[bytes] | None:
        """Keys of a session's blocks, even of a damaged row; None when there is no row."""
        row = self._keys.row_id(name)
        with self._reading() as db:
            if not db or not db.execute("SELECT 1 FROM sessions WHERE id = ?", (row,)).fetchone():
                return None
            return [k for (k,) in db.execute("SELECT key FROM uses WHERE session = ?", (row,))]

    def used_elsewhere(self, name: str, keys: list[bytes]) -> set[bytes]:
        """Those of ``keys`` that another session uses."""
        row = self._keys.row_id(name)
        query = "SELECT 1 FROM uses WHERE key = ? AND session != ? LIMIT 1"
        with self._reading() as db:
            return {k for k in keys if db and db.execute(query, (k, row)).fetchone()}

    def used(self, keys: list[bytes]) -> set[bytes]:
        """Those of ``keys`` that any session uses."""
        query = "SELECT 1 FROM uses WHERE key = ? LIMIT 1"
        with self._reading() as db:
            return {k for k in keys if db and db.execute(query, (k,)).fetchone()}

    def expired(self, now: float) -> list[str]:
        """Ids of the sessions whose time is over."""
        query = "SELECT id, meta FROM sessions WHERE expires_at <= ?"
        with self._reading() as db:
            rows = db.execute(query, (now,)).fetchall() if db else []
        metas = (self._meta(row, sealed) for row, sealed in rows)
        return [meta["id"] for meta in metas if meta is not None]

    def next_expiry(self) -> float:
        """When the next session expires; infinity when none will."""
        with self._reading() as db:
            row = db.execute("SELECT min(expires_at) FROM sessions").fetchone() if db else None
        return math.inf if row is None or row[0] is None else float(row[0])

    def pinned_keys(self) -> set[bytes]:
        """Keys of the blocks of all pinned sessions."""
        query = "SELECT key FROM uses JOIN sessions ON session = id WHERE pinned"
        with self._reading() as db:
            return {key for (key,) in db.execute(query)} if db else set()

    def count(self) -> int:
        with self._reading() as db:
            return int(db.execute("SELECT count(*) FROM sessions").fetchone()[0]) if db else 0

    def check(self) -> int:
        """Number of rows that do not unseal. Raises StoreError where the file is no database."""
        with self._reading() as db:
            rows = db.execute("SELECT id, meta, body FROM sessions").fetchall() if db else []
        return sum(self._decode(*row) is None for row in rows)

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                with self._explained():
                    self._db.close()
                self._db = None

    def close_if_idle(self) -> bool:
        """Close the connection unless someone uses it; the next use opens it again."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self.close()
        finally:
            self._lock.release()
        return True

    def after_fork(self, tables: OpenTables) -> None:
        """In a child: SQLite must not use files, nor close them, across a fork."""
        self._lock = threading.RLock()
        self._tables = tables
        if self._path is None:
            return
        _abandoned.append(self._db)
        self._db = None
        self._writable = False

    # Encoding

    def _meta(self, row: bytes, sealed: bytes) -> dict[str, Any] | None:
        data = self._keys.unseal(sealed, b"meta" + row)
        if data is None:
            self.damaged += 1
            return None
        meta: dict[str, Any] = json.loads(data)
        return meta

    def _decode(self, row: bytes, sealed_meta: bytes, sealed_body: bytes) -> Session | None:
        meta = self._meta(row, sealed_meta)
        if meta is None:
            return None
        data = self._keys.unseal(sealed_body, _body_context(row, meta["updated_at"]))
        if data is None:
            self.damaged += 1
            return None
        (num_tokens,) = _COUNT.unpack_from(data)
        split = _COUNT.size + 8 * num_tokens
        tokens = list(struct.unpack_from(f"<{num_tokens}q", data, _COUNT.size))
        keys = [data[i : i + KEY_BYTES] for i in range(split, len(data), KEY_BYTES)]
        identity = bytes.fromhex(meta.pop("identity"))
        return Session(token_ids=tokens, keys=keys, identity=identity, **meta)

    # The connection

    def _check_space(self, num_bytes: int) -> None:
        """Refuse before SQLite fills the disk: its log would keep the space of what failed."""
        if self._path is None:
            return
        wanted = 2 * num_bytes + _SPARE_BYTES  # in the log, then in the table
        free = shutil.disk_usage(self._path.parent).free
        if free < wanted:
            raise StoreError(
                f"{self._path}: cannot save a session: no space left; {wanted} bytes free "
                f"wanted, got {free}; nothing that was stored before is lost"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except (sqlite3.Error, OSError) as error:
            where = self._path or "sessions in memory"
            raise StoreError(f"{where}: the table of sessions refused: {error}") from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """The connection, or None when there is no table yet."""
        with self._lock, self._explained():
            yield self._connect()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            db = self._connect()
            assert db is not None
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise

    def _connect(self) -> sqlite3.Connection | None:
        if self._path is not None and not self._writable:
            try:
                inode = self._path.stat().st_ino
            except OSError:
                self.close()
                return None
            if inode != self._inode:  # the tenant was deleted and made anew
                self.close()
            self._inode = inode
        if self._db is None:
            self._db = self._open()
            if self._path is not None:
                self._tables.opened(self)
        return self._db

    def _open(self) -> sqlite3.Connection:
        if self._path is None:
            db = _connect(":memory:")
        elif self._writable:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            db = _connect(self._path.absolute().as_uri())
            db.execute("PRAGMA journal_mode = WAL").fetchall()
            db.execute(f"PRAGMA synchronous = {'FULL' if self._durable else 'NORMAL'}")
            db.execute("PRAGMA secure_delete = ON").fetchall()
        else:
            return self._open_readonly(self._path.absolute().as_uri())
        db.executescript(_SCHEMA)
        return db

    def _open_readonly(self, uri: str) -> sqlite3.Connection:
        # A log needs a writable folder even for reading; where there is none, nobody writes.
        for options in ("?mode=ro", "?mode=ro&immutable=1"):
            db = _connect(uri + options)
            try:
                db.execute("SELECT count(*) FROM sessions").fetchone()
            except sqlite3.OperationalError as error:
                db.close()
                failed = error
            else:
                return db
        raise failed


_SPARE_BYTES = 64 << 10
_COUNT = struct.Struct("<Q")
_abandoned: list[object] = []  # connections of a parent process: kept, so that none is closed


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, isolation_level=None, check_same_thread=False, uri=True)


def _body_context(row: bytes, updated_at: float) -> bytes:
    return b"body" + row + struct.pack("<d", updated_at)


def _encode_meta(session: Session) -> bytes:
    if not isinstance(session.id, str) or not session.id:
        raise ArgumentError(f"session.id: a string that is not empty wanted, got {session.id!r}")
    if len(session.identity) != KEY_BYTES:
        raise ArgumentError(
            f"session.identity: {KEY_BYTES} bytes wanted, got {len(session.identity)}"
        )
    fields = {
        "id": session.id,
        "metadata": session.metadata,
        "identity": session.identity.hex(),
        "created_at": session.created_at,
        "updated_at": session.updated_at,
        "expires_at": session.expires_at,
        "pinned": bool(session.pinned),
    }
    try:
        return json.dumps(fields).encode()
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"session.metadata: JSON wanted: {error}") from None


def _encode_body(session: Session) -> bytes:
    if (bad := next((k for k in session.keys if len(k) != KEY_BYTES), None)) is not None:
        raise ArgumentError(f"session.keys: keys of {KEY_BYTES} bytes wanted, got {len(bad)}")
    tokens = token_bytes(session.token_ids)
    return _COUNT.pack(len(tokens) // 8) + tokens + b"".join(session.keys)


def _matches(metadata: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(name in metadata and metadata[name] == wanted[name] for name in wanted)
