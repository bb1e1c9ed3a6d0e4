"""The one error tree: everything memos raises on purpose is a ``MemosError``."""

from __future__ import annotations


class MemosError(Exception):
    """Base of all errors of this package."""


class ArgumentError(MemosError, ValueError):
    """The caller's mistake. The message names the argument, what was wanted and what came."""


class NotFoundError(MemosError, KeyError):
    """An id, name or session that does not exist."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class AccessError(MemosError, PermissionError):
    """What a principal may not do with a cube or memory that it may see."""


class BackendError(MemosError, RuntimeError):
    """The machine's limit: a backend, instruction set or package that is not there."""


class StoreError(MemosError, OSError):
    """The folder of a store cannot do what was asked: full, read-only, of another format."""


class StoreLockedError(StoreError):
    """Another process holds the folder for writing."""


class QuotaError(StoreError):
    """What was to be stored is larger than the quota of every tier."""
