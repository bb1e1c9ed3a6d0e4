"""KVCacheMemory: add, retrieve, update, delete; sharing; what it accepts and what it refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from memos import KVCacheMemory, MemCube
from memos.errors import ArgumentError, NotFoundError
from memos.kv import KVStore
from memos.kv.cache import MemosCache
from memos.kv.model import shape_of

from .models import build, config, prompt, smollm2, tiny

P = 8
OPTIONS: dict[str, Any] = {"block_tokens": P, "sink_tokens": 2, "recent_tokens": 5}
SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_layers": 3, "num_key_value_heads": 2,
    "vocab_size": 97,
}  # fmt: skip


def memory(model: Any = None, **options: Any) -> KVCacheMemory:
    options = {"model": model or tiny("llama"), "codec": "raw", **OPTIONS, **options}
    return KVCacheMemory("chat", **options)


def generated(model: Any, ids: torch.Tensor, cache: Any = None, new: int = 9) -> Any:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new,
        do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip


def content_of(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """What the article's chat adds after a first turn, its token ids beside the cache."""
    output = generated(model, ids)
    return {"token_ids": output.sequences, "cache": output.past_key_values}


def folder_bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and "segments" in f.parts)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_articles_chat(name: str, tmp_path: Path) -> None:
    """add, retrieve by user, continue with the full ids, update; twice, in two memories."""
    model = build(name, sliding_window=64) if name == "gemma3" else tiny(name)
    ids = prompt(37)
    with memory(model, path=tmp_path, max_cache_size=1024) as kv:
        assert kv.retrieve("user:user_123", limit=1) == []
        first = content_of(model, ids)
        cube = kv.add(first, metadata={"user_id": "user_123", "created_at": "2023-11-15"})
        assert isinstance(cube, MemCube)
    with memory(model, path=tmp_path, max_cache_size=1024) as kv:
        (hit,) = kv.retrieve("user:user_123", limit=1)
        assert hit["id"] == hit.id == cube.id
        assert hit["metadata"]["created_at"] == "2023-11-15"
        assert hit["metadata"]["tokens"] == 45
        assert hit["content"].token_ids == first["token_ids"][0, :-1].tolist()
        full = torch.cat([first["token_ids"], prompt(6, seed=2)], dim=1)
        output = model.generate(
            **hit["content"].inputs(full), max_new_tokens=9, return_dict_in_generate=True
        )
        assert torch.equal(output.sequences, generated(model, full).sequences)
        output.past_key_values.set_tokens(output.sequences)
        updated = kv.update(hit["id"], output.past_key_values, {"updated_at": "2023-11-16"})
        assert updated.id == cube.id
        assert updated.metadata["user_id"] == "user_123"
        assert updated.metadata["tokens"] == full.shape[1] + 8
        assert updated.updated_at >= updated.created_at == hit.created_at
        assert len(kv.retrieve("user:user_123")) == 1


def test_retrieve() -> None:
    model = tiny("llama")
    kv = memory(clock=iter(range(1000, 2000)).__next__)
    texts = [prompt(37, seed=s) for s in range(3)]
    for i, text in enumerate(texts):
        kv.add(content_of(model, text), {"user_id": "ann", "topic": i % 2}, id=f"s{i}")
    kv.add(content_of(model, texts[0]), {"user_id": "bob"}, id="other")
    assert [c.id for c in kv.retrieve("user:ann")] == ["s2", "s1", "s0"]
    assert [c.id for c in kv.retrieve("user:ann", limit=2)] == ["s2", "s1"]
    assert [c.id for c in kv.retrieve("user:ann", filters={"topic": 0})] == ["s2", "s0"]
    assert [c.id for c in kv.retrieve("session:other")] == ["other"]
    assert kv.retrieve("session:other", filters={"user_id": "ann"}) == []
    assert kv.retrieve("session:none") == kv.retrieve("user:none") == []
    assert kv.retrieve("user:ann", limit=0) == []
    (hit,) = kv.retrieve([*texts[1][0].tolist(), 3, 4])
    assert hit.metadata["tokens"] == 32  # whole blocks of anyone in this tenant
    assert hit.content.token_ids == texts[1][0, :32].tolist()
    assert kv.retrieve([5, 6, 7]) == kv.retrieve([]) == []


