"""Who may do what with which cube: principals, groups, grants, and access lists of cubes.

A right is "read", "write", "share" or "admin"; admin is all of them. A principal - "user:ann",
"agent:tutor" - has the rights that were granted to it, to a group it is in, or to ANYONE:

    on a memory   by a row of rights_grants ("" as the memory: on every one);
    on a cube     by the cube's own list, ``acl``: {"read": ["user:ann"], "inherit": true}. Without
                  a list it inherits: from the cube above it in a tree, else from its memory. With
                  a list only those who stand there have rights, and, where it inherits, those who
                  have them above.

Who has admin on a memory has it on every cube there. To read a cube one must be able to read
every cube above it, and to read a relationship both its ends: their names are its words.

Everything is asked in SQL, of the state that the connection sees, so that what one process grants
or revokes holds in all others with the next statement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    bindparam,
    select,
    text,
)

from memos.cube.utf8 import check_utf8
from memos.errors import AccessError, ArgumentError
from memos.records.links import chunks
from memos.records.schema import cubes, memories

if TYPE_CHECKING:
    from memos.records.database import Database

RIGHTS = ("read", "write", "share", "admin")
ANYONE = "anyone"  # every principal
EVERY_MEMORY = ""
BITS = {right: 1 << i for i, right in enumerate(RIGHTS)}
ADMIN, ALL = BITS["admin"], (1 << len(RIGHTS)) - 1

tables = MetaData()

grants = Table(
    "rights_grants",
    tables,
    Column("memory", Text, primary_key=True),
    Column("principal", Text, primary_key=True),
    Column("rights", Integer, nullable=False),
    sqlite_with_rowid=False,
)

members = Table(
    "rights_members",
    tables,
    Column("name", Text, primary_key=True),  # of the group
    Column("member", Text, primary_key=True),  # a principal, or another group
    sqlite_with_rowid=False,
)

state = Table(  # number of the transaction that last changed one of the others
    "rights_state",
    tables,
    Column("id", Integer, primary_key=True),
    Column("change", Integer, nullable=False),
)


def prepare(connection: Connection) -> None:
    """Make the tables where they are not there."""
    tables.create_all(connection)


def are_there(connection: Connection) -> bool:
    """Whether anything was ever granted in this store."""
    return connection.exec_driver_sql(_THERE).first() is not None


# What was given.


def bits_of(rights: Any) -> int:
    """The rights of this name, or of these names, as bits. Raises ArgumentError."""
    names = [rights] if isinstance(rights, str) else rights
    if not isinstance(names, Iterable):
        raise ArgumentError(f"right: of {', '.join(RIGHTS)} wanted, got {rights!r}")
    bits = 0
    for name in names:
        if not isinstance(name, str) or name not in BITS:
            raise ArgumentError(f"right: of {', '.join(RIGHTS)} wanted, got {name!r}")
        bits |= BITS[name]
    if not bits:
        raise ArgumentError(f"right: of {', '.join(RIGHTS)} wanted, got none")
    return bits


def names_of(bits: int) -> list[str]:
    """The names of these rights."""
    return [name for name, bit in BITS.items() if bits & bit]


def checked_principal(value: Any, what: str = "principal") -> str:
    """The name of a principal or group. Raises ArgumentError."""
    if not isinstance(value, str) or not value.strip():
        raise ArgumentError(f"{what}: a name such as 'user:ann' wanted, got {value!r}")
    check_utf8(value, what)
    return value


def checked_acl(value: Any) -> dict[str, Any] | None:
    """The access list of a cube in its normal form; None: it inherits.

    Raises ArgumentError for another form than {right: [principals], "inherit": bool}.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ArgumentError(f"acl: a dict of {', '.join(RIGHTS)}, inherit wanted, got {value!r}")
    found: dict[str, Any] = {}
    for key, names in value.items():
        if key == "inherit":
            if not isinstance(names, bool):
                raise ArgumentError(f"acl: inherit wants true or false, got {names!r}")
            if names:
                found[key] = True
            continue
        if key not in BITS:
            raise ArgumentError(f"acl: {', '.join(RIGHTS)} or inherit wanted, got {key!r}")
        if isinstance(names, str) or not isinstance(names, Sequence | set | frozenset):
            raise ArgumentError(f"acl: {key} wants a list of principals, got {names!r}")
        listed = sorted({checked_principal(name, f"acl: {key}") for name in names})
        if listed:
            found[key] = listed
    return found


