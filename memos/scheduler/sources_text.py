"""The texts of a declarative memory as units, and what can be made of them: their KV, an adapter.

A text becomes a unit when it is used, when it is found to be cold, or when it is asked for. Hot
ones may be activated: prefilled once, so that a context carries their KV instead of their words;
all of a memory's hot ones together may be consolidated into an adapter. Both are done by whoever
is given for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from memos.errors import ArgumentError, NotFoundError
from memos.scheduler.plan import Action
from memos.scheduler.sources import Engine
from memos.scheduler.units import ADAPTER, KV, TEXT, Unit

if TYPE_CHECKING:
    from memos.cube import MemCube
    from memos.records.cold_rows import ColdRow

_BOUND = 65536  # units of one memory: those used last
ACTIVATED, LEARNT = "kv", "adapter"


class Activator(Protocol):
    """Makes KV of texts. Whose engine holds the bytes counts them."""

    def cost(self, text: str) -> tuple[int, float]:
        """(bytes, seconds) of activating a text."""

    def activate(self, memory: str, id: str, cancelled: Callable[[], bool]) -> None:
        """Prefill a text, so that a context can carry its KV."""

    def deactivate(self, memory: str, id: str) -> None:
        """Forget the KV of a text; nothing there is fine."""


class Consolidator(Protocol):
    """Teaches an adapter what texts say."""

    def cost(self, num_texts: int) -> tuple[int, float]:
        """(bytes, seconds) of learning so many texts."""

    def consolidate(self, memory: str, ids: Sequence[str], cancelled: Callable[[], bool]) -> None:
        """Learn these texts of a memory, as a job that survives a restart."""


class TextSource:
    """Texts: a unit each, "memory/id"; "memory/id kv" is the KV of one, "memory adapter" an adapter
    of the hot ones. Texts stay on disk whatever happens.

    Args:
        archives: archives a text: (id, why).
        tier:     where KV of texts is held.
        hot:      uses of a text from which on it is worth learning; as many texts are learnt at
            once as are hot, at least ``least``.
        walk:     looks at some more texts, from a number on: those of them that are to be archived,
            and the next number. Once in every step.
        find:     a text by its id.
    """

    def __init__(
        self,
        name: str,
        *,
        archives: Callable[[str, str], object],
        activator: Activator | None = None,
        consolidator: Consolidator | None = None,
        tier: str = "host",
        adapter_tier: str = "disk",
        hot: int = 20,
        least: int = 8,
        walk: Callable[[int], tuple[Sequence[ColdRow], int]] | None = None,
        find: Callable[[str], ColdRow | None] | None = None,
    ) -> None:
        self.name, self._archives = name, archives
        self.activator, self.consolidator = activator, consolidator
        self.tier, self.adapter_tier, self.hot, self.least = tier, adapter_tier, hot, least
        self._walk, self._find, self._place = walk, find, 0
        self._lock = threading.Lock()
        self._texts: OrderedDict[str, Unit] = OrderedDict()
        self._counts: dict[str, int] = {}
        self._activated: set[str] = set()
        self._learnt: set[str] = set()
        self._dirty: dict[str, None] = {}
        self._uses: list[tuple[str, float]] = []

    def close(self) -> None:
        """Nothing listens."""

    def id(self, cube: str) -> str:
        return f"{self.name}/{cube}"

    def used_texts(self, cubes: Iterable[MemCube], at: float) -> None:
        """Hits were returned, or a context carries them."""
        with self._lock:
            for cube in cubes:
                text = cube.content if isinstance(cube.content, str) else str(cube.content)
                unit = Unit(
                    self.id(cube.id),
                    TEXT,
                    num_bytes={"disk": len(text.encode())},
                    copies=frozenset({"disk"}),
                    importance=cube.importance,
                    archived=cube.state == "ARCHIVED",
                )
                self._uses.append((unit.id, at))
                self._counts[cube.id] = self._counts.get(cube.id, 0) + 1
                if self._texts.get(cube.id) != unit:
                    self._texts[cube.id] = unit
                    self._dirty[unit.id] = None
                self._texts.move_to_end(cube.id)
                if self.activator is not None:
                    self._uses.append((f"{unit.id} {ACTIVATED}", at))
                    self._dirty[unit.id] = None
                if self.consolidator is not None:
                    self._uses.append((f"{self.name} {LEARNT}", at))
                    self._dirty[f"{self.name} {LEARNT}"] = None
            while len(self._texts) > _BOUND:
                cube_id, unit = self._texts.popitem(last=False)
                self._counts.pop(cube_id, None)
                self._activated.discard(cube_id)
                self._dirty[unit.id] = None

    def engines(self) -> Sequence[Engine]:
        return []

    def uses(self) -> Iterator[tuple[str, float]]:
        with self._lock:
            found, self._uses = self._uses, []
        yield from found

    def changed(self) -> Iterator[Unit | str]:
        with self._lock:
            dirty, self._dirty = list(self._dirty), {}
            found = [one for id in dirty for one in self._look(id)]
        yield from found

    def look_again(self) -> None:
        """Some more of the texts that nobody has used here are looked at."""
        if self._walk is None:
            return
        rows, self._place = self._walk(self._place)
        for row in rows:
            self._take(row)

    def ask(self, unit: str) -> None:
        """From now on a text is a unit, used here or not; unknown ones are ignored."""
        row = None if self._find is None else self._find(self._cube(unit))
        if row is not None:
            self._take(row)

    def _take(self, row: ColdRow) -> None:
        unit = Unit(
            self.id(row.id),
            TEXT,
            num_bytes={"disk": row.num_bytes},
            copies=frozenset({"disk"}),
            heat=row.heat,
            last=row.last,
            importance=row.importance,
            archived=row.archived,
        )
        with self._lock:
            if row.id in self._texts or len(self._texts) >= _BOUND:
                return
            self._texts[row.id] = unit
            self._texts.move_to_end(row.id, last=False)  # the first to be forgotten
            self._dirty[unit.id] = None

    def figures(self) -> dict[str, float]:
        """texts: that were used; activated."""
        return {"texts": len(self._texts), "activated": len(self._activated)}

    def _look(self, id: str) -> Iterator[Unit | str]:
        if id == f"{self.name} {LEARNT}":
            yield from self._adapter()
            return
        cube = self._cube(id)
        unit = self._texts.get(cube)
        if unit is None:
            yield id
            yield f"{id} {ACTIVATED}"
            return
        yield unit
        if self.activator is not None:
            size, seconds = self.activator.cost("x" * unit.num_bytes["disk"])
            yield Unit(
                f"{id} {ACTIVATED}",
                KV,
                num_bytes={self.tier: size},
                copies=frozenset([self.tier] if cube in self._activated else []),
                importance=unit.importance,
                rebuildable=True,
                rebuild_s=seconds,
            )

    def _adapter(self) -> Iterator[Unit]:
        hot = self._hot()
        if self.consolidator is None or len(hot) < self.least:
            return
        size, seconds = self.consolidator.cost(len(hot))
        is_there = set(hot) <= self._learnt
        yield Unit(
            f"{self.name} {LEARNT}",
            ADAPTER,
            num_bytes={self.adapter_tier: size},
            copies=frozenset([self.adapter_tier] if is_there else []),
            rebuildable=True,
            rebuild_s=seconds,
        )

    def _hot(self) -> list[str]:
        return sorted(id for id, count in self._counts.items() if count >= self.hot)

    def _cube(self, unit: str) -> str:
        return unit.partition("/")[2].removesuffix(f" {ACTIVATED}")

    def copy(self, action: Action, cancelled: Callable[[], bool]) -> None:
        if action.unit == f"{self.name} {LEARNT}" and self.consolidator is not None:
            with self._lock:
                hot = self._hot()
            self.consolidator.consolidate(self.name, hot, cancelled)
            if not cancelled():
                with self._lock:
                    self._learnt.update(hot)
                    self._dirty[action.unit] = None
            return
        if not action.unit.endswith(f" {ACTIVATED}") or self.activator is None:
            raise ArgumentError(f"unit {action.unit!r}: texts are on disk only")
        cube = self._cube(action.unit)
        self.activator.activate(self.name, cube, cancelled)
        with self._lock:
            self._activated.add(cube)

    def discard(self, unit: str, tier: str) -> None:
        if unit == f"{self.name} {LEARNT}":
            return  # what was learnt is a cube of its own: who does not want it deletes it
        if not unit.endswith(f" {ACTIVATED}") or self.activator is None:
            raise ArgumentError(f"unit {unit!r}: the text itself stays")
        cube = self._cube(unit)
        self.activator.deactivate(self.name, cube)
        with self._lock:
            self._activated.discard(cube)

    def archive(self, unit: str, why: str) -> None:
        cube = self._cube(unit)
        with contextlib.suppress(NotFoundError):  # it was deleted meanwhile
            self._archives(cube, why)
        with self._lock:
            self._texts.pop(cube, None)
            self._dirty[unit] = None

    def compress(self, action: Action, cancelled: Callable[[], bool]) -> bool:
        raise ArgumentError(f"unit {action.unit!r}: a session wanted, texts are not compressed")
