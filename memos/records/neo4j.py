"""A graph server that speaks Bolt and Cypher: Neo4j, and what is compatible with it.

What it holds of one graph memory, for other applications to query:

    (:MemosNode:LABEL {PROPERTIES, memos_id, memos_key, memos_seq, ...})
    -[:TYPE {PROPERTIES, memos_id, memos_key, memos_seq, ...}]->(:MemosNode)

memos_id is the cube's id, memos_key is unique in the database: the memory's prefix and the cube's
number. A property that the server cannot hold - a map, a mixed list, null, a large integer - is
JSON text under its key, and memos_json names the key; a key that is no plain name stands in the
JSON text memos_rest. The cubes themselves stay in records: nothing is read back from here but
numbers.

Statements are fixed texts with parameters; labels, types and property names that go into a
statement were checked before and stand in backticks.
"""

from __future__ import annotations

import importlib.util
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection

from memos.cube.secret import Secret
from memos.errors import ArgumentError, BackendError, StoreError
from memos.records.graph import Edge, SqliteGraph, Wanted
from memos.records.scope import Scope

COMMON = "MemosNode"  # the label that every node has
ROOT = "MemosGraph"  # one node for each memory
NAME = re.compile(r"\w{1,100}")
_PARAMS = ("uri", "username", "password", "database")
_SCHEMES = ("bolt", "bolt+s", "bolt+ssc", "neo4j", "neo4j+s", "neo4j+ssc")
_CONNECT_S = 5.0
_TRIES = 6  # of a statement that met another one; the pauses add up to 3 s
_BATCH = 1000  # rows of one statement
T = TypeVar("T")


class Server:
    """A connection pool to one database. Thread-safe.

    Args:
        params: uri, and where the server wants them username, password and database.

    Raises:
        ArgumentError: a parameter is missing or unknown.
        BackendError:  the driver is not installed.
    """

    def __init__(self, params: Mapping[str, Any] | None) -> None:
        self.uri, self.database, self._auth = _checked(params)
        if importlib.util.find_spec("neo4j") is None:
            raise BackendError(
                "storage_backend='neo4j' wants the package neo4j: pip install 'memos-native[neo4j]'"
            )
        self._driver: Any = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Server({self.uri!r}, database={self.database!r})"

    @property
    def target(self) -> str:
        """Which database this is."""
        return f"{self.uri} {self.database or ''}".rstrip()

    def connect(self) -> None:
        """Open the pool and ask the server for its name. Raises StoreError, BackendError."""
        import neo4j

        user = self._auth[0] if self._auth else ""
        with self._lock:
            if self._driver is None:
                self._driver = self._guarded(
                    lambda: neo4j.GraphDatabase.driver(
                        self.uri,
                        auth=None if self._auth is None else (user, self._auth[1].reveal()),
                        connection_timeout=_CONNECT_S,
                        connection_acquisition_timeout=2 * _CONNECT_S,
                        max_transaction_retry_time=0,
                        notifications_min_severity="OFF",
                    )
                )
            driver = self._driver
        self._guarded(driver.verify_connectivity)

    def close(self) -> None:
        """Close the pool; ``connect`` opens it again."""
        with self._lock:
            driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()

    def write(self, statement: str, **parameters: Any) -> list[Any]:
        """Run one statement in a transaction of its own. Raises StoreError."""
        return self._run(statement, parameters, "w")

    def read(self, statement: str, **parameters: Any) -> list[Any]:
        """Run one statement that changes nothing. Raises StoreError."""
        return self._run(statement, parameters, "r")

    def _run(self, statement: str, parameters: dict[str, Any], routing: str) -> list[Any]:
        driver = self._driver
        if driver is None:
            self.connect()
            driver = self._driver

        def run() -> list[Any]:
            found = driver.execute_query(
                statement, parameters, database_=self.database, routing_=routing
            )
            return list(found.records)

        return self._guarded(run)

    def _guarded(self, call: Callable[[], T]) -> T:
        """The driver's errors in words; what met another transaction is tried again."""
        from neo4j import exceptions

        broken = 0
        for attempt in range(_TRIES):
            try:
                return call()
            except exceptions.AuthError as error:
                raise StoreError(f"{self.uri}: user and password are refused") from error
            except (exceptions.ServiceUnavailable, exceptions.SessionExpired, OSError) as error:
                # A pooled connection breaks when the server starts anew: the next one is fresh.
                broken += 1
                if broken > 1 or self._driver is None:
                    raise StoreError(
                        f"{self.uri}: no graph server answers ({type(error).__name__})"
                    ) from error
            except (exceptions.TransientError, exceptions.ConstraintError) as error:
                # Two that make one node: the second one finds it when it tries again.
                if attempt == _TRIES - 1:
                    raise StoreError(f"{self.uri}: {self._plain(error)}") from error
                time.sleep(0.1 * 2**attempt)
            except (exceptions.Neo4jError, exceptions.DriverError) as error:
                raise StoreError(f"{self.uri}: {self._plain(error)}") from error
        raise StoreError(f"{self.uri}: no graph server answers")

    def _plain(self, error: Exception) -> str:
        text = str(getattr(error, "message", None) or error).partition("\n")[0]
        secret = self._auth[1].reveal() if self._auth else ""
        return text.replace(secret, "***") if secret else text


