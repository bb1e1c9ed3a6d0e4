"""Contexts as KV: what is activated costs no prefill, is never stale, and is nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models are torch models")
pytest.importorskip("transformers", reason="the models are those of transformers")

from memos import MOS, GeneralTextMemory, KVCacheMemory  # noqa: E402
from memos.errors import AccessError, ArgumentError, NotFoundError  # noqa: E402

from . import models  # noqa: E402
from .test_compose import Counted, Words, last_logits, prefilled  # noqa: E402

NOTES = {
    "a": "The boiler in the cellar is serviced by Weber every autumn.",
    "b": "Weber can be reached in the morning, and not on Fridays.",
    "c": "The cat eats twice a day, at seven and at six.",
}
QUERY = "Who services the boiler, and when can Weber be reached?"


class Tokens(Words):
    """With a chat template, as tokenizers of transformers have it."""

    chat_template = "yes"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        said = " ".join(f"{m['role']} : {m['content']}" for m in messages)
        return f"begin {said} answer :"


def kv_memory(path: Path | None, tokenizer: Any = None, **options: Any) -> KVCacheMemory:
    return KVCacheMemory(
        "kv", model=models.tiny("llama"), tokenizer=tokenizer or Words(), path=path,
        **{"codec": "raw", "block_tokens": 8, **options},
    )  # fmt: skip


@pytest.fixture
def mos(tmp_path: Path) -> Iterator[MOS]:
    with MOS(tmp_path / "m") as found, kv_memory(tmp_path / "kv") as kv:
        found.register_memory(GeneralTextMemory("notes", embedder=None))
        found.register_memory(kv)
        for id, text in NOTES.items():
            found.add("notes", text, id=id)
        yield found


def cited(context: Any) -> set[str]:
    return {citation.id for citation in context.citations}


def test_hits_that_are_activated_cost_no_prefill(mos: MOS) -> None:
    model = models.tiny("llama")
    assert mos.activate(["a", "b", "c"]) == 3
    assert mos.activate(["a", "b", "c"]) == 0
    with Counted(model) as counted:
        context = mos.context(QUERY, as_kv=True, share=0.0)
    assert {"a", "b"} <= cited(context)
    assert context.prefilled == ()
    composed = context.composed
    asked = len(composed.token_ids) - composed.pieces[-1][1]
    assert counted.tokens == asked - 1, "the question alone"
    again = mos.context(QUERY)
    assert str(context) == str(again)


def test_what_is_not_activated_is_prefilled_once(mos: MOS) -> None:
    mos.activate("a")
    context = mos.context(QUERY, as_kv=True)
    assert "b" in context.prefilled
    assert "a" not in context.prefilled
    assert mos.context(QUERY, as_kv=True).prefilled == ()


@pytest.mark.parametrize("tokenizer", [Words, Tokens])
def test_all_tokens_anew_is_a_prefill_of_the_prompt(tmp_path: Path, tokenizer: Any) -> None:
    model = models.tiny("llama")
    with MOS() as mos, kv_memory(None, tokenizer()) as kv:
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
        mos.register_memory(kv)
        for id, text in NOTES.items():
            mos.add("notes", text, id=id)
        context = mos.context(QUERY, as_kv=True, share=1.0)
    ids = context.composed.token_ids
    _, want = prefilled(model, ids)
    assert torch.allclose(last_logits(model, context.composed), want, rtol=0, atol=1e-4)
    out = model.generate(**context.inputs, max_new_tokens=4, do_sample=False)
    assert out[0, : len(ids)].tolist() == ids


def test_an_activated_cube_is_activated(mos: MOS) -> None:
    """By use, along the table of states."""
    assert mos.get("c").state == "CREATED"
    mos.activate("c")
    mos.records.uses.write()
    assert mos.get("c").state == "ACTIVATED"
    assert [move.new for move in mos.transitions("c")] == ["ACTIVATED"]


def test_another_content_is_never_answered_from_the_old(mos: MOS) -> None:
    kv = mos.memory("kv")
    mos.activate(["a", "b", "c"])
    mos.update("notes", "b", "Weber can be reached in the evening.")
    context = mos.context(QUERY, as_kv=True)
    assert context.prefilled == ("b",)
    tokens = kv.tokens_of("Weber can be reached in the evening.\n")
    spans = [context.composed.token_ids[a:b] for a, b in context.composed.pieces]
    assert tokens in spans
    mos.activate(["a", "b", "c"])
    assert len(kv._pieces_tenant().sessions(cube="b")) == 1, "the KV of the old content is gone"


def test_another_system_prompt_is_another_piece(mos: MOS) -> None:
    mos.activate(["a", "b", "c"])
    context = mos.context(QUERY, as_kv=True, system="Be brief.")
    assert set(context.prefilled) == cited(context)


def test_another_model_never_gets_it(tmp_path: Path) -> None:
    for seed in (0, 1):
        model = models.build("llama", seed=seed)
        with (
            MOS() as mos,
            KVCacheMemory("kv", model=model, tokenizer=Words(), path=tmp_path, codec="raw") as kv,
        ):
            mos.register_memory(GeneralTextMemory("notes", embedder=None))
            mos.register_memory(kv)
            mos.add("notes", NOTES["a"], id="a")
            assert mos.activate("a") == 1


def test_it_survives_a_restart(tmp_path: Path) -> None:
    for made in (3, 0):
        with MOS(tmp_path / "m") as mos, kv_memory(tmp_path / "kv") as kv:
            mos.register_memory(GeneralTextMemory("notes", embedder=None))
            mos.register_memory(kv)
            for id, text in NOTES.items():
                if made:
                    mos.add("notes", text, id=id)
            assert mos.activate(list(NOTES)) == made


def test_a_purge_takes_the_kv_with_it(mos: MOS) -> None:
    kv = mos.memory("kv")
    mos.activate(["a", "b"])
    mos.delete("notes", "a")
    assert "a" not in cited(mos.context(QUERY, as_kv=True))
    mos.purge("a", "notes")
    assert ("notes", "a") not in kv.activated()
    assert ("notes", "b") in kv.activated()
    mos.purge(memory="kv")
    assert kv.activated() == []


def test_rights_hold(mos: MOS) -> None:
    """A principal gets what it may read, and no KV of what it may not."""
    mos.activate(["a", "b", "c"])
    kv = mos.memory("kv")
    tutor = mos.as_principal("agent:tutor")
    mos.grant("agent:tutor", "read", "notes", id="b")
    with pytest.raises((NotFoundError, ArgumentError)):
        tutor.context(QUERY, as_kv=True)
    mos.grant("agent:tutor", "read", "kv")
    context = tutor.context(QUERY, as_kv=True)
    assert cited(context) == {"b"}
    assert len(context.composed.pieces) == 1
    ids = context.composed.token_ids
    assert ids == kv.tokens_of("Answer with the help of these memories.\n\n") + kv.tokens_of(
        NOTES["b"] + "\n"
    ) + kv.tokens_of(f"\n{QUERY}\n")
    assert tutor.memory("kv").sessions() == []
    for owners_only in (lambda: tutor.memory("kv").compose, lambda: tutor.activate):
        with pytest.raises((AccessError, AttributeError)):
            owners_only()
    mos.revoke("agent:tutor", "read", "notes", id="b")
    assert cited(tutor.context(QUERY, as_kv=True)) == set()


def test_a_reader_stores_nothing(mos: MOS) -> None:
    kv = mos.memory("kv")
    mos.grant("agent:tutor", "read", "notes")
    mos.grant("agent:tutor", "read", "kv")
    tutor = mos.as_principal("agent:tutor")
    assert tutor.context(QUERY, as_kv=True).prefilled
    assert kv.activated() == []
    mos.grant("agent:tutor", "write", "kv")
    assert tutor.context(QUERY, as_kv=True).prefilled
    assert kv.activated() != []


def test_deactivated(mos: MOS) -> None:
    mos.activate("a")
    assert mos.deactivate("a") == 1
    assert mos.deactivate("a") == 0
    assert mos.activate("a") == 1


def test_options_of_a_cache_without_one(mos: MOS) -> None:
    with pytest.raises(ArgumentError, match="as_kv=True wanted"):
        mos.context(QUERY, share=0.5)


def test_which_kv_memory(mos: MOS, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a KVCacheMemory wanted, got 'notes'"):
        mos.context(QUERY, as_kv=True, kv="notes")
    with KVCacheMemory("other", model=models.tiny("llama"), tokenizer=Words()) as other:
        mos.register_memory(other)
        with pytest.raises(ArgumentError, match="there are: kv, other"):
            mos.context(QUERY, as_kv=True)
        assert mos.context(QUERY, as_kv=True, kv="other").composed is not None
