"""The block store among processes: killed, beside others, without space, without rights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memos.errors import StoreError, StoreLockedError
from memos.kv import KVStore, Session

from .store_help import SMALL, P, check_get, entries_for, keys_of, report

SCRIPT = Path(__file__).with_name("store_processes.py")
KILLS = 200


def start(task: str, folder: Path, argument: object = "") -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), task, str(folder), str(argument)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def run(task: str, folder: Path, argument: object = "") -> dict[str, Any]:
    return result(start(task, folder, argument))


def test_kill_9(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    """SIGKILL at random moments: what had been acknowledged is there, and nothing else."""
    figures = run("kill", tmp_path, KILLS)
    assert figures["kills"] == KILLS
    assert figures["acknowledged"] > 200
    assert figures["in flight"] > 20
    record_property("kills", figures)
    report(
        request,
        f"{figures['kills']} writers killed, {figures['in flight']} of them inside a change; "
        f"{figures['acknowledged']} puts acknowledged, {figures['blocks checked']} blocks checked, "
        "0 lost, 0 wrong",
    )


def test_readers_beside_a_writer(tmp_path: Path) -> None:
    folder, done = tmp_path / "s", tmp_path / "done"
    with KVStore(folder) as store:
        store.tenant()
    readers = [start("read", folder, done) for _ in range(2)]
    wrote = run("write", folder, 200)
    done.touch()
    for reader in readers:
        saw = result(reader)
        assert saw["last"] == wrote["held"], "a reader sees what the writer left"
        assert sorted(saw["sessions"]) == ["0", "10", "20"]
        assert set(saw["misses"]) <= {"absent", "gone", "header", "key", "truncated", "payload"}
    assert wrote["evictions"] > 0


def test_second_writer(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    store = KVStore(folder)
    refused = run("lock", folder, 0)
    assert refused["error"].startswith("StoreLockedError")
    assert f"process {os.getpid()} " in refused["error"]
    waited = run("lock", folder, 0.2)
    assert waited["error"].startswith("StoreLockedError")
    assert waited["waited_s"] >= 0.2
    waiting = start("lock", folder, 60)
    store.close()
    assert result(waiting)["error"] == ""
    with KVStore(folder), pytest.raises(StoreLockedError, match="mode='r'"):
        KVStore(folder)


def test_reader_in_the_same_process_follows_the_writer(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with KVStore(folder) as writer, KVStore(folder, mode="r") as reader:
        mine = writer.tenant("t")
        his = reader.tenant("t")
        for round in range(20):
            entries = entries_for(mine, range(100 * round, 100 * round + 3 * P))
            assert check_get(his, entries) == 0
            mine.put(entries, SMALL)
            assert check_get(his, entries) == 3, "on the next question"
            mine.delete([entries[1].key])
            assert check_get(his, entries) == 1, "even though it was in the reader's memory"
        mine.save_session(Session("s", [1], SMALL.digest, keys_of(entries)))
        assert [s.id for s in his.sessions()] == ["s"]
        mine.delete_session("s")
        assert his.sessions() == []
        assert check_get(his, entries) == 0
        for change in (lambda: his.put(entries, SMALL), lambda: his.delete([entries[0].key])):
            with pytest.raises(StoreError, match="mode='r'"):
                change()
        mine.put(entries, SMALL)
        assert check_get(his, entries) == 3
        writer.delete_tenant("t")
        assert check_get(his, entries) == 0
        mine = writer.tenant("t")
        entries = entries_for(mine, range(3 * P))
        mine.put(entries, SMALL)
        mine.save_session(Session("new", [1], SMALL.digest, []))
        his = reader.tenant("t")
        assert check_get(his, entries) == 3, "the tenant that was made anew"
        assert [s.id for s in his.sessions()] == ["new"]


def test_reader_of_segments_that_vanish(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with KVStore(folder) as writer, KVStore(folder, mode="r", host_bytes=0) as reader:
        mine, his = writer.tenant(), reader.tenant()
        entries = entries_for(mine, range(4 * P))
        for entry in entries:
            mine.put([entry], SMALL)
        assert check_get(his, entries) == 4
        for path in sorted(folder.rglob("*.kvs"))[1:]:
            path.unlink()
        assert check_get(his, entries) == 1
        shutil.rmtree(folder / "tenants")
        assert check_get(his, entries) == 0


def test_fork(tmp_path: Path) -> None:
    said = run("fork", tmp_path / "s")
    assert said["got"] > 0
    assert said["sessions"] == ["s"]
    assert "fork" in said["put"]
    assert "fork" in said["save"]
    assert said["then"] > 0
    assert said["seen"] == said["then"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of one megabyte."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None or os.geteuid() != 0:
        pytest.skip("mounting a small filesystem needs root")
    place = tmp_path / "disk"
    place.mkdir()
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.strip()}")
    yield place
    subprocess.run([umount, str(place)], check=True)


def test_disk_full(small_disk: Path) -> None:
    said = run("full", small_disk / "s", "disk")
    assert len(said["errors"]) == 3
    assert all("no space left" in error for error in said["errors"])
    assert "ENOSPC" in said["errors"][0]
    assert said["temporary"] == []
    assert said["clean"]


def test_file_size_limit(tmp_path: Path) -> None:
    said = run("full", tmp_path / "s", "limit")
    assert len(said["errors"]) == 3
    assert all("no space left" in error for error in said["errors"][:2])
    assert "EFBIG" in said["errors"][0]
    assert said["temporary"] == []
    assert said["clean"]


def test_read_only_folder() -> None:
    user = os.geteuid() or 65534
    place = Path(tempfile.mkdtemp(prefix="memos-store-"))
    try:
        folder = place / "s"
        with KVStore(folder) as store:
            tenant = store.tenant()
            entries = entries_for(tenant, range(1000, 1000 + 12))
            tenant.put(entries, SMALL)
            tenant.save_session(Session("s", [1], SMALL.digest, keys_of(entries)))
        place.chmod(0o755)
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, user, user)
            path.chmod(0o500 if path.is_dir() else 0o400)
        before = sorted(folder.rglob("*"))
        said = run("readonly", folder, user)
        assert "read-only for this process" in said["errors"][0]
        assert len(said["errors"]) == 8
        assert all("mode='r'" in error for error in said["errors"][1:])
        assert said["got"] > 0
        assert said["sessions"] == ["s"]
        assert sorted(folder.rglob("*")) == before, "nothing was left behind"
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o700)
        shutil.rmtree(place)


def test_a_full_store_keeps_what_it_has(tmp_path: Path) -> None:
    """An OSError in the middle of a change leaves the store usable."""
    with KVStore(tmp_path / "s") as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(4 * P))
        tenant.put(entries[:2], SMALL)
        folder = next((tmp_path / "s" / "tenants").iterdir()) / "segments"
        aside = folder.with_name("aside")
        folder.rename(aside)
        with pytest.raises(StoreError, match="cannot store blocks"):
            tenant.put(entries, SMALL)
        aside.rename(folder)
        assert tenant.put(entries, SMALL) == 2
        assert check_get(tenant, entries) == 4
