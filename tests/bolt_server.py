"""A real graph server for the tests, and the ways to a GraphMemory on each backend.

The server is the one inside the package arcadedb-embedded: it speaks Bolt and Cypher. Where
NEO4J_URI (NEO4J_USER, NEO4J_PASSWORD, NEO4J_DATABASE) is set, the same tests also run there.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memos.memories.graph import GraphMemory
from memos.records.store import Records

START_S = 120


class BoltServer:
    """One server process on 127.0.0.1, with its own ports, password and folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bolt-"))
        for name in ("databases", "config"):
            (self.folder / name).mkdir()
        self.password = secrets.token_hex(12)
        self.http, self.port = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def params(self) -> dict[str, str]:
        return {
            "uri": f"bolt://127.0.0.1:{self.port}",
            "username": "root",
            "password": self.password,
            "database": "memos",
        }

    def start(self) -> None:
        spec = importlib.util.find_spec("arcadedb_embedded")
        assert spec is not None
        assert spec.origin is not None
        home = Path(spec.origin).parent
        settings = {
            "server.rootPath": self.folder,
            "server.rootPassword": self.password,
            "server.httpIncomingHost": "127.0.0.1",
            "server.httpIncomingPort": self.http,
            "server.plugins": "Bolt:com.arcadedb.bolt.BoltProtocolPlugin",
            "bolt.host": "127.0.0.1",
            "bolt.port": self.port,
            "server.defaultDatabases": "memos[root]",
        }
        log = self.folder / f"log-{time.monotonic_ns()}.txt"
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [
                    *(str(home / "jre" / "bin" / "java"), "-Xmx256m"),
                    *("--add-modules", "jdk.incubator.vector"),
                    *("--enable-native-access=ALL-UNNAMED", "-cp", str(home / "jars" / "*")),
                    *(f"-Darcadedb.{name}={value}" for name, value in settings.items()),
                    "com.arcadedb.server.ArcadeDBServer",
                ],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )
        end = time.monotonic() + START_S
        while b"Server started in" not in log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(log.read_text(errors="replace")[-2000:])
            time.sleep(0.05)

    def kill(self) -> None:
        """As a crash does it: without a word."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Graphs:
    """Makes bound memories on one backend, and closes them."""

    def __init__(self, backend: str, params: dict[str, str] | None) -> None:
        self.backend, self.params = backend, params
        self._open = contextlib.ExitStack()

    def __call__(self, records: Records | None = None, name: str = "g", **more: Any) -> GraphMemory:
        more.setdefault("embedder", None)
        if self.params is not None:
            more |= {"storage_backend": "neo4j", "connection_params": self.params}
        memory = GraphMemory(name, **more)
        self._open.callback(memory.close)
        memory.bind(records or self.records())
        return memory

    def records(self, path: Path | None = None, **more: Any) -> Records:
        records = Records(path, **more)
        self._open.callback(records.close)
        return records

    def run(self, statement: str, **parameters: Any) -> list[dict[str, Any]]:
        """Ask the server, past memos."""
        import neo4j

        assert self.params is not None
        auth = (self.params["username"], self.params["password"])
        with neo4j.GraphDatabase.driver(self.params["uri"], auth=auth) as driver:
            found = driver.execute_query(
                statement, parameters, database_=self.params.get("database")
            )
            return [record.data() for record in found.records]

    def close(self) -> None:
        self._open.close()


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port: int = it.getsockname()[1]
        return port


def make_server() -> BoltServer:
    """A server that runs; skips the test where it cannot."""
    for package in ("arcadedb_embedded", "neo4j"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    server = BoltServer()
    try:
        server.start()
    except BaseException:
        server.remove()
        raise
    return server


_shared: list[BoltServer] = []  # one for all test files


@pytest.fixture(scope="session")
def bolt() -> Iterator[BoltServer]:
    if not _shared:
        _shared.append(make_server())
    yield _shared[0]
    _shared[0].remove()


def targets() -> list[str]:
    return ["bolt", *(["neo4j"] if os.environ.get("NEO4J_URI") else [])]


def params_of(target: str, fixture: Callable[[str], Any]) -> dict[str, str] | None:
    """How to connect; None for SQLite."""
    if target == "sqlite":
        return None
    if target == "bolt":
        server: BoltServer = fixture("bolt")
        return server.params
    names = {
        "uri": "NEO4J_URI",
        "username": "NEO4J_USER",
        "password": "NEO4J_PASSWORD",
        "database": "NEO4J_DATABASE",
    }
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