def test_retrieved_content_is_the_readers_own() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(codec="int4")
    kv.add(content_of(model, ids), id="a")
    hit, twin = kv.retrieve("session:a")[0], kv.retrieve("session:a")[0]
    before = twin.content.dense()
    hit.content.crop(-20)
    hit.content.inputs(prompt(50, seed=3))
    hit.metadata["x"] = 1
    again = kv.retrieve("session:a")[0]
    for cube in (twin, again):
        assert "x" not in cube.metadata
        for layer, dense in zip(cube.content.layers, before.layers, strict=True):
            torch.testing.assert_close(layer.keys, dense.keys, rtol=0, atol=0)


def test_update_and_delete() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory()
    kv.add(content_of(model, ids), {"user_id": "ann"}, id="a")
    assert kv.update("a", metadata={"title": "x"}).metadata["title"] == "x"
    assert kv.retrieve("session:a")[0].metadata["user_id"] == "ann"
    kv.add(content_of(model, ids), id="b")
    blocks = kv.stats()["host"]["blocks"]
    kv.delete("a")
    assert kv.retrieve("session:a") == []
    assert kv.stats()["host"]["blocks"] == blocks  # b uses them all
    kv.delete("b")
    assert kv.stats()["host"]["blocks"] == 0
    for call in (lambda: kv.delete("a"), lambda: kv.update("a"), lambda: kv.pin("a")):
        with pytest.raises(NotFoundError, match="'a'"):
            call()


def test_what_add_accepts() -> None:
    model, ids = tiny("llama"), prompt(37)
    output = generated(model, ids)
    known = MemosCache(model.config, "raw", **OPTIONS)
    generated(model, ids, known)
    known.set_tokens(output.sequences)
    own = MemosCache(model.config, "raw", block_tokens=16)  # lossless: stored in any codec
    generated(model, ids, own)
    own.set_tokens(output.sequences)
    lossy = MemosCache(model.config, "int4", **OPTIONS)
    generated(model, ids, lossy)
    static = transformers.StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(ids, past_key_values=static)
    contents: list[tuple[Any, int]] = [
        (known, 45),
        (own, 45),
        ({"token_ids": output.sequences[0].tolist(), "cache": output.past_key_values}, 45),
        ({"token_ids": output.sequences, "cache": lossy}, 45),
        ({"token_ids": ids, "cache": static}, 37),
    ]
    kv = memory(codec="int4")
    for content, tokens in contents:
        if content is known:
            continue
        cube = kv.add(content)
        assert cube.metadata["tokens"] == tokens
        assert cube.content.known_tokens == tokens
    raw = memory()
    for content, tokens in contents[:1] + contents[2:3]:
        assert raw.add(content).metadata["tokens"] == tokens
    turn = raw.begin("t", ids)
    turn.commit(model.generate(**turn.inputs, max_new_tokens=9, do_sample=False))
    assert raw.add(turn, {"user_id": "eve"}).metadata["tokens"] == 45
    assert raw.retrieve("user:eve")[0].id == "t"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda m, out: out.past_key_values, r"pass \{'token_ids': ids, 'cache': cache\}"),
        (lambda m, out: MemosCache(m.config), "a cache that knows its tokens wanted"),
        (
            lambda m, out: {"token_ids": out.sequences[:, :20], "cache": out.past_key_values},
            "45 ids wanted as in the cache, got 20",
        ),
        (lambda m, out: {"token_ids": [1], "kv": 3}, r"got \['kv', 'token_ids'\]"),
        (lambda m, out: "hello", "a Cache wanted, got str"),
        (lambda m, out: {"token_ids": [97], "cache": out.past_key_values}, "ids below 97 wanted"),
    ],
)
def test_what_add_refuses(content: Any, message: str) -> None:
    model = tiny("llama")
    kv = memory()
    with pytest.raises(ArgumentError, match=message):
        kv.add(content(model, generated(model, prompt(37))))
    assert kv.stats()["host"]["blocks"] == 0


