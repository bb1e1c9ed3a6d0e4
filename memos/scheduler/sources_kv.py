"""The sessions of a KVCacheMemory as units: on the model's device, in memory and on disk."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos.errors import ArgumentError, NotFoundError, StoreError
from memos.scheduler.plan import Action
from memos.scheduler.sources import Engine
from memos.scheduler.sources_device import DEVICE, DeviceTier, Here
from memos.scheduler.units import KV, Estimate, Unit

if TYPE_CHECKING:
    from memos.kv.identity import KVIdentity
    from memos.kv.sessions import Session
    from memos.memories.kv_cache import KVCacheMemory

HOST, DISK = "host", "disk"
_OPEN_S = 600.0  # a turn that was begun and not committed is given up after so long
_CHUNK = 16  # blocks between two looks at whether a move is cancelled
_READ = 64  # rows of sessions that nothing holds, looked at with every step
_FEW = 8  # sessions that share a block: each new one changes what it costs the others


class Pace:
    """Seconds per token of the prompt and per generated one, from turns as they happen.

    Least squares over recent turns: the time of a turn is a sum of both.
    """

    def __init__(self, prompt_s: float = 1e-3, keep: float = 0.98) -> None:
        self.prompt_s, self.output_s, self._keep = prompt_s, prompt_s, keep
        self._pp = self._po = self._oo = self._pt = self._ot = 0.0

    def add(self, prompt: int, output: int, seconds: float) -> None:
        """A turn computed so many tokens of its prompt and generated so many."""
        keep = self._keep
        self._pp = keep * self._pp + prompt * prompt
        self._po = keep * self._po + prompt * output
        self._oo = keep * self._oo + output * output
        self._pt = keep * self._pt + prompt * seconds
        self._ot = keep * self._ot + output * seconds
        both = self._pp * self._oo - self._po * self._po
        if both > 1e-3 * self._pp * self._oo:
            first = (self._pt * self._oo - self._ot * self._po) / both
            second = (self._ot * self._pp - self._pt * self._po) / both
            if first > 0 and second > 0:
                self.prompt_s, self.output_s = first, second
                return
        total = self._pt + self._ot
        if total > 0:
            same = total / (self._pp + 2 * self._po + self._oo)
            self.prompt_s = self.output_s = same


@dataclass(frozen=True)
class _Known:
    """What is remembered of a session between two looks at its row."""

    keys: list[bytes]
    tokens: int
    updated_at: float
    identity: bytes
    cold_keys: list[bytes]  # of its blocks once it is compressed; empty: it cannot be
    sizes: list[int]  # bytes of its blocks in the slowest tier, as payloads or as frames
    cold_sizes: list[int]
    is_compressed: bool


class KVSource:
    """Sessions: a unit each, "memory/session". Blocks that sessions share count in parts.

    A session that nothing holds can be computed again by its next turn, so its last copy may go.
    Where the memory has a ``cold_codec`` it can be compressed instead, once: a session that is
    neither pinned nor in a turn, and whose own blocks free more than the compressed ones take.

    Args:
        memory: whose sessions.
        rebuild: computes a session's KV anew and stores it, in the background; None: only turns do.
    """

    def __init__(
        self,
        memory: KVCacheMemory,
        *,
        clock: Callable[[], float] = time.time,
        rebuild: Callable[[str], object] | None = None,
    ) -> None:
        self.name, self.memory, self._clock = memory.name, memory, clock
        self._rebuild = rebuild
        self._store = memory.store
        self.has_disk = self._store.path is not None
        self.pace = Pace()
        # Seconds per byte.
        self._access = {DEVICE: Estimate(5e-11), HOST: Estimate(1e-10), DISK: Estimate(1e-9)}
        self.device = DeviceTier(memory, self._on_device)
        self._lock = threading.Lock()
        self._dirty: dict[str, None] = dict.fromkeys(
            session.id for session in memory.tenant.sessions()
        )
        self._uses: deque[tuple[str, float]] = deque()
        self._open: dict[str, float] = {}
        self._known: dict[str, _Known] = {}
        self._told: dict[str, Unit] = {}
        self._moved: tuple[str, ...] = ()
        self._absent: OrderedDict[str, None] = OrderedDict()  # sessions of which no tier has all
        self._sharers: dict[bytes, set[str]] = {}
        self._was_in: dict[str, str] = {}
        self._main: KVIdentity | None = None  # as of the last look; None: nothing is compressed
        self._cold: KVIdentity | None = None
        memory.meter = self

    def close(self) -> None:
        """Listen no more."""
        if self.memory.meter is self:
            self.memory.meter = None

    # What the memory tells

    def begun(self, turn: Any, seconds: float) -> None:
        """A turn begins; what was stored of its prompt took so long to come back."""
        now = self._clock()
        with self._lock:
            self._dirty[turn.session] = None
            self._open[turn.session] = now
            self._uses.append((self.id(turn.session), now))
            if turn.stored_bytes:
                where = self._was_in.get(turn.session, HOST)
                where = DEVICE if turn.from_device else where
                self._access[where].add(seconds / turn.stored_bytes)
        start = time.perf_counter()

        def committed(turn: Any) -> None:
            took = time.perf_counter() - start
            with self._lock:
                self._dirty[turn.session] = None
                self._open.pop(turn.session, None)
                computed = len(turn.token_ids) - turn.reused_tokens
                output = max(turn.cache.get_seq_length() + 1 - len(turn.token_ids), 0)
                self.pace.add(computed, output, took)

        turn.on_commit = committed

    # Units

    def id(self, session: str) -> str:
        return f"{self.name}/{session}"

    def engines(self) -> Sequence[Engine]:
        store = self._store
        found = [
            self.device.engine(),
            Engine(
                self.name,
                HOST,
                lambda: store.held()[HOST],
                lambda n: store.set_quotas(host_bytes=n),
                store,
            ),
        ]
        if self.has_disk:
            found.append(
                Engine(
                    self.name,
                    DISK,
                    lambda: store.held()[DISK],
                    lambda n: store.set_quotas(disk_bytes=n),
                    store,
                )
            )
        return found

    def uses(self) -> Iterator[tuple[str, float]]:
        while self._uses:
            yield self._uses.popleft()

    def changed(self) -> Iterator[Unit | str]:
        now = self._clock()
        with self._lock:
            over = [name for name, at in self._open.items() if now - at > _OPEN_S]
            for name in over:
                del self._open[name]
                self._dirty[name] = None
            dirty, self._dirty = list(self._dirty), {}
            moved = [name for name in self._moved if name not in dirty and name in self._known]
            self._moved = ()
        self._cold = self.memory.cold_identity
        self._main = None if self._cold is None else self.memory.identity
        for name in dirty:
            self._read(name)
        pinned = self.memory.tenant.pinned_keys()
        here = self.device.here()
        for name in [*dirty, *moved]:
            unit = self._measured(name, pinned, here)
            if unit is None:
                self._told.pop(name, None)
                yield self.id(name)
            elif self._told.get(name) != unit:
                self._told[name] = unit
                yield unit

    def look_again(self) -> None:
        """Engines moved blocks by themselves: where those of every session are is looked up."""
        self.device.forget()
        with self._lock:
            self._moved = tuple(self._known)
            for name in list(itertools.islice(self._absent, _READ)):
                self._absent.move_to_end(name)
                self._dirty[name] = None

    def _read(self, name: str) -> None:
        """Take in a session's row; of one that is gone, nothing stays."""
        session = self.memory.tenant.session(name)
        cold = self._once_compressed(session)
        with self._lock:
            before = self._known.pop(name, None)
            old = set(before.keys) if before is not None else set()
            new = session.keys if session is not None else []
            for key in old.difference(new):
                self._sharers[key].discard(name)
                if not self._sharers[key]:
                    del self._sharers[key]
            for key in new:
                sharers = self._sharers.setdefault(key, set())
                sharers.add(name)
                if key not in old and len(sharers) <= _FEW:
                    self._moved = (*self._moved, *(sharers - {name}))
            if session is not None:
                tokens = len(session.token_ids)
                is_cold = self._cold is not None and session.identity == self._cold.digest
                self._known[name] = _Known(
                    session.keys, tokens, session.updated_at, session.identity, *cold, is_cold
                )

    def _once_compressed(self, session: Session | None) -> tuple[list[bytes], list[int], list[int]]:
        """Keys under the cold codec, and the bytes of the blocks now and then."""
        main, cold = self._main, self._cold
        if main is None or cold is None or session is None or session.identity != main.digest:
            return [], [], []
        from memos.kv.recompress import keys_under, payload_sizes

        kept = self._kept_bytes
        sizes, smaller = payload_sizes(session, main), payload_sizes(session, cold)
        keys = keys_under(self.memory.tenant, session, cold)
        return keys, [kept(n) for n in sizes], [kept(n) for n in smaller]

    def _kept_bytes(self, payload: int) -> int:
        """What a payload takes where it is kept for good."""
        from memos.kv.frame import frame_bytes

        return frame_bytes(payload, self._store.is_encrypted) if self.has_disk else payload

    def _measured(self, name: str, pinned: set[bytes], here: Here) -> Unit | None:
        with self._lock:
            known, is_open = self._known.get(name), name in self._open
            if known is None:
                self._was_in.pop(name, None)
                self._absent.pop(name, None)
                return self._opening(name) if is_open else None
            part = sum(1.0 / len(self._sharers[key]) for key in known.keys)
            alone = [len(self._sharers[key]) == 1 for key in known.keys]
        tiers = (HOST, DISK) if self.has_disk else (HOST,)
        placed = self.memory.tenant.placed(known.keys)
        count = len(known.keys)
        whole = max(size * count // max(held, 1) for held, size in placed.values())
        size = max(int(whole * part / max(count, 1)), 1)
        copies = frozenset(tier for tier in tiers if count and placed[tier][0] == count)
        if copies:
            self._absent.pop(name, None)
        else:  # dropped, or deleted: that is found out by and by
            self._absent.setdefault(name)
        is_pinned = bool(known.keys) and known.keys[-1] in pinned
        smaller = {}
        if copies and not is_pinned and not is_open and known.cold_keys:
            saved = self._saved(known, alone)
            smaller = dict.fromkeys(tiers, max(size - saved, 1)) if saved > 0 else {}
        sizes = dict.fromkeys(tiers, size)
        device = self._device_copy(known, here)
        if device is not None and copies:
            sizes[DEVICE], is_here = device
            copies |= {DEVICE} if is_here else set()
        self._was_in[name] = HOST if HOST in copies or not self.has_disk else DISK
        return Unit(
            self.id(name),
            KV,
            num_bytes=sizes,
            copies=copies,
            pinned=is_pinned,
            in_use=is_open,
            rebuildable=True,
            rebuild_s=known.tokens * self.pace.prompt_s,
            access_s={tier: whole * self._access[tier].value for tier in sizes},
            last=known.updated_at,
            buildable=self._rebuild is not None,
            mirror=DEVICE,
            compressed_bytes=smaller,
        )

    def _saved(self, known: _Known, alone: Sequence[bool]) -> int:
        """Bytes that compressing a session frees: what others use stays, and what is there of the
        new blocks is shared."""
        there = self.memory.tenant.expiries(known.cold_keys)
        freed = sum(size for size, own in zip(known.sizes, alone, strict=True) if own)
        pairs = zip(known.cold_keys, known.cold_sizes, strict=True)
        return freed - sum(size for key, size in pairs if key not in there)

    def _device_copy(self, known: _Known, here: Here) -> tuple[int, bool] | None:
        """What a session's full blocks take on the device, and whether they all are there; None
        where they cannot be."""
        if here is None or here[1].digest != known.identity:
            return None
        pool, identity = here
        keys = known.keys[: known.tokens // identity.block_tokens]
        if not keys:
            return None
        with self._lock:
            part = sum(1.0 / max(len(self._sharers.get(key, ())), 1) for key in keys)
        return max(int(part * pool.block_bytes), 1), pool.contains(keys) == len(keys)

    def _on_device(self) -> set[bytes]:
        """Keys of the sessions that have a copy there."""
        with self._lock:
            units = list(self._told.items())
            told = [name for name, unit in units if DEVICE in unit.copies]
            return {key for name in told if name in self._known for key in self._known[name].keys}

    def _opening(self, name: str) -> Unit:
        """A session whose first turn runs."""
        return Unit(self.id(name), KV, {HOST: 1}, in_use=True, rebuildable=True, buildable=False)

    def figures(self) -> dict[str, float]:
        """hit_rate: of the blocks that turns asked for; host_hits, disk_hits; sessions, and how
        many of them are compressed, where they can be."""
        stats = self._store.stats()
        disk = stats.get("disk", {"hits": 0})
        hits = {"host_hits": stats["host"]["hits"], "disk_hits": disk["hits"]}
        figures = {"hit_rate": stats["hit_rate"], "sessions": len(self._known), **hits}
        device = self.memory.pools.stats()
        if device:
            figures["device_hits"] = device["hits"]
        if self._cold is not None:
            known = list(self._known.values())
            figures["compressed"] = sum(session.is_compressed for session in known)
        return figures

    # Moves

    def _name(self, unit: str) -> str:
        return unit[len(self.name) + 1 :]

    def copy(self, action: Action, cancelled: Callable[[], bool]) -> None:
        name = self._name(action.unit)
        session = self.memory.tenant.session(name)
        if session is None:
            raise NotFoundError(f"session {name!r}: not there")
        if action.source is None:
            if self._rebuild is None:
                raise ArgumentError(f"session {name!r}: its next turn computes it")
            self._rebuild(name)
            if action.target != DEVICE:
                return
            session = self.memory.tenant.session(name)
            if session is None:
                raise NotFoundError(f"session {name!r}: not there")
        if action.target == DEVICE:
            try:
                self.device.load(session, cancelled)
            finally:
                with self._lock:
                    self._dirty[name] = None
            return
        if action.target == HOST:
            kinds = self.memory.identity, self.memory.cold_identity
            identity = next((i for i in kinds if i and i.digest == session.identity), None)
            if identity is None:
                raise ArgumentError(f"session {name!r}: made for another model")
            for start in range(0, len(session.keys), _CHUNK):
                if cancelled():
                    return
                self.memory.tenant.get(session.keys[start : start + _CHUNK], identity)
        placed = self.memory.tenant.placed(session.keys)
        with self._lock:
            self._dirty[name] = None
        if placed.get(action.target or HOST, (0, 0))[0] < len(session.keys):
            raise StoreError(f"session {name!r}: {action.target} does not hold all of it")

    def discard(self, unit: str, tier: str) -> None:
        name = self._name(unit)
        with self._lock:
            if name in self._open:
                raise ArgumentError(f"session {name!r}: a turn uses it")
            self._dirty[name] = None
            known = self._known.get(name)
            keys = [] if known is None else known.keys
            own = [key for key in keys if self._sharers.get(key, set()) <= {name}]
        if tier == DEVICE:
            self.device.drop(own)
            return
        try:
            self.memory.tenant.leave(name, tier)
        except NotFoundError:
            return  # it was deleted meanwhile
        finally:
            self.device.forget(keys)

    def compress(self, action: Action, cancelled: Callable[[], bool]) -> bool:
        name = self._name(action.unit)
        with self._lock:
            if name in self._open:
                raise ArgumentError(f"session {name!r}: a turn uses it")
            self._dirty[name] = None
        session = self.memory.tenant.session(name)
        if session is None:
            raise NotFoundError(f"session {name!r}: not there")
        if session.pinned:
            raise ArgumentError(f"session {name!r}: it is pinned")
        self.memory.compress(name, cancelled=cancelled)
        self.device.forget()  # the blocks that they were
        session = self.memory.tenant.session(name)
        cold = self.memory.cold_identity
        return session is not None and cold is not None and session.identity == cold.digest

    def archive(self, unit: str, why: str) -> None:
        raise ArgumentError(f"unit {unit!r}: a text wanted, sessions are not archived")