def with_grant(acl: Mapping[str, Any] | None, principal: str, bits: int) -> dict[str, Any]:
    """An access list with these rights more; one that inherits goes on to do so."""
    found: dict[str, Any] = {"inherit": True} if acl is None else dict(acl)
    for right in names_of(bits):
        found[right] = sorted({*found.get(right, ()), principal})
    return found


def without_grant(acl: Mapping[str, Any], principal: str, bits: int) -> dict[str, Any]:
    """An access list with these rights less."""
    found = dict(acl)
    for right in names_of(bits):
        left = [name for name in found.pop(right, ()) if name != principal]
        if left:
            found[right] = left
    return found


def granted(connection: Connection, memory: str, principal: str) -> int:
    """The rights of exactly this grant, as bits."""
    row = select(grants.c.rights).where(grants.c.memory == memory, grants.c.principal == principal)
    return int(connection.execute(row).scalar() or 0)


def set_grant(
    database: Database, connection: Connection, memory: str, principal: str, bits: int
) -> None:
    """Give a principal exactly these rights on a memory; 0: none."""
    prepare(connection)
    connection.execute(
        grants.delete().where(grants.c.memory == memory, grants.c.principal == principal)
    )
    if bits:
        connection.execute(
            grants.insert(), {"memory": memory, "principal": principal, "rights": bits}
        )
    _note(database, connection)


def set_member(
    database: Database, connection: Connection, group: str, member: str, is_in: bool
) -> None:
    """Put a principal into a group, or take it out."""
    prepare(connection)
    connection.execute(members.delete().where(members.c.name == group, members.c.member == member))
    if is_in:
        connection.execute(members.insert(), {"name": group, "member": member})
    _note(database, connection)


def listed(connection: Connection) -> tuple[list[Any], list[Any]]:
    """Every grant (memory, principal, rights) and every membership (group, member)."""
    if not are_there(connection):
        return [], []
    rows = connection.execute(select(grants).order_by(grants.c.memory, grants.c.principal))
    given = [(row.memory, row.principal, tuple(names_of(row.rights))) for row in rows]
    rows = connection.execute(select(members).order_by(members.c.name, members.c.member))
    return given, [(row.name, row.member) for row in rows]


def _note(database: Database, connection: Connection) -> None:
    number, _ = database.allocate(connection)
    connection.exec_driver_sql(
        "INSERT OR REPLACE INTO rights_state(id, change) VALUES (1, ?)", (number,)
    )


_THERE = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'rights_state'"


# What a principal has.