def test_caches_of_other_kinds_are_refused() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory()
    kv.add(content_of(model, ids), id="a")
    with pytest.raises(ArgumentError, match="'a', which exists; use update"):
        kv.add(content_of(model, ids), id="a")
    rows = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids.repeat(2, 1), past_key_values=rows)
    with pytest.raises(ArgumentError, match="one row wanted"):
        kv.add({"token_ids": ids, "cache": rows})
    other = MemosCache(model.config, "int8", **OPTIONS)
    generated(model, ids, other)
    with pytest.raises(ArgumentError, match=r"\['raw', 8, 2\] wanted as in this memory"):
        kv.add({"token_ids": generated(model, ids).sequences, "cache": other})
    wide = build("llama", head_dim=16)
    with pytest.raises(ArgumentError, match=r"wanted as the memory was made for"):
        kv.add(content_of(wide, ids))
    deep = build("llama", num_hidden_layers=2)
    with pytest.raises(ArgumentError, match="Cache of 3 layers wanted, got DynamicCache of 2"):
        kv.add(content_of(deep, ids))
    gemma = tiny("gemma3")
    with pytest.raises(ArgumentError, match="DynamicSlidingWindowLayer in layer 0"):
        memory(gemma).add(content_of(gemma, ids))


# Known by its config only.


