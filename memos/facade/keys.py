"""The keys of an encrypted store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memos.errors import ArgumentError

if TYPE_CHECKING:
    from memos.records.sealed_database import SealedDatabase
    from memos.records.store import Records


class Keys:
    """Part of MOS. Raises ArgumentError where the store is not encrypted."""

    records: Records

    def change_master_key(self, key: Any) -> None:
        """Another master key: the old one opens nothing any more.

        Args:
            key: a MasterKey, or where it is, as ``MOS`` takes it.

        Wherever this process dies, the store opens with the old key or with the new one. Copies
        of the folder keep the old one.

        Cost: one row for each memory.
        """
        from memos.records.keys import MasterKey

        self._sealed().change_master(MasterKey.of(key))

    def change_memory_key(self, memory_name: str) -> None:
        """Another key for a memory; what its cubes say stays sealed under their own keys.

        Raises NotFoundError. Cost: one row for each cube, 4 us.
        """
        memory = self.memory(memory_name)  # type: ignore[attr-defined]
        self._sealed().change_key(memory.table.memory)

    def reseal(self) -> None:
        """New keys for everything, and everything sealed anew: after a key became known.

        Cost: as writing the whole store.
        """
        self._sealed().reseal()

    def _sealed(self) -> SealedDatabase:
        from memos.records.sealed_database import SealedDatabase

        database = self.records.database
        if not isinstance(database, SealedDatabase):
            raise ArgumentError("key: an encrypted store wanted, MOS(path, key=...) makes one")
        return database
