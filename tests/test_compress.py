"""Sessions that are encoded again by a smaller codec: values, keys, what stays, what goes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest

torch = pytest.importorskip("torch", reason="caches are of torch models")
pytest.importorskip("transformers", reason="caches are of transformers models")

from hypothesis import given, settings  # noqa: E402

from memos import MOS  # noqa: E402
from memos.errors import (  # noqa: E402
    AccessError,
    ArgumentError,
    NotFoundError,
    QuotaError,
    StoreError,
)
from memos.kv.cache import common_prefix  # noqa: E402
from memos.kv.recompress import compress  # noqa: E402
from memos.memories.kv_cache import KVCacheMemory  # noqa: E402

from .compress_help import dense, once_more, same  # noqa: E402
from .models import build, prompt, tiny  # noqa: E402
from .turns import P, S, fill, memory, run  # noqa: E402

HOT, COLD = "int8-g32", "int4-g32"


def chat(**options: Any) -> KVCacheMemory:
    return memory(tiny("llama"), HOT, **{"cold_codec": COLD, **options})


def is_cold(kv: KVCacheMemory, session: str = "a") -> bool:
    found = kv.tenant.session(session)
    assert found is not None
    assert kv.cold_identity is not None
    if found.identity == kv.cold_identity.digest:
        return True
    assert found.identity == kv.identity.digest
    return False


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("hot", "cold"), [("raw", "int8-g32"), (HOT, COLD), ("fp8-g32", "k:int4-g32-rot,v:int2-g32")]
)
def test_the_values_are_those_of_the_smaller_codec(name: str, hot: str, cold: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    kv = memory(model, hot, cold_codec=cold)
    output = fill(kv, model, prompt(60))
    before, figures = dense(kv.get("a").content), kv.get("a").metadata
    session = kv.tenant.session("a")
    held = kv.store.held()["host"]
    saved = kv.compress("a")
    assert saved == held - kv.store.held()["host"] > 0
    assert kv.compress("a") == 0
    cube = kv.get("a")
    assert cube.content.codec.name == cold
    assert same(dense(cube.content), once_more(before, cold, P, S))
    assert cube.metadata["tokens"] == figures["tokens"]
    assert cube.metadata["stored_bytes"] == figures["stored_bytes"] - saved
    now = kv.tenant.session("a")
    assert (now.token_ids, now.metadata) == (session.token_ids, session.metadata)
    assert (now.created_at, now.updated_at) == (session.created_at, session.updated_at)
    # It goes on in the smaller codec, whole.
    turn = kv.begin("a", output)
    assert turn.reused_tokens == figures["tokens"]
    turn.commit(run(model, turn))
    assert is_cold(kv)
    assert turn.stored_tokens == output.shape[1] + 8
    assert turn.stored_bytes == kv.get("a").metadata["stored_bytes"]
    assert kv.retrieve(output[0].tolist())[0].content.codec.name == cold
    kv.delete("a")
    assert kv.store.held()["host"] == 0


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="cold_codec: one that makes blocks smaller"):
        chat(cold_codec="raw")
    with pytest.raises(ArgumentError, match="cold_codec"):
        chat(cold_codec=HOT)
    with pytest.raises(ArgumentError, match="codec"):
        chat(cold_codec="mp3")
    kv = memory(tiny("llama"), HOT)
    fill(kv, tiny("llama"), prompt(20))
    with pytest.raises(ArgumentError, match="made with cold_codec="):
        kv.compress("a")
    assert kv.cold_identity is None
    kv = chat()
    with pytest.raises(NotFoundError):
        kv.compress("a")
    kv.tenant.save_session(_empty(kv))
    assert kv.compress("empty") == 0


def _empty(kv: KVCacheMemory) -> Any:
    from memos.kv import Session

    return Session("empty", [], kv.identity.digest, [])


@pytest.mark.parametrize("key", [None, bytes(range(32))])
def test_what_belongs_to_the_session_stays(key: bytes | None, tmp_path: Path) -> None:
    """Times, pin, and the time to live of every block; also where all is encrypted."""
    if key is not None:
        pytest.importorskip("cryptography")
    now = [1000.0]
    kv = chat(path=tmp_path, ttl_s=50.0, clock=lambda: now[0], encryption_key=key)
    output = fill(kv, tiny("llama"), prompt(30))
    now[0] += 20.0
    turn = kv.begin("a", output)
    turn.commit(run(tiny("llama"), turn))
    kv.pin("a")
    before = kv.tenant.session("a")
    ends = list(kv.tenant.expiries(before.keys).values())
    assert len(set(ends)) == 2
    kv.compress("a")
    after = kv.tenant.session("a")
    assert after.expires_at == before.expires_at
    assert after.pinned
    assert list(kv.tenant.expiries(after.keys).values()) == ends
    assert kv.tenant.pinned_keys() == set(after.keys)
    kv.close()


def test_shared_blocks_stay_for_others() -> None:
    kv, model = chat(), tiny("llama")
    start = prompt(3 * P)
    for seed, name in ((5, "a"), (6, "b")):
        fill(kv, model, torch.cat([start, prompt(20, seed=seed)], 1), name)
    keys = kv.tenant.session("b").keys
    before, figures = dense(kv.get("b").content), kv.get("b").metadata
    held = kv.store.held()["host"]
    assert kv.compress("a") == held - kv.store.held()["host"]
    assert kv.tenant.contains(keys) == len(keys)
    assert same(dense(kv.get("b").content), before)
    assert kv.get("b").metadata == figures
    # A new session takes what has more tokens, and never some of each.
    longer = torch.cat([start, prompt(20, seed=5), prompt(4)], 1)
    turn = kv.begin("new", longer)
    assert turn.cache.codec.name == COLD
    assert turn.reused_tokens == (3 * P + 20) // P * P
    assert kv.begin("new", start).cache.codec.name == HOT, "of equal many the main one"
    assert kv.begin("a", start).cache.codec.name == COLD, "or that of the session"
    held = kv.store.held()["host"]
    assert kv.compress("b") == held - kv.store.held()["host"]
    kv.delete("a")
    kv.delete("b")
    assert kv.store.held()["host"] == 0


def test_a_turn_that_began_before_goes_back() -> None:
    """It holds the old blocks: its commit stores them, and nothing of the others stays."""
    kv, model = chat(), tiny("llama")
    output = fill(kv, model, prompt(40))
    turn = kv.begin("a", output)
    kv.compress("a")
    turn.commit(run(model, turn))
    assert not is_cold(kv)
    assert kv.get("a").metadata["tokens"] == turn.stored_tokens == output.shape[1] + 8
    assert kv.store.held()["host"] == turn.stored_bytes
    kv.compress("a")
    kv.update("a", kv.get("a").content, {"n": 1})
    assert is_cold(kv)
    kv.add(kv.get("a").content, id="copy")
    assert is_cold(kv, "copy")


class Cut:
    """Cancels at the n-th look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __call__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("kept", [False, True])
