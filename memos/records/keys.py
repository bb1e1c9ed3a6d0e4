"""Keys of an encrypted store: a master key from outside, and what it opens inside.

The master key wraps a key for each memory, which wraps a key for each cube and one for what else
belongs to the memory; these seal the rows. A wrapped key is random and stands in the file, so a
new master key or a new key of a memory rewrites wrapped keys only, and a key that is deleted takes
with it whatever it sealed, in every copy of a page that a disk still has.
"""

from __future__ import annotations

import base64
import binascii
import os
import sqlite3
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memos.cube.sealing import KEY_BYTES, check_key, cipher, hkdf, seal, unseal
from memos.errors import ArgumentError, BackendError, NotFoundError, StoreError

_CHUNK = 500
_FILES = -(1 << 40)  # minus a memory: the owner of the files beside the store
_WAYS = "'file:PATH', 'env:NAME', 'keyring:SERVICE/NAME', 32 bytes or a MasterKey"


class MasterKey:
    """The key outside of a store that opens everything in it: 32 random bytes.

    A passphrase is no such key: make one with ``new_file`` or ``memos key new``. The key itself is
    in no attribute, repr, pickle or message; ``id`` names it.

    Args:
        key:    32 random bytes.
        origin: where it came from, for messages.

    Raises:
        ArgumentError: it is no key.
        BackendError: the package cryptography is missing.
    """

    def __init__(self, key: bytes, origin: str = "given") -> None:
        self._cipher = cipher(key, "key")
        self.id: str = hkdf(key, b"", b"memos master key id v1")[:8].hex()
        self.origin = origin

    def __repr__(self) -> str:
        return f"MasterKey({self.id}, {self.origin})"

    def __reduce__(self) -> Any:
        raise TypeError("a MasterKey is not pickled: pass where it comes from, 'file:PATH'")

    @classmethod
    def of(cls, given: Any) -> MasterKey:
        """A key from what a user passes: a MasterKey, 32 bytes, or a text that says where it is."""
        if isinstance(given, MasterKey):
            return given
        if isinstance(given, bytes):
            return cls(given)
        way, _, rest = given.partition(":") if isinstance(given, str) else ("", "", "")
        if way == "file" and rest:
            return cls.from_file(rest)
        if way == "env" and rest:
            return cls.from_env(rest)
        if way == "keyring" and rest:
            return cls.from_keyring(*_service(rest))
        # Perhaps the key itself, by mistake: it is not repeated.
        raise ArgumentError(f"key: {_WAYS} wanted, got a {type(given).__name__} that is none")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> MasterKey:
        """The key in a file: 32 bytes, or their base64 or hexadecimal text.

        Raises:
            NotFoundError: no such file.
            ArgumentError: it holds no key.
        """
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"key: the file {path} wanted, it is not there") from None
        except OSError as error:
            raise StoreError(f"key: {path} cannot be read ({error.strerror})") from error
        if len(data) == KEY_BYTES and not all(32 <= byte < 127 for byte in data):
            return cls(data, f"file {path}")
        return cls(_key_of(data.decode("latin-1"), f"the file {path}"), f"file {path}")

    @classmethod
    def from_env(cls, name: str = "MEMOS_KEY") -> MasterKey:
        """The key in an environment variable, as base64 or hexadecimal text.

        Raises:
            NotFoundError: the variable is not set.
            ArgumentError: it holds no key.
        """
        text = os.environ.get(name)
        if not text:
            raise NotFoundError(f"key: the environment variable {name} wanted, it is not set")
        return cls(_key_of(text, f"the environment variable {name}"), f"environment {name}")

    @classmethod
    def from_keyring(cls, service: str = "memos", name: str = "master") -> MasterKey:
        """The key that the operating system's keyring keeps under a service and a name.

        Raises:
            NotFoundError: it keeps none there.
            BackendError: the package keyring is missing, or it finds no keyring to ask.
        """
        where = f"keyring {service}/{name}"
        text = _ask_keyring("get_password", service, name)
        if not text:
            raise NotFoundError(f"key: {where} wanted, the keyring keeps none there")
        return cls(_key_of(text, where), where)

    @classmethod
    def new_file(cls, path: str | os.PathLike[str]) -> MasterKey:
        """Make a random key and write it to a new file that only its owner reads.

        Raises:
            ArgumentError: the file is there already: it may hold the only copy of a key.
            StoreError: it cannot be written.
        """
        text = new_text()
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ArgumentError(f"path: a new file wanted, got {path}, which exists") from None
        except OSError as error:
            raise StoreError(f"{path}: the key cannot be written ({error.strerror})") from error
        with os.fdopen(fd, "w") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
        return cls.from_file(path)

    @classmethod
    def new_keyring(cls, service: str = "memos", name: str = "master") -> MasterKey:
        """Make a random key and have the operating system's keyring keep it.

        Raises:
            ArgumentError: it keeps one there already.
            BackendError: the package keyring is missing, or it finds no keyring to ask.
        """
        if _ask_keyring("get_password", service, name):
            raise ArgumentError(f"name: a new one wanted, the keyring has {service}/{name}")
        _ask_keyring("set_password", service, name, new_text())
        return cls.from_keyring(service, name)

    def wrap(self, key: bytes, name: bytes) -> bytes:
        """A key of 32 bytes, to be stored beside what it seals."""
        check_key(key)
        return seal(self._cipher, key, b"memos wrapped key v1" + name)

    def unwrap(self, wrapped: bytes, name: bytes) -> bytes | None:
        """The key that was wrapped under this name; None: not with this master key."""
        return unseal(self._cipher, wrapped, b"memos wrapped key v1" + name)


