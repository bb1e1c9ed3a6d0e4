"""One tenant's view of a store: blocks and sessions under keys of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memos.errors import ArgumentError, NotFoundError, StoreError
from memos.kernels.hashing import hash_blocks
from memos.kv import _files
from memos.kv._crypto import Buffer, TenantKeys
from memos.kv._reading import Question, read_blocks
from memos.kv._state import State
from memos.kv._writing import check_entry, write_blocks
from memos.kv.frame import ZERO_KEY
from memos.kv.identity import KVIdentity
from memos.kv.sessions import Session, SessionTable

_TICK_NS = 200_000_000  # a folder's time of change may lag behind the clock by less than this
_LONGEST_TTL_S = 10**12


@dataclass(frozen=True)
class Entry:
    """One block to store.

    ``token_ids`` are the block's own tokens: P of them, or for a tail 1 to P - 1. ``index`` counts
    full blocks before it; ``parent`` is the key of the last of those, 32 zero bytes for none.
    ``expires_ms``: milliseconds since 1970, 0: never; None: as ``put`` says.
    """

    key: bytes
    parent: bytes
    token_ids: Sequence[int]
    index: int
    payload: Buffer
    tail: bool = False
    expires_ms: int | None = None


class Tenant:
    """Blocks and sessions of one tenant; made by ``KVStore.tenant``. Thread-safe.

    No other tenant's key opens, matches or predicts anything in here.
    """

    def __init__(self, state: State, name: str, folder: Path | None, keys: TenantKeys) -> None:
        self.name = name
        self.id = keys.tenant_id
        self._state = state
        self._keys = keys
        self._folder = folder
        self._deleted = False
        self._pinned: set[bytes] | None = None
        self._next_expiry: float | None = None  # of a session; None: not known
        self._seen: tuple[int, int] | None = None  # the segment folder when it was last scanned
        self._key_stat = (0, 0)
        path = None if folder is None else folder / "sessions.db"
        self._sessions = SessionTable(
            path, keys, writable=state.writable, durable=state.durable, tables=state.tables
        )

    # For the store

    def load(self) -> None:
        """Scan the segments."""
        state = self._state
        if state.disk is None or self._folder is None:
            return
        with state.lock:
            self._key_stat = _identify(self._folder / "key")
            if state.writable:
                (self._folder / "segments").mkdir(mode=0o700, exist_ok=True)
            for record in state.disk.load(self._folder / "segments", self._keys):
                state.note_expiry(record.block)

    def parts(self) -> tuple[Path, TenantKeys, SessionTable] | None:
        """What ``verify`` walks."""
        return None if self._folder is None else (self._folder, self._keys, self._sessions)

    def is_current(self) -> bool:
        """False once the folder's secret is another one: the tenant was deleted and made anew."""
        return self._folder is None or self._key_stat == _identify(self._folder / "key")

    def mark_deleted(self) -> None:
        self._deleted = True
        self._sessions.close()

    def after_fork(self) -> None:
        self._sessions.after_fork(self._state.tables)

    def close(self) -> None:
        self._sessions.close()

    # Keys

    def block_keys(self, token_ids: Sequence[int], identity: KVIdentity) -> list[bytes]:
        """Keys of the full blocks of these tokens, which begin at the very first token."""
        return hash_blocks(
            token_ids, identity.block_tokens, self._keys.block_secret, ZERO_KEY, identity.digest
        )

    def tail_key(self, token_ids: Sequence[int], parent: bytes, identity: KVIdentity) -> bytes:
        """Key of 1 to P - 1 trailing tokens, stored exact, after the full block ``parent``."""
        if not 1 <= len(token_ids) < identity.block_tokens:
            raise ArgumentError(
                f"token_ids: 1 to {identity.block_tokens - 1} tokens wanted for a tail, "
                f"got {len(token_ids)}"
            )
        secret = self._keys.tail_secret
        return hash_blocks(token_ids, len(token_ids), secret, parent, identity.digest)[0]

    # Blocks

    def put(
        self,
        entries: Iterable[Entry],
        identity: KVIdentity,
        *,
        ttl_s: float | None = None,
        keep: Collection[bytes] = (),
        background: bool = False,
    ) -> int:
        """Store blocks; on return they survive a crash.

        A block that is stored already, for at least as long, is touched and not rewritten. When
        not all new ones fit, the leading ones that do are stored; put parents before children.

        Args:
            ttl_s:      how long they live, but for entries that say when their time is over.
            keep:       keys of blocks that are not evicted for these.
            background: with a disk they do not come into memory.

        Returns:
            How many were newly stored.

        Raises:
            ArgumentError: an entry's key is not that of its tokens, or a size is out of contract.
            QuotaError: not one new block fits; nothing was evicted for it.
            StoreError: the folder is full or read-only; nothing stored before is lost.
        """
        state = self._state
        if ttl_s is not None and not 0 < ttl_s < _LONGEST_TTL_S:
            raise ArgumentError(f"ttl_s: more than 0, at most {_LONGEST_TTL_S} wanted, got {ttl_s}")
        now = state.now_ms()
        expires = 0 if ttl_s is None else now + max(1, int(ttl_s * 1000))
        items = [
            check_entry(
                f"entries[{i}]",
                entry,
                identity,
                self._keys,
                now,
                expires if entry.expires_ms is None else entry.expires_ms,
            )
            for i, entry in enumerate(entries)
        ]
        with self._writing("store blocks"):
            self._sweep_sessions_when_due()
            state.sweep(now)
            folder = None if self._folder is None else self._folder / "segments"
            return write_blocks(state, folder, items, identity, self._keys, keep, background)

    def get(
        self,
        keys: Sequence[bytes],
        identity: KVIdentity,
        token_ids: Sequence[int] | None = None,
        *,
        background: bool = False,
    ) -> list[memoryview]:
        """Payloads of the longest prefix of ``keys`` whose blocks pass every check.

        Bad data never raises: it ends the prefix and is counted in ``stats()``. The views are
        read-only and stay valid for as long as they are held.

        Args:
            keys:      consecutive blocks, a tail last.
            identity:  what the caller's model is; a block of another one is a miss.
            token_ids: the tokens behind ``keys``, from the first key's first token on; may be
                longer. Given, the tokens each block was stored for are compared with them.
            background: it is no use of them, and they do not come into memory.
        """
        state = self._state
        state.check_open()
        self.refresh()
        question = Question(keys, identity, token_ids, self._keys, state.now_ms(), background)
        return read_blocks(state, question)

    def contains(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are known and not expired. Looks at the index only."""
        state = self._state
        state.check_open()
        self.refresh()
        now, count = state.now_ms(), 0
        with state.lock:
            for key in keys:
                block = state.find(key)
                if block is None or block.tenant != self.id or block.has_expired(now):
                    break
                count += 1
        return count

    def expiries(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """Of those of these blocks that are known: when their time is over, in milliseconds since
        1970; 0: never."""
        state = self._state
        with state.lock:
            found = ((key, state.find(key)) for key in keys)
            return {
                key: block.expires_ms
                for key, block in found
                if block is not None and block.tenant == self.id
            }

    def placed(self, keys: Sequence[bytes]) -> dict[str, tuple[int, int]]:
        """(how many of these blocks, their bytes) in memory, "host", and on "disk"."""
        state = self._state
        found = {"host": (0, 0)} if state.disk is None else {"host": (0, 0), "disk": (0, 0)}
        with state.lock:
            for key in keys:
                held = state.host.blocks.get(key)
                if held is not None:
                    count, size = found["host"]
                    found["host"] = count + 1, size + len(held.payload)
                record = None if state.disk is None else state.disk.records.get(key)
                if record is not None:
                    count, size = found["disk"]
                    found["disk"] = count + 1, size + record.frame_bytes
        return found

    def leave(self, session_id: str, tier: str) -> int:
        """Give up the blocks of a session in a tier, those aside that other sessions use; the
        session stays, and is computed again where this was the last copy. Returns how many.

        Args:
            tier: "host": out of memory; "disk": everywhere.

        Raises NotFoundError; ArgumentError where the session is pinned.
        """
        state = self._state
        keys = self._sessions.keys_of(session_id)
        if keys is None:
            raise NotFoundError(f"session {session_id!r}: not there")
        keys = sorted(set(keys) - self._sessions.used_elsewhere(session_id, keys))
        if tier == "host" and state.disk is not None:
            with state.lock:
                return sum(state.host.remove(key) for key in keys)
        if self.pinned_keys().intersection(keys):
            raise ArgumentError(f"session {session_id!r}: it is pinned")
        return self.delete(keys)

    def delete(self, keys: Iterable[bytes]) -> int:
        """Remove blocks, pinned or not, and their bytes from disk; returns how many there were."""
        with self._writing("delete blocks"):
            return self._destroy(keys)

    def refresh(self) -> None:
        """Look for segments that another process wrote or removed; cheap when there are none."""
        state = self._state
        if state.disk is None or self._folder is None or state.writable:
            return
        folder = self._folder / "segments"
        seen, now = _identify(folder), time.time_ns()
        with state.lock:
            if seen != self._seen:
                state.disk.load(folder, self._keys)
                # A change within the clock's tick of this one would carry the same time.
                self._seen = seen if now - seen[1] > _TICK_NS else None

    def _destroy(self, keys: Iterable[bytes]) -> int:
        state = self._state
        with state.lock:
            mine = []
            for key in keys:
                block = state.find(key)
                if block is not None and block.tenant == self.id:
                    mine.append(key)
            count = state.destroy(mine, wipe=True)
            if state.disk is not None and self._folder is not None:
                # A damaged frame may be one of those: its key is not known any more.
                state.disk.reclaim(self.id, wipe=True)
        return count

    def now(self) -> float:
        """Seconds since 1970 by the store's clock."""
        return self._state.clock()

    # Sessions

    def save_session(
        self, session: Session, *, keep_times: bool = False, also: Iterable[bytes] = ()
    ) -> Session:
        """Insert or replace a session, durable on return.

        ``updated_at`` becomes now, and ``created_at`` where it is 0; returned is what was stored.
        With ``keep_times`` both stay as they are: it comes from another store. Of what it claimed
        or used before, ``also`` stays claimed.
        """
        with self._writing("save a session"):
            self._sweep_sessions_when_due()
            now = self._state.clock()
            created = session.created_at or now
            stored = dataclasses.replace(session, created_at=created, updated_at=now)
            if keep_times:
                stored = session
            self._sessions.save(stored, also)
            self._pinned = self._next_expiry = None
            return stored

    def claim(self, session_id: str, keys: Sequence[bytes]) -> None:
        """A session uses blocks that its row does not name, until ``save_session``: while it is
        pinned they stay, and with it they go. Raises NotFoundError."""
        with self._writing("claim blocks"):
            if self._sessions.keys_of(session_id) is None:
                raise NotFoundError(f"session {session_id!r}: not there")
            self._sessions.claim(session_id, keys)
            self._pinned = None

    def claimed(self, session: Session) -> set[bytes]:
        """Keys that a session uses and its row does not name."""
        return set(self._sessions.keys_of(session.id) or ()).difference(session.keys)

    def give_up(self, session_id: str, keys: Iterable[bytes]) -> set[bytes]:
        """A session uses these blocks no more, but for those that its row names. Those that no
        other session uses go, and what follows them; returns their keys."""
        with self._writing("delete blocks"):
            session = self._sessions.load(session_id)
            keys = set(keys).difference(() if session is None else session.keys)
            doomed = keys - self._sessions.used_elsewhere(session_id, sorted(keys))
            # Blocks first: were the claims gone first, a crash would leave what no one deletes.
            if doomed:
                self._destroy(doomed | self._followers(doomed))
            self._sessions.release(session_id, keys)
            self._pinned = None
            return doomed

    def exchange(self, session: Session, identity: bytes, keys: list[bytes]) -> set[bytes]:
        """A session stands in other blocks from now on, all of which are stored; those it had go.

        A crash leaves it in the one or in the other. Its times, metadata and pin stay.

        Args:
            session:  as it was when its blocks were read.
            identity: digest; keys: of the new blocks, each in place of an old one.

        Returns:
            Keys of the old blocks that no other session uses.

        Raises:
            StoreError: it changed meanwhile, or a new block is not there any more.
        """
        with self._writing("exchange blocks"):
            now = self._sessions.load(session.id)
            same = now is not None and now.identity == session.identity
            if now is None or not same or now.keys != session.keys:
                raise StoreError(f"session {session.id!r}: it changed while it was read")
            if self.contains(keys) < len(keys):
                raise StoreError(f"session {session.id!r}: no room for all of its blocks")
            new = dataclasses.replace(now, identity=identity, keys=keys)
            self._sessions.save(new, session.keys)
            self._pinned = None
            with self._state.lock:
                for key, old in zip(keys, session.keys, strict=True):
                    self._state.succeed(key, old)
            return self.give_up(session.id, session.keys)

    def session(self, id: str) -> Session | None:
        """The session of this id; None when there is none, it expired or its row is damaged."""
        self._state.check_open()
        found = None if self._deleted else self._sessions.load(id)
        return found if found is not None and self._is_current(found) else None

    def sessions(self, **metadata: Any) -> list[Session]:
        """Sessions whose metadata has all these items, newest first."""
        self._state.check_open()
        found = [] if self._deleted else self._sessions.find(metadata)
        return [session for session in found if self._is_current(session)]

    def delete_session(self, id: str) -> int:
        """Remove a session and the blocks that no other session uses; returns how many blocks.

        Blocks that follow a removed block go too: nothing could reach them. Raises NotFoundError.
        """
        with self._writing("delete a session"):
            keys = self._sessions.keys_of(id)
            if keys is None:
                raise NotFoundError(f"session {id!r}: not there")
            return self._delete_session(id, keys)

    def clear(self) -> int:
        """Remove every session and every block, and their bytes; returns how many blocks."""
        with self._writing("delete all blocks"):
            for session in self._sessions.find({}):
                self._sessions.remove(session.id)
            with self._state.lock:
                mine = [block.key for block in self._state.blocks() if block.tenant == self.id]
            self._pinned = self._next_expiry = None
            return self._destroy(mine)

    def pin(self, session_id: str, pinned: bool = True) -> None:
        """While a session is pinned its blocks are never evicted. Raises NotFoundError."""
        with self._writing("pin a session"):
            session = self._sessions.load(session_id)
            if session is None:
                raise NotFoundError(f"session {session_id!r}: not there")
            self._sessions.save(dataclasses.replace(session, pinned=pinned))
            self._pinned = None

    def sweep_sessions(self) -> int:
        """Delete the sessions that expired, with their blocks; returns how many."""
        with self._writing("delete expired sessions"):
            over = self._sessions.expired(self._state.clock())
            for id in over:
                self._delete_session(id, self._sessions.keys_of(id) or [])
            self._next_expiry = None
            return len(over)

    def _sweep_sessions_when_due(self) -> None:
        if self._next_expiry is None:
            self._next_expiry = self._sessions.next_expiry()
        if self._state.clock() >= self._next_expiry:
            self.sweep_sessions()

    def pinned_keys(self) -> set[bytes]:
        """Keys of the blocks of pinned sessions; none where the table of sessions is damaged."""
        if self._pinned is None:
            try:
                self._pinned = self._sessions.pinned_keys()
            except StoreError:  # reported to whoever asks for sessions; others can go on storing
                return set()
        return self._pinned

    def _delete_session(self, id: str, keys: list[bytes]) -> int:
        # Blocks first: were the row gone first, a crash would leave blocks that no one deletes.
        doomed = set(keys) - self._sessions.used_elsewhere(id, keys)
        doomed |= self._followers(doomed)
        count = self._destroy(doomed)
        self._sessions.remove(id)
        self._pinned = None
        return count

    def _followers(self, keys: set[bytes]) -> set[bytes]:
        """Keys of all blocks that follow one of these and that no session uses."""
        state = self._state
        children: dict[bytes, list[bytes]] = {}
        with state.lock:
            for block in state.blocks():
                if block.tenant == self.id:
                    children.setdefault(block.parent, []).append(block.key)
        found: set[bytes] = set()
        front = list(keys)
        while front:
            for child in children.get(front.pop(), ()):
                if child not in found and child not in keys:
                    found.add(child)
                    front.append(child)
        return found - self._sessions.used(sorted(found))

    def _is_current(self, session: Session) -> bool:
        return session.expires_at is None or session.expires_at > self._state.clock()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        with self._state.write_lock:
            self._state.check_writable()
            if self._deleted:
                raise NotFoundError(f"tenant {self.name!r}: deleted; ask the store for a new one")
            with _files.explained(what, self._folder or Path("memory")):
                yield


def _identify(path: Path) -> tuple[int, int]:
    """Changes when the file or folder changes or is another one."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_ino, stat.st_mtime_ns