def test_what_fails_or_is_cancelled_has_not_been(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memos.kv.recompress._AT_ONCE", 1)  # block by block
    kv, model = chat(path=tmp_path if kept else None), tiny("llama")
    fill(kv, model, prompt(60))
    before, session = dense(kv.get("a").content), kv.tenant.session("a")
    held = kv.store.stats()["disk" if kept else "host"]["blocks"]
    for looks in range(len(session.keys)):
        assert kv.compress("a", cancelled=Cut(looks)) == 0
        assert kv.tenant.session("a") == session
        assert kv.store.stats()["disk" if kept else "host"]["blocks"] == held
    size = kv.store.held()["disk" if kept else "host"]
    monkeypatch.undo()  # all at once: the first blocks fit, and are stored
    kv.pin("a")
    session = kv.tenant.session("a")
    kv.store.set_quotas(**{"disk_bytes" if kept else "host_bytes": size + 5000})
    with pytest.raises((QuotaError, StoreError)):
        kv.compress("a")
    assert kv.tenant.session("a") == session
    assert kv.store.stats()["disk" if kept else "host"]["blocks"] == held
    kv.pin("a", False)
    with pytest.raises((QuotaError, StoreError)):  # nor does it push out what it reads
        kv.compress("a")
    assert same(dense(kv.get("a").content), before)
    kv.store.set_quotas(**{"disk_bytes" if kept else "host_bytes": 1 << 24})
    assert kv.compress("a", cancelled=Cut(len(session.keys))) > 0
    kv.close()


def test_a_damaged_block_refuses_and_nothing_is_lost(tmp_path: Path) -> None:
    model = tiny("llama")
    with chat(path=tmp_path) as kv:
        fill(kv, model, prompt(60))
        session = kv.tenant.session("a")
        tenant = kv.tenant._state.disk
        record = tenant.records[session.keys[4]]
        where, at = record.segment.path, record.offset + 600
    data = bytearray(where.read_bytes())
    data[at] ^= 1
    where.write_bytes(data)
    with chat(path=tmp_path) as kv:
        with pytest.raises(StoreError, match="block 4 is missing or damaged"):
            kv.compress("a")
        assert kv.tenant.session("a") == session
        assert kv.store.stats()["disk"]["blocks"] == len(session.keys) - 1
        assert kv.get("a").metadata["tokens"] == 4 * P
        with pytest.raises(StoreError, match="missing or damaged"):
            kv.compress("a")


def test_a_session_that_changes_meanwhile_is_left_alone() -> None:
    kv, model = chat(), tiny("llama")
    output = fill(kv, model, prompt(40))
    made: list[int] = []

    def meanwhile() -> bool:
        if not made:
            made.append(1)
            turn = kv.begin("a", output)
            turn.commit(run(model, turn))
        return False

    with pytest.raises(StoreError, match="it changed"):
        kv.compress("a", cancelled=meanwhile)
    assert not is_cold(kv)
    assert kv.get("a").metadata["tokens"] == output.shape[1] + 8
    assert kv.store.held()["host"] == kv.get("a").metadata["stored_bytes"]
    with pytest.raises(ArgumentError, match="another model"):
        compress(kv.tenant, "a", kv.cold_identity, kv.cold_identity.__class__(**OTHER))


OTHER: dict[str, Any] = {
    "model": "ab" * 32, "num_layers": 1, "num_kv_heads": 1, "head_dim_k": 8, "head_dim_v": 8,
    "dtype": "float32", "codec": "int2",
}  # fmt: skip


def test_only_who_may_write() -> None:
    mos, kv = MOS(), chat()
    mos.register_memory(kv)
    fill(kv, tiny("llama"), prompt(40))
    kv.update("a", acl={"read": ["user:ann"], "write": ["user:bob"]})
    for who in ("user:ann", "user:bob"):
        mos.grant(who, "read", "chat")
    with pytest.raises(AccessError):
        mos.as_principal("user:ann").memory("chat").compress("a")
    with pytest.raises(NotFoundError):
        mos.as_principal("user:bob").memory("chat").compress("a")
    assert not is_cold(kv)
    kv.update("a", acl={"read": ["user:ann"], "write": ["user:ann"]})
    assert mos.as_principal("user:ann").memory("chat").compress("a") > 0
    mos.close()


def test_one_pool_for_what_is_hot() -> None:
    kv, model = chat(device_bytes=1 << 20), tiny("llama")
    outputs = {name: fill(kv, model, prompt(40, seed=i), name) for i, name in enumerate("ab")}
    kv.begin("a", outputs["a"])
    pool = kv._pools._pool
    keys = kv.tenant.session("a").keys
    assert pool.contains(keys) > 0
    kv.compress("a")
    for name in "abab":
        turn = kv.begin(name, outputs[name])
        assert turn.reused_tokens == outputs[name].shape[1] - 1
        assert kv._pools._pool is pool, "it is not made anew"
    assert pool.contains(keys) == 0, "what was given up is wiped"
    assert pool.contains(kv.tenant.session("b").keys) > 0


step = st.fixed_dictionaries(
    {
        "session": st.sampled_from("abc"),
        "keep": st.sampled_from([1.0, 1.0, 0.7, 0.3, 0.0]),
        "new": st.integers(1, 25),
        "answer": st.integers(0, 12),
        "then": st.sampled_from(["", "compress", "compress", "reopen", "delete", "fork"]),
    }
)


@functools.lru_cache(maxsize=2)
def float_model(name: str) -> Any:
    return build(name)


@settings(max_examples=25)
@given(
    name=st.sampled_from(["llama", "gemma3"]),
    hot=st.sampled_from(["raw", "int8-g32"]),
    steps=st.lists(step, min_size=2, max_size=8),
)
def test_histories(name: str, hot: str, steps: list[dict[str, Any]]) -> None:
    """Beside a dict of what each session says: what is reused begins it, and all of it is reused
    that was stored; values are those of the model, as near as the codecs are."""
    model, texts, stored = float_model(name), dict[str, list[int]](), dict[str, list[int]]()
    seed = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, 4, (count,), generator=seed).tolist()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():

        def opened() -> KVCacheMemory:
            return memory(model, hot, cold_codec="int8-g32" if hot == "raw" else COLD, path=folder,
                          durable=False)  # fmt: skip

        kv = opened()
        for one in steps:
            session = one["session"]
            text = texts.get(session, [])
            ids = text[: int(len(text) * one["keep"])] + tokens(one["new"])
            turn = kv.begin(session, ids)
            text = stored.get(session, [])
            shared = common_prefix(text, ids)
            assert turn.reused_tokens >= min(shared // P * P, len(ids) - 1)
            assert turn.reused_tokens >= (shared if shared == len(text) < len(ids) else 0)
            cache = turn.cache
            assert cache.token_ids[: turn.reused_tokens] == ids[: turn.reused_tokens]
            if turn.reused_tokens and hot == "raw":
                exact = model(torch.tensor([ids[: turn.reused_tokens]]), use_cache=True)
                for layer, (k, v) in zip(exact.past_key_values.layers, dense(cache), strict=True):
                    for got, want in ((k, layer.keys), (v, layer.values)):
                        n = want.shape[2]  # a sliding layer keeps its window only
                        torch.testing.assert_close(got[:, :, -n:], want, rtol=0.05, atol=0.3)
            answer = tokens(one["answer"])
            model(torch.tensor([ids[turn.reused_tokens :]]), past_key_values=cache)
            for token in answer:
                model(torch.tensor([[token]]), past_key_values=cache)
            turn.commit([*ids, *answer, 5])
            texts[session] = stored[session] = [*ids, *answer]
            assert turn.stored_tokens == len(texts[session])
            match one["then"]:
                case "compress":
                    before, was = dense(kv.get(session).content), is_cold(kv, session)
                    kv.compress(session)
                    assert is_cold(kv, session)
                    codec = kv.cold_identity.codec
                    wanted = before if was else once_more(before, codec, P, S)
                    assert same(dense(kv.get(session).content), wanted)
                case "reopen":
                    kv.close()
                    kv = opened()
                case "delete":
                    kv.delete(session)
                    del stored[session]
                case "fork":
                    texts["abc"["cab".index(session)]] = texts[session]
            assert set(kv.sessions()) == set(stored)
            for other, said in stored.items():
                found = kv.tenant.session(other)
                assert found.token_ids == said
                assert kv.tenant.contains(found.keys) == len(found.keys)
        kv.close()