def test_a_config_in_place_of_a_model(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(37)
    for given in (SHAPE, model.config):
        kv = KVCacheMemory("chat", given, codec="raw", **OPTIONS)
        kv.add(content_of(model, ids), {"user_id": "ann"})
        turn = kv.begin("s", ids)
        assert turn.reused_tokens == 32
        output = model.generate(**turn.inputs, max_new_tokens=9, do_sample=False)
        assert torch.equal(output, generated(model, ids).sequences)
        turn.commit(output)
    with pytest.raises(ArgumentError, match="revision: a name for the weights wanted"):
        KVCacheMemory("chat", SHAPE, path=tmp_path)
    assert not list(tmp_path.iterdir())
    for revision, reused in (("v1", 0), ("v1", 44), ("v2", 0)):
        with KVCacheMemory(
            "chat", SHAPE, path=tmp_path, revision=revision, codec="raw", **OPTIONS
        ) as kv:
            turn = kv.begin("s", output)
            assert turn.reused_tokens == (45 if reused else 0)
            turn.commit(model.generate(**turn.inputs, max_new_tokens=1, do_sample=False))


def test_a_dict_without_kv_heads_learns_them(tmp_path: Path) -> None:
    """The article's model_config says three numbers; the first cache says the rest."""
    model, ids = build("llama", dtype=torch.bfloat16), prompt(37)
    three = {"hidden_size": 32, "num_attention_heads": 4, "num_layers": 3}
    options: dict[str, Any] = {"path": tmp_path, "revision": "1", "codec": "raw", **OPTIONS}
    with KVCacheMemory("chat", three, **options) as kv:
        kv.add(content_of(model, ids), {"user_id": "ann"})
        assert kv.retrieve("user:ann")[0].metadata == {
            "user_id": "ann", "tokens": 45, "raw_bytes": 45 * 3 * 2 * 16 * 2,
            "stored_bytes": 45 * 3 * 2 * 16 * 2,
        }  # fmt: skip
    with KVCacheMemory("chat", three, **options) as kv:
        (hit,) = kv.retrieve("user:ann")
        assert hit.content.layers[0].dense()[0].dtype == torch.bfloat16
        assert hit.metadata["tokens"] == 45


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name: a string that is not empty wanted"),
        ({"model_config": SHAPE}, "exactly one of them wanted"),
        ({"model": None}, "exactly one of them wanted"),
        ({"max_cache_size": 0}, "max_cache_size: a number of tokens, at least 1, wanted, got 0"),
        ({"max_cache_size": 1.5}, "got 1.5"),
        ({"max_cache_size": True}, "got True"),
        ({"ttl_s": 0}, "ttl_s: seconds above 0 wanted"),
        ({"codec": "int3"}, "codec: raw, or"),
        ({"sink_tokens": 8}, "sink_tokens: 0 to block_tokens - 1 = 7 wanted, got 8"),
        ({"model": None, "model_config": {**SHAPE, "heads": 3}}, "got heads"),
        ({"model": None, "model_config": {**SHAPE, "num_layers": "3"}}, "num_layers: a number"),
        ({"model": None, "model_config": {**SHAPE, "hidden_size": 33}}, "or pass head_dim"),
        ({"model": None, "model_config": {"num_layers": 3}}, "num_attention_heads wanted, got"),
        ({"model": None, "model_config": {**SHAPE, "dtype": "int8"}}, "dtype: float32, float16"),
        ({"model": None, "model_config": {**SHAPE, "head_dim": 4}, "codec": "int4"}, "multiple"),
        ({"model": None, "model_config": transformers.MambaConfig()}, "of mamba"),
        ({"path": "x", "store": 1}, "at most one of them"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    given = {"name": "chat", "model": tiny("llama"), **OPTIONS, **options}
    with pytest.raises(ArgumentError, match=message):
        KVCacheMemory(**given)


def test_shapes() -> None:
    deepseek = transformers.DeepseekV3Config(num_hidden_layers=2)
    one = shape_of(deepseek).uniform()
    assert (one.num_kv_heads, one.head_dim_k, one.head_dim_v) == (128, 192, 128)
    mixed = config("llama")
    assert shape_of(mixed).token_bytes() == 3 * 2 * 16 * 4
    with pytest.raises(ArgumentError, match="causal attention wanted, got gemma3_text"):
        shape_of(config("gemma3", use_bidirectional_attention=True))
    with pytest.raises(ArgumentError, match="self-attention wanted, got mllama"):
        shape_of(transformers.MllamaConfig())


# Sharing.


def test_a_system_prompt_is_stored_once(tmp_path: Path) -> None:
    """100 users with one system prompt: its blocks are on disk once, in bytes."""
    model, system = tiny("llama"), prompt(20 * P)
    kv = memory(path=tmp_path, durable=False)

    def ask(user: int) -> int:
        text = torch.cat([system, prompt(5, seed=1000 + user)], dim=1)
        turn = kv.begin(f"session-{user}", text, user=f"user-{user}")
        with torch.no_grad():
            model(text[:, turn.reused_tokens :], past_key_values=turn.cache)
        turn.commit()
        assert turn.stored_tokens == 165
        return turn.reused_tokens

    assert ask(0) == 0
    first = folder_bytes(tmp_path)
    raw = model.config.num_hidden_layers * 2 * 16 * 4  # bytes per token
    assert first > 165 * raw
    assert [ask(user) for user in range(1, 100)] == [160] * 99
    disk = kv.stats()["disk"]
    assert disk["blocks"] == 20 + 100
    added = (folder_bytes(tmp_path) - first) / 99
    assert added <= 5 * raw + 4096  # its tail and a page; the shared tokens would be 61,440 more
    kv.delete("session-0")
    assert kv.stats()["disk"]["blocks"] == 20 + 99
    assert kv.retrieve("user:user-7")[0].metadata["tokens"] == 165
    kv.close()


def test_tenants_share_nothing(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(37)
    with KVStore(tmp_path) as store:
        ann, bob = (memory(store=store, tenant=name) for name in ("ann", "bob"))
        ann.add(content_of(model, ids), {"user_id": "x"}, id="a")
        assert bob.begin("a", ids).reused_tokens == 0
        assert bob.retrieve("user:x") == bob.retrieve("session:a") == bob.retrieve(ids) == []
        assert ann.begin("other", ids).reused_tokens == 32
        ann.close()  # the store was given: it stays open
        assert ann.begin("a", ids).reused_tokens == 32


def test_forks_of_a_conversation() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory()
    turn = kv.begin("a", ids)
    output = model.generate(**turn.inputs, max_new_tokens=9, do_sample=False)
    turn.commit(output)
    for i, session in enumerate(("b", "c")):
        text = torch.cat([output, prompt(8, seed=i)], dim=1)
        turn = kv.begin(session, text)
        assert turn.reused_tokens == 40
        got = model.generate(**turn.inputs, max_new_tokens=9, do_sample=False)
        assert torch.equal(got, generated(model, text).sequences)
        turn.commit(got)
    assert kv.begin("a", output).reused_tokens == 45


def test_damage_is_a_miss(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(37)
    with memory(path=tmp_path) as kv:
        kv.add(content_of(model, ids), id="a")
    for path in tmp_path.rglob("*"):
        if path.is_file() and "segments" in path.parts:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    with memory(path=tmp_path) as kv:
        turn = kv.begin("a", ids)
        assert turn.reused_tokens < 32
        got = model.generate(**turn.inputs, max_new_tokens=9, do_sample=False)
        assert torch.equal(got, generated(model, ids).sequences)
        turn.commit(got)
        assert kv.begin("a", got).reused_tokens == 45


def test_threads() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory()
    want = generated(model, ids).sequences
    wrong: list[Any] = []

    def work(number: int) -> None:
        for turn_number in range(3):
            turn = kv.begin(f"s{number}", ids)
            got = model.generate(**turn.inputs, max_new_tokens=9, do_sample=False)
            turn.commit(got)
            if not torch.equal(got, want) or (turn_number and turn.reused_tokens != 32):
                wrong.append((number, turn.reused_tokens))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert kv.stats()["host"]["blocks"] == 6


def test_cube_reads_both_ways() -> None:
    cube = MemCube(id="a", kind="kv_cache", content=1, metadata={"x": 2})
    assert cube["content"] == cube.content == 1
    assert dict(cube)["metadata"] == {"x": 2}
    assert copy.copy(cube).id == "a"
    assert cube.get("nothing", 3) == 3
    with pytest.raises(NotFoundError, match=r"cube\['name'\]: one of id, kind, content"):
        cube["name"]
    with pytest.raises(AttributeError, match=r"cube.name: one of id, kind, content"):
        _ = cube.name
    with pytest.raises(AttributeError):
        cube.id = "b"  # type: ignore[misc]


def test_names_load_nothing_heavy() -> None:
    code = (
        "import sys, memos, memos.memories, memos.kv, memos.cube; memos.KVCacheMemory; "
        "memos.MemCube; print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "[]"


@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_real_model(codec: str, tmp_path: Path) -> None:
    """SmolLM2-135M, bf16, two memories: raw computes as without reuse, int4 stores less."""
    model, tokenizer = smollm2()
    text = Path(__file__).with_name("models.py").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :150]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    made: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "codec": codec}
    with KVCacheMemory("chat", path=tmp_path, **made) as kv:
        turn = kv.begin("a", ids)
        output = model.generate(**turn.inputs, **options)
        turn.commit(output)
        assert turn.stored_tokens == 153
        ratio = turn.stored_bytes / turn.raw_bytes
        assert ratio == 1 if codec == "raw" else ratio < 0.5
    with KVCacheMemory("chat", path=tmp_path, **made) as kv:
        longer = torch.cat([output, ids[:, 20:30]], dim=1)
        turn = kv.begin("a", longer)
        again = kv.begin("b", longer)
        assert (turn.reused_tokens, again.reused_tokens) == (153, 128)
        got = model.generate(**turn.inputs, **options)
        turn.commit(got)
        assert turn.stored_tokens == longer.shape[1] + 3
    if codec == "raw":
        with torch.no_grad():  # bf16: another split of the prompt rounds otherwise
            want = model(longer, logits_to_keep=1).logits.float()
            fed = longer[:, again.reused_tokens :]
            logits = model(fed, past_key_values=again.cache, logits_to_keep=1).logits.float()
        torch.testing.assert_close(logits, want, rtol=0, atol=0.75)