class Actor:
    """A principal on one store: what it may see, in SQL, and what it may do. Thread-safe.

    Args:
        principal: its name.
        groups:    it is in, beside those that the store knows.
        purpose:   why it acts: stands in the audit records.

    Raises:
        ArgumentError: a name is none.
    """

    def __init__(
        self, database: Database, principal: str, groups: Iterable[str] = (), purpose: str = ""
    ) -> None:
        if isinstance(groups, str):
            raise ArgumentError(f"groups: a list of names wanted, got {groups!r}")
        self.principal = checked_principal(principal)
        given = {checked_principal(name, "groups") for name in groups}
        self.key = tuple(sorted({self.principal, *given, ANYONE}))
        self.purpose = purpose
        self.database = database
        self._names = json.dumps(self.key)
        if not database.readonly:
            with database.read() as connection:
                known = are_there(connection)
            if not known:
                with database.write() as connection:
                    prepare(connection)
        with database.read() as connection:
            sql = _Sql(are_there(connection))
        self._sql = sql
        self._restricted: dict[int, tuple[Select[Any], Select[Any]]] = {}
        self._built: dict[Any, Any] = {}
        self._sees: dict[str, tuple[tuple[int, int], bool]] = {}

    def __repr__(self) -> str:
        return f"Actor({self.principal!r})"

    # What may be seen.

    def clause(self, alias: str = "cubes") -> ColumnElement[bool]:
        """SQL over ``cubes``, under this name, that is true for what may be read, in any state."""
        sql = text(self._sql.seen(alias)).bindparams(acting=self._names)
        return cast("ColumnElement[bool]", sql)

    def restrict(self, statement: Select[Any]) -> Select[Any]:
        """A statement over ``cubes``, which stands in a module, for what may be read."""
        found = self._restricted.get(id(statement))
        if found is None:
            found = (statement, statement.where(self.clause()))
            self._restricted[id(statement)] = found
        return found[1]

    def built(self, key: Any, make: Callable[[], Any]) -> Any:
        """A statement that ``make`` makes of this actor's clauses; made once."""
        if key not in self._built:
            self._built[key] = make()
        return self._built[key]

    def readable(self, connection: Connection, seqs: Iterable[int]) -> set[int]:
        """Which of these cubes, of any memory and in any state, may be read."""
        statement = self.restrict(_BY_SEQS)
        return {
            int(row[0])
            for part in chunks(list(seqs))
            for row in connection.execute(statement, {"seqs": part})
        }

    def sees(self, connection: Connection, memory: str) -> bool:
        """Whether there is a right on this memory, or a cube in it that may be read."""
        stamps = self.stamps(connection)
        known = self._sees.get(memory)
        if known is None or known[0] != stamps or self.database.is_writing():
            known = self._sees[memory] = (stamps, self._look_for_any(connection, memory))
        return known[1]

    def _look_for_any(self, connection: Connection, memory: str) -> bool:
        if self.on_memory(connection, memory):
            return True
        number = connection.execute(select(memories.c.id).where(memories.c.name == memory)).scalar()
        if number is None:
            return False
        statement = self.restrict(_ONE_OF).limit(1)
        return connection.execute(statement, {"memory": number}).first() is not None

    def admission(
        self, connection: Connection, memory: int
    ) -> Callable[[Mapping[str, Any] | None, bool], bool]:
        """Whether a version with this list, and nothing above it (True), may be read by who may
        read its cube: a function."""
        bits, names = self._memory_bits(connection, memory), self.names(connection)

        def admits(acl: Mapping[str, Any] | None, is_root: bool) -> bool:
            inherited = not is_root or bool(bits & BITS["read"])
            if acl is None or bits & ADMIN:
                return inherited
            if any(names & set(_list(acl.get(right))) for right in ("read", "admin")):
                return True
            return acl.get("inherit") is True and inherited

        return admits

    def stamps(self, connection: Connection) -> tuple[int, int]:
        """Numbers of the last transaction, and of the last that changed a grant or a group."""
        # Asked with every path of a query: SQLAlchemy takes ten times as long as the lookup.
        row = connection.connection.cursor().execute(self._sql.stamps).fetchone()
        return int(row[0]), int(row[1] or 0)

    # What may be done.

    def names(self, connection: Connection) -> set[str]:
        """Itself and the groups it is in."""
        rows = connection.exec_driver_sql(self._sql.raw_who, (self._names,))
        return {row[0] for row in rows}

    def on_memory(self, connection: Connection, memory: str) -> int:
        """Rights on a memory of this name, as bits."""
        if not self._sql.has_tables:
            return 0
        rows = connection.exec_driver_sql(self._sql.raw_rights, (memory, self._names))
        bits = 0
        for row in rows:
            bits |= int(row[0])
        return ALL if bits & ADMIN else bits

    def on_listed(self, connection: Connection, memory: str, acl: Mapping[str, Any] | None) -> int:
        """Rights on something of a memory with this list, as bits."""
        bits = self.on_memory(connection, memory)
        if acl is None or bits & ADMIN:
            return bits
        names, own = self.names(connection), 0
        for right, bit in BITS.items():
            if names & set(_list(acl.get(right))):
                own |= bit
        own |= bits if acl.get("inherit") is True else 0
        return ALL if own & ADMIN else own

    @staticmethod
    def reads(bits: int) -> bool:
        """Whether "read" is among these rights."""
        return bool(bits & BITS["read"])

    def on_cube(self, connection: Connection, seq: int) -> int:
        """Rights that a cube's list and what it inherits give, as bits.

        Whether it may be seen at all is another question: see ``readable``.
        """
        chain: list[Any] = []
        seen: set[int] = set()
        at: int | None = seq
        while at is not None and at not in seen:
            seen.add(at)
            row = connection.exec_driver_sql(_CHAIN, (at,)).first()
            if row is None:
                return 0
            chain.append(row)
            at = row.parent
        memory = self._memory_bits(connection, chain[0].memory)
        if memory & ADMIN:
            return ALL
        names, bits = self.names(connection), memory
        for row in reversed(chain):
            if row.acl is None:
                continue
            acl = json.loads(row.acl)
            own = 0
            for right, bit in BITS.items():
                if names & set(_list(acl.get(right))):
                    own |= bit
            own = ALL if own & ADMIN else own
            bits = own | bits if acl.get("inherit") is True else own
        return bits

    def check_memory(self, connection: Connection, right: str, memory: str) -> None:
        """Raise AccessError without this right on a memory."""
        if not self.on_memory(connection, memory) & BITS[right]:
            raise AccessError(f"{self.principal} has no right to {right} memory {memory!r}")

    def check_cube(self, connection: Connection, right: str, seq: int, id: str) -> None:
        """Raise AccessError without this right on a cube, which it may see."""
        if not self.on_cube(connection, seq) & BITS[right]:
            raise AccessError(f"{self.principal} has no right to {right} cube {id!r}")

    def _memory_bits(self, connection: Connection, number: int) -> int:
        name = connection.execute(select(memories.c.name).where(memories.c.id == number)).scalar()
        return 0 if name is None else self.on_memory(connection, str(name))