class ServerGraph:
    """One memory's structure on a server. Thread-safe.

    Args:
        server: where.
        local:  the same structure in records, which decides what may be seen.
        prefix: of the keys: names this store and this memory, and no other.
    """

    def __init__(self, server: Server, local: SqliteGraph, prefix: str) -> None:
        self.server, self.local, self.prefix = server, local, prefix

    # Reading.

    def find(self, connection: Connection, wanted: Wanted, scope: Scope, limit: int) -> list[int]:
        """As SqliteGraph.find."""
        statement, parameters = self._matching(wanted)

        def candidates(after: int, size: int) -> list[int]:
            rows = self.server.read(statement, **parameters, after=after, limit=size)
            return [int(row["seq"]) for row in rows]

        return self.local.pages(connection, candidates, wanted, scope, limit)

    def edges(
        self,
        connection: Connection,
        seqs: Sequence[int],
        types: Sequence[str] | None,
        direction: str,
        scope: Scope,
        limit: int,
        after: int = 0,
    ) -> list[Edge]:
        """As SqliteGraph.edges."""
        kinds = "" if types is None else ":" + "|".join(map(_quoted, types))
        left, right = {"out": ("-", "->"), "in": ("<-", "-"), "both": ("-", "-")}[direction]
        statement = (
            f"UNWIND $keys AS key MATCH (n:{COMMON} {{memos_key: key}}){left}[r{kinds}]{right}"
            f"(:{COMMON}) WHERE r.memos_seq > $after "
            "RETURN DISTINCT r.memos_seq AS seq ORDER BY seq LIMIT $limit"
        )
        keys = [self._key(seq) for seq in seqs]
        found: list[Edge] = []
        while len(found) < limit:
            size = min(limit, _BATCH)
            rows = self.server.read(statement, keys=keys, after=after, limit=size)
            numbers = [int(row["seq"]) for row in rows]
            found += self.local.edges_among(connection, numbers, scope)
            if len(numbers) < size:
                break
            after = numbers[-1]
        return found[:limit]

    # Writing. Every statement may run again without harm.

    def is_known(self) -> bool:
        """Whether the server has heard of this memory."""
        statement = f"MATCH (g:{ROOT} {{memos_key: $key}}) RETURN g.memos_key AS key"
        return bool(self.server.read(statement, key=self.prefix))

    def prepare(self, name: str) -> None:
        """Make what keeps nodes unique, then the node that says that this memory is here."""
        self.server.write(
            f"CREATE CONSTRAINT memos_key IF NOT EXISTS FOR (n:{COMMON}) "
            "REQUIRE n.memos_key IS UNIQUE"
        )
        self.server.write(
            f"MERGE (g:{ROOT} {{memos_key: $key}}) SET g.name = $name", key=self.prefix, name=name
        )

    def wipe(self) -> None:
        """Delete everything of this memory."""
        statement = (
            f"MATCH (n:{COMMON}) WHERE n.memos_key STARTS WITH $prefix WITH n LIMIT $limit "
            "DETACH DELETE n RETURN count(*) AS deleted"
        )
        while self.server.write(statement, prefix=self.prefix, limit=_BATCH)[0]["deleted"]:
            pass

    def put_nodes(self, nodes: Mapping[int, tuple[str, Sequence[str], Mapping[str, Any]]]) -> None:
        """Make nodes what they are now: number -> (id, labels, properties)."""
        for _, labels, _ in nodes.values():
            for label in labels:
                _quoted(label)  # before anything is written
        keys = [self._key(seq) for seq in nodes]
        there = {
            row["key"]: (set(row["own"] or ()), set(row["labels"]))
            for row in self.server.read(
                f"UNWIND $keys AS key MATCH (n:{COMMON} {{memos_key: key}}) "
                "RETURN n.memos_key AS key, n.memos_labels AS own, labels(n) AS labels",
                keys=keys,
            )
        }
        merge: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        missing: dict[str, list[str]] = {}
        stale: dict[str, list[str]] = {}
        for seq, (id, labels, properties) in nodes.items():
            key = self._key(seq)
            stored = {**self._stored(seq, id, properties), "memos_labels": list(labels)}
            row = {"key": key, "properties": stored}
            own, all_of_them = there.get(key, (set(), None))
            if all_of_them is None:
                merge.setdefault(tuple(sorted(labels)), []).append(row)
                continue
            merge.setdefault((), []).append(row)
            for label in set(labels) - all_of_them:
                missing.setdefault(label, []).append(key)
            for label in (own & all_of_them) - set(labels):
                stale.setdefault(label, []).append(key)
        match = f"UNWIND $keys AS key MATCH (n:{COMMON} {{memos_key: key}}) "
        for label, at in sorted(stale.items()):  # first: memos_labels still says whose they are
            self.server.write(f"{match} REMOVE n:{_quoted(label)}", keys=at)
        for labels, rows in sorted(merge.items()):
            also = "".join(f":{_quoted(label)}" for label in labels)
            self.server.write(
                f"UNWIND $rows AS row MERGE (n:{COMMON}{also} {{memos_key: row.key}}) "
                "SET n = row.properties",
                rows=rows,
            )
        for label, at in sorted(missing.items()):
            self.server.write(f"{match} SET n:{_quoted(label)}", keys=at)

    def put_relationships(
        self, edges: Mapping[int, tuple[str, str, int, int, Mapping[str, Any]]]
    ) -> None:
        """Make relationships what they are: number -> (id, type, source, target, properties).

        Raises StoreError when the server has lost an end.
        """
        for type_, rows in _grouped(
            (type_, self._relationship(seq, id, source, target, properties))
            for seq, (id, type_, source, target, properties) in edges.items()
        ):
            done = self.server.write(
                f"UNWIND $rows AS row MATCH (a:{COMMON} {{memos_key: row.source}}) "
                f"MATCH (b:{COMMON} {{memos_key: row.target}}) "
                f"MERGE (a)-[r:{_quoted(type_)} {{memos_key: row.key}}]->(b) "
                "SET r = row.properties RETURN count(r) AS done",
                rows=rows,
            )[0]["done"]
            if done != len(rows):
                raise StoreError(
                    f"{self.server.uri}: the server has lost nodes of this memory; "
                    "memory.synchronise(rebuild=True) sends all of them"
                )

    def delete_nodes(self, seqs: Sequence[int]) -> None:
        """Delete nodes, and with them their relationships."""
        self.server.write(
            f"UNWIND $keys AS key MATCH (n:{COMMON} {{memos_key: key}}) DETACH DELETE n",
            keys=[self._key(seq) for seq in seqs],
        )

    def delete_relationships(self, edges: Mapping[int, tuple[str, int, int]]) -> None:
        """Delete relationships: number -> (type, source, target)."""
        for type_, rows in _grouped(
            (
                type_,
                {"key": self._key(seq), "source": self._key(a), "target": self._key(b)},
            )
            for seq, (type_, a, b) in edges.items()
        ):
            self.server.write(
                f"UNWIND $rows AS row MATCH (:{COMMON} {{memos_key: row.source}})"
                f"-[r:{_quoted(type_)} {{memos_key: row.key}}]->"
                f"(:{COMMON} {{memos_key: row.target}}) DELETE r",
                rows=rows,
            )

    # Inside.

    def _key(self, seq: int) -> str:
        return f"{self.prefix}{seq:d}"

    def _stored(self, seq: int, id: str, properties: Mapping[str, Any]) -> dict[str, Any]:
        own = {"memos_key": self._key(seq), "memos_id": id, "memos_seq": seq}
        return {**stored_properties(properties), **own}

    def _relationship(
        self, seq: int, id: str, source: int, target: int, properties: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "key": self._key(seq),
            "source": self._key(source),
            "target": self._key(target),
            "properties": self._stored(seq, id, properties),
        }

    def _matching(self, wanted: Wanted) -> tuple[str, dict[str, Any]]:
        """A statement for nodes that may fit: all that do, and perhaps some that do not."""
        labels = "".join(f":{_quoted(label)}" for label in wanted.labels)
        parts = ["n.memos_key STARTS WITH $prefix", "n.memos_seq > $after"]
        parameters: dict[str, Any] = {"prefix": self.prefix}
        for i, (key, value) in enumerate(wanted.properties.items()):
            if not _is_plain(key):
                parts.append("n.memos_rest IS NOT NULL")
                continue
            parameters[f"key{i}"] = key
            text = f"$key{i} IN n.memos_json"
            if _is_scalar(value):
                name = f"n.{_quoted(key)}"
                parameters[f"value{i}"] = value
                text += (
                    f" OR CASE WHEN $key{i} IN n.memos_lists THEN $value{i} IN {name} "
                    f"ELSE {name} = $value{i} END"
                )
            elif isinstance(value, list):
                text += f" OR $key{i} IN n.memos_lists"
            parts.append(f"({text})")
        return (
            f"MATCH (n:{COMMON}{labels}) WHERE {' AND '.join(parts)} "
            "RETURN n.memos_seq AS seq ORDER BY seq LIMIT $limit",
            parameters,
        )


