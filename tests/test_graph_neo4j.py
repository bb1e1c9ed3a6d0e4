"""The graph on a server: in step with the records, whatever dies in between."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos.errors import ArgumentError, BackendError, StoreError
from memos.memories.graph import GraphMemory
from memos.records.graph import SqliteGraph
from memos.records.neo4j import Server, ServerGraph, stored_properties
from memos.records.outbox import prefix_of
from memos.records.store import Records

from .bolt_server import BoltServer, Graphs, bolt, free_port, make_server, params_of, targets  # noqa: F401
from .graph_help import edge, node
from .graph_model import history

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=targets())
def graphs(request: pytest.FixtureRequest) -> Iterator[Graphs]:
    made = Graphs(request.param, params_of(request.param, request.getfixturevalue))
    yield made
    made.close()


@pytest.fixture
def mortal() -> Iterator[BoltServer]:
    """A server that a test may kill."""
    server = make_server()
    yield server
    server.remove()


def prefix(memory: GraphMemory) -> str:
    with memory.records.database.read() as connection:
        return prefix_of(connection, memory.table.memory)


def on_server(graphs: Graphs, memory: GraphMemory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nodes (labels, properties) and relationships (type, ends, properties) by id."""
    nodes = graphs.run(
        "MATCH (n:MemosNode) WHERE n.memos_key STARTS WITH $prefix "
        "RETURN n.memos_id AS id, labels(n) AS labels, properties(n) AS properties",
        prefix=prefix(memory),
    )
    edges = graphs.run(
        "MATCH (a:MemosNode)-[r]->(b:MemosNode) WHERE r.memos_key STARTS WITH $prefix "
        "RETURN r.memos_id AS id, type(r) AS type, a.memos_id AS a, b.memos_id AS b, "
        "properties(r) AS properties",
        prefix=prefix(memory),
    )
    assert len({row["id"] for row in nodes}) == len(nodes)
    assert len({row["id"] for row in edges}) == len(edges)
    return {row["id"]: row for row in nodes}, {row["id"]: row for row in edges}


