"""The tables of the life of cubes: their moves, their uses, and the jobs that look after them.

They belong to the schema of the store, and are made where they are not there.
"""

from __future__ import annotations

from sqlalchemy import Column, Float, Index, Integer, Table, Text

from memos.records.schema import tables

# Cubes that are in no index. A vector of theirs stays in its row, and out of the vector index.
cold = Table(
    "cold",
    tables,
    Column("seq", Integer, primary_key=True),
    Column("memory", Integer, nullable=False),
    Column("change", Integer, nullable=False),
    Index("cold_change", "memory", "change"),
)

# Every move of a cube between states.
transitions = Table(
    "transitions",
    tables,
    Column("id", Integer, primary_key=True),
    Column("seq", Integer, nullable=False),
    Column("old", Text, nullable=False),
    Column("new", Text, nullable=False),
    Column("trigger", Text, nullable=False),
    Column("who", Text),
    Column("why", Text, nullable=False),
    Column("at", Float(53), nullable=False),
    Index("transitions_seq", "seq", "id"),
    sqlite_autoincrement=True,
)

pins = Table("pins", tables, Column("seq", Integer, primary_key=True))

# What a use counts for, see uses.py. No row: never used.
uses = Table(
    "uses",
    tables,
    Column("seq", Integer, primary_key=True),
    Column("count", Integer, nullable=False),
    Column("last", Float(53), nullable=False),  # seconds since 1970
    Column("heat", Float(53), nullable=False),  # uses as of ``last``, older ones counting less
)

jobs = Table(
    "jobs",
    tables,
    Column("id", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("arguments", Text, nullable=False),  # JSON
    Column("state", Text, nullable=False),
    Column("units", Integer, nullable=False),
    Column("done", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("result", Text, nullable=False),  # JSON: numbers that the units add up
    Column("error", Text),
    Column("created_at", Float(53), nullable=False),
    Column("updated_at", Float(53), nullable=False),
    Index("jobs_state", "state", "id"),
    sqlite_autoincrement=True,
)

job_units = Table(
    "job_units",
    tables,
    Column("job", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("key", Text, nullable=False),
    Column("payload", Text, nullable=False),  # JSON
    Column("state", Text, nullable=False),
    Column("tries", Integer, nullable=False),
    Index("job_units_key", "job", "key", unique=True),
    Index("job_units_state", "job", "state", "number"),
    sqlite_with_rowid=False,
)
