"""ParametricMemory: what a model has learnt, as LoRA adapters that are switched on per request."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memos.cube import Hit, MemCube
from memos.errors import ArgumentError, BackendError, NotFoundError
from memos.memories.declarative import DeclarativeMemory

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.adapters.adapter import Adapter
    from memos.adapters.attach import Attachment
    from memos.adapters.into_base import Merged
    from memos.adapters.learning.gate import Report
    from memos.adapters.pool import AdapterPool
    from memos.adapters.slab import SlabLayout
    from memos.adapters.store import AdapterStore
    from memos.records.scope import Scope
    from memos.records.store import Records
    from memos.records.writes import Change, New

_KEPT = 1024  # cubes looked up by name
MERGED_FROM = "merged_from"  # relation to an adapter that this one was made of


class ParametricMemory(DeclarativeMemory):
    """LoRA adapters with their provenance, found by words, applied without changing the model.

    Content: the folder of a PEFT adapter (adapter_config.json and adapter_model.safetensors), or
    an ``Adapter``. Its bytes are stored once, by digest, in PEFT's own layout. Every adapter has a
    name of its own: metadata "name"; default: the folder's, or the digest's first digits. ::

        mos.add("skills", "path/to/adapter", {"name": "medical"})
        skills.attach(model)                       # the weights stay as they are
        with skills.use("medical"):
            model.generate(**inputs)
        with skills.use_batch(["medical", None, "legal"]):  # one for each row
            model.generate(**batch)
        skills.detach()                            # bit for bit the model from before

    Thread-safe once registered; which adapter is in use belongs to each thread or task.

    Args:
        name, description: of the memory.
        device_bytes: of adapters ready on the model's device; more are loaded when used, and the
            least recently used ones, neither pinned nor in use, make room.
        host_bytes:   of adapters kept in host memory behind a GPU.
        disk_bytes:   of adapters stored; adding beyond it is an error.
        num_slots:    adapters that can be ready at once.
        policy:       which adapter goes first: "lru".
        embedder, clock: as every declarative memory.

    Raises:
        ArgumentError: an argument is out of contract.
    """

    kind = "parametric"
    in_prompts = False

    def __init__(
        self,
        name: str,
        description: str = "",
        *,
        device_bytes: int = 1 << 30,
        host_bytes: int = 4 << 30,
        disk_bytes: int = 64 << 30,
        num_slots: int = 256,
        policy: str = "lru",
        **more: Any,
    ) -> None:
        super().__init__(name, description, **more)
        for what, value in (
            ("device_bytes", device_bytes),
            ("host_bytes", host_bytes),
            ("disk_bytes", disk_bytes),
            ("num_slots", num_slots),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"{what}: a number of at least 1 wanted, got {value!r}")
        self.device_bytes, self.host_bytes, self.disk_bytes = device_bytes, host_bytes, disk_bytes
        self.num_slots, self.policy = num_slots, policy
        self._files: AdapterStore | None = None
        self._attachment: Attachment | None = None
        self._pool: AdapterPool | None = None
        self._layout: SlabLayout | None = None
        self._base: dict[str, str] | None = None  # fingerprint of the attached model
        self._attach_lock = threading.RLock()
        self.meter: Any = None  # told of a pool that is there, and of digests that are used
        # By principal and name: as of which change.
        self._known: dict[tuple[Any, str], tuple[int, MemCube]] = {}

    def bind(self, records: Records) -> None:
        """Keep the cubes in this store; its folder has the adapters."""
        if records.database.is_sealed:
            raise ArgumentError(
                f"memory {self.name!r}: an encrypted store keeps no adapters, whose files others "
                "open as they are; register it with a MOS whose folder is not encrypted"
            )
        super().bind(records)

    def close(self) -> None:
        """Detach from the model and give back what this memory holds."""
        if self._attachment is not None:
            self.detach()
        super().close()

    @property
    def pool(self) -> AdapterPool | None:
        """What is ready for the attached model; None while there is none."""
        return self._pool

    @property
    def files(self) -> AdapterStore:
        """The stored adapters, by digest. Raises BackendError without torch."""
        records = self.records
        with self._attach_lock:
            if self._files is None:
                try:
                    from memos.adapters.store import AdapterStore
                except ModuleNotFoundError as error:
                    raise BackendError(
                        f"memory {self.name!r}: adapters want torch, which is not installed: pip "
                        "install 'memos-native[adapters]'"
                    ) from error
                folder = records.folder and records.folder / "adapters" / str(self.table.memory)
                if records.readonly and folder is not None and not folder.is_dir():
                    folder = None  # none were stored, and nothing may be made
                self._files = AdapterStore(
                    folder, disk_bytes=self.disk_bytes, durable=records.database.durable
                )
            return self._files

    # Under a model.

    def attach(self, model: Any) -> ParametricMemory:
        """Put the adapters under the linear layers of a model, which computes as before until one
        is in use. Returns the memory.

        Raises:
            ArgumentError: this memory, or another one, is attached; the model has PEFT layers.
        """
        from memos.adapters.attach import Attachment
        from memos.adapters.pool import AdapterPool
        from memos.adapters.slab import SlabLayout, StoredSlabs

        with self._attach_lock:
            if self._attachment is not None:
                raise ArgumentError(f"memory {self.name!r}: it is attached to a model; detach it")
            attachment = Attachment(model, self.num_slots)
            modules = [(name, *shape) for name, shape in attachment.shapes.items()]
            self._layout = SlabLayout(modules, attachment.dtype)
            self._pool = AdapterPool(
                attachment.table,
                StoredSlabs(self.files, self._layout, pin=attachment.device.type == "cuda"),
                device_bytes=self.device_bytes,
                host_bytes=self.host_bytes,
                policy=self.policy,
            )
            self._base = None
            self._attachment = attachment
            if self.meter is not None:
                self.meter.attached()
        return self

    def detach(self) -> None:
        """Give the model back bit for bit as it was.

        Raises ArgumentError while an adapter is in use, or where this memory is not attached.
        """
        with self._attach_lock:
            self._attached().detach()
            if self._pool is not None:
                self._pool.close()
            self._attachment = self._pool = self._layout = None

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """In this block the attached model computes with this adapter; None: the base model.

        Raises:
            NotFoundError: no adapter of this name.
            ArgumentError: it does not fit the model, or the memory is not attached.
            QuotaError: it does not fit the budget beside those that are in use or pinned.

        Cost: a lookup when it is ready; else it is loaded.
        """
        with self.use_batch([name]):
            yield

    @contextmanager
    def use_batch(self, names: Sequence[str | None]) -> Iterator[None]:
        """In this block row i of a batch computes with the adapter ``names[i]``.

        Beams and returned sequences count to the row they come from. Raises as ``use``.
        """
        attached, pool = self._attached(), self._pool
        assert pool is not None
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ArgumentError(f"names: a list with a name or None per row wanted, got {names!r}")
        digests = {name: self._digest(name) for name in set(names) if name is not None}
        if self.meter is not None:
            self.meter.used(digests.values())
        with ExitStack() as stack:
            stack.enter_context(attached.held())
            slots = dict(stack.enter_context(pool.using(list(digests.values()))))
            identities = [digests[name] if name is not None else "" for name in names]
            stack.enter_context(
                attached.use([slots.get(one, -1) for one in identities], identities)
            )
            yield

    def prefetch(self, name: str) -> None:
        """Load an adapter in the background. Raises NotFoundError."""
        self._ready().prefetch(self._digest(name))

    def pin(self, name: str, pinned: bool = True) -> None:
        """While an adapter is pinned it is not evicted. Raises NotFoundError."""
        scope = self.scope()
        if scope.rights is not None:
            cube = self.named(name)
            with self.records.database.read() as connection:
                seq = self.table.seq(connection, cube.id, scope)
                scope.check_cube(connection, "write", seq, cube.id)
        self._ready().pin(self._digest(name), pinned)

    def stats(self) -> dict[str, Any]:
        """Cubes and vectors; disk: bytes stored; and, while attached, the tiers of the pool."""
        if importlib.util.find_spec("torch") is None or self.scope().rights is not None:
            return super().stats()
        more = {} if self._pool is None else self._pool.stats()
        return {**super().stats(), "disk": self.files.stats(), **more}

    # Adapters.

    def adapter(self, name: str) -> Adapter:
        """The adapter itself, verified. Raises NotFoundError, StoreError."""
        return self.files.load(self._digest(name))

    def check(self) -> list[str]:
        """What is wrong with the stored adapters that any version names: each is read and
        compared with its digest."""
        found = []
        for digest in sorted(self._named_digests()):
            why = self.files.check(digest) if digest in self.files else "its files are missing"
            if why is not None:
                found.append(f"memory {self.name!r}, adapter {digest[:12]}: {why}")
        return found

    def sweep(self) -> int:
        """Remove stored adapters that no version names, left by writers that died or were
        refused; returns how many. Those of the last hour stay: somebody may be adding them."""
        self.records.database.check_writable()
        return len(self.files.sweep(self._named_digests(), older_than_s=3600))

    def _named_digests(self) -> set[str]:
        return {content["digest"] for _, content in self.records.contents(self.table.memory)}

    def named(self, name: str) -> MemCube:
        """The cube of the adapter with this name, or this id. Raises NotFoundError."""
        scope = dataclasses.replace(self.scope({"name": name}), archived=True)
        with self.records.database.read() as connection:
            seqs = self.table.recent(connection, scope, 1)
            found = self.table.one(connection, seqs[0], scope) if seqs else None
        try:
            return self.get(name if found is None else found.id)
        except NotFoundError:
            raise NotFoundError(f"memory {self.name!r}: no adapter {name!r}") from None

    def fits(self, base: Mapping[str, str]) -> bool | None:
        """Whether what a card says of a base model is true of the attached one; None: none is."""
        if self._attachment is None:
            return None
        try:
            self._check_base("", base)
        except ArgumentError:
            return False
        return True

    def export(self, name: str, path: str | os.PathLike[str]) -> Path:
        """Write an adapter as a folder that PEFT loads; returns the folder.

        Raises NotFoundError; StoreError where the folder exists or cannot be written.
        """
        from memos.adapters.files import write_adapter

        write_adapter(path, self.adapter(name))
        return Path(path)

    def combine(
        self,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        method: str = "svd",
        *,
        name: str,
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> MemCube:
        """Store a new adapter made of others; see ``memos.adapters.merge.combine``.

        Args:
            weights: one for each; default: all 1.
            method:  "exact", "svd", "ties" or "dare".
            name:    of the new adapter.
            options: rank, density, seed, ... as the method takes them.

        Returns:
            Its cube, with a relation "merged_from" to each source.
        """
        from memos.adapters.merge import combine

        sources = [self.named(one) for one in names]
        digests = [cube.content["digest"] for cube in sources]
        adapters = [self.files.load(digest) for digest in digests]
        made = combine(adapters, weights or [1.0] * len(adapters), method, **options)
        recipe = {**made.card["recipe"], "parents": digests}
        made = dataclasses.replace(made, card={**made.card, "recipe": recipe})
        return self.add(
            made,
            {**(metadata or {}), "name": name},
            relations=[{"type": MERGED_FROM, "target": cube.id} for cube in sources],
            derived_from=[cube.id for cube in sources],
        )

    def merge_into_base(
        self, names: str | Sequence[str], weights: Sequence[float] | None = None
    ) -> Merged:
        """Write adapters into fresh weights of the attached model.

        Returns:
            What ``unmerge()`` takes back, to the same bytes; also a context manager.
        """
        from memos.adapters.into_base import merge_into_base

        names = [names] if isinstance(names, str) else list(names)
        adapters = [self.adapter(one) for one in names]
        model = self._attached().model
        return merge_into_base(model, adapters, weights or [1.0] * len(adapters))

    def learn(
        self,
        cubes: Sequence[MemCube],
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[MemCube | None, Report]:
        """Train an adapter on text memories and store it if it passes the gate.

        Args:
            cubes:   texts to learn.
            model:   the bare base model; unchanged afterwards.
            name:    of the new adapter.
            options: as ``memos.adapters.learning.learn.learn`` takes them: rank, lr, seed, ...

        Returns:
            (cube, report); cube is None where the gate refused the adapter, and
            ``report.reasons`` says why. The cube has a relation "learnt_from" to each source; it
            becomes stale (metadata "stale") when one of them is changed or deleted.
        """
        from memos.adapters.learning.learn import learn
        from memos.records.links import LEARNT_FROM

        self._check_name(name)
        with ExitStack() as stack:
            if self._attachment is not None and self._attachment.model is model:
                stack.enter_context(self.use(None))
            learnt = learn(cubes, model, tokenizer, **options)
        if not learnt.report.accepted:
            return None, learnt.report
        cube = self.add(
            learnt.adapter,
            {**(metadata or {}), "name": name},
            relations=[{"type": LEARNT_FROM, "target": one.id} for one in cubes],
            derived_from=[one.id for one in cubes],
            source="learn",
        )
        return cube, learnt.report

    # What the base asks.

    def lookup(self, query: Any, limit: int, scope: Scope) -> list[Hit]:
        raise ArgumentError(
            f"query: memory {self.name!r} wants words about its adapters, got "
            f"{type(query).__name__}"
        )

    def _new(self, item: Mapping[str, Any], now: float) -> New:
        new, content = super()._new(item, now), item["content"]
        if "name" not in new.metadata:
            of_folder = isinstance(content, str | os.PathLike) and Path(content).resolve().name
            new.metadata["name"] = of_folder or new.content["digest"][:12]
        return new

    def _read(self, content: Any) -> tuple[str, Any]:
        from memos.adapters.adapter import Adapter
        from memos.adapters.files import read_adapter
        from memos.adapters.packed import pack

        if isinstance(content, str | os.PathLike):
            content = read_adapter(content)
        if not isinstance(content, Adapter):
            raise ArgumentError(
                f"content: the folder of a PEFT adapter, or an Adapter, wanted, got "
                f"{type(content).__name__}"
            )
        if self._layout is not None:
            self._layout.plan(pack(content).layers)
            self._check_base("to add", content.card.get("base"))
        self.records.database.check_writable()
        digest = self.files.put(content)
        targets = sorted({layer.rpartition(".")[2] for layer in content.factors})
        said = {
            "digest": digest,
            "rank": content.rank,
            "layers": len(content.factors),
            "targets": targets,
            "base_model": content.config.get("base_model_name_or_path"),
            **content.card,
        }
        text = f"LoRA adapter of rank {content.rank} on {', '.join(targets)}"
        return text, said

    def _place_all(
        self,
        connection: Connection,
        news: Sequence[New],
        items: Sequence[Mapping[str, Any]],
        names: Mapping[str, int],
    ) -> None:
        super()._place_all(connection, news, items, names)
        known = self._duplicates(connection, news)
        seen: dict[str, bytes] = {}
        for new, again in zip(news, known, strict=True):
            name = new.metadata["name"]
            if again is None:
                self._check_name(name)
            if seen.setdefault(name, new.digest) != new.digest:
                raise ArgumentError(f"name: two adapters of one name wanted: {name!r}")

    def _share(self, source: Any, contents: Iterable[Any]) -> None:
        for digest in sorted({c["digest"] for c in contents if c and c["digest"] in source.files}):
            self.files.share(source.files, digest)

    def _change(self, connection: Connection, old: MemCube, content: Any, change: Change) -> None:
        super()._change(connection, old, content, change)
        metadata = old.metadata if change.metadata is None else change.metadata
        change.metadata = {k: v for k, v in metadata.items() if k != "stale"}

    def left(self, connection: Connection, seqs: Sequence[int]) -> None:
        """Archived adapters leave the device and the host's memory."""
        pool = self._pool
        if pool is None:
            return
        busy = pool.busy()
        for row in self.table.rows(connection, seqs):
            digest = json.loads(row.content)["digest"]
            if row.state == "ARCHIVED" and digest not in busy:
                pool.drop(digest)

    def in_use(self) -> set[str]:
        """Ids of the adapters that a model computes with now, or that are pinned."""
        busy = set() if self._pool is None else self._pool.busy()
        return {cube.id for cube in self.cubes(None) if cube.content["digest"] in busy}

    def purged(self, contents: Sequence[Any]) -> None:
        super().purged(contents)
        digests = {content["digest"] for content in contents} - self._named_digests()
        for digest in sorted(digests):
            if self._pool is not None:
                self._pool.drop(digest)
            if digest in self.files:
                self.files.delete(digest)

    # Inside.

    def _attached(self) -> Attachment:
        if self._attachment is None:
            raise ArgumentError(f"memory {self.name!r}: attach it to a model first, attach(model)")
        return self._attachment

    def _ready(self) -> AdapterPool:
        self._attached()
        assert self._pool is not None
        return self._pool

    def _digest(self, name: str) -> str:
        """Of the adapter of this name, which fits the attached model as far as its card says."""
        if not isinstance(name, str):
            raise ArgumentError(f"name: of an adapter, or None, wanted, got {name!r}")
        change = self.records.database.last_change()
        rights = self.scope().rights
        asked = (None if rights is None else rights.key, name)
        known = self._known.get(asked)
        over = known and known[1].expires_at
        if known is None or known[0] != change or (over and over <= self._clock()):
            known = self._known[asked] = (change, self.named(name))
            if len(self._known) > _KEPT:
                self._known.pop(next(iter(self._known)), None)
        elif self.records.database.observer is not None:
            cube = known[1]
            self.records.database.observer.used(self.name, {cube.id: cube.versions}, "use")
        content = known[1].content
        if self._attachment is not None:
            self._check_base(name, content.get("base"))
        return str(content["digest"])

    def _check_name(self, name: Any) -> None:
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"name: a string that is not empty wanted, got {name!r}")
        with self.records.database.read() as connection:
            # Also a name that the caller may not see: who may see both would get either.
            scope = dataclasses.replace(self.scope({"name": name}), archived=True, rights=None)
            if self.table.recent(connection, scope, 1):
                raise ArgumentError(
                    f"name: a new one wanted, got {name!r}, which another adapter has; use update"
                )

    def _check_base(self, name: str, base: Mapping[str, str] | None) -> None:
        """Raise ArgumentError where an adapter says that it belongs to another base model."""
        if not base:
            return
        if self._base is None:
            from memos.adapters.fingerprint import fingerprint

            self._base = fingerprint(self._attached().model)
        for part in ("model", "config", "weights"):
            if base.get(part) != self._base[part]:
                raise ArgumentError(
                    f"adapter {name!r}: made for another base model: its {part} is "
                    f"{base.get(part)!r}, that of the attached model {self._base[part]!r}"
                )