class _Sql:
    """The texts of an actor's SQL; the names it acts under stand in ``:acting``."""

    def __init__(self, has_tables: bool) -> None:
        self.has_tables = has_tables
        given = "SELECT value AS name FROM json_each(:acting)"
        self.who = f"SELECT name FROM ({given})"
        if has_tables:
            self.who = (
                f"WITH RECURSIVE who(name) AS ({given} UNION SELECT m.name FROM rights_members "
                "AS m JOIN who ON m.member = who.name) SELECT name FROM who"
            )
        last = "SELECT max(change) FROM rights_state" if has_tables else "SELECT 0"
        self.stamps = f"SELECT change, ({last}) FROM store WHERE id = 1"
        self.raw_who = self.who.replace(":acting", "?")
        self.raw_rights = (
            "SELECT g.rights FROM rights_grants AS g WHERE g.memory IN (?, '') "
            f"AND g.principal IN ({self.raw_who})"
        )

    def seen(self, a: str) -> str:
        """True for a cube that may be read, in any state."""
        admins = self._memories(ADMIN)
        above = (
            f"WITH RECURSIVE up(seq) AS (SELECT {a}.parent UNION SELECT p.parent FROM cubes AS p "
            "JOIN up ON p.seq = up.seq WHERE p.parent IS NOT NULL) "
            f"SELECT 1 FROM up JOIN cubes AS x ON x.seq = up.seq WHERE NOT {self._listed('x')}"
        )
        ends = (
            "SELECT 1 FROM relations AS r JOIN cubes AS e ON e.seq IN (r.source, r.target) "
            f"WHERE r.cube = {a}.seq AND NOT {self._listed('e')}"
        )
        return (
            f"({a}.memory IN ({admins}) OR ({self._listed(a)}"
            f" AND ({a}.parent IS NULL OR NOT EXISTS ({above}))"
            f" AND ({a}.kind <> 'relationship' OR (EXISTS (SELECT 1 FROM relations AS r "
            f"WHERE r.cube = {a}.seq) AND NOT EXISTS ({ends})))))"
        )

    def _listed(self, a: str) -> str:
        """True where a cube's own list, or what it inherits at once, lets it be read."""
        inherits = f"({a}.parent IS NOT NULL OR {a}.memory IN ({self._memories(1 | ADMIN)}))"

        def holds(right: str) -> str:
            each = f"json_each({a}.acl, '$.{right}') AS l"
            return f"EXISTS (SELECT 1 FROM {each} WHERE l.value IN ({self.who}))"

        return (
            f"CASE WHEN {a}.acl IS NULL THEN {inherits} ELSE {holds('read')} OR {holds('admin')} "
            f"OR (coalesce(json_extract({a}.acl, '$.inherit'), 0) = 1 AND {inherits}) END"
        )

    def _memories(self, bits: int) -> str:
        """Numbers of the memories on which one of these rights is granted."""
        if not self.has_tables:
            return "SELECT 0 WHERE 0"
        return (
            "SELECT o.id FROM memories AS o JOIN rights_grants AS g ON g.memory IN (o.name, '') "
            f"WHERE (g.rights & {bits}) <> 0 AND g.principal IN ({self.who})"
        )


def _list(value: Any) -> Sequence[Any]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else ()


_BY_SEQS = select(cubes.c.seq).where(cubes.c.seq.in_(bindparam("seqs", expanding=True)))
_ONE_OF = select(cubes.c.seq).where(
    cubes.c.memory == bindparam("memory"), cubes.c.state != "DELETED"
)
_CHAIN = "SELECT memory, parent, acl FROM cubes WHERE seq = ?"
