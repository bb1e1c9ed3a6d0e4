"""Rows that stand above and below one another: the SQL of trees, and what full text reads there.

The words of the headings above a cube are part of its full text, so that they find what stands
below them: see ``context_below``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, func, literal, select

from memos.records.links import chunks
from memos.records.schema import cubes, store
from memos.records.scope import DELETED
from memos.records.words import context_of

TITLES = 8  # levels above a cube whose headings are words of it
_TITLE_LENGTH = 120  # characters; what is longer, or has several lines, is no heading
# Metadata of imported documents that says how to write them again: no words to be found by.
LAYOUT = {"level", "line", "markup", "front", "joint", "of", "digest", "format"}

ORDER = func.coalesce(cubes.c.position, cubes.c.seq)  # of the children of one parent


def title_of(text: str) -> str:
    """The text, where it can be the heading of what stands below it; else ''."""
    return "" if "\n" in text or len(text) > _TITLE_LENGTH else text


def context_below(metadata: Mapping[str, Any], titles: Sequence[str]) -> str:
    """Words of a cube for full text beside its text.

    Args:
        titles: ``title_of`` of the cubes above it, root first; the last eight count.
    """
    own = context_of({key: value for key, value in metadata.items() if key not in LAYOUT})
    path = " > ".join(title for title in titles[-TITLES:] if title)
    return f"{own} {path}" if own and path else own or path


def ancestors_of(
    connection: Connection, seqs: Sequence[int], depth: int | None = None
) -> dict[int, list[int]]:
    """For each cube those above it, nearest first, at most ``depth`` of them."""
    found: dict[int, list[int]] = {seq: [] for seq in seqs}
    for part in chunks(list(found)):
        up = (
            select(
                cubes.c.seq.label("start"), cubes.c.parent.label("seq"), literal(1).label("depth")
            )
            .where(cubes.c.seq.in_(part), cubes.c.parent.is_not(None))
            .cte("up", recursive=True)
        )
        above = cubes.alias("above")
        step = select(up.c.start, above.c.parent, up.c.depth + 1).join(up, above.c.seq == up.c.seq)
        step = step.where(above.c.parent.is_not(None))
        if depth is not None:
            step = step.where(up.c.depth < depth)
        up = up.union_all(step)
        for row in connection.execute(select(up).order_by(up.c.start, up.c.depth)):
            if depth != 0:
                found[row.start].append(int(row.seq))
    return found


def descendants_of(
    connection: Connection, seqs: Sequence[int], depth: int | None = None
) -> dict[int, list[tuple[int, int]]]:
    """For each cube (seq, parent) of all below it that are not deleted, in document order.

    Args:
        depth: levels that are read; None: all.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for part in chunks(list(dict.fromkeys(seqs))):
        down = (
            select(cubes.c.seq.label("start"), cubes.c.seq, literal(0).label("depth"))
            .where(cubes.c.seq.in_(part))
            .cte("down", recursive=True)
        )
        below = cubes.alias("below")
        step = (
            select(down.c.start, below.c.seq, down.c.depth + 1)
            .join(down, below.c.parent == down.c.seq)
            .where(below.c.state != DELETED)
        )
        if depth is not None:
            step = step.where(down.c.depth < depth)
        down = down.union_all(step)
        rows = connection.execute(
            select(down.c.start, cubes.c.seq, cubes.c.parent)
            .join(cubes, cubes.c.seq == down.c.seq)
            .where(down.c.depth > 0)
            .order_by(ORDER)
        )
        children: dict[int, dict[int, list[int]]] = {seq: {} for seq in part}
        for row in rows:
            children[row.start].setdefault(int(row.parent), []).append(int(row.seq))
        for seq in part:
            found[seq] = _in_document_order(seq, children[seq])
    return found


def children_of(connection: Connection, seqs: Sequence[int]) -> dict[int, list[int]]:
    """For each cube those directly below it that are not deleted, in order."""
    found: dict[int, list[int]] = {seq: [] for seq in seqs}
    for part in chunks(list(found)):
        rows = connection.execute(
            select(cubes.c.parent, cubes.c.seq)
            .where(cubes.c.parent.in_(part), cubes.c.state != DELETED)
            .order_by(ORDER)
        )
        for row in rows:
            found[row.parent].append(int(row.seq))
    return found


def next_seq(connection: Connection) -> int:
    """The number that the next new cube of this transaction gets."""
    return int(connection.execute(select(store.c.seq).where(store.c.id == 1)).scalar_one()) + 1


def settle(
    connection: Connection, change: int, expires_at: Mapping[int, float | None], thread: str
) -> None:
    """Write what cubes have from the one above them; no new version."""
    connection.exec_driver_sql(
        "UPDATE cubes SET expires_at = ?, thread = ?, change = ? WHERE seq = ?",
        [(at, thread, change, seq) for seq, at in expires_at.items()],
    )


def _in_document_order(root: int, children: Mapping[int, list[int]]) -> list[tuple[int, int]]:
    order: list[tuple[int, int]] = []
    stack = [(child, root) for child in reversed(children.get(root, []))]
    while stack:
        seq, parent = stack.pop()
        order.append((seq, parent))
        stack += [(child, seq) for child in reversed(children.get(seq, []))]
    return order
