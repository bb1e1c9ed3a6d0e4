"""What lies in a store's folder besides segments and sessions.

FORMAT               JSON: name, version, whether encrypted, a check of the key, and where a
                     master key opens it the key, wrapped
LOCK                 flock by the one writer, its pid inside
recency              a hint: keys, the least recently used first
tenants/<id>/key     the tenant's secret and its check, 64 bytes, mode 0600
tenants/<id>/segments/NNNNNNNN.kvs
tenants/<id>/sessions.db
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from memos.errors import ArgumentError, StoreError
from memos.kv import _files
from memos.kv._crypto import KEY_BYTES, TenantKeys, Wraps, hkdf

FORMAT_NAME = "memos-kv"
FORMAT_VERSION = 1
ID_BYTES = 16
_KEY_NAME = b"memos.kv folder"
_RECENCY_MAGIC = b"MEMOSLRU"
_OWN_NAMES = {"FORMAT", "LOCK", "recency", "tenants"}


class Folder:
    """Paths and small files of one store. Not thread-safe: the store's write lock guards it."""

    def __init__(
        self,
        path: Path,
        encryption_key: bytes | None,
        durable: bool,
        wrapped: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.tenants = path / "tenants"
        self._encryption_key = encryption_key
        self._wrapped = dict(wrapped or {})
        self._durable = durable
        self._name_key = b"memos.kv"
        if encryption_key is not None:
            self._name_key = hkdf(encryption_key, b"", b"memos.kv tenant names v1")

    # The store

    def lock(self, wait_s: float) -> _files.FolderLock:
        """Make the folder where it is missing and take the writer's lock."""
        with _files.explained("open for writing", self.path):
            if not self.path.is_dir():
                self.path.mkdir(parents=True)
                if self._durable:
                    _files.sync_folder(self.path.parent)
            if not (self.path / "FORMAT").exists():
                names = {n for n in os.listdir(self.path) if not n.startswith(_files.TEMP)}
                if not names <= _OWN_NAMES:
                    raise StoreError(
                        f"{self.path}: a store or an empty folder wanted, got one without a file "
                        f"FORMAT and with {sorted(names - _OWN_NAMES)[0]!r}"
                    )
            return _files.FolderLock(self.path / "LOCK", wait_s)

    def prepare(self) -> None:
        """As the writer: clear away what a killed one left, write FORMAT where there is none."""
        with _files.explained("open for writing", self.path):
            path = self.path / "FORMAT"
            if not path.exists():
                text = json.dumps(self._format(), indent=1) + "\n"
                _files.write_file(path, text.encode(), durable=self._durable, mode=0o644)
            self.tenants.mkdir(mode=0o700, exist_ok=True)
            folders = [self.path, self.tenants]
            folders += [self.tenants / id.hex() / "segments" for id in self.tenant_ids()]
            folders += [self.tenants / id.hex() for id in self.tenant_ids()]
            for folder in folders:
                _files.clear_leftovers(folder)

    def check_format(self) -> None:
        """Raise StoreError unless this is a store that we can read with this key."""
        path = self.path / "FORMAT"
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise StoreError(f"{self.path}: a store wanted, got a folder without FORMAT") from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: cannot be read: {error}") from error
        wanted = self._format()
        if not isinstance(found, dict) or found.get("format") != FORMAT_NAME:
            raise StoreError(f"{path}: format {FORMAT_NAME!r} wanted, got {found!r}")
        if found.get("version") != FORMAT_VERSION:
            raise StoreError(
                f"{path}: version {FORMAT_VERSION} wanted, got {found.get('version')!r}"
            )
        if bool(found.get("encrypted")) != wanted["encrypted"]:
            given = "one was given" if wanted["encrypted"] else "none was given"
            does = "is" if found.get("encrypted") else "is not"
            raise StoreError(f"{self.path}: the store {does} encrypted, but of keys {given}")
        if found.get("key_check") != wanted["key_check"]:
            raise StoreError(f"{self.path}: encrypted under another encryption_key")

    def _format(self) -> dict[str, object]:
        key, check = self._encryption_key, ""
        if key is not None:
            check = hkdf(key, b"", b"memos.kv key check v1").hex()
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "encrypted": key is not None,
            "key_check": check,
            **self._wrapped,
        }

    @property
    def is_wrapped(self) -> bool:
        """Whether a master key keeps the key of this folder."""
        return bool(self._wrapped)

    def rewrap(self, master: Wraps) -> None:
        """Keep the key of the folder under another master key."""
        assert self._encryption_key is not None
        self._wrapped = _wrapped(self._encryption_key, master)
        text = json.dumps(self._format(), indent=1) + "\n"
        with _files.explained("change the key", self.path):
            path = self.path / "FORMAT"
            _files.write_file(path, text.encode(), durable=self._durable, mode=0o644)

    # Tenants

    def tenant_id(self, name: str) -> bytes:
        """The id of a tenant: a digest of its name, keyed where the store is encrypted."""
        return tenant_id(name, self._name_key)

    def tenant_ids(self) -> list[bytes]:
        try:
            names = os.listdir(self.tenants)
        except OSError:
            return []
        ids = []
        for name in sorted(names):
            if len(name) == 2 * ID_BYTES and set(name) <= set("0123456789abcdef"):
                ids.append(bytes.fromhex(name))
        return ids

    def tenant_folder(self, id: bytes) -> Path:
        return self.tenants / id.hex()

    def load_keys(self, id: bytes) -> TenantKeys | None:
        """A tenant's keys, None when there is no such tenant.

        Raises:
            StoreError: the key file is damaged.
        """
        path = self.tenant_folder(id) / "key"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            if not path.parent.is_dir():
                return None
            data = b""
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error}") from error
        if len(data) == 2 * KEY_BYTES:
            keys = TenantKeys(id, data[:KEY_BYTES], self._encryption_key)
            if hmac.compare_digest(keys.check, data[KEY_BYTES:]):
                return keys
        raise StoreError(
            f"{path}: the tenant's key is damaged, so its blocks are unreadable; restore the "
            "file, or remove them with delete_tenant"
        )

    def make_tenant(self, id: bytes) -> TenantKeys:
        """A new tenant with a new secret; its folder appears whole."""
        secret = secrets.token_bytes(KEY_BYTES)
        keys = TenantKeys(id, secret, self._encryption_key)
        temp = _files.temp_path(self.tenants)
        try:
            temp.mkdir(mode=0o700)
            (temp / "segments").mkdir(mode=0o700)
            _files.write_file(temp / "key", secret + keys.check, durable=self._durable)
            temp.rename(self.tenant_folder(id))
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        if self._durable:
            _files.sync_folder(self.tenants)
        return keys

    def remove_tenant(self, id: bytes) -> None:
        """Move a tenant's folder out of sight, then remove it, its secret first."""
        gone = self.tenants / f"{_files.DELETED}{id.hex()}-{secrets.token_hex(6)}"
        self.tenant_folder(id).rename(gone)
        if self._durable:
            _files.sync_folder(self.tenants)
        (gone / "key").unlink(missing_ok=True)
        for path in (gone / "segments").glob("*"):
            os.truncate(path, 0)  # a reader may hold it open
        shutil.rmtree(gone)
        if self._durable:
            _files.sync_folder(self.tenants)

    # Recency

    def save_recency(self, keys: list[bytes]) -> None:
        data = _RECENCY_MAGIC + b"".join(keys)
        data += blake3(data).digest()
        _files.write_file(self.path / "recency", data, durable=False)

    def load_recency(self) -> list[bytes]:
        """Keys, the least recently used first; none where the file is missing or damaged."""
        try:
            data = (self.path / "recency").read_bytes()
        except OSError:
            return []
        body, check = data[:-KEY_BYTES], data[-KEY_BYTES:]
        if not body.startswith(_RECENCY_MAGIC) or blake3(body).digest() != check:
            return []
        start = len(_RECENCY_MAGIC)
        return [body[i : i + KEY_BYTES] for i in range(start, len(body), KEY_BYTES)]


