"""A sealed image of the tables of an encrypted store, so that opening need not make them anew.

A cache: what does not open, or is not the image that the file knows, is left alone. What was
written since is taken from the rows, as from another process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from pathlib import Path
from typing import Any

from memos.cube.memcube_cipher import OpeningReader, SealingWriter
from memos.errors import StoreError
from memos.records.schema import FORMAT

_VERSION = 1  # changes with what is made from the rows, too
_MAGIC = b"MEMOSIMG" + f"{_VERSION} {FORMAT} {sqlite3.sqlite_version}".encode().ljust(24)
_ID_BYTES = 16
_LEAST = 5000  # rows; fewer are read as fast from the file
_GROWTH = 20  # it is written again when a row in so many is newer
_PIECE = 1 << 20
_MOST = 1 << 30  # bytes that SQLite takes back


def pays(db: sqlite3.Connection) -> bool:
    """Whether an image may pay for itself; before Python 3.11 there is none."""
    (rows,) = db.execute("SELECT count(*) FROM sealed_rows").fetchone()
    return bool(rows >= _LEAST and hasattr(db, "serialize"))


def save(db: sqlite3.Connection, path: Path, key: bytes) -> None:
    """Write the tables in memory to a file, where many of their rows are new.

    Raises StoreError where it cannot be written.
    """
    (seen,) = db.execute("SELECT last FROM sealed_seen").fetchone()
    before = _stamp(db, path, key)
    rows, new = db.execute(
        "SELECT count(*), coalesce(sum(stamp > ?), 0) FROM sealed_rows", (before,)
    ).fetchone()
    if new * _GROWTH <= rows:
        return
    data = db.serialize(name="main")
    if len(data) >= _MOST:
        return
    id = os.urandom(_ID_BYTES)
    # A file that was put back to an earlier state knows an earlier image.
    db.execute("UPDATE sealed_head SET image = ?", (id,))
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                sealing: Any = SealingWriter(file, key)
                sealing.write(_MAGIC + id + seen.to_bytes(8, "little"))
                for at in range(0, len(data), _PIECE):
                    sealing.write(data[at : at + _PIECE])
                sealing.finish()
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise StoreError(f"{path}: the image was not saved: {error}") from error


def load(db: sqlite3.Connection, path: Path, key: bytes) -> None:
    """Put the tables of the file into memory, where they are not newer than the store."""
    if not hasattr(db, "deserialize"):
        return
    last, floor = db.execute("SELECT last, floor FROM sealed_head").fetchone()
    seen = _stamp(db, path, key)
    if not max(floor, 1) <= seen <= last:
        return
    parts = []
    with contextlib.suppress(OSError), open(path, "rb") as file:
        reader = OpeningReader(file, key)
        reader.seek(len(_MAGIC) + _ID_BYTES + 8)
        while part := reader.read(_PIECE):
            parts.append(part)
        # Not into ``db`` itself: what is put back so may not grow beyond a limit.
        with contextlib.closing(sqlite3.connect(":memory:")) as image:
            image.deserialize(b"".join(parts))
            image.backup(db, name="main")
        db.execute("UPDATE sealed_seen SET last = ?", (seen,))


def _stamp(db: sqlite3.Connection, path: Path, key: bytes) -> int:
    """As of which transaction the image is; 0: there is none that fits."""
    (id,) = db.execute("SELECT image FROM sealed_head").fetchone()
    wanted = _MAGIC + (id or b"")
    try:
        with open(path, "rb") as file:
            head = OpeningReader(file, key).read(len(_MAGIC) + _ID_BYTES + 8)
    except OSError:  # also where it does not open under the key
        return 0
    return int.from_bytes(head[-8:], "little") if id and head[:-8] == wanted else 0
