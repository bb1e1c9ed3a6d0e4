"""What a .memcube says of the memories of a store: the lines of its records, and its tensors.

A memory is a run of parts, each a member of records and, where its cubes have vectors, a member
of tensors. A cube is a line that names it, then a line for each of its versions, oldest first:

    {"created_at", "creator", "cube": id, "derived_from", "kind", "order", "position", "thread",
     "versions": n}
    {"acl", "at", "author", "content", "digest", "edges", "expires_at", "importance", "metadata",
     "parent_id", "parents", "source", "state", "text", "version"}

A version without text and content has those of the one before it. docs/format/memcube.md says
what each field is; transfer_out.py writes, transfer_in.py reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, NamedTuple

import numpy

from memos.cube.identity import version_digest
from memos.cube.memcube import encode
from memos.cube.safetensors import (
    ALL_ITEM_BYTES,
    LENGTH_BYTES,
    Entry,
    build_header,
    header_bytes,
    parse_header,
)
from memos.errors import ArgumentError, StoreError
from memos.records.history import SIZE
from memos.records.states import STATES

PART_BYTES = 16 << 20  # a part ends with the cube that fills it, by its lines or its vectors
MAX_TENSORS_BYTES = 128 << 20
CUBE_KEYS = {
    *("created_at", "creator", "cube", "derived_from", "kind", "order", "position", "thread"),
    "versions",
}
VERSION_KEYS = {
    *("acl", "at", "author", "content", "digest", "edges", "expires_at", "importance"),
    *("metadata", "parent_id", "parents", "source", "state", "text", "version"),
}
_FLOATS = {"float32": "F32", "float16": "F16"}

Progress = Callable[[int, int], object]


def records_name(memory: int, part: int) -> str:
    """The member with the lines of a part; memories and parts count from 1."""
    return f"records/{memory:04d}-{part:06d}.jsonl"


def tensors_name(memory: int, part: int) -> str:
    """The member with the vectors of a part."""
    return f"tensors/{memory:04d}-{part:06d}.safetensors"


# Lines. They are put together from what is stored, which is canonical JSON already.


def cube_line(row: Any, order: int, position: int | None, versions: int) -> bytes:
    """The line that names a cube."""
    return (
        f'{{"created_at":{_number(row.created_at)},"creator":{_text(row.creator)},'
        f'"cube":{_text(row.id)},"derived_from":{row.derived_from or "null"},'
        f'"kind":{_text(row.kind)},"order":{order},'
        f'"position":{"null" if position is None else position},"thread":{_text(row.thread)},'
        f'"versions":{versions}}}\n'
    ).encode()


def version_line(row: Any, at: float, parent_id: str | None, *, same_body: bool) -> bytes:
    """The line of a version, from a row of ``cubes`` or of ``versions`` with its body."""
    parents = ",".join(f'"{digest}"' for digest in _hexes(row.parents))
    content = "" if same_body else f'"content":{row.content or "null"},'
    text = "" if same_body else f'"text":{_text(row.text)},'
    return (
        f'{{"acl":{row.acl or "null"},"at":{_number(at)},"author":{_text(row.author)},{content}'
        f'"digest":"{row.version_digest.hex()}","edges":{row.edges or "[]"},'
        f'"expires_at":{_number(row.expires_at)},"importance":{_number(row.importance)},'
        f'"metadata":{row.metadata},"parent_id":{_text(parent_id)},"parents":[{parents}],'
        f'"source":{_text(row.source)},"state":"{row.state}",{text}"version":{row.version}}}\n'
    ).encode()


def _text(value: str | None) -> str:
    return "null" if value is None else encode_basestring(value)


def _number(value: float | None) -> str:
    return "null" if value is None else repr(float(value))


def _hexes(parents: bytes | None) -> list[str]:
    data = parents or b""
    return [data[at : at + SIZE].hex() for at in range(0, len(data), SIZE)]


class CubeFields(NamedTuple):
    """A line that names a cube, checked; JSON as it is stored."""

    id: str
    kind: str
    created_at: float
    creator: str | None
    derived_from: str | None
    order: int
    position: int | None
    thread: str | None
    versions: int


class VersionFields(NamedTuple):
    """A line of a version, checked; JSON as it is stored, and what is read most often parsed."""

    version: int
    state: str
    text: str
    content: str | None
    metadata: str
    importance: float
    parent_id: str | None
    edges: str | None
    acl: str | None
    author: str | None
    source: str | None
    at: float
    expires_at: float | None
    parents: bytes | None
    version_digest: bytes
    content_value: Any
    metadata_value: dict[str, Any]


def parse_cube(line: Mapping[str, Any], what: str) -> CubeFields:
    """The fields of a line that names a cube. Raises StoreError: other keys or types."""
    if line.keys() != CUBE_KEYS:
        raise StoreError(f"{what}: a cube with {', '.join(sorted(CUBE_KEYS))} wanted")
    derived = line["derived_from"]
    if derived is not None and not (_is_list(derived, str) and derived):
        raise StoreError(f"{what}: derived_from: a list of ids or null wanted")
    return CubeFields(
        id=checked_text(line["cube"], f"{what}: cube"),
        kind=checked_text(line["kind"], f"{what}: kind"),
        created_at=_time(line["created_at"], f"{what}: created_at"),
        creator=_optional(line["creator"], f"{what}: creator"),
        derived_from=None if derived is None else encode(derived),
        order=count(line["order"], f"{what}: order"),
        position=None if line["position"] is None else count(line["position"], what),
        thread=_optional(line["thread"], f"{what}: thread"),
        versions=count(line["versions"], f"{what}: versions", 1),
    )


def parse_version(
    line: Mapping[str, Any], before: VersionFields | None, what: str
) -> VersionFields:
    """The fields of a line of a version, that follows ``before``. Raises StoreError."""
    keys = line.keys()
    if keys != VERSION_KEYS and (before is None or keys != VERSION_KEYS - {"text", "content"}):
        raise StoreError(f"{what}: a version with {', '.join(sorted(VERSION_KEYS))} wanted")
    if "text" in keys:
        text, value = line["text"], line["content"]
        if not isinstance(text, str):
            raise StoreError(f"{what}: text: a string wanted")
        content = None if value is None else encode(value)
        if before is not None and (text, content) == (before.text, before.content):
            raise StoreError(f"{what}: a text that is not that of the version before wanted")
    else:
        assert before is not None
        text, content, value = before.text, before.content, before.content_value
    parents = line["parents"]
    if not _is_list(parents, str) or len(parents) > 1000:
        raise StoreError(f"{what}: parents: a list of digests wanted")
    if not isinstance(line["metadata"], dict):
        raise StoreError(f"{what}: metadata: an object wanted")
    if line["state"] not in STATES:
        raise StoreError(f"{what}: state: one of {', '.join(STATES)} wanted")
    importance = line["importance"]
    if type(importance) is not float or not 0 <= importance <= 1:
        raise StoreError(f"{what}: importance: a number from 0 to 1 wanted")
    if line["version"] != (1 if before is None else before.version + 1):
        raise StoreError(f"{what}: versions from 1 on wanted, each once")
    acl = line["acl"]
    return VersionFields(
        version=line["version"],
        state=line["state"],
        text=text,
        content=content,
        metadata=encode(line["metadata"]),
        importance=importance,
        parent_id=_optional(line["parent_id"], f"{what}: parent_id"),
        edges=_edges(line["edges"], f"{what}: edges"),
        acl=None if acl is None else encode(acl),
        author=_optional(line["author"], f"{what}: author"),
        source=_optional(line["source"], f"{what}: source"),
        at=_time(line["at"], f"{what}: at"),
        expires_at=None
        if line["expires_at"] is None
        else _time(line["expires_at"], f"{what}: expires_at"),
        parents=b"".join(_digest(one, f"{what}: parents") for one in parents) or None,
        version_digest=_digest(line["digest"], f"{what}: digest"),
        content_value=value,
        metadata_value=line["metadata"],
    )


def digest_of_version(
    cube: Any, version: Any, at: float, parent_id: str | None, deleted: bool
) -> bytes:
    """What the digest of a version of a cube has to be."""
    return version_digest(
        cube.id,
        cube.kind,
        version.text,
        version.content,
        version.metadata,
        parent_id,
        version.edges,
        version.acl,
        version.importance,
        cube.creator,
        cube.derived_from,
        version.author,
        version.source,
        at,
        deleted,
        version.parents,
    )


def checked_text(value: Any, what: str) -> str:
    """A string that is not empty. Raises StoreError, which names ``what``."""
    if not isinstance(value, str) or not value:
        raise StoreError(f"{what}: a string that is not empty wanted")
    return value


def count(value: Any, what: str, least: int = 0) -> int:
    """A whole number. Raises StoreError, which names ``what``."""
    if type(value) is not int or not least <= value < 1 << 53:
        raise StoreError(f"{what}: a whole number of at least {least} wanted")
    return value


def _optional(value: Any, what: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise StoreError(f"{what}: a string or null wanted")
    return value


def _time(value: Any, what: str) -> float:
    if type(value) is not float or not math.isfinite(value):
        raise StoreError(f"{what}: seconds since 1970 wanted")
    return value


def _digest(value: Any, what: str) -> bytes:
    try:
        found = bytes.fromhex(value)
    except (TypeError, ValueError):
        found = b""
    if len(found) != SIZE or found.hex() != value:
        raise StoreError(f"{what}: {SIZE} bytes in hex wanted")
    return found


def _edges(value: Any, what: str) -> str | None:
    if not isinstance(value, list):
        raise StoreError(f"{what}: a list wanted")
    for edge in value:
        is_edge = isinstance(edge, list) and len(edge) == 5
        if not is_edge or not _is_list(edge[:3], str) or not edge[0]:
            raise StoreError(f"{what}: type, memory, target, weight and properties wanted")
        if type(edge[3]) is not float or not 0 < edge[3] < math.inf:
            raise StoreError(f"{what}: a weight above 0 wanted")
        if not isinstance(edge[4], dict):
            raise StoreError(f"{what}: properties: an object wanted")
    keys = [tuple(edge[:3]) for edge in value]
    if len(set(keys)) < len(keys) or sorted(value, key=encode) != value:
        raise StoreError(f"{what}: sorted relations, each once, wanted")
    return encode(value) if value else None


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


# Tensors.


@dataclass
class Vectors:
    """The vectors of the cubes of one part.

    Args:
        cubes:  [n] which cube of the part has each, from 0, ascending.
        data:   the rows as they are stored.
        tokens: signs of the token vectors of each; b"" for none.
    """

    cubes: list[int] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)
    num_bytes: int = 0

    def append(self, cube: int, data: bytes, tokens: bytes) -> None:
        self.cubes.append(cube)
        self.data.append(data)
        self.tokens.append(tokens)
        self.num_bytes += len(data) + len(tokens) + 12


def vectors_pieces(vectors: Vectors, dim: int, dtype: str) -> Iterator[bytes]:
    """A safetensors file: cubes I64 [n], token_counts I32 [n], vectors [n, dim], tokens U8."""
    width = -(-dim // 8)
    counts = [len(signs) // width for signs in vectors.tokens]
    n = len(vectors.cubes)
    found: list[tuple[str, str, tuple[int, ...]]] = [
        ("cubes", "I64", (n,)),
        ("token_counts", "I32", (n,)),
        ("vectors", _FLOATS[dtype], (n, dim)),
        ("tokens", "U8", (sum(counts), width)),
    ]
    entries, at = [], 0
    for name, kind, shape in found:
        size = math.prod(shape) * ALL_ITEM_BYTES[kind]
        entries.append(Entry(name, kind, shape, at, at + size))
        at += size
    yield build_header(entries, {})
    yield numpy.array(vectors.cubes, "<i8").tobytes()
    yield numpy.array(counts, "<i4").tobytes()
    yield b"".join(vectors.data)
    yield b"".join(vectors.tokens)


def parse_vectors(data: bytes, cubes: int, dim: int, dtype: str, what: str) -> Vectors:
    """What ``vectors_pieces`` wrote of a part with so many cubes. Raises StoreError."""
    try:
        n = header_bytes(data[:LENGTH_BYTES], len(data), what)
        start = LENGTH_BYTES + n
        text = data[LENGTH_BYTES:start]
        entries, metadata = parse_header(text, len(data) - start, what, ALL_ITEM_BYTES)
    except ArgumentError as error:
        raise StoreError(str(error)) from None
    shapes = {entry.name: (entry.dtype, entry.shape) for entry in entries}
    rows = shapes.get("cubes", ("", (0,)))[1][0] if len(shapes) == 4 else 0
    total = shapes.get("tokens", ("", (0,)))[1][0] if len(shapes) == 4 else 0
    width = -(-dim // 8)
    wanted = {
        "cubes": ("I64", (rows,)),
        "token_counts": ("I32", (rows,)),
        "vectors": (_FLOATS[dtype], (rows, dim)),
        "tokens": ("U8", (total, width)),
    }
    if shapes != wanted or [entry.name for entry in entries] != list(wanted) or metadata:
        raise StoreError(f"{what}: tensors {', '.join(wanted)} of {dtype} [n, {dim}] wanted")
    parts = [memoryview(data)[start + entry.start : start + entry.end] for entry in entries]
    indices = numpy.frombuffer(parts[0], "<i8")
    counts = numpy.frombuffer(parts[1], "<i4")
    values = numpy.frombuffer(parts[2], f"<f{4 if dtype == 'float32' else 2}")
    if not rows or (numpy.diff(indices) <= 0).any() or indices[0] < 0 or indices[-1] >= cubes:
        raise StoreError(f"{what}: cubes of the part wanted, ascending")
    if (counts < 0).any() or int(counts.sum(dtype=numpy.int64)) != total:
        raise StoreError(f"{what}: token_counts that add up to the tokens wanted")
    if not numpy.isfinite(values).all():
        raise StoreError(f"{what}: finite numbers wanted, got NaN or infinity")
    size = dim * values.itemsize
    ends = numpy.cumsum(counts, dtype=numpy.int64) * width
    starts = ends - counts.astype(numpy.int64) * width
    return Vectors(
        indices.tolist(),
        [bytes(parts[2][i * size : (i + 1) * size]) for i in range(rows)],
        [bytes(parts[3][a:b]) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)],
    )


# What stands in the manifest of each memory.


@dataclass(frozen=True)
class Embedder:
    """What made the vectors of a memory."""

    identity: str
    dim: int
    metric: str
    dtype: str


@dataclass(frozen=True)
class MemoryInfo:
    """One memory of a file.

    Args:
        name, kind, description, config: as the store has them.
        embedder: None: there are no vectors.
        cubes, versions: how many lines of each.
        numbers:  ``order`` and ``position`` of its cubes are below it.
        parts:    how many; each has records, and where there are vectors tensors.
    """

    name: str
    kind: str
    description: str
    config: dict[str, Any]
    embedder: Embedder | None
    cubes: int
    versions: int
    numbers: int
    parts: int

    def as_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        fields = dict(vars(self))
        fields["embedder"] = None if self.embedder is None else dict(vars(self.embedder))
        return fields


_INFO = {
    "name": str, "kind": str, "description": str, "config": dict, "cubes": int, "versions": int,
    "numbers": int, "parts": int,
}  # fmt: skip
_EMBEDDER = {"identity": str, "dim": int, "metric": str, "dtype": str}


def parse_infos(value: Any) -> list[MemoryInfo]:
    """The memories of a manifest. Raises StoreError: anything but what ``as_json`` gives."""
    if not isinstance(value, list) or len(value) > 9999:
        raise StoreError("manifest.json: memories: a list wanted")
    found = []
    for one in value:
        if not isinstance(one, dict) or one.keys() != {*_INFO, "embedder"}:
            raise StoreError(f"manifest.json: memories: {', '.join(_INFO)} and embedder wanted")
        what = f"manifest.json: memory {str(one['name'])[:100]!r}"
        _check_types(one, _INFO, what)
        embedder = one["embedder"]
        if embedder is not None:
            if not isinstance(embedder, dict) or embedder.keys() != _EMBEDDER.keys():
                raise StoreError(f"{what}: embedder with {', '.join(_EMBEDDER)} wanted")
            _check_types(embedder, _EMBEDDER, what)
            if (
                not 1 <= embedder["dim"] <= 1 << 20
                or embedder["dtype"] not in _FLOATS
                or embedder["metric"] not in ("cosine", "dot", "l2")
            ):
                raise StoreError(f"{what}: an embedder wanted, got {embedder}")
        made = None if embedder is None else Embedder(**embedder)
        info = MemoryInfo(**{**one, "embedder": made})
        sizes = (info.cubes, info.versions, info.numbers, info.parts)
        if not info.name or min(sizes) < 0 or not info.cubes <= info.numbers <= 2 * info.cubes:
            raise StoreError(f"{what}: numbers that fit each other wanted")
        if info.versions < info.cubes or bool(info.parts) != bool(info.cubes):
            raise StoreError(f"{what}: numbers that fit each other wanted")
        found.append(info)
    names = [info.name for info in found]
    if names != sorted(set(names)):
        raise StoreError("manifest.json: memories in the order of their names, each once, wanted")
    return found


def _check_types(value: Mapping[str, Any], types: Mapping[str, type], what: str) -> None:
    for name, kind in types.items():
        if type(value[name]) is not kind:
            raise StoreError(f"{what}: {name}: {kind.__name__} wanted")