def in_records(memory: GraphMemory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same, as it ought to be."""
    local = SqliteGraph(memory.table.memory)
    with memory.records.database.read() as connection:
        seqs = [seq for seq, _ in local.living(connection)]
        rows = list(memory.table.rows(connection, seqs))
    nodes, edges = {}, {}
    for row in rows:
        content = json.loads(row.content)
        properties = stored_properties(content["properties"])
        properties |= {
            "memos_key": f"{prefix(memory)}{row.seq}",
            "memos_id": row.id,
            "memos_seq": row.seq,
        }
        if row.kind == "node":
            labels = [content["label"]] if "label" in content else content["labels"]
            properties["memos_labels"] = labels
            nodes[row.id] = (sorted(["MemosNode", *labels]), properties)
        else:
            ends = (content["source_id"], content["target_id"])
            edges[row.id] = (content["label"], *ends, properties)
    return nodes, edges


def assert_in_step(graphs: Graphs, memory: GraphMemory) -> None:
    nodes, edges = on_server(graphs, memory)
    have = (
        {id: (sorted(row["labels"]), row["properties"]) for id, row in nodes.items()},
        {id: (r["type"], r["a"], r["b"], r["properties"]) for id, r in edges.items()},
    )
    assert have == in_records(memory)
    assert memory.pending() == 0


# In step.


def test_other_applications_read_what_was_said(graphs: Graphs) -> None:
    memory = graphs()
    a = memory.add(
        node("Disease", "Diabetes", types=["1", "2"], mixed=[1, "a"], deep={"x": 1}, none=None)
    ).id
    b = memory.add(node("Symptom", "Polyuria")).id
    memory.add(edge("EXHIBITS_SYMPTOM", a, b, frequency="common"))
    (row,) = graphs.run(
        "MATCH (d:Disease {memos_id: $id})-[r:EXHIBITS_SYMPTOM]->(s:Symptom) "
        "RETURN properties(d) AS d, r.frequency AS frequency, s.name AS name",
        id=a,
    )
    assert (row["frequency"], row["name"]) == ("common", "Polyuria")
    assert row["d"]["name"] == "Diabetes"
    assert row["d"]["types"] == ["1", "2"]
    assert {key: json.loads(row["d"][key]) for key in row["d"]["memos_json"]} == {
        "mixed": [1, "a"],
        "deep": {"x": 1},
        "none": None,
    }
    assert_in_step(graphs, memory)
    assert memory.get(a).content["properties"]["deep"] == {"x": 1}


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_histories(graphs: Graphs, data: Any) -> None:
    memory, _ = history(graphs, data, 14)
    memory.synchronise()
    assert_in_step(graphs, memory)
    memory.close()


def test_an_index_of_an_earlier_life_is_replaced(graphs: Graphs, tmp_path: Path) -> None:
    """Changes made without the server are sent when it is there again."""
    path = tmp_path / "store"
    memory = graphs(graphs.records(path))
    a, b = memory.add(node("N", "a")).id, memory.add(node("N", "b")).id
    link = memory.add(edge("R", a, b)).id
    plain = GraphMemory("g", embedder=None)  # as a MOS opens it: it knows no password
    plain.bind(graphs.records(path))
    plain.delete(a)
    c = plain.add({"type": "node", "labels": ["N", "M"], "properties": {}}).id
    plain.add(edge("R", c, b, x=1))
    plain.update(b, node("Other", "b"))
    assert plain.pending() == 5
    assert set(on_server(graphs, memory)[1]) == {link}
    assert memory.degree(b) == 1
    assert_in_step(graphs, memory)


def test_a_graph_that_was_in_sqlite_is_sent_when_a_server_comes(
    graphs: Graphs, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    plain = GraphMemory("g", embedder=None)
    plain.bind(graphs.records(path))
    nodes = [{"content": node("N", str(i)), "id": str(i)} for i in range(1100)]
    edges = [{"content": edge("R", str(i), str(i + 1))} for i in range(1099)]
    plain.add_many([*nodes, *edges])
    assert plain.pending() == 0
    memory = graphs(graphs.records(path))
    assert_in_step(graphs, memory)
    assert len(memory.shortest_path("0", "60", max_depth=60)) == 60  # type: ignore


def test_what_others_changed_on_the_server_is_repaired_on_request(graphs: Graphs) -> None:
    memory = graphs()
    a, b = memory.add(node("N", "a")).id, memory.add(node("N", "b")).id
    memory.add(edge("R", a, b))
    graphs.run("MATCH (n:MemosNode {memos_id: $id}) SET n.name = 'x', n:Mine", id=a)
    graphs.run("MATCH (n:MemosNode {memos_id: $id}) DETACH DELETE n", id=b)
    with pytest.raises(StoreError, match="rebuild=True"):
        memory.add(edge("R", a, b, again=True))
    assert memory.pending() == 1
    memory.synchronise(rebuild=True)
    assert_in_step(graphs, memory)
    assert memory.degree(a) == 2


def test_a_server_that_lost_everything_is_filled_again(graphs: Graphs, tmp_path: Path) -> None:
    path = tmp_path / "store"
    memory = graphs(graphs.records(path))
    a, b = memory.add(node("N", "a")).id, memory.add(node("N", "b")).id
    memory.add(edge("R", a, b))
    for label in ("MemosNode", "MemosGraph"):
        graphs.run(
            f"MATCH (n:{label}) WHERE n.memos_key STARTS WITH $prefix DETACH DELETE n",
            prefix=prefix(memory),
        )
    assert_in_step(graphs, graphs(graphs.records(path)))


def test_labels_that_others_gave_stay(graphs: Graphs) -> None:
    memory = graphs()
    a = memory.add({"type": "node", "labels": ["A", "B"], "properties": {}}).id
    graphs.run("MATCH (n:MemosNode {memos_id: $id}) SET n:Reviewed", id=a)
    memory.update(a, {"type": "node", "labels": ["B", "C"]})
    nodes, _ = on_server(graphs, memory)
    assert sorted(nodes[a]["labels"]) == ["B", "C", "MemosNode", "Reviewed"]


def test_relationships_of_others_are_not_seen(graphs: Graphs) -> None:
    memory = graphs()
    a, b = memory.add(node("N", "a")).id, memory.add(node("N", "b")).id
    graphs.run(
        "MATCH (a:MemosNode {memos_id: $a}) MATCH (b:MemosNode {memos_id: $b}) "
        "CREATE (a)-[:FOREIGN]->(b)",
        a=a,
        b=b,
    )
    assert memory.degree(a) == 0
    assert memory.shortest_path(a, b) is None


# More than one at a time.


def test_contended_merges_make_one_node_each(graphs: Graphs) -> None:
    """Past the lock that senders share: as two machines would do it."""
    memory = graphs()
    assert graphs.params is not None
    server = Server(graphs.params)
    target = ServerGraph(server, SqliteGraph(memory.table.memory), f"{prefix(memory)}x/")
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for round in range(3):
                target.put_nodes({i: (str(i), ["A", "B"], {"round": round}) for i in range(50)})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    (row,) = graphs.run(
        "MATCH (n:MemosNode) WHERE n.memos_key STARTS WITH $p "
        "RETURN count(n) AS n, count(DISTINCT n.memos_key) AS keys",
        p=target.prefix,
    )
    assert row == {"n": 50, "keys": 50}
    server.close()


def test_one_process_sends_at_a_time(graphs: Graphs, tmp_path: Path) -> None:
    import fcntl

    memory = graphs(graphs.records(tmp_path))
    (lock,) = tmp_path.glob("graph-*.lock")
    with open(lock, "ab") as other:  # as another process in the middle of sending
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = threading.Thread(target=memory.add, args=(node("N", "a"),))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        assert on_server(graphs, memory) == ({}, {})
    writer.join()
    assert_in_step(graphs, memory)
    assert len(memory.nodes()) == 1


WRITER = """
    import json, sys
    from memos.memories.graph import GraphMemory
    from memos.records.store import Records

    path, params, who = sys.argv[1], json.loads(sys.stdin.readline()), sys.argv[2]
    more = {"storage_backend": "neo4j", "connection_params": params} if params else {}
    memory = GraphMemory("g", embedder=None, **more)
    memory.bind(Records(path))
    print("ready", flush=True)
    sys.stdin.readline()
    last = "hub"
    for i in range(15):
        id = memory.add({"type": "node", "label": "N", "properties": {"who": who, "i": i}}).id
        memory.add({"type": "relationship", "label": "R", "source_id": last, "target_id": id})
        if i % 5 == 4:
            memory.delete(id)
        else:
            last = id
        print(i, flush=True)
    memory.close()
"""


def spawn(path: Path, params: Any, who: str, code: str = WRITER) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path), who],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(params) + "\n")
    process.stdin.flush()
    return process


@pytest.mark.parametrize("target", ["sqlite", *targets()])
def test_two_processes_on_one_folder(
    target: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    graphs = Graphs(target, params_of(target, request.getfixturevalue))
    memory = graphs(graphs.records(tmp_path))
    memory.add(node("Hub", "hub"), id="hub")
    writers = [spawn(tmp_path, graphs.params, who) for who in ("one", "two")]
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in writers:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in writers:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert len(memory.nodes("N", limit=1000)) == 24
    found = memory.neighbourhood("hub", 10)
    assert max(found.distances.values()) == 10
    assert memory.degree("hub") == 2
    if target != "sqlite":
        assert_in_step(graphs, memory)
    graphs.close()


# What dies.


def test_a_process_killed_between_the_two_commits(graphs: Graphs, tmp_path: Path) -> None:
    """At each point of a send in turn: the next one to open the folder finishes it."""
    code = """
        import json, os, signal, sys
        from memos.memories.graph import GraphMemory
        from memos.records.neo4j import Server
        from memos.records.store import Records

        path, params, stop = sys.argv[1], json.loads(sys.stdin.readline()), int(sys.argv[2])
        memory = GraphMemory(
            "g", embedder=None, storage_backend="neo4j", connection_params=params
        )
        memory.bind(Records(path))
        left = stop
        plain = Server.write

        def write(self, *given, **more):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return plain(self, *given, **more)

        Server.write = write
        memory.update("a", {"type": "node", "labels": ["New", "Newer"], "properties": {"x": 1}})
        memory.add_many([
            {"content": {"type": "node", "label": "L", "properties": {"i": i}}, "id": f"n{i}"}
            for i in range(3)
        ] + [
            {"content": {"type": "relationship", "label": "R", "source_id": "n0",
                         "target_id": f"n{i}"}} for i in range(3)
        ])
        memory.delete("b")
        memory.delete("n0")
        print("done", flush=True)
    """
    for stop in (0, 1, 2, 4, 6, 8):
        path = tmp_path / str(stop)
        memory = graphs(graphs.records(path))
        memory.add_many(
            [{"content": node("Old", name), "id": name} for name in "ab"]
            + [{"content": edge("R", "a", "b")}]
        )
        process = spawn(path, graphs.params, str(stop), code)
        output, _ = process.communicate(timeout=60)
        again = graphs(graphs.records(path))  # opening sends what is pending
        assert_in_step(graphs, again)
        assert (process.returncode, output) == (-signal.SIGKILL, "")


def test_the_server_dies_and_comes_back(mortal: BoltServer, tmp_path: Path) -> None:
    graphs = Graphs("bolt", mortal.params)
    memory = graphs(graphs.records(tmp_path))
    a = memory.add(node("N", "a"), id="a").id
    mortal.kill()
    with pytest.raises(StoreError, match="1 changes are stored in records, and are sent") as told:
        memory.add(node("N", "b"), id="b")
    assert mortal.password not in str(told.value)
    assert memory.get("b").content["properties"] == {"name": "b"}  # the records have it
    assert len(memory.history("b")) == 1
    with pytest.raises(StoreError, match="no graph server answers"):
        memory.neighbourhood(a)
    with pytest.raises(StoreError, match="2 changes"):
        memory.add(edge("R", "a", "b"))
    with pytest.raises(StoreError, match="no graph server answers"):
        graphs(graphs.records(tmp_path))
    mortal.start()
    assert memory.neighbourhood(a).distances == {"a": 0, "b": 1}  # sent with this call
    assert_in_step(graphs, memory)
    graphs.close()


def test_a_transaction_that_is_undone_is_not_sent(graphs: Graphs, tmp_path: Path) -> None:
    memory = graphs(graphs.records(tmp_path))
    a = memory.add(node("N", "a")).id

    def undone() -> None:
        with memory.records.database.write():
            memory.add(node("N", "b"))
            memory.delete(a)
            raise KeyError

    with pytest.raises(KeyError):
        undone()
    assert_in_step(graphs, memory)
    with memory.records.database.write():
        b = memory.add(node("N", "b")).id
        memory.add(edge("R", a, b))
        assert set(on_server(graphs, memory)[0]) == {a}
    assert_in_step(graphs, memory)


def test_memory_closed_and_used_again(graphs: Graphs) -> None:
    memory = graphs()
    a = memory.add(node("N", "a")).id
    memory.close()
    memory.close()
    assert memory.degree(a) == 0


# Secrets and settings.


def test_the_password_is_never_shown(
    bolt: BoltServer,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    records = Records(tmp_path)
    memory = GraphMemory("g", embedder=None, storage_backend="neo4j", connection_params=bolt.params)
    memory.bind(records)
    memory.add(node("N", "a"))
    shown = f"{memory!r} {memory._server!r} {memory._structure!r} {memory.config()} {vars(memory)}"
    assert bolt.password not in shown
    wrong = {**bolt.params, "password": bolt.password[::-1] + "x"}
    with pytest.raises(StoreError, match="user and password are refused") as told:
        GraphMemory("h", storage_backend="neo4j", connection_params=wrong).bind(records)
    assert wrong["password"] not in str(told.value) + repr(told.value.__cause__)
    memory.close()
    records.close()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert bolt.password.encode() not in written
    assert bolt.password not in caplog.text


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        SECRET,
        {"username": "neo4j", "password": SECRET},
        {"uri": "bolt://127.0.0.1:1", "user": "neo4j", "password": SECRET},
        {"uri": "bolt://127.0.0.1:1", "password": SECRET},
        {"uri": "bolt://127.0.0.1:1", "username": "neo4j"},
        {"uri": "bolt://127.0.0.1:1", "username": 3, "password": SECRET},
        {"uri": "bolt://127.0.0.1:1", "username": "neo4j", "password": [SECRET]},
        {"uri": f"bolt://neo4j:{SECRET}@127.0.0.1:1"},
        {"uri": f"http://{SECRET}"},
        {"uri": None},
    ],
)
def test_parameters_that_are_out_of_contract(params: Any) -> None:
    with pytest.raises(ArgumentError, match="connection_params") as told:
        GraphMemory("g", storage_backend="neo4j", connection_params=params)
    assert SECRET not in str(told.value)


def test_a_server_that_is_not_there() -> None:
    records = Records()
    memory = GraphMemory(
        "g",
        storage_backend="neo4j",
        connection_params={
            "uri": f"bolt://127.0.0.1:{free_port()}",
            "username": "neo4j",
            "password": SECRET,
        },
    )
    with pytest.raises(StoreError, match="no graph server answers") as told:
        memory.bind(records)
    assert SECRET not in str(told.value)
    assert records.memories() == []
    with pytest.raises(ArgumentError, match="register"):
        memory.nodes()


def test_an_unknown_database(bolt: BoltServer) -> None:  # noqa: F811
    params = {**bolt.params, "database": "nowhere"}
    memory = GraphMemory("g", storage_backend="neo4j", connection_params=params)
    with pytest.raises(StoreError, match="nowhere"):
        memory.bind(Records())
    memory.close()


def test_without_the_package_the_error_says_how_to_install_it() -> None:
    code = """
        import sys
        sys.modules["neo4j"] = None
        from memos.errors import BackendError
        from memos.memories.graph import GraphMemory
        try:
            GraphMemory("g", storage_backend="neo4j", connection_params={"uri": "bolt://x"})
        except BackendError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "pip install 'memos-native[neo4j]'" in done.stdout, done.stderr
    assert issubclass(BackendError, Exception)


def test_statements_take_no_name_unchecked(graphs: Graphs) -> None:
    memory = graphs()
    memory.add(node("N", "a"))
    structure = memory._structure
    assert isinstance(structure, ServerGraph)
    evil = "N`) DETACH DELETE n //"
    with pytest.raises(ArgumentError):
        structure.put_nodes({1: ("x", [evil], {})})
    with memory.records.database.read() as connection, pytest.raises(ArgumentError):
        structure.edges(connection, [1], [evil], "both", memory.scope(), 5)
    odd = memory.add({"type": "node", "label": "N", "properties": {evil: 1, "`": 2}}).id
    assert [cube.id for cube in memory.nodes("N", {evil: 1})] == [odd]
    assert memory.nodes("N", {evil: 2}) == []
    assert_in_step(graphs, memory)
