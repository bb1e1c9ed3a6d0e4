"""Files with what belongs to a model: adapters and KV caches, under it and under another one."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="adapters and caches are of torch models")
pytest.importorskip("transformers", reason="caches are of transformers models")

from memos import MOS, GeneralTextMemory, KVCacheMemory, ParametricMemory  # noqa: E402
from memos.adapters.adapter import Adapter, Factors  # noqa: E402
from memos.adapters.fingerprint import fingerprint  # noqa: E402
from memos.errors import ArgumentError, StoreError  # noqa: E402
from memos.kv.transfer import PART_BYTES  # noqa: E402

from .memcube_help import changed, joined, parts_of, problems  # noqa: E402
from .models import build, prompt, tiny  # noqa: E402

OPTIONS: dict[str, Any] = {"block_tokens": 8, "sink_tokens": 2, "recent_tokens": 5}


class Words:
    """A tokenizer whose tokens are numbers."""

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(97)}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def chat(model: Any = None, name: str = "chat", **options: Any) -> KVCacheMemory:
    options = {"model": model or tiny("llama"), "codec": "int4", **OPTIONS, **options}
    return KVCacheMemory(name, tokenizer=Words(), **options)


def adapter(model: Any, seed: int, rank: int = 3) -> Adapter:
    torch.manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            shape = (rank, module.in_features), (module.out_features, rank)
            factors[name] = Factors(torch.randn(shape[0]), torch.randn(shape[1]), 0.5)
    return Adapter(factors, {}, {"base": fingerprint(model), "recipe": {"seed": seed}})


def fill(kv: KVCacheMemory, number: int, length: int = 37) -> None:
    model = kv._model
    ids = prompt(length, seed=number)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    content = {"token_ids": out.sequences, "cache": out.past_key_values}
    kv.add(content, {"user_id": "ann", "n": number}, id=f"s{number}")


def answers(kv: KVCacheMemory, id: str, model: Any) -> Any:
    """What the model says next, from the stored cache."""
    cube = kv.get(id)
    ids = torch.tensor([[*cube.content.token_ids, 5, 6]])
    with torch.no_grad():
        out = model.generate(
            **cube.content.inputs(ids), max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return cube.metadata["tokens"], out.sequences, torch.stack(out.logits)


@pytest.fixture(name="one")
def one_fixture() -> MOS:
    """A store with sessions, adapters, and the text that one was learnt from."""
    model = tiny("llama")
    mos = MOS()
    mos.register_memory(GeneralTextMemory("notes", embedder=None))
    mos.add("notes", "Berlin is the capital.", id="fact")
    mos.register_memory(ParametricMemory("skills", embedder=None))
    mos.add("skills", adapter(model, 1), {"name": "first"}, id="a1")
    relation = {"type": "learnt_from", "target": "fact"}
    mos.add(
        "skills", adapter(model, 2), {"name": "second"}, id="a2", relations=[relation],
        derived_from=["fact"],
    )  # fmt: skip
    mos.update("skills", "a1", adapter(model, 3))
    kv = mos.register_memory(chat())
    fill(kv, 1)
    fill(kv, 2, 9)
    fill(kv, 3, 40)
    kv.pin("s3")
    return mos


def receiving(model: Any = None, **options: Any) -> MOS:
    mos = MOS()
    mos.register_memory(chat(model, **options))
    return mos


def test_export_import_export_gives_equal_bytes(one: MOS, tmp_path: Path) -> None:
    made = one.export(tmp_path / "1")
    assert made.memories == {"notes": 1, "skills": 2, "chat": 3}
    two = receiving()
    report = two.import_(tmp_path / "1", embedder=None)
    assert {n: r.cubes for n, r in report.memories.items()} == made.memories
    two.export(tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert problems(two) == []
    assert two.memory("skills").check() == []
    assert not two.memory("chat").store.verify().bad


def test_sessions_are_continued(one: MOS, tmp_path: Path) -> None:
    model = tiny("llama")
    one.export(tmp_path / "1", memory="chat")
    two = receiving(path=tmp_path / "kv")
    two.import_(tmp_path / "1")
    for id in ("s1", "s2", "s3"):
        a, b = (answers(mos.memory("chat"), id, model) for mos in (one, two))
        assert a[0] == b[0] > 0
        assert torch.equal(a[1], b[1])
        assert torch.equal(a[2], b[2])
    (cube,) = two.retrieve("chat", "session:s1")
    assert cube.metadata["n"] == 1
    sessions = [mos.memory("chat").tenant.session("s3") for mos in (one, two)]
    assert [session.pinned for session in sessions] == [True, True]
    assert sessions[0].updated_at == sessions[1].updated_at
    assert sessions[0].keys != sessions[1].keys  # of another tenant's secret


def test_adapters_are_used(one: MOS, tmp_path: Path) -> None:
    model = build("llama")
    one.export(tmp_path / "1", memory="skills")
    two = MOS(tmp_path / "two")
    two.import_(tmp_path / "1", embedder=None)
    ids = prompt(9)
    logits = []
    for mos in (one, two):
        skills = mos.memory("skills").attach(model)
        with skills.use("second"), torch.no_grad():
            logits.append(model(ids).logits)
        skills.detach()
    assert torch.equal(*logits)
    for name in ("first", "second"):
        a, b = (mos.memory("skills").adapter(name) for mos in (one, two))
        assert a.card == b.card
        assert all(torch.equal(f.down, b.factors[n].down) for n, f in a.factors.items())


def test_another_model_is_offered_a_rebuild(one: MOS, tmp_path: Path) -> None:
    other = build("llama", seed=7)
    one.export(tmp_path / "1")
    two = receiving(other)
    two.register_memory(ParametricMemory("skills", embedder=None)).attach(other)
    report = two.import_(tmp_path / "1", embedder=None)
    assert two.memory("chat").tenant.sessions() == []
    by_id = {rebuild.id: rebuild for rebuild in report.rebuild}
    assert set(by_id) == {"s1", "s2", "s3", "a1", "a2"}
    session = by_id["s1"]
    tokens = one.memory("chat").tenant.session("s1").token_ids
    assert session.kind == "kv_cache"
    assert list(session.token_ids) == tokens
    assert session.text == " ".join(map(str, tokens))
    assert "model" in session.why
    assert session.made_for["model"] == one.memory("chat").identity.model
    learnt = by_id["a2"]
    assert (learnt.kind, learnt.sources) == ("parametric", ("fact",))
    assert two.get(learnt.sources[0]).content == "Berlin is the capital."
    assert learnt.made_for["weights"] != fingerprint(other)["weights"]
    with (
        pytest.raises(ArgumentError, match="another base model"),
        two.memory("skills").use("first"),
    ):
        pass


def test_without_a_model_everything_is_said(one: MOS, tmp_path: Path) -> None:
    one.export(tmp_path / "1")
    two = MOS()
    report = two.import_(tmp_path / "1", embedder=None)
    why = {rebuild.id: rebuild.why for rebuild in report.rebuild}
    assert "registered" in why["s1"]
    assert "attached" in why["a1"]
    assert set(two.memories) == {"notes", "skills"}


def test_the_same_model_needs_no_rebuild(one: MOS, tmp_path: Path) -> None:
    one.export(tmp_path / "1")
    two = receiving()
    two.register_memory(ParametricMemory("skills", embedder=None)).attach(build("llama"))
    assert two.import_(tmp_path / "1", embedder=None).rebuild == []


def test_sessions_that_are_there(one: MOS, tmp_path: Path) -> None:
    one.export(tmp_path / "1", ["s1", "s2"])
    one.export(tmp_path / "2", ["s2", "s3"])
    two = receiving()
    assert two.import_(tmp_path / "1").memories["chat"].cubes == 2
    with pytest.raises(ArgumentError, match="'s2' already"):
        two.import_(tmp_path / "2")
    assert {s.id for s in two.memory("chat").tenant.sessions()} == {"s1", "s2"}
    told = two.import_(tmp_path / "2", on_conflict="skip").memories["chat"]
    assert (told.cubes, told.skipped) == (1, 1)


def test_blocks_that_were_evicted_are_left_out(one: MOS, tmp_path: Path) -> None:
    kv = one.memory("chat")
    keys = kv.tenant.session("s1").keys
    kv.tenant.delete(keys[2:])
    one.export(tmp_path / "1", memory="chat")
    two = receiving()
    two.import_(tmp_path / "1")
    assert two.get("s1", "chat").metadata["tokens"] == 16
    assert two.memory("chat").tenant.session("s1").token_ids == kv.tenant.session("s1").token_ids
    two.export(tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def undisturbed(mos: MOS, folder: Path) -> Any:
    """What an import could have left behind."""
    files = sorted(str(p) for p in folder.rglob("*") if "adapters/" in str(p) and p.is_file())
    kv = mos.memory("chat")
    return (
        [f for f in files if not f.endswith("LOCK")],
        kv.tenant.sessions(),
        kv.store.verify().ok,
        mos.records.memories(),
    )


def test_files_that_lie_leave_nothing(one: MOS, tmp_path: Path) -> None:
    one.export(tmp_path / "1")
    whole = (tmp_path / "1").read_bytes()
    members, info = parts_of(whole)
    two = MOS(tmp_path / "two")
    two.register_memory(chat(path=tmp_path / "kv"))
    before = undisturbed(two, tmp_path)
    rng = random.Random(1)
    names = [n for n in members if n.startswith(("adapters", "blobs")) or "0003" in n]
    assert len(names) == 3 * 2 + 2
    for i in range(120):
        name = names[i % len(names)]
        data = bytearray(members[name][1])
        match i % 4:
            case 0:
                data = data[: rng.randrange(len(data))]
            case 1:
                data += b"0"
            case 2:
                data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)
            case 3:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if name.startswith("blobs") and i % 4 > 1:
            continue  # numbers in a cache are what they are: who signed them is to be trusted
        path = tmp_path / "wrong"
        path.write_bytes(changed(whole, name, lambda _, data=data: bytes(data)))
        try:
            two.import_(path, embedder=None)
        except (StoreError, ArgumentError):
            assert undisturbed(two, tmp_path) == before, name
        else:
            assert name.endswith("0003-000001.jsonl"), (name, i)  # another id, another time
            for session in two.memory("chat").tenant.sessions():
                two.delete("chat", session.id)
            two.close()
            two = MOS(tmp_path / f"two-{i}")
            two.register_memory(chat(path=tmp_path / f"kv-{i}"))
            before = undisturbed(two, tmp_path)
    for key in info["memories"][2]["identity"]:
        for wrong in (None, "x", -1, 2**40, 1.5):
            made = copy.deepcopy(info)
            made["memories"][2]["identity"][key] = wrong
            path.write_bytes(joined(members, made))
            try:
                report = two.import_(path, embedder=None)
            except (StoreError, ArgumentError):
                assert undisturbed(two, tmp_path) == before
            else:
                assert {r.id for r in report.rebuild} >= {"s1", "s2", "s3"}
                two.close()
                two = MOS(tmp_path / f"two-{key}")
                two.register_memory(chat(path=tmp_path / f"kv-{key}"))
                before = undisturbed(two, tmp_path)


def test_sessions_in_several_parts(one: MOS, tmp_path: Path, monkeypatch: Any) -> None:
    import memos.kv.transfer as transfer

    assert PART_BYTES == 16 << 20
    monkeypatch.setattr(transfer, "PART_BYTES", 1000)
    one.export(tmp_path / "1", memory="chat")
    two = receiving()
    two.import_(tmp_path / "1")
    two.export(tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert len(parts_of((tmp_path / "1").read_bytes())[0]) == 6
