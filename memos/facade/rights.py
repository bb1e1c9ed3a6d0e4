"""Who may do what, and what was done."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from memos.errors import AccessError, ArgumentError, StoreError

if TYPE_CHECKING:
    from memos.governance.audit import Audit
    from memos.governance.trace import Trace
    from memos.governance.views import View
    from memos.records.store import Records

EVERY_MEMORY = "*"

# Verbs that make an audit record each: the argument that names the memory, and the one that asks.
_AUDITED: dict[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(("add", "add_many", "get", "update", "delete"), ("memory_name", None)),
    **dict.fromkeys(("history", "diff", "rollback", "clone"), ("memory_name", None)),
    "retrieve": ("memory_name", "query"),
    "context": (None, "query"),
    "branch": ("memory", None),
    "merge": ("into", None),
    **dict.fromkeys(("relate", "explain", "stats", "expire", "at", "trace"), (None, None)),
    **dict.fromkeys(("grant", "revoke", "export", "purge", "sweep", "distil"), ("memory", None)),
    **dict.fromkeys(("import_", "archive", "freeze", "thaw", "pin"), (None, None)),
    **dict.fromkeys(("add_member", "remove_member", "find_duplicates"), (None, None)),
    "merge_duplicates": ("memory", None),
}
_DETAILS = {
    **dict.fromkeys(("grant", "revoke"), ("principal", "right", "id")),
    **dict.fromkeys(("add_member", "remove_member"), ("group", "member")),
}


class Rights:
    """Part of MOS."""

    records: Records
    _audit: Audit | None = None
    _clock: Callable[[], float]
    _memories: dict[str, Any]
    memory: Callable[[str], Any]

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for name, (memory, query) in _AUDITED.items():
            if hasattr(cls, name):
                setattr(cls, name, _audited(getattr(cls, name), name, memory, query))

    # Access.

    def as_principal(
        self, principal: str, groups: Iterable[str] = (), *, purpose: str = ""
    ) -> View:
        """This MOS with the rights of a principal: what was not granted is not there.

        Args:
            principal: its name, such as "user:ann" or "agent:tutor".
            groups:    it is in, beside those that the store knows (``add_member``).
            purpose:   why it acts: stands in every audit record.

        Returns:
            A view with the verbs of a MOS. Without a principal, a MOS is its owner's, who sees
            and may do everything.

        Raises ArgumentError.
        """
        from memos.governance.verbs import MOS_VERBS
        from memos.governance.views import View
        from memos.records.rights import Actor

        if not isinstance(purpose, str):
            raise ArgumentError(f"purpose: a string wanted, got {purpose!r}")
        actor = Actor(self.records.database, principal, groups, purpose)
        return View(self, actor, self._audit, MOS_VERBS)

    def grant(
        self,
        principal: str,
        right: str | Iterable[str],
        memory: str | None = None,
        *,
        id: str | None = None,
    ) -> None:
        """Give a principal or a group rights, beside those it has.

        Args:
            principal: "user:ann", "group:staff", or "anyone".
            right:     "read", "write", "share" or "admin", or several. Read: see cubes. Write:
                add, change and delete. Share: give others what one has oneself. Admin:
                everything, lists of rights included.
            memory:    on a memory of this name; "*": on every one, also on later ones.
            id:        on this cube, by its ``acl``; a new version of it. With ``memory`` where
                several memories have the id.

        Raises:
            NotFoundError: no such memory or cube.
            AccessError:   the principal who acts has neither admin nor share, or not these rights.
        """
        from memos.records import rights

        name, bits = rights.checked_principal(principal), rights.bits_of(right)
        if id is not None:
            self._change_list(id, memory, name, bits, True)
            return
        key = self._granted_on(memory)
        with self.records.database.write() as connection:
            self._check_giver(connection, key, bits)
            old = rights.granted(connection, key, name) if rights.are_there(connection) else 0
            rights.set_grant(self.records.database, connection, key, name, old | bits)

    def revoke(
        self,
        principal: str,
        right: str | Iterable[str],
        memory: str | None = None,
        *,
        id: str | None = None,
    ) -> None:
        """Take from a principal what was granted to exactly this name on exactly this memory or
        cube. Arguments and errors as ``grant``; wants admin.

        It holds with the next call of every process; what was read before stays read.
        """
        from memos.records import rights

        name, bits = rights.checked_principal(principal), rights.bits_of(right)
        if id is not None:
            self._change_list(id, memory, name, bits, False)
            return
        key = self._granted_on(memory)
        with self.records.database.write() as connection:
            self._check_giver(connection, key, None)
            old = rights.granted(connection, key, name) if rights.are_there(connection) else 0
            rights.set_grant(self.records.database, connection, key, name, old & ~bits)

    def grants(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """(memory, principal, rights) of every grant on memories; "*" as the memory: every one."""
        from memos.records import rights

        with self.records.database.read() as connection:
            found, _ = rights.listed(connection)
        return [(memory or EVERY_MEMORY, principal, names) for memory, principal, names in found]

    def add_member(self, group: str, member: str) -> None:
        """Put a principal, or another group, into a group: it has what the group has."""
        self._set_member(group, member, True)

    def remove_member(self, group: str, member: str) -> None:
        """Take a principal, or another group, out of a group."""
        self._set_member(group, member, False)

    def groups(self) -> dict[str, list[str]]:
        """The members of every group."""
        from memos.records import rights

        with self.records.database.read() as connection:
            _, found = rights.listed(connection)
        groups: dict[str, list[str]] = {}
        for group, member in found:
            groups.setdefault(group, []).append(member)
        return groups

    # Audit.

    @property
    def audit(self) -> Audit:
        """The audit records: ``head``, ``records(...)``, ``verify()``.

        Raises StoreError where this store has none: ``MOS(path, audit=True)`` switches them on.
        """
        if self._audit is None:
            raise StoreError("audit: this store has no records of it; MOS(path, audit=True)")
        return self._audit

    def trace(self, what: Any, memory_name: str | None = None) -> Trace:
        """Where a cube comes from, how it changed and who used it; or, of a context, which
        memories reached the prompt, and why.

        Args:
            what: a cube, a hit, an id; a Context, or the text of one that is in the records.

        Returns:
            A Trace: ``str(trace)`` tells it in words. Uses are those of the audit records; a
            principal without admin sees its own.

        Raises: NotFoundError, ArgumentError.
        """
        from memos.governance.trace import trace_context, trace_cube
        from memos.records.scope import acting

        if isinstance(what, str) and memory_name is None and self._audit is not None:
            told = [r for r in self._audit.prompts(what) if _is_told(r, acting.get())]
            if told:
                return trace_context(None, told, None)
        if hasattr(what, "citations"):
            from memos.retrieval import explain

            told = [] if self._audit is None else self._audit.prompts(what.text)
            told = [r for r in told if _is_told(r, acting.get())]
            return trace_context(what, told, explain(what))
        id = what if isinstance(what, str) else getattr(what, "id", None)
        if not isinstance(id, str):
            raise ArgumentError(
                f"what: a cube, an id or a context wanted, got {type(what).__name__}"
            )
        name = memory_name or (getattr(what, "memory", None) or None)
        memory = self._holder(id, name, dead=True)  # type: ignore[attr-defined]
        return trace_cube(memory, id, self._audit, acting.get())

    # Inside.

    def _open_audit(self, wanted: bool | None) -> None:
        """Go on with the audit log of this store, or begin one."""
        from memos.governance.audit import open_audit

        self._audit = open_audit(self.records, wanted, self._clock)
        self.records.database.observer = self._audit

    def _close_audit(self) -> None:
        if self._audit is not None:
            self.records.database.observer = None
            self._audit.close()
            self._audit = None

    def _watched(self, memory: Any) -> Any:
        """A memory that the audit log hears of; those in records do by themselves."""
        if self._audit is not None and hasattr(memory, "observer"):
            memory.observer = self._audit
        return memory

    def _seen(self, memories: dict[str, Any]) -> dict[str, Any]:
        """Those of the memories of which whoever acts may see anything."""
        from memos.records.scope import acting

        actor = acting.get()
        if actor is None:
            return memories
        with self.records.database.read() as connection:
            return {
                name: memory
                for name, memory in memories.items()
                if actor.sees(connection, name) or getattr(memory, "shows_any", _never)()
            }

    def _readable(self, seqs: Iterable[int]) -> set[int]:
        """Which of these cubes whoever acts may read."""
        from memos.records.scope import Scope, acting

        wanted = list(seqs)
        with self.records.database.read() as connection:
            return Scope(rights=acting.get()).readable_among(connection, wanted)

    def _granted_on(self, memory: Any) -> str:
        if memory == EVERY_MEMORY:
            return ""
        if not isinstance(memory, str):
            raise ArgumentError(f"memory: a name, or id=, wanted, got {memory!r}")
        self.memory(memory)
        return memory

    def _check_giver(self, connection: Any, memory: str, bits: int | None) -> None:
        """Raise AccessError where whoever acts may not give these rights; None: take some."""
        from memos.records.scope import acting

        actor = acting.get()
        if actor is not None:
            _check_bits(actor, actor.on_memory(connection, memory), bits, f"memory {memory!r}")

    def _change_list(
        self, id: str, memory_name: str | None, principal: str, bits: int, gives: bool
    ) -> None:
        from memos.governance.lists import list_of, rights_on
        from memos.governance.views import as_actor
        from memos.records.rights import with_grant, without_grant
        from memos.records.scope import acting

        memory = self._holder(id, memory_name)  # type: ignore[attr-defined]
        actor = acting.get()
        with self.records.database.write() as connection:
            if actor is not None:
                have = rights_on(connection, memory, id, actor)
                _check_bits(actor, have, bits if gives else None, f"cube {id!r}")
            acl = list_of(connection, memory, id)
            new = with_grant(acl, principal, bits) if gives else acl
            if not gives and acl is not None:
                new = without_grant(acl, principal, bits)
            if new != acl:
                author = {} if actor is None else {"author": actor.principal}
                with as_actor(None):
                    memory.update(id, acl=new, **author)

    def _set_member(self, group: str, member: str, is_in: bool) -> None:
        from memos.records import rights

        one, other = (
            rights.checked_principal(group, "group"),
            rights.checked_principal(member, "member"),
        )
        if rights.ANYONE in (one, other):
            raise ArgumentError(f"group: everybody is {rights.ANYONE!r} already")
        with self.records.database.write() as connection:
            rights.set_member(self.records.database, connection, one, other, is_in)


def _check_bits(actor: Any, have: int, bits: int | None, what: str) -> None:
    from memos.records.rights import ADMIN, BITS, names_of

    if have & ADMIN:
        return
    if bits is None:
        raise AccessError(f"{actor.principal} has no right to take rights on {what}")
    if not have & BITS["share"] or bits & ~have:
        names = ", ".join(names_of(bits))
        raise AccessError(f"{actor.principal} has no right to give {names} on {what}")


def _is_told(record: Any, actor: Any) -> bool:
    return actor is None or record.who == actor.principal


def _never() -> bool:
    return False


def _audited(
    verb: Callable[..., Any], name: str, memory: str | None, query: str | None
) -> Callable[..., Any]:
    """The verb, with a record of each call where the store is audited."""
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        audit = self._audit
        if audit is None:
            return verb(self, *args, **kwargs)
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:  # the call itself says what is wrong
            return verb(self, *args, **kwargs)
        where = given.get(memory) if memory else None
        detail = {key: given.get(key) for key in _DETAILS.get(name, ())}
        asked = given.get(query) if query else None
        where = where if isinstance(where, str) else None
        with audit.doing(name, where, asked, detail) as done:
            done.result = verb(self, *args, **kwargs)
        return done.result

    return run