def stored_properties(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Properties as a server can hold them; see the top of this file."""
    stored: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    marks: dict[str, list[str]] = {"memos_json": [], "memos_lists": []}
    for key, value in properties.items():
        if not _is_plain(key):
            rest[key] = value
        elif _is_scalar(value):
            stored[key] = value
        elif _is_uniform(value):
            stored[key] = value
            marks["memos_lists"].append(key)
        else:
            stored[key] = json.dumps(value, ensure_ascii=False)
            marks["memos_json"].append(key)
    if rest:
        stored["memos_rest"] = json.dumps(rest, ensure_ascii=False)
    return {**stored, **{name: sorted(keys) for name, keys in marks.items() if keys}}


def _is_plain(key: str) -> bool:
    return NAME.fullmatch(key) is not None and not key.startswith("memos_")


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return -(2**63) <= value < 2**63
    return isinstance(value, str | float | bool)


def _is_uniform(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len({type(item) for item in value}) < 2
        and all(map(_is_scalar, value))
    )


def _quoted(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ArgumentError(f"label: letters, digits and underscores wanted, got {name!r}")
    return f"`{name}`"


def _grouped(
    rows: Iterable[tuple[str, dict[str, Any]]],
) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows:
        groups.setdefault(name, []).append(row)
    return sorted(groups.items())


def _checked(
    params: Mapping[str, Any] | None,
) -> tuple[str, str | None, tuple[str, Secret] | None]:
    """uri, database and (user, password). Messages name what is wrong, and show no values."""
    if not isinstance(params, Mapping) or not set(params) <= set(_PARAMS) or "uri" not in params:
        names = ", ".join(sorted(map(str, params))) if isinstance(params, Mapping) else "none"
        raise ArgumentError(
            f"connection_params: a dict with uri and of {', '.join(_PARAMS[1:])} wanted, "
            f"got {names}"
        )
    for name, value in params.items():
        if not isinstance(value, str) and not (value is None and name != "uri"):
            raise ArgumentError(
                f"connection_params[{name!r}]: a string wanted, got {type(value).__name__}"
            )
    uri = params["uri"]
    scheme, found, rest = uri.partition("://")
    if not found or scheme not in _SCHEMES or "@" in rest:
        raise ArgumentError(
            f"connection_params['uri']: {', '.join(_SCHEMES)} and ://host:port wanted, user and "
            "password under their own names"
        )
    user, password = params.get("username"), params.get("password")
    if (user is None) != (password is None):
        raise ArgumentError("connection_params: username and password go together")
    auth = None if user is None else (user, Secret(password or ""))
    return uri, params.get("database"), auth
