"""Access to what a model uses: sessions of caches, and adapters."""

from __future__ import annotations

from typing import Any

import pytest

from memos import MOS, KVCacheMemory, ParametricMemory
from memos.errors import AccessError, NotFoundError
from tests.models import tiny

torch = pytest.importorskip("torch")

ANN, BOB, EVE = "user:ann", "user:bob", "user:eve"


def ids_of(seed: int, length: int = 90) -> Any:
    return torch.randint(0, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def content(ids: Any) -> dict[str, Any]:
    from transformers import DynamicCache

    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return {"token_ids": ids[0], "cache": cache}


@pytest.fixture
def chats() -> MOS:
    mos = MOS()
    kv = KVCacheMemory("chats", model=tiny("llama"), codec="raw", block_tokens=16)
    mos.register_memory(kv)
    mos.add("chats", content(ids_of(1)), {"user_id": "ann"}, id="open")
    mos.add("chats", content(ids_of(2)), {"user_id": "ann"}, id="hidden", acl={"read": [EVE]})
    return mos


def test_sessions(chats: MOS) -> None:
    ann, eve = chats.as_principal(ANN), chats.as_principal(EVE)
    assert ann.memories == {}
    assert ann.stats() == {"memories": {}}
    chats.grant(ANN, "read", "chats")
    mine = ann.memory("chats")
    for view in (ann, mine):
        where = ("chats",) if view is ann else ()
        assert [cube.id for cube in view.retrieve(*where, "user:ann")] == ["open"]
        assert view.retrieve(*where, "session:hidden") == []
        assert view.retrieve(*where, ids_of(2)[0].tolist()) == []
        assert view.retrieve(*where, ids_of(1)[0].tolist())[0].metadata["tokens"] > 0
    assert mine.sessions() == ["open"]
    assert not mine.has("hidden")
    assert mine.stats() == {"sessions": 1}
    for call in (mine.get, mine.history, mine.delete, mine.pin):
        with pytest.raises(NotFoundError):
            call("hidden")
    for call in (mine.delete, mine.pin, lambda id: mine.update(id, metadata={"a": 1})):
        with pytest.raises(AccessError):
            call("open")
    with pytest.raises(AccessError):
        mine.add(content(ids_of(3)))
    with pytest.raises(AccessError):
        mine.begin("new", ids_of(1))
    with pytest.raises(NotFoundError):
        mine.begin("hidden", ids_of(2))
    # What was listed on one session alone.
    assert list(eve.memories) == ["chats"]
    assert eve.memory("chats").sessions() == ["hidden"]
    assert eve.get("hidden").acl is None
    with pytest.raises(NotFoundError):
        eve.get("open")


def test_a_turn_restores_what_may_be_read(chats: MOS) -> None:
    chats.grant(ANN, ["read", "write"], "chats")
    mine = chats.as_principal(ANN).memory("chats")
    owner = chats.memory("chats")
    prompt = torch.cat([ids_of(2), ids_of(5, 10)], dim=1)
    assert owner.begin("o", prompt).reused_tokens >= 80
    assert mine.begin("a", prompt).reused_tokens == 0
    prompt = torch.cat([ids_of(1), ids_of(5, 10)], dim=1)
    turn = mine.begin("a", prompt, acl={"admin": [ANN]})
    assert turn.reused_tokens >= 80
    with torch.no_grad():
        output = tiny("llama").generate(**turn.inputs, max_new_tokens=2, do_sample=False)
    turn.commit(output, metadata={"kv_acl": None, "seen": 1})
    assert chats.memory("chats").list_of("a") == {"admin": [ANN]}
    assert mine.get("a").acl == {"admin": [ANN]}
    assert mine.get("a").metadata["seen"] == 1
    chats.grant(BOB, ["read", "write"], "chats")
    bob = chats.as_principal(BOB).memory("chats")
    with pytest.raises(NotFoundError):
        bob.get("a")
    chats.as_principal(ANN).grant(BOB, "read", id="a")
    assert bob.get("a").id == "a"
    with pytest.raises(AccessError):
        bob.begin("a", prompt)
    chats.as_principal(ANN).revoke(BOB, "read", id="a")
    assert not bob.has("a")
    made = bob.add(content(ids_of(7)), id="b")
    assert made.id == "b"
    bob.delete("b")


def adapter(seed: int) -> Any:
    from memos.adapters.adapter import Adapter, Factors

    model, factors = tiny("llama"), {}
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            out, into = module.weight.shape
            down = torch.randn(into, 2, generator=generator)
            up = torch.randn(2, out, generator=generator)
            factors[name] = Factors(down.T.contiguous(), up.T.contiguous(), 0.5)
    return Adapter(factors, {"peft_type": "LORA"})


def test_adapters(tmp_path: Any) -> None:
    mos = MOS(tmp_path / "m", audit=True)
    skills = mos.register_memory(ParametricMemory("skills", embedder=None))
    mos.add("skills", adapter(1), {"name": "open"})
    mos.add("skills", adapter(2), {"name": "hidden"}, acl={"read": [EVE]})
    mos.grant(ANN, "read", "skills")
    ann, eve = mos.as_principal(ANN), mos.as_principal(EVE)
    mine = ann.memory("skills")
    from tests.models import build

    model = build("llama")
    skills.attach(model)
    ids = ids_of(1, 8)

    def logits() -> Any:
        with torch.no_grad():
            return model(ids).logits

    base = logits()
    with skills.use("hidden"):
        hidden = logits()
    assert not torch.equal(base, hidden)
    with mine.use("open"):
        assert not torch.equal(logits(), base)
    assert torch.equal(logits(), base)
    for call in (
        lambda: mine.use("hidden").__enter__(),
        lambda: mine.use_batch(["open", "hidden"]).__enter__(),
        lambda: mine.prefetch("hidden"),
        lambda: mine.pin("hidden"),
        lambda: mine.adapter("hidden"),
        lambda: mine.named("hidden"),
        lambda: mine.export("hidden", tmp_path / "out"),
        lambda: mine.combine(["open", "hidden"], name="both"),
        lambda: mine.merge_into_base("hidden"),
        lambda: ann.get(skills.named("hidden").id),
    ):
        with pytest.raises(NotFoundError):
            call()
    assert torch.equal(logits(), base)
    with pytest.raises(AccessError):
        mine.pin("open")
    with pytest.raises(AccessError):
        mine.combine(["open"], name="mine")
    with pytest.raises(AccessError):
        mine.detach  # noqa: B018
    assert set(mine.stats()) == {"cubes", "vectors"}
    assert mine.stats()["cubes"] == 1
    with eve.memory("skills").use("hidden"):
        assert torch.equal(logits(), hidden)
    uses = [(r.who, [c[1] for c in r.cubes]) for r in mos.audit.records() if r.what == "use"]
    names = {skills.named(name).id: name for name in ("open", "hidden")}
    told = [(who, [names[id] for id in ids]) for who, ids in uses if ids]
    assert (ANN, ["open"]) in told
    assert (EVE, ["hidden"]) in told
    assert (ANN, ["hidden"]) not in told
    # A right that is taken holds at once, also for what was looked up before.
    mos.revoke(ANN, "read", "skills")
    with pytest.raises(NotFoundError):
        mine.use("open").__enter__()
    mos.close()
