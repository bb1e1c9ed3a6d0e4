"""One SQLite file: connections, transactions, and errors in words.

Readers never wait and never see half of a transaction (WAL); writers take turns, across threads
and processes. A transaction that was committed survives the death of the process; with
``durable`` also the loss of power.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, event, select
from sqlalchemy.pool import QueuePool, StaticPool

from memos.cube.utf8 import utf8_error
from memos.errors import ArgumentError, StoreError, StoreLockedError
from memos.records import life_schema  # noqa: F401 - its tables belong to the store
from memos.records.schema import FORMAT, store, tables

WAIT_S = 30.0  # for another process that writes


class Database:
    """Thread-safe. One instance per file and process; other processes may open it too.

    Args:
        path:     of the file; None: in memory, gone with this object.
        durable:  every commit waits for the disk (synchronous=FULL), so that it survives a loss
            of power; else a commit survives the death of the process (NORMAL).
        readonly: nothing is written, not even made.

    Raises:
        StoreError: no database, of another format, or a folder that cannot be used.
    """

    is_sealed = False  # whether the file holds nothing that can be read

    def __init__(self, path: Path | None, *, durable: bool = False, readonly: bool = False) -> None:
        self.path, self.durable, self.readonly = path, durable, readonly
        self._write_lock = threading.RLock()
        self._writer: int | None = None  # the thread in a transaction
        self._afterwards: list[Callable[[], object]] = []
        self._allocated: list[int] = []  # numbers of changes of the transaction
        self._is_told = False  # the observer knows of them
        self.observer: Any = None  # told of what is read, and of changes before they are committed
        self._local = threading.local()  # connection: of the thread's snapshot
        self._pid = os.getpid()
        if sqlite3.sqlite_version_info < (3, 35):
            raise StoreError(f"SQLite 3.35 or newer wanted, got {sqlite3.sqlite_version}")
        self._engine = sqlalchemy.create_engine(
            "sqlite://",
            creator=self._connect,
            **self._pool(),
        )
        event.listen(self._engine, "begin", _begin)
        with self._errors():
            self._prepare()

    def close(self) -> None:
        """Close every connection. The object cannot be used afterwards."""
        self._engine.dispose()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state of the store."""
        self._check_process()
        held: Connection | None = getattr(self._local, "connection", None)
        if held is not None:
            yield held
            return
        if self.path is None:
            with self.write() as connection:
                yield connection
            return
        with self._errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Every read of this thread inside sees the same state, through one connection."""
        with self.read() as connection:
            outer = getattr(self._local, "connection", None)
            self._local.connection = connection
            try:
                yield
            finally:
                self._local.connection = outer

    @contextlib.contextmanager
    def outside(self) -> Iterator[sqlite3.Connection]:
        """A connection in no transaction, for what SQLite does only there. No thread writes."""
        self._check_process()
        self.check_writable()
        with self._errors(), self._write_lock, self._engine.connect() as connection:
            found: Any = connection.connection.driver_connection
            yield found

    def check_writable(self) -> None:
        """Raise StoreError where this store was opened read-only."""
        if self.readonly:
            raise StoreError(f"{self.path}: opened read-only, nothing can be changed")

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: committed at the end, undone when an error leaves it.

        A transaction inside one of the same thread is part of it.
        """
        self._check_process()
        self.check_writable()
        with self._errors(), self._write_lock:
            held: Connection | None = getattr(self, "_held", None)
            if held is not None:
                yield held
                return
            with self._watched(), self._engine.connect() as connection:
                connection = connection.execution_options(memos_write=self.path is not None)
                with connection.begin():
                    self._held: Connection | None = connection
                    self._writer = threading.get_ident()
                    try:
                        with self._told(connection):
                            yield connection
                    finally:
                        afterwards, self._afterwards = self._afterwards, []
                        self._held = self._writer = None
        for call in afterwards:
            call()

    def after_commit(self, call: Callable[[], object]) -> None:
        """Call this once the transaction of this thread is committed; at once outside of one.

        A transaction that is undone drops it; the same call is made once. An error in it reaches
        the writer, whose transaction stays committed.
        """
        if self._writer != threading.get_ident():
            call()
        elif call not in self._afterwards:
            self._afterwards.append(call)

    def is_inside(self) -> bool:
        """Whether this thread is in a transaction, or holds one state of the store."""
        held = getattr(self._local, "connection", None) is not None
        return held or self._writer == threading.get_ident()

    def is_writing(self) -> bool:
        """Whether this thread is in a transaction that may still be undone."""
        return self.path is not None and self._writer == threading.get_ident()

    def change(self, connection: Connection) -> int:
        """Number of the last transaction that this connection sees."""
        return int(connection.execute(_CHANGE).scalar_one())

    def allocate(self, connection: Connection, rows: int = 0) -> tuple[int, int]:
        """Number of this transaction, and the first of ``rows`` numbers for new cubes."""
        change, last = connection.exec_driver_sql(_ALLOCATE, (rows,)).one()
        self._allocated.append(int(change))
        return int(change), int(last) - rows + 1

    def last_change(self) -> int:
        """Number of the last transaction that changed a cube: equal ones mean equal cubes."""
        with self.read() as connection:
            return int(connection.exec_driver_sql("SELECT change FROM store").scalar_one())

    def file_key(self, memory: int) -> bytes | None:
        """Under which files beside this one are encrypted for a memory; None: they are not."""
        return None

    def destroy_keys(self, connection: Connection, seqs: Sequence[int]) -> None:
        """In the transaction that removes what cubes say: delete the keys that sealed it, too.

        Where nothing is encrypted there are none.
        """

    # Inside.

    @contextlib.contextmanager
    def _told(self, connection: Connection) -> Iterator[None]:
        """Around what a transaction does: before it is committed the observer is told of it."""
        self._allocated.clear()
        yield
        if self._allocated and self.observer is not None:
            first, last = min(self._allocated), max(self._allocated)
            self._is_told = True
            self.observer.before_commit(connection, first, last)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Around a transaction: the observer is told of one that is undone after all."""
        self._is_told = False
        try:
            yield
        except BaseException:
            if self._is_told and self.observer is not None:
                self.observer.undone()
            raise

    def _pool(self) -> dict[str, Any]:
        if self.path is None:
            return {"poolclass": StaticPool}
        return {"poolclass": QueuePool, "pool_size": 8, "max_overflow": 56}

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise StoreError(
                f"{self.path}: opened before a fork; open the folder in the child process again"
            )

    def _connect(self) -> sqlite3.Connection:
        if self.path is None:
            name, uri = ":memory:", False
        else:
            mode = "ro" if self.readonly else "rwc"
            name, uri = f"{self.path.absolute().as_uri()}?mode={mode}", True
        connection = sqlite3.connect(
            name, uri=uri, timeout=WAIT_S, isolation_level=None, check_same_thread=False
        )
        pragmas = ["foreign_keys=ON", "cache_size=-65536", "temp_store=MEMORY"]
        if self.path is not None and not self.readonly:
            # What is overwritten or deleted leaves no bytes behind, so that a purge is one.
            pragmas += ["journal_mode=WAL", "wal_autocheckpoint=16384", "secure_delete=ON"]
            pragmas += [f"synchronous={'FULL' if self.durable else 'NORMAL'}"]
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _prepare(self) -> None:
        with self._engine.connect() as connection, connection.begin():
            known = sqlalchemy.inspect(connection).has_table("store")
            found = connection.execute(select(store.c.format)).scalar_one() if known else 0
            other = sqlalchemy.inspect(connection).get_table_names()
        if known:
            if found != FORMAT:
                self._upgrade(found)
            if not self.readonly and not set(tables.tables) <= set(other):
                with self.write() as connection:
                    tables.create_all(connection)
            return
        if "sealed_head" in other:
            with self.read() as connection:
                wanted = connection.exec_driver_sql("SELECT master FROM sealed_head").scalar_one()
            raise StoreError(
                f"{self.path}: the store is encrypted; its master key {wanted} wanted, as "
                "key='file:PATH', 'env:NAME' or 'keyring:SERVICE/NAME'"
            )
        if other:
            raise StoreError(f"{self.path}: a database of memos wanted, got tables {other[:3]}")
        if self.readonly:
            raise StoreError(f"{self.path}: a store wanted, got an empty database")
        with self.write() as connection:
            if sqlalchemy.inspect(connection).has_table("store"):
                return  # another process was quicker
            tables.create_all(connection)
            first = {"id": 1, "format": FORMAT, "uuid": uuid.uuid4().hex}
            first |= {"change": 0, "seq": 0}
            connection.execute(store.insert(), first)

    def _upgrade(self, found: int) -> None:
        from memos.records.upgrade import upgrade

        if self.readonly or found > FORMAT:
            hint = ": open it once for writing" if 0 < found < FORMAT else ""
            raise StoreError(f"{self.path}: format {FORMAT} wanted, got {found}{hint}")
        with self.write() as connection:
            found = connection.execute(select(store.c.format)).scalar_one()
            # Another process may have been quicker.
            if found != FORMAT and not upgrade(connection, found):
                raise StoreError(f"{self.path}: format {FORMAT} wanted, got {found}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors in words; those of memos pass."""
        try:
            yield
        except sqlalchemy.exc.DBAPIError as error:
            raise _translated(self.path, error.orig or error) from error
        except sqlite3.Error as error:
            raise _translated(self.path, error) from error
        except (sqlalchemy.exc.NoResultFound, sqlalchemy.exc.MultipleResultsFound) as error:
            raise StoreError(f"{self.path}: damaged, one row wanted ({error})") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            # Only what is stored is read here.
            raise StoreError(f"{self.path}: damaged, other text wanted ({error})") from error
        except UnicodeEncodeError as error:
            raise utf8_error(error) from error


