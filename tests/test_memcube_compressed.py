"""Files with sessions that were compressed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="caches are of torch models")
pytest.importorskip("transformers", reason="caches are of transformers models")

from memos import MOS  # noqa: E402
from memos.errors import ArgumentError, StoreError  # noqa: E402

from .compress_help import dense, same  # noqa: E402
from .memcube_help import joined, parts_of  # noqa: E402
from .test_memcube_models import chat, fill  # noqa: E402

CODECS: dict[str, Any] = {"codec": "int8-g32", "cold_codec": "int4-g32"}


def store(**options: Any) -> MOS:
    mos = MOS()
    mos.register_memory(chat(**options))
    return mos


@pytest.fixture(name="one")
def one_fixture() -> MOS:
    mos = store(**CODECS)
    for number, length in ((1, 37), (2, 9), (3, 61)):
        fill(mos.memory("chat"), number, length)
    return mos


def values(mos: MOS, id: str) -> Any:
    return dense(mos.memory("chat").get(id).content)


def test_a_file_without_them_says_nothing_of_them(one: MOS, tmp_path: Path) -> None:
    one.export(tmp_path / "1")
    plain = store(codec="int8-g32")
    plain.import_(tmp_path / "1")
    plain.export(tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_they_come_back_as_they_were(one: MOS, tmp_path: Path) -> None:
    kv = one.memory("chat")
    kv.compress("s1")
    kv.compress("s3")
    one.export(tmp_path / "1")
    two = store(**CODECS, path=tmp_path / "kv")
    assert two.import_(tmp_path / "1").rebuild == []
    for id, codec in (("s1", "int4-g32"), ("s2", "int8-g32"), ("s3", "int4-g32")):
        assert two.memory("chat").get(id).content.codec.name == codec
        assert same(values(one, id), values(two, id))
        now, then = (mos.memory("chat").tenant.session(id) for mos in (one, two))
        assert (now.identity, now.token_ids) == (then.identity, then.token_ids)
    two.export(tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    two.close()
    # Where the small codec is the main one they are sessions as any other.
    three = store(codec="int4-g32")
    report = three.import_(tmp_path / "1")
    assert {(r.id, r.made_for["codec"]) for r in report.rebuild} == {("s2", "int8-g32")}
    assert same(values(one, "s1"), values(three, "s1"))


def test_without_that_codec_their_tokens_come(one: MOS, tmp_path: Path) -> None:
    one.memory("chat").compress("s1")
    one.export(tmp_path / "1")
    tokens = one.memory("chat").tenant.session("s1").token_ids
    for options in ({"codec": "int8-g32"}, {**CODECS, "cold_codec": "int2-g32"}):
        two = store(**options)
        (rebuild,) = two.import_(tmp_path / "1").rebuild
        assert (rebuild.id, list(rebuild.token_ids)) == ("s1", tokens)
        assert rebuild.made_for["codec"] == "int4-g32"
        assert "codec" in rebuild.why
        assert two.memory("chat").sessions().count("s1") == 0
        assert same(values(one, "s3"), values(two, "s3"))


def test_manifests_that_lie(one: MOS, tmp_path: Path) -> None:
    one.memory("chat").compress("s1")
    one.export(tmp_path / "1")
    members, info = parts_of((tmp_path / "1").read_bytes())
    (memory,) = info["memories"]
    assert memory["cold"] == {**memory["identity"], "codec": "int4-g32"}
    for lie in (None, {}, memory["identity"], {**memory["cold"], "num_layers": 4},
                {**memory["cold"], "codec": "int2-g32"}, {**memory["cold"], "codec": "int4"},
                "gone"):  # fmt: skip
        made = copy.deepcopy(info)
        if lie == "gone":
            del made["memories"][0]["cold"]
        else:
            made["memories"][0]["cold"] = lie
        (tmp_path / "2").write_bytes(joined(members, made))
        two = store(**CODECS)
        with pytest.raises((StoreError, ArgumentError)):
            two.import_(tmp_path / "2")
        assert two.memory("chat").sessions() == []