def new_text() -> str:
    """A new random key as text, for a file, a variable or a keyring."""
    return base64.b64encode(os.urandom(KEY_BYTES)).decode()


def _key_of(text: str, where: str) -> bytes:
    text = text.strip()
    key = b""
    try:
        if len(text) == 2 * KEY_BYTES:
            key = bytes.fromhex(text)
        elif len(text) in (43, 44):
            text = text.rstrip("=").replace("-", "+").replace("_", "/")
            key = base64.b64decode(f"{text}=", validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != KEY_BYTES:
        raise ArgumentError(
            f"key: {KEY_BYTES} random bytes as base64 or hexadecimal wanted in {where}, got a text "
            f"of {len(text)} characters that is neither"
        )
    return key


def _service(text: str) -> tuple[str, str]:
    service, _, name = text.partition("/")
    return service, name or "master"


def _ask_keyring(call: str, *arguments: str) -> Any:
    try:
        import keyring
        import keyring.errors
    except ImportError as error:
        raise BackendError(
            "key: the package 'keyring' is not installed; pip install 'memos-native[keyring]'"
        ) from error
    try:
        return getattr(keyring, call)(*arguments)
    except keyring.errors.KeyringError as error:
        raise BackendError(f"key: the keyring does not answer ({error})") from error


class KeyRing:
    """The keys in one store, as far as its master key opens them.

    An owner is what has a key of its own: a cube by its number; minus the number of a memory for
    what belongs to the memory; 0 for what belongs to the store. Not thread-safe: the connection
    that it works on belongs to one thread at a time.

    Args:
        path: of the store, for messages.
    """

    def __init__(self, path: Path, master: MasterKey) -> None:
        self.path, self.master = path, master
        self.generation = -1  # of what was read
        self._memories: dict[int, Any] = {}  # ciphers that wrap the keys of owners
        self._store: bytes | None = None  # under which keys of rows are hidden

    def read(self, db: sqlite3.Connection) -> None:
        """Open the keys of the memories.

        Raises StoreError where the master key is another one.
        """
        wanted, generation = db.execute("SELECT master, generation FROM sealed_head").fetchone()
        if generation == self.generation:
            return
        if wanted != self.master.id:
            raise StoreError(
                f"{self.path}: encrypted under the master key {wanted}, got {self.master.id} "
                f"({self.master.origin})"
            )
        found = {}
        for memory, wrapped in db.execute("SELECT memory, wrapped FROM sealed_memories"):
            key = self.master.unwrap(wrapped, _memory_name(memory))
            if key is None:
                raise StoreError(f"{self.path}: damaged, the key of memory {memory} does not open")
            found[memory] = cipher(key)
        self._memories, self.generation = found, generation

    def ciphers(
        self, db: sqlite3.Connection, owners: Mapping[int, int], *, make: bool
    ) -> dict[int, Any]:
        """The cipher of each owner.

        Args:
            owners: owner -> number of its memory.
            make:   those that have no key get one; else they are left out.
        """
        found: dict[int, Any] = {}
        for owner, memory, wrapped in self._wrapped(db, list(owners)):
            found[owner] = self.open(owner, memory, wrapped)
        new = []
        for owner, memory in owners.items() if make else ():
            if owner not in found:
                key = os.urandom(KEY_BYTES)
                found[owner] = cipher(key)
                new.append((owner, memory, self._wrap(db, owner, memory, key)))
        if new:
            db.executemany("INSERT INTO sealed_keys VALUES (?, ?, ?)", new)
        return found

    def open(self, owner: int, memory: int, wrapped: bytes) -> Any:
        """The cipher of an owner's wrapped key. Raises StoreError where that is damaged."""
        return cipher(self._unwrap(owner, memory, wrapped))

    def hidden(self, db: sqlite3.Connection) -> bytes:
        """The key under which what names a row is hidden."""
        if self._store is None:
            self.ciphers(db, {0: 0}, make=True)
            self._store = self.derived(db, 0, b"memos names of rows v1")
        return self._store

    def of_files(self, db: sqlite3.Connection, memory: int, *, make: bool) -> bytes | None:
        """Under which files beside the store are encrypted, for a memory or, 0, for all of it."""
        owner = _FILES - memory
        if make:
            self.ciphers(db, {owner: memory}, make=True)
        elif not list(self._wrapped(db, [owner])):
            return None
        return self.derived(db, owner, b"memos files v1")

    def derived(self, db: sqlite3.Connection, owner: int, purpose: bytes) -> bytes:
        """32 bytes that follow from an owner's key. Raises StoreError where it has none."""
        for _, memory, wrapped in self._wrapped(db, [owner]):
            return hkdf(self._unwrap(owner, memory, wrapped), b"", purpose)
        raise StoreError(f"{self.path}: damaged, the key of {called(owner)} is missing")

    # Changing keys: each in the caller's transaction.

    def change_master(self, db: sqlite3.Connection, master: MasterKey) -> None:
        """Wrap the keys of the memories with another master key."""
        rows = db.execute("SELECT memory, wrapped FROM sealed_memories").fetchall()
        new = []
        for memory, wrapped in rows:
            key = self.master.unwrap(wrapped, _memory_name(memory))
            if key is None:
                raise StoreError(f"{self.path}: damaged, the key of memory {memory} does not open")
            new.append((master.wrap(key, _memory_name(memory)), memory))
        db.executemany("UPDATE sealed_memories SET wrapped = ? WHERE memory = ?", new)
        db.execute("UPDATE sealed_head SET master = ?", (master.id,))
        self._changed(db)

    def change_memory(self, db: sqlite3.Connection, memory: int) -> None:
        """A new key for a memory; the keys of its cubes are wrapped with it."""
        rows = db.execute(
            "SELECT owner, memory, wrapped FROM sealed_keys WHERE memory = ?", (memory,)
        ).fetchall()
        keys = [(owner, self._unwrap(owner, memory, wrapped)) for owner, _, wrapped in rows]
        self._make_memory(db, memory)
        new = [(self._wrap(db, owner, memory, key), owner) for owner, key in keys]
        db.executemany("UPDATE sealed_keys SET wrapped = ? WHERE owner = ?", new)

    def destroy(self, db: sqlite3.Connection, owners: Iterable[int]) -> None:
        """Delete the keys of owners, and those of the files that may say the same."""
        gone = list(owners)
        memories = {memory for _, memory, _ in self._wrapped(db, gone)} | {0}
        gone += [_FILES - memory for memory in memories]
        db.executemany("DELETE FROM sealed_keys WHERE owner = ?", [(owner,) for owner in gone])
        if 0 in gone:
            self._store = None

    def destroy_memory(self, db: sqlite3.Connection, memory: int) -> None:
        """Delete the key of a memory, with those of all its cubes."""
        db.execute("DELETE FROM sealed_keys WHERE memory = ?", (memory,))
        db.execute("DELETE FROM sealed_memories WHERE memory = ?", (memory,))
        self._memories.pop(memory, None)
        self._changed(db)

    # Inside.

    def forget(self) -> None:
        """After a transaction that was undone: read again what the file says."""
        self.generation, self._store = -1, None

    def _wrapped(
        self, db: sqlite3.Connection, owners: list[int]
    ) -> Iterable[tuple[int, int, bytes]]:
        for start in range(0, len(owners), _CHUNK):
            part = owners[start : start + _CHUNK]
            marks = ", ".join("?" * len(part))
            yield from db.execute(
                f"SELECT owner, memory, wrapped FROM sealed_keys WHERE owner IN ({marks})", part
            ).fetchall()

    def _unwrap(self, owner: int, memory: int, wrapped: bytes) -> bytes:
        kek = self._memories.get(memory)
        key = None if kek is None else unseal(kek, wrapped, _owner_name(owner, memory))
        if key is None or len(key) != KEY_BYTES:
            raise StoreError(f"{self.path}: damaged, the key of {called(owner)} does not open")
        return key

    def _wrap(self, db: sqlite3.Connection, owner: int, memory: int, key: bytes) -> bytes:
        if memory not in self._memories:
            self._make_memory(db, memory)
        return seal(self._memories[memory], key, _owner_name(owner, memory))

    def _make_memory(self, db: sqlite3.Connection, memory: int) -> None:
        key = os.urandom(KEY_BYTES)
        wrapped = self.master.wrap(key, _memory_name(memory))
        db.execute("INSERT OR REPLACE INTO sealed_memories VALUES (?, ?)", (memory, wrapped))
        self._memories[memory] = cipher(key)
        self._changed(db)

    def _changed(self, db: sqlite3.Connection) -> None:
        """Other processes read the keys again before they use one."""
        db.execute("UPDATE sealed_head SET generation = generation + 1")
        self.generation = db.execute("SELECT generation FROM sealed_head").fetchone()[0]


def called(owner: int) -> str:
    """An owner in words."""
    if owner > 0:
        return f"cube {owner}"
    return f"memory {-owner}" if owner else "the store"


def _memory_name(memory: int) -> bytes:
    return b"memory" + struct.pack("<q", memory)


def _owner_name(owner: int, memory: int) -> bytes:
    return b"memos key v1" + struct.pack("<qq", owner, memory)