def open_database(
    folder: str | os.PathLike[str] | None,
    *,
    durable: bool = False,
    readonly: bool = False,
    key: Any = None,
) -> Database:
    """The database of a folder, made where it is not there; None: in memory.

    With a master key, see ``memos.records.keys``, it is encrypted.
    """
    if folder is None:
        if key is not None:
            raise ArgumentError("key: a path wanted with it, nothing is stored without one")
        return Database(None)
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"path: a folder wanted, got the file {path}")
    if readonly and not (path / "records.sqlite").exists():
        raise StoreError(f"{path}: no store there, and opened read-only")
    try:
        if not readonly:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: the folder cannot be made ({error.strerror})") from error
    if key is not None:
        from memos.records.keys import MasterKey
        from memos.records.sealed_database import SealedDatabase

        master = MasterKey.of(key)
        return SealedDatabase(path / "records.sqlite", master, durable=durable, readonly=readonly)
    return Database(path / "records.sqlite", durable=durable, readonly=readonly)


_CHANGE = select(store.c.change).where(store.c.id == 1)
_ALLOCATE = "UPDATE store SET change = change + 1, seq = seq + ? WHERE id = 1 RETURNING change, seq"


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("memos_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _translated(path: Path | None, error: Any) -> Exception:
    text = str(error)
    where = "the store in memory" if path is None else str(path)
    if "locked" in text or "busy" in text:
        return StoreLockedError(f"{where}: another process has been writing for {WAIT_S:.0f} s")
    if "full" in text:
        return StoreError(f"{where}: the disk is full; what was stored before is still there")
    if "readonly" in text or "unable to open" in text:
        return StoreError(f"{where}: it cannot be written ({text})")
    return StoreError(f"{where}: {text}")
