"""Cubes as files that another store opens: one .memcube holds memories of any kind."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from memos.errors import ArgumentError, NotFoundError, StoreError

if TYPE_CHECKING:
    import threading

    from memos.records.store import Records

Progress = Callable[[int, int], object]
CONFLICTS = ("error", "skip")  # what an id does that is there already


@dataclass(frozen=True)
class Exported:
    """What ``mos.export`` wrote.

    Args:
        path:      of the file.
        num_bytes: of it.
        digest:    of its content, in hex: the same for the same content.
        memories:  name -> how many cubes, or sessions of a KVCacheMemory.
    """

    path: Path
    num_bytes: int
    digest: str
    memories: dict[str, int]


@dataclass(frozen=True)
class Rebuild:
    """What was made by another model than the one here: to be made anew, from its source.

    Args:
        memory, id: of the session or adapter.
        kind:       "kv_cache" or "parametric".
        why:        it cannot be used, in words.
        made_for:   the model it was made for, as the file says.
        text:       of a session: what its tokens say; None: the file does not know.
        token_ids:  of a session, by the tokenizer of ``made_for``.
        sources:    of an adapter: ids of the cubes it was learnt from.
    """

    memory: str
    id: str
    kind: str
    why: str
    made_for: dict[str, Any]
    text: str | None = None
    token_ids: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass
class MemoryReport:
    """What came of one memory of a file.

    Args:
        kind:     of the memory.
        is_new:   it was made by the import.
        cubes:    how many were stored; of a KVCacheMemory: sessions.
        versions: how many of them together.
        skipped:  how many were there already.
        vectors:  "kept" as they were; "re-embedded" by the embedder of the memory, which is
            another one; "dropped": another one, which is not here; "none": there were none.
        waiting:  relations to cubes that are not in this store: they are made when those come.
    """

    kind: str
    is_new: bool = False
    cubes: int = 0
    versions: int = 0
    skipped: int = 0
    vectors: str = "none"
    waiting: int = 0


@dataclass
class Imported:
    """What ``mos.import_`` did.

    Args:
        digest:   of the content of the file, in hex.
        signer:   public key in hex of who signed it; None: nobody.
        memories: what came of each, by name.
        rebuild:  what another model made. Sessions are not stored; adapters are, and are refused
            under the wrong model.
    """

    digest: str
    signer: str | None
    memories: dict[str, MemoryReport] = field(default_factory=dict)
    rebuild: list[Rebuild] = field(default_factory=list)


@dataclass(frozen=True)
class Inspected:
    """What a file says of itself, verified.

    Args:
        num_bytes:    of the file.
        digest:       of its content, in hex.
        signer:       public key in hex of who signed it; None: nobody.
        is_encrypted: whether it is.
        memories:     as they stand in its manifest: name, kind, cubes, embedder, identity, ...
        adapters:     digests of those in it.
        members:      (name, type, bytes, digest) of everything in it.
    """

    num_bytes: int
    digest: str
    signer: str | None
    is_encrypted: bool
    memories: list[dict[str, Any]]
    adapters: list[str]
    members: list[tuple[str, str, int, str]]


class Files:
    """Part of MOS."""

    records: Records
    _lock: threading.RLock
    _memories: dict[str, Any]
    _restored: set[str]
    memory: Callable[[str], Any]

    def export(
        self,
        path: str | os.PathLike[str],
        ids: Sequence[str] | None = None,
        memory: str | Sequence[str] | None = None,
        *,
        sign: Any = None,
        passphrase: str | bytes | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Exported:
        """Write memories into one file, with everything that is known of their cubes: versions,
        relations, access lists, provenance, vectors, adapters, KV blocks.

        Equal contents give equal files, byte for byte, as long as nothing is encrypted.

        Args:
            path:       of the file; it appears whole or not at all.
            ids:        only these cubes or sessions, with what they cannot stand without: what is
                above and below them in a tree, the ends of relationships. None: everything, and
                what was deleted with its history.
            memory:     a name, or names; None: all that may be exported.
            sign:       an Ed25519 private key (of cryptography), or its 32 bytes.
            passphrase: encrypts the file: a text, or a key of 32 bytes.
            overwrite:  replace a file that is there.
            progress:   called with (cubes done, cubes in all).

        Raises:
            NotFoundError: an unknown memory or id.
            ArgumentError: an argument is out of contract.
            AccessError:   the principal has not "admin" on one of the memories, or may not read a
                cube that relations name.
            StoreError:    the store is damaged, or the file cannot be written.

        Cost: reads everything once; a few tens of megabytes of memory, however much it is.
        """
        from memos.facade.files_out import export

        where = Path(path)
        if where.is_dir() or (where.exists() and not overwrite):
            raise ArgumentError(f"path: a new file wanted, or overwrite=True, got {where}")
        if ids is not None and (isinstance(ids, str) or not all(isinstance(i, str) for i in ids)):
            raise ArgumentError(f"ids: a list of ids wanted, got {ids!r}")
        names = [memory] if isinstance(memory, str) else memory
        with self._lock:
            chosen = dict(self._memories)
        if names is not None:
            chosen = {name: self.memory(name) for name in names}
        with _written(where) as stream:
            made = export(
                self.records,
                chosen,
                stream,
                ids,
                named=names is not None,
                sign=sign,
                secret=passphrase,
                progress=progress,
            )
        return Exported(where, where.stat().st_size, made[0], made[1])

    def import_(
        self,
        path: str | os.PathLike[str],
        *,
        on_conflict: str = "error",
        passphrase: str | bytes | None = None,
        trusted: Sequence[Any] | None = None,
        embedder: Any = "auto",
        names: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> Imported:
        """Read what ``export`` wrote, here or elsewhere. The whole file is verified before
        anything is stored, and all of it is stored or nothing.

        Memories are made where they are new. A KVCacheMemory has to be registered for its model;
        sessions of another model, or without a memory, are offered as ``rebuild``.

        Args:
            path:        of the file.
            on_conflict: where an id is there already: "error"; "skip": the cube stays where it
                has the version of the file, as its last one or in its history, and is an error
                otherwise.
            passphrase:  of an encrypted file: a text, or a key of 32 bytes.
            trusted:     Ed25519 public keys (of cryptography, 32 bytes, or hex), one of which has
                to have signed the file; None: anybody or nobody.
            embedder:    of memories that are new: "auto" or None. Register a memory before to
                give it another one. Texts are embedded again where the file's vectors were made
                by another one.
            names:       of memories of the file -> what to call them here: beside one that is
                there, to be merged into it.
            progress:    called with (bytes done, bytes in all); every byte is read twice.

        Raises:
            StoreError:    the file is damaged, lies, or is not signed by whom it should.
            ArgumentError: an id is there already, or an argument is out of contract.
            AccessError:   the principal has not "admin" on one of the memories.
            NotFoundError: no such file.

        Cost: reads the file twice and writes it once, in one transaction; a few tens of megabytes
            of memory, however much it is, and the disk twice.
        """
        from memos.facade.files_in import Import

        if embedder not in (None, "auto"):
            raise ArgumentError(f"embedder: 'auto' or None wanted, got {embedder!r}")
        if on_conflict not in CONFLICTS:
            raise ArgumentError(
                f"on_conflict: one of {', '.join(CONFLICTS)} wanted, got {on_conflict!r}"
            )
        self.records.database.check_writable()
        with self._lock:
            memories, restored = dict(self._memories), frozenset(self._restored)
        with opened(path) as stream, explained(path):
            run = Import(
                self.records,
                memories,
                restored,
                stream,
                on_conflict=on_conflict,
                secret=passphrase,
                trusted=trusted,
                embedder=embedder,
                names=names,
                progress=progress,
            )
            report = run.run()
        with self._lock:
            for name, memory in run.made.items():
                if name in self._memories:  # somebody has registered it meanwhile
                    memory.close()
                else:
                    self._memories[name] = memory
                    self._restored.add(name)
        return report


def inspect(
    path: str | os.PathLike[str],
    *,
    passphrase: str | bytes | None = None,
    trusted: Sequence[Any] | None = None,
    progress: Progress | None = None,
) -> Inspected:
    """What is in a .memcube. Every byte of it is verified; no store is needed.

    Args:
        passphrase, trusted: as ``mos.import_``.
        progress:            called with (bytes done, bytes in all).

    Raises: NotFoundError, StoreError, ArgumentError: as ``mos.import_``.
    """
    from memos.cube.memcube import MemcubeReader

    with opened(path) as stream, explained(path):
        reader = MemcubeReader(stream, secret=passphrase, trusted=trusted)
        reader.verify(progress)
        info = reader.info
        memories, adapters = info.get("memories"), info.get("adapters")
        if not _is_list(memories, dict) or not _is_list(adapters, str):
            raise StoreError("manifest.json: memories and adapters wanted")
        return Inspected(
            num_bytes=Path(path).stat().st_size,
            digest=reader.digest,
            signer=reader.signer,
            is_encrypted=reader.is_encrypted,
            memories=memories or [],
            adapters=adapters or [],
            members=[(m.name, m.type, m.num_bytes, m.digest) for m in reader.members.values()],
        )


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to read. Raises NotFoundError, StoreError."""
    where = Path(path)
    try:
        stream = where.open("rb")
    except FileNotFoundError:
        raise NotFoundError(f"path: no file {where}") from None
    except OSError as error:
        raise StoreError(f"{where}: it cannot be read ({error.strerror})") from error
    with stream:
        yield stream


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the file say which file."""
    try:
        yield
    except StoreError as error:
        if type(error) is not StoreError or str(error).startswith(str(path)):
            raise
        raise StoreError(f"{path}: {error}") from error
    except OSError as error:
        if isinstance(error, NotFoundError | ArgumentError) or error.strerror is None:
            raise
        raise StoreError(f"{path}: it cannot be read ({error.strerror})") from error


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at the end, whole; nothing is left of it when an error comes."""
    temp = path.with_name(f".tmp-{path.name[:200]}-{secrets.token_hex(6)}")
    try:
        with temp.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temp.replace(path)
    except BaseException as error:
        temp.unlink(missing_ok=True)
        if type(error) in (OSError, PermissionError, FileNotFoundError, NotADirectoryError):
            why = getattr(error, "strerror", None) or error
            raise StoreError(f"{path}: it cannot be written ({why})") from error
        raise


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def only(value: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    """Raise StoreError where an object has other keys."""
    if value.keys() != set(keys):
        raise StoreError(f"{what}: {', '.join(keys)} wanted")