def folder_key(path: Path | None, master: Wraps) -> tuple[bytes, dict[str, str]]:
    """The key of a folder that a master key opens, and what FORMAT says of it; new where there is
    no folder yet.

    Raises StoreError where the master key is another one.
    """
    try:
        found = None if path is None else json.loads((path / "FORMAT").read_bytes())
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: FORMAT cannot be read: {error}") from error
    if found is None:
        key = secrets.token_bytes(KEY_BYTES)
        return key, _wrapped(key, master)
    if not isinstance(found, dict) or not found.get("wrapped_key"):
        raise StoreError(f"{path}: its key is not kept under a master key, but one was given")
    if found.get("master") != master.id:
        raise StoreError(
            f"{path}: encrypted under the master key {found.get('master')}, got {master.id}"
        )
    opened = None
    with contextlib.suppress(ValueError, TypeError):
        opened = master.unwrap(bytes.fromhex(found["wrapped_key"]), _KEY_NAME)
    if opened is None:
        raise StoreError(f"{path}: damaged, its key does not open")
    return opened, {name: found[name] for name in ("master", "wrapped_key")}


def _wrapped(key: bytes, master: Wraps) -> dict[str, str]:
    return {"master": master.id, "wrapped_key": master.wrap(key, _KEY_NAME).hex()}


def tenant_id(name: str, name_key: bytes = b"memos.kv") -> bytes:
    """16 bytes of HMAC-SHA256 over the name."""
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"name: a string that is not empty wanted, got {name!r}")
    return hmac.digest(name_key, name.encode(), "sha256")[:ID_BYTES]
