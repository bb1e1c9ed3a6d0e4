"""The database of an encrypted store: its tables in memory, their rows sealed in the file."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from memos.cube.sealing import KEY_BYTES
from memos.errors import BackendError, StoreError
from memos.records import sealed_image
from memos.records.database import WAIT_S, Database
from memos.records.keys import MasterKey
from memos.records.sealed import Replica


class SealedDatabase(Database):
    """As ``Database``, with one connection, whose turns the threads of a process take.

    A write inside a read of the same thread ends what the read saw: it sees the latest state, as
    after the write, from then on.

    Args:
        master: opens what is there, and seals what is written.

    Raises:
        StoreError: as ``Database``; another master key; the store is not encrypted.

    Cost: opening reads every row; the tables stay in memory.
    """

    is_sealed = True

    def __init__(
        self, path: Path, master: MasterKey, *, durable: bool = False, readonly: bool = False
    ) -> None:
        self._replica = Replica(path, master)
        self._image = path.with_name("records.image")
        self._held: Connection | None = None
        self._is_writing = False
        super().__init__(path, durable=durable, readonly=readonly)

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state of the store."""
        self._check_process()
        with self._errors(), self._write_lock:
            if self._held is not None:
                yield self._held
                return
            with self._transaction(writes=False) as connection:
                yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: committed at the end, undone when an error leaves it.

        A transaction inside one of the same thread is part of it.
        """
        self._check_process()
        self.check_writable()
        with self._errors(), self._write_lock:
            if self._held is not None and self._is_writing:
                yield self._held
                return
            self._afterwards = []
            if self._held is not None:
                with self._within_read(self._held):
                    yield self._held
            else:
                with self._transaction(writes=True) as connection:
                    yield connection
            afterwards, self._afterwards = self._afterwards, []
        for call in afterwards:
            call()

    # Keys.

    @property
    def master(self) -> MasterKey:
        """The key that opens this store."""
        return self._replica.keys.master

    def change_master(self, master: MasterKey) -> None:
        """Wrap every key with another master key; the old one opens nothing any more.

        Other processes that have the store open go on until a memory gets a key; then they have
        to open it again.
        """
        with self.write() as connection:
            self._replica.keys.change_master(_raw(connection), master)
        self._replica.keys.master = master
        self.scrub()

    def change_key(self, memory: int) -> None:
        """A new key for a memory; the keys of its cubes are wrapped with it."""
        with self.write() as connection:
            self._replica.keys.change_memory(_raw(connection), memory)
        self.scrub()

    def reseal(self) -> None:
        """New keys for everything, and every row sealed anew with them.

        Cost: as writing the whole store.
        """
        with self.write() as connection:
            self._replica.reseal(_raw(connection))
        self.scrub()

    def file_key(self, memory: int) -> bytes | None:
        """Under which files beside this one are encrypted for a memory: 32 bytes.

        Another one after keys of its cubes were destroyed: the files before are lost with it.
        """
        with self.read() as connection:
            found = self._replica.keys.of_files(_raw(connection), memory, make=False)
        if found is None and not self.readonly:
            with self.write() as connection:
                found = self._replica.keys.of_files(_raw(connection), memory, make=True)
        return found or os.urandom(KEY_BYTES)  # nothing was written that it could open

    def destroy_keys(self, connection: Connection, seqs: Sequence[int]) -> None:
        """In the transaction that removes what cubes say: delete the keys that sealed it.

        Rows of these cubes that are still there at its end are sealed with new keys. Afterwards no
        copy of an old page says anything any more.
        """
        self._replica.destroy(_raw(connection), list(seqs))
        self.after_commit(self.scrub)

    def destroy_memory_key(self, connection: Connection, memory: int) -> None:
        """As ``destroy_keys``, for all cubes of a memory, and for what else belongs to it."""
        db = _raw(connection)
        owners = [r[0] for r in db.execute(
            "SELECT owner FROM sealed_keys WHERE memory = ?", (memory,))]  # fmt: skip
        self._replica.destroy(db, owners)
        self._replica.keys.destroy_memory(db, memory)
        self.after_commit(self.scrub)

    def scrub(self) -> None:
        """Empty the write-ahead log: what was overwritten in the file is in no log either.

        Raises StoreError while another process reads an older state.
        """
        if self.readonly:
            return
        self._image.unlink(missing_ok=True)
        with self._errors(), self._write_lock, self._engine.connect() as connection:
            row = _raw(connection).execute("PRAGMA disk.wal_checkpoint(TRUNCATE)").fetchone()
        if row[0]:
            raise StoreError(
                f"{self.path}: another process has been reading for {WAIT_S:.0f} s; what was "
                "overwritten is still in the write-ahead log, until the store is closed everywhere"
            )

    # Inside.

    def _pool(self) -> dict[str, Any]:
        from sqlalchemy.pool import StaticPool

        return {"poolclass": StaticPool}

    def close(self) -> None:
        """Write the image of the tables, where it pays for itself, and close the file."""
        if not self.readonly and self._pid == os.getpid():
            # It is a cache: whatever keeps the store from being read was told, or will be.
            with contextlib.suppress(StoreError):
                self._save_image()
        super().close()

    def _save_image(self) -> None:
        with self.read() as connection:
            if not sealed_image.pays(_raw(connection)):
                return
        key = self.file_key(0)
        assert key is not None
        with self._errors(), self._write_lock, self._engine.connect() as connection:
            sealed_image.save(_raw(connection), self._image, key)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            ":memory:", uri=True, timeout=WAIT_S, isolation_level=None, check_same_thread=False
        )
        assert self.path is not None
        if ("TEMP_STORE=0",) in db.execute("PRAGMA compile_options").fetchall():
            raise BackendError(
                "key: this SQLite writes temporary tables to files (SQLITE_TEMP_STORE=0), where "
                "names of rows could be read; another build of SQLite wanted"
            )
        for pragma in ("foreign_keys=ON", "temp_store=MEMORY"):
            db.execute(f"PRAGMA {pragma}")
        self._replica.attach(db, readonly=self.readonly, durable=self.durable)
        return db

    def _prepare(self) -> None:
        writes = not self.readonly
        with self._engine.connect() as connection:
            connection = connection.execution_options(memos_write=writes)
            with connection.begin():
                self._replica.prepare(_raw(connection), readonly=self.readonly)
        with self._engine.connect() as connection:
            db = _raw(connection)
            key = self._replica.keys.of_files(db, 0, make=False)
            if key is not None:
                sealed_image.load(db, self._image, key)
        with self.read():
            pass
        super()._prepare()
        if writes:
            with self.write() as connection:
                self._replica.tidy(_raw(connection))

    @contextlib.contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            connection = connection.execution_options(memos_write=writes)
            with self._watched(), self._noticed(), connection.begin():
                db = _raw(connection)
                self._replica.follow(db)
                with self._holding(connection, writes):
                    if not writes:
                        yield connection
                        return
                    with self._told(connection):
                        yield connection
                    self._replica.flush(db)

    @contextlib.contextmanager
    def _within_read(self, held: Connection) -> Iterator[None]:
        """A transaction of its own, in the place of the one that reads."""
        db = _raw(held)
        db.execute("COMMIT")
        try:
            db.execute("BEGIN IMMEDIATE")
            with self._watched(), self._noticed():
                self._replica.follow(db)
                with self._holding(held, True):
                    with self._told(held):
                        yield
                    self._replica.flush(db)
                db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
            db.execute("BEGIN")

    @contextlib.contextmanager
    def _holding(self, connection: Connection, writes: bool) -> Iterator[None]:
        before = self._held, self._is_writing, self._writer
        self._held, self._is_writing = connection, writes
        self._writer = threading.get_ident() if writes else None
        try:
            yield
        finally:
            self._held, self._is_writing, self._writer = before

    @contextlib.contextmanager
    def _noticed(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._replica.undone()
            raise


def _raw(connection: Connection) -> sqlite3.Connection:
    found: Any = connection.connection.driver_connection
    db: sqlite3.Connection = found
    return db
