"""Purges: what a cube said goes, its tombstone stays.

A tombstone keeps id, memory, kind, times and state. Whatever could tell what stood there goes, the
digests too: who guesses a short text could tell by them that he guessed right. Pages are
overwritten with zeros as they are freed (secure_delete), and the write-ahead log is emptied.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, and_, delete, func, inspect, or_, select

from memos.errors import StoreError
from memos.records.history import digest_of
from memos.records.life_schema import cold, job_units, pins, transitions, uses
from memos.records.links import chunks
from memos.records.schema import bodies, cubes, facts, relations, vectors, versions
from memos.records.states import DELETED
from memos.records.vectors import GONE
from memos.records.writes import content_digest

if TYPE_CHECKING:
    from memos.records.cubes import CubeTable
    from memos.records.database import Database


def all_below(connection: Connection, table: CubeTable, seqs: Sequence[int]) -> list[int]:
    """These cubes and all that hang on them, in any state: children, and relationships at nodes."""
    found = dict.fromkeys(seqs)
    front = list(seqs)
    while front:
        more: list[int] = []
        for part in chunks(front):
            rows = connection.execute(select(cubes.c.seq).where(cubes.c.parent.in_(part)))
            more += [int(row[0]) for row in rows]
            edge = relations.c
            ends = or_(edge.source.in_(part), edge.target.in_(part))
            rows = connection.execute(select(edge.cube).where(ends, edge.cube.is_not(None)))
            more += [int(row[0]) for row in rows]
            more += _told_of(connection, table, part)
        front = [seq for seq in dict.fromkeys(more) if seq not in found]
        found.update(dict.fromkeys(front))
    return list(found)


def _told_of(connection: Connection, table: CubeTable, seqs: Sequence[int]) -> list[int]:
    """Deleted relationships of these nodes: their words name both ends."""
    named = select(cubes.c.id).where(cubes.c.seq.in_(seqs), cubes.c.kind == "node")
    ids = [row[0] for row in connection.execute(named)]
    if not ids:
        return []
    ends = [func.json_extract(cubes.c.content, f"$.{end}") for end in ("source_id", "target_id")]
    rows = connection.execute(
        select(cubes.c.seq).where(
            cubes.c.memory == table.memory,
            cubes.c.kind == "relationship",
            cubes.c.content.is_not(None),
            or_(*(end.in_(ids) for end in ends)),
        )
    )
    return [int(row[0]) for row in rows]


def texts_of(connection: Connection, seqs: Sequence[int]) -> set[str]:
    """Every text that these cubes ever had."""
    found: set[str] = set()
    for part in chunks(list(seqs)):
        rows = connection.execute(select(cubes.c.text).where(cubes.c.seq.in_(part)))
        found.update(row[0] for row in rows)
        old = select(bodies.c.text).join(versions, versions.c.body == bodies.c.digest)
        found.update(row[0] for row in connection.execute(old.where(versions.c.seq.in_(part))))
    return found


def contents_of(connection: Connection, seqs: Sequence[int]) -> Iterator[Any]:
    """Every content other than a text that these cubes ever had."""
    for part in chunks(list(seqs)):
        now = select(cubes.c.content).where(cubes.c.seq.in_(part), cubes.c.content.is_not(None))
        old = select(bodies.c.content).join(versions, versions.c.body == bodies.c.digest)
        old = old.where(versions.c.seq.in_(part), bodies.c.content.is_not(None))
        for statement in (now, old):
            for row in connection.execute(statement).all():
                yield json.loads(row[0])


def derived_from(connection: Connection, seqs: Sequence[int]) -> list[tuple[str, str]]:
    """(memory's name, id) of living cubes that were made of these, and may say what they said."""
    from memos.records.schema import memories

    edge = relations.c
    found: dict[tuple[str, str], None] = {}
    for part in chunks(list(seqs)):
        rows = connection.execute(
            select(memories.c.name, cubes.c.id)
            .select_from(relations)
            .join(cubes, cubes.c.seq == edge.source)
            .join(memories, memories.c.id == cubes.c.memory)
            .where(
                edge.target.in_(part),
                edge.type.in_(("distilled_from", "merged_from", "learnt_from", "cloned_from")),
                cubes.c.state != DELETED,
                cubes.c.seq.not_in(part),
            )
        )
        found.update({(row[0], row[1]): None for row in rows})
    return list(found)


def in_branches(connection: Connection, memory: int, seqs: Sequence[int]) -> list[tuple[str, str]]:
    """(memory's name, id) of living cubes that a branch, or what it was made of, has of these."""
    from memos.records.schema import branches, memories

    pairs = [tuple(row) for row in connection.execute(select(branches.c.memory, branches.c.source))]
    kin = {memory}
    while more := {end for pair in pairs if kin & set(pair) for end in pair} - kin:
        kin |= more
    found: dict[tuple[str, str], None] = {}
    for part in chunks(list(seqs) if len(kin) > 1 else []):
        ids = list(connection.execute(select(cubes.c.id).where(cubes.c.seq.in_(part))).scalars())
        twins = [cubes.c.id.startswith(f"{id}~", autoescape=True) for id in ids]
        rows = connection.execute(
            select(memories.c.name, cubes.c.id)
            .join(memories, memories.c.id == cubes.c.memory)
            .where(
                cubes.c.memory.in_(kin),
                or_(cubes.c.id.in_(ids), *twins),
                cubes.c.state != DELETED,
                cubes.c.seq.not_in(part),
            )
        )
        found.update({(row[0], row[1]): None for row in rows})
    return list(found)


def scrub(connection: Connection, table: CubeTable, seqs: Sequence[int]) -> None:
    """Make tombstones of deleted cubes of one memory.

    Cost: a few statements for each 500; full text is written anew.
    """
    change, _ = table.database.allocate(connection)
    tables = set(inspect(connection).get_table_names())
    for part in chunks(list(seqs)):
        old = [row[0] for row in connection.execute(
            select(versions.c.body).where(versions.c.seq.in_(part))
        )]  # fmt: skip
        for statement in (
            delete(versions).where(versions.c.seq.in_(part)),
            delete(facts).where(facts.c.memory == table.memory, facts.c.seq.in_(part)),
            delete(uses).where(uses.c.seq.in_(part)),
            delete(pins).where(pins.c.seq.in_(part)),
            delete(cold).where(cold.c.seq.in_(part)),
            delete(relations).where(
                or_(
                    relations.c.source.in_(part),
                    relations.c.target.in_(part),
                    relations.c.cube.in_(part),
                )
            ),
            transitions.update().where(transitions.c.seq.in_(part)).values(why=""),
            vectors.update()
            .where(vectors.c.seq.in_(part))
            .values(data=None, tokens=GONE, change=change),
        ):
            connection.execute(statement)
        if "graph_facts" in tables:
            marks = ", ".join("?" * len(part))
            connection.exec_driver_sql(
                f"DELETE FROM graph_facts WHERE memory = ? AND seq IN ({marks})",
                (table.memory, *part),
            )
        _drop_bodies(connection, old)
        for row in table.rows(connection, part):
            _bury(connection, row, change)
    connection.exec_driver_sql(
        f"INSERT INTO text_{table.memory:d}(text_{table.memory:d}) VALUES ('optimize')"
    )
    table.fulltext.forget()


def forget_units(connection: Connection) -> None:
    """Drop what finished jobs still say of their units."""
    over = and_(job_units.c.state != "WAITING", job_units.c.payload != "null")
    connection.execute(job_units.update().where(over).values(payload="null"))


def empty_log(database: Database) -> None:
    """Bring the write-ahead log into the file, and empty it.

    Raises StoreError where another process reads for long: the purge is done, but the log still
    holds what was there, until the next one empties it.
    """
    if database.path is None:
        return
    with database.outside() as connection:
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if busy:
        raise StoreError(
            f"{database.path}: purged, but another process reads, and the log keeps what was "
            "there; call purge again"
        )


def _drop_bodies(connection: Connection, digests: Iterable[bytes]) -> None:
    for part in chunks(list(dict.fromkeys(digests))):
        still = select(versions.c.body).where(versions.c.body.in_(part))
        connection.execute(
            bodies.delete().where(bodies.c.digest.in_(part), bodies.c.digest.not_in(still))
        )


def _bury(connection: Connection, row: Any, change: int) -> None:
    new: dict[str, Any] = {
        **dict.fromkeys(("text", "context"), ""),
        **dict.fromkeys(("content", "parent", "position", "thread", "source", "creator")),
        **dict.fromkeys(("derived_from", "acl", "author", "edges", "parents", "expires_at")),
        "metadata": "{}",
        "importance": 0.0,
        "version": 1,
        "state": DELETED,
        "digest": content_digest(row.kind, "", None, "{}", None),
        "change": change,
    }
    new["version_digest"] = digest_of(row, None, **new)
    connection.execute(cubes.update().where(cubes.c.seq == row.seq).values(new))
