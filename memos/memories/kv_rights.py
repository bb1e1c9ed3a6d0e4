"""Rights on the sessions of a KVCacheMemory: those on the memory, or a session's own list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memos.errors import AccessError, NotFoundError
from memos.kv.sessions import LIST

if TYPE_CHECKING:
    from memos.kv.sessions import Session
    from memos.kv.tenant import Tenant
    from memos.records.rights import Actor


def actor() -> Actor | None:
    """Who acts; None: the owner, or nobody who has a store of rights."""
    from memos.records.scope import acting

    return acting.get()


def listed(acl: Any) -> dict[str, Any]:
    """Metadata that keeps a list of rights with a session. Raises ArgumentError."""
    if acl is None:
        return {}
    from memos.records.rights import checked_acl

    return {LIST: checked_acl(acl)}


def bits_on(who: Actor, memory: str, session: Session | None) -> int:
    """Rights on a session, or, for None, on the memory."""
    acl = None if session is None else session.metadata.get(LIST)
    with who.database.read() as connection:
        return who.on_listed(connection, memory, acl)


def may(memory: str, right: str, session: Session | None) -> bool:
    """Whether whoever acts has this right."""
    who = actor()
    if who is None:
        return True
    from memos.records.rights import BITS

    return bool(bits_on(who, memory, session) & BITS[right])


def seen(memory: str, sessions: Sequence[Session]) -> list[Session]:
    """The sessions that whoever acts may read."""
    if actor() is None:
        return list(sessions)
    return [session for session in sessions if may(memory, "read", session)]


def check(memory: str, right: str, session: Session | None) -> None:
    """Raise NotFoundError where whoever acts may not read a session, and AccessError where it
    may, without this right."""
    who = actor()
    if who is None:
        return
    if session is not None and not may(memory, "read", session):
        raise NotFoundError(f"memory {memory!r}: no session {session.id!r}")
    if not may(memory, right, session):
        what = f"memory {memory!r}" if session is None else f"session {session.id!r}"
        raise AccessError(f"{who.principal} has no right to {right} {what}")


def restorable(memory: str, tenant: Tenant, ids: Sequence[int]) -> int:
    """How many first tokens whoever acts may have restored: those that a session begins with that
    it may read. What others asked shows in nothing."""
    from memos.kv.cache import common_prefix

    known = tenant.sessions()
    mine = seen(memory, known)
    if len(mine) == len(known):
        return len(ids)
    return max((common_prefix(list(ids), one.token_ids) for one in mine), default=0)


def shown_list(memory: str, session: Session) -> Any:
    """The list of a session, to who may give or take rights by it."""
    acl = session.metadata.get(LIST)
    return acl if acl is None or may(memory, "share", session) else None


def without_list(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as it is read."""
    return {key: value for key, value in metadata.items() if key != LIST}
