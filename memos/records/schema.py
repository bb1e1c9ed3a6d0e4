"""The tables. One schema; the full-text tables of SQLite stand in fulltext.py.

seq is a cube's row number: small, ordered by time, never used again; indexes hold it instead of
the id. change numbers the transactions of the store: an index that has seen change n asks for
rows with a greater one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)
from sqlalchemy.types import UserDefinedType

FORMAT = 2  # of the tables; a store of another number is refused


class Number(UserDefinedType[Any]):
    """Integers and floats as they are: 64-bit integers stay exact."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "NUMERIC"


tables = MetaData()

store = Table(
    "store",
    tables,
    Column("id", Integer, primary_key=True),
    Column("format", Integer, nullable=False),
    Column("uuid", Text, nullable=False),
    Column("change", Integer, nullable=False),
    Column("seq", Integer, nullable=False),
)

memories = Table(
    "memories",
    tables,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("config", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
)

cubes = Table(
    "cubes",
    tables,
    Column("seq", Integer, primary_key=True),
    Column("memory", Integer, ForeignKey("memories.id"), nullable=False),
    Column("id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("text", Text, nullable=False),  # what full text and embedders read
    Column("context", Text, nullable=False),  # metadata in words, read by full text
    Column("content", Text),  # JSON; NULL: the content is the text itself
    Column("metadata", Text, nullable=False),
    Column("importance", Float(53), nullable=False),
    Column("parent", Integer, ForeignKey("cubes.seq")),
    Column("position", Integer),  # among its siblings, as if it were the seq; NULL: the seq
    Column("thread", Text),  # conversation or document whose cubes follow one another
    Column("source", Text),
    Column("creator", Text),
    Column("derived_from", Text),
    Column("acl", Text),
    Column("author", Text),  # of this version
    Column("created_at", Float(53), nullable=False),
    Column("updated_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    Column("digest", LargeBinary, nullable=False),
    Column("edges", Text),  # JSON of outgoing relations, as this version has them
    Column("parents", LargeBinary),  # digests of the versions that this one was made of
    Column("version_digest", LargeBinary, nullable=False),
    Column("change", Integer, nullable=False),
    Index("cubes_id", "memory", "id", unique=True),
    Index("cubes_change", "memory", "change"),
    Index("cubes_digest", "memory", "digest"),
    # Where there is none, nothing is indexed: a page less to write for each add.
    Index("cubes_parent", "parent", "seq", sqlite_where=text("parent IS NOT NULL")),
    Index("cubes_thread", "memory", "thread", "seq", sqlite_where=text("thread IS NOT NULL")),
    Index("cubes_expiry", "expires_at", sqlite_where=text("expires_at IS NOT NULL")),
    sqlite_autoincrement=True,
)


class CubeRow(NamedTuple):
    """A row of ``cubes``: its columns, in their order."""

    seq: int
    memory: int
    id: str
    kind: str
    state: str
    version: int
    text: str
    context: str
    content: str | None
    metadata: str
    importance: float
    parent: int | None
    position: int | None
    thread: str | None
    source: str | None
    creator: str | None
    derived_from: str | None
    acl: str | None
    author: str | None
    created_at: float
    updated_at: float
    expires_at: float | None
    digest: bytes
    edges: str | None
    parents: bytes | None
    version_digest: bytes
    change: int


# Versions that were: the last one is the cube itself.
versions = Table(
    "versions",
    tables,
    Column("seq", Integer, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("deleted", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),  # digest of text and content
    Column("metadata", Text, nullable=False),
    Column("importance", Float(53), nullable=False),
    Column("parent_id", Text),
    Column("edges", Text),
    Column("acl", Text),
    Column("author", Text),
    Column("source", Text),
    Column("at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    Column("digest", LargeBinary, nullable=False),
    Column("parents", LargeBinary),
    Column("version_digest", LargeBinary, nullable=False),
    Index("versions_body", "body"),
    sqlite_with_rowid=False,
)

# Memories that were made of another one; their cubes begin with its versions.
branches = Table(
    "branches",
    tables,
    Column("memory", Integer, ForeignKey("memories.id"), primary_key=True),
    Column("source", Integer, ForeignKey("memories.id"), nullable=False),
    Column("at", Float(53), nullable=False),
)

bodies = Table(  # text and content of versions, equal ones once
    "bodies",
    tables,
    Column("digest", LargeBinary, primary_key=True),
    Column("text", Text, nullable=False),
    Column("content", Text),
)


def fact_columns() -> list[Column[Any]]:
    """Columns of a table of facts: which cube has which scalar under which key."""
    return [
        Column("memory", Integer, primary_key=True),
        Column("key", Text, primary_key=True),
        Column("type", Integer, primary_key=True),
        Column("number", Number, primary_key=True),
        Column("string", Text, primary_key=True),
        Column("seq", Integer, primary_key=True),
    ]


# One row for each scalar in the metadata: what filters look up.
facts = Table(
    "facts",
    tables,
    *fact_columns(),
    Index("facts_string", "memory", "type", "string", "key"),
    sqlite_with_rowid=False,
)

relations = Table(
    "relations",
    tables,
    Column("id", Integer, primary_key=True),
    Column("source", Integer, ForeignKey("cubes.seq"), nullable=False),
    Column("type", Text, nullable=False),
    Column("target", Integer, ForeignKey("cubes.seq"), nullable=False),
    Column("weight", Float(53), nullable=False),
    Column("properties", Text, nullable=False),
    Column("cube", Integer, ForeignKey("cubes.seq")),  # a relationship that is a cube itself
    Index("relations_source", "source", "type", "target"),
    Index("relations_target", "target", "type", "source"),
    Index("relations_cube", "cube"),
)

# What made the vectors of a memory: those of another embedder mean something else.
embedders = Table(
    "embedders",
    tables,
    Column("memory", Integer, ForeignKey("memories.id"), primary_key=True),
    Column("identity", Text, nullable=False),
    Column("dim", Integer, nullable=False),
    Column("metric", Text, nullable=False),
    Column("dtype", Text, nullable=False),
)

vectors = Table(
    "vectors",
    tables,
    Column("seq", Integer, ForeignKey("cubes.seq"), primary_key=True),
    Column("memory", Integer, nullable=False),
    Column("data", LargeBinary),  # little-endian numbers; NULL: it had one, and was deleted
    Column("tokens", LargeBinary),  # token vectors for late interaction
    Column("change", Integer, nullable=False),
    Index("vectors_change", "memory", "change"),
)

embeddings = Table(  # equal texts are embedded once
    "embeddings",
    tables,
    Column("digest", LargeBinary, primary_key=True),
    Column("data", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
