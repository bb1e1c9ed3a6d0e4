"""Memories become an adapter: learnt, measured, refused, resumed; the model stays as it is."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="models are torch models")
pytest.importorskip("peft", reason="learning needs peft: pip install 'memos-native[adapters]'")

from memos.adapters.attach import Attachment  # noqa: E402
from memos.adapters.fingerprint import fingerprint  # noqa: E402
from memos.adapters.learning import checkpoint as checkpoints  # noqa: E402
from memos.adapters.learning.batch import Batch, Encoder, Item  # noqa: E402
from memos.adapters.learning.gate import Figures, Gate, Report  # noqa: E402
from memos.adapters.learning.learn import Learnt, learn  # noqa: E402
from memos.adapters.learning.rows import Question  # noqa: E402
from memos.adapters.learning.targets import Targets, teach  # noqa: E402
from memos.adapters.learning.train import Recipe, Step  # noqa: E402
from memos.adapters.learning.view import LoraView, shared_copy  # noqa: E402
from memos.errors import ArgumentError, StoreError  # noqa: E402

from .learning_model import FACTS, FAST, memories, model, tokenizer  # noqa: E402
from .models import build  # noqa: E402

CPU = torch.device("cpu")
LOOSE = Gate(min_recall=0, max_anchor_kl=1e9, max_old_fact_drop=1)


def run(**changes: Any) -> Learnt:
    return learn(FACTS, model(), tokenizer(), **{**FAST, **changes})


def weights(of: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}


def same(a: Learnt, b: Learnt) -> bool:
    return a.adapter.factors.keys() == b.adapter.factors.keys() and all(
        torch.equal(f.down, b.adapter.factors[n].down)
        and torch.equal(f.up, b.adapter.factors[n].up)
        for n, f in a.adapter.factors.items()
    )


@pytest.fixture(scope="module")
def guarded() -> Learnt:
    return run(budget=Gate(min_recall=0.8, max_old_fact_drop=0.05))


def test_facts_are_learnt_and_the_adapter_is_accepted(guarded: Learnt) -> None:
    report = guarded.report
    assert report.accepted, str(report)
    assert report.figures.recall_base == 0
    assert report.figures.num_old_facts >= 10
    assert report.figures.num_anchor_tokens > 0
    assert "accepted" in str(report)
    card = json.loads(json.dumps(guarded.adapter.card))
    assert card["sources"] == [cube.id for cube in FACTS]
    assert card["evaluation"]["recall"] == report.figures.recall
    assert card["recipe"]["lr"] == FAST["lr"]
    assert card["base"] == fingerprint(model(), tokenizer())


def test_without_the_guard_the_adapter_is_refused(guarded: Learnt) -> None:
    report = run(kl_weight=0).report
    assert not report.accepted
    assert any("KL(base || adapted)" in reason for reason in report.reasons)
    assert any("accuracy on old facts fell" in reason for reason in report.reasons)
    assert report.figures.anchor_kl > 10 * guarded.report.figures.anchor_kl
    assert "refused: " in str(report)


def test_the_model_is_not_changed_and_serves_meanwhile() -> None:
    live = model()
    before, modules = weights(live), [(n, id(m)) for n, m in live.named_modules()]
    grads = [p.requires_grad for p in live.parameters()]
    ids = torch.tensor([tokenizer()("Where does Bo Tamm live ?")["input_ids"]])
    logits = live(ids).logits
    seen, going = [], threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not going.is_set():
                seen.append(bool(torch.equal(live(ids).logits, logits)))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        run(max_steps=8, budget=LOOSE)
    finally:
        going.set()
        thread.join()
    assert seen
    assert all(seen)
    assert modules == [(n, id(m)) for n, m in live.named_modules()]
    assert grads == [p.requires_grad for p in live.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())


def test_adapters_attached_to_the_model_do_not_count() -> None:
    tok = tokenizer()
    bare = build("llama", vocab_size=len(tok))
    small = {**FAST, "max_steps": 4, "budget": LOOSE}
    alone = learn(FACTS[:1], bare, tok, **small)
    attachment = Attachment(bare, 1)
    try:
        assert same(alone, learn(FACTS[:1], bare, tok, **small))
        assert fingerprint(bare) == {**alone.adapter.card["base"], "tokenizer": ""}
    finally:
        attachment.detach()


def test_the_factors_are_all_there_is(guarded: Learnt) -> None:
    """base + scale * up @ down answers as the adapted model did."""
    merged = build("llama", vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=96,
                   num_hidden_layers=2)  # fmt: skip
    merged.load_state_dict(model().state_dict())
    layers = dict(merged.named_modules())
    assert len(guarded.adapter.factors) == 2 * 7
    for name, f in guarded.adapter.factors.items():
        assert f.down.shape[0] == f.up.shape[1] == FAST["rank"]
        layers[name].weight.data += f.scale * f.up @ f.down
    encoder = Encoder(tokenizer())
    prompt = encoder.prompt("Do you know where Bo Tamm lives?", True)
    new = merged.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert "Sandrel" in tokenizer().decode(new[0, len(prompt) :])
    assert guarded.adapter.config["peft_type"] == "LORA"


def test_same_seed_same_bytes_another_seed_others() -> None:
    small = {"max_steps": 6, "budget": LOOSE}
    first = run(**small)
    assert same(first, run(**small))
    assert not same(first, run(**small, seed=1))


class StopHereError(Exception):
    pass


def test_resumed_is_as_if_uninterrupted(tmp_path: Path) -> None:
    small: dict[str, Any] = {"max_steps": 14, "cooldown": 3, "budget": LOOSE}
    whole = run(**small)
    numbers = []
    ends = [7, 12]

    def stop(step: Step) -> None:
        numbers.append(step.number)
        if step.number in ends:
            ends.remove(step.number)
            raise StopHereError

    options = {**small, "checkpoint": tmp_path, "checkpoint_every": 5, "progress": stop}
    for _ in range(2):
        with pytest.raises(StopHereError):
            run(**options)
    resumed = run(**options)
    assert numbers == [*range(1, 8), *range(6, 13), *range(11, 15)]
    assert same(whole, resumed)
    assert dataclasses.replace(whole.report, minutes=0) == dataclasses.replace(
        resumed.report, minutes=0
    )


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    small: dict[str, Any] = {"max_steps": 2, "budget": LOOSE, "checkpoint": tmp_path,
                             "checkpoint_every": 1}  # fmt: skip
    run(**small)
    for other in ({"seed": 3}, {"lr": 1e-3}, {"anchors": FAST["anchors"][:8]}):
        with pytest.raises(ArgumentError, match="of other memories, another model or other"):
            run(**{**small, **other})
    with pytest.raises(ArgumentError, match="of other memories"):
        learn(FACTS[:1], model(), tokenizer(), **{**FAST, **small})
    path = tmp_path / checkpoints.NAME
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreError, match="cannot be read"):
        run(**small)
    checkpoints.forget(tmp_path)
    run(**small)
    assert [p.name for p in tmp_path.iterdir()] == [checkpoints.NAME]


def test_the_stop_rule_and_the_time_limit_end_training() -> None:
    settled = run(stop_share=0.3, stop_kl=10.0, cooldown=4, budget=LOOSE).report
    assert settled.stopped == "settled"
    assert settled.steps < FAST["max_steps"]
    assert settled.figures.p_half >= 0.3
    late = run(max_minutes=1e-9, cooldown=2, budget=LOOSE).report
    assert (late.stopped, late.steps) == ("minutes", 2)
    assert run(max_steps=3, budget=LOOSE).report.stopped == "steps"


def test_steps_follow_the_number_of_rows() -> None:
    assert Recipe().for_rows(1).max_steps == 120
    assert Recipe(rows_per_step=4).for_rows(1000).max_steps == 1000
    assert Recipe(max_steps=7).for_rows(1000).max_steps == 7


def test_questions_given_for_the_gate() -> None:
    questions = [Question("Bo Tamm , where ?", "Sandrel")]
    report = run(questions=questions, max_steps=2, budget=LOOSE).report
    assert report.figures.num_questions == 1
    assert report.wrong
    assert report.wrong[0][:2] == tuple(questions[0])
    with pytest.raises(ArgumentError, match="that no training row has"):
        run(questions=[Question("Who lives in Sandrel?", "Bo")])


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_other_architectures(name: str) -> None:
    """Without a chat template, too."""
    tok = tokenizer(with_chat=False)
    other = build(name, vocab_size=len(tok), sliding_window=64)
    other.generation_config.eos_token_id = tok.eos_token_id
    learnt = learn(FACTS[:1], other, tok, **{**FAST, "max_steps": 3, "budget": LOOSE})
    assert len(learnt.adapter.factors) == 3 * 7
    assert all(bool(f.up.any()) for f in learnt.adapter.factors.values())


def test_bf16_factors_of_a_bf16_model() -> None:
    tok = tokenizer()
    half = build("llama", vocab_size=len(tok), dtype=torch.bfloat16)
    half.generation_config.eos_token_id = tok.eos_token_id
    learnt = learn(FACTS[:1], half, tok, **{**FAST, "max_steps": 3, "budget": LOOSE})
    assert {f.down.dtype for f in learnt.adapter.factors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank: a whole number from 1"),
        ({"lr": -1.0}, "lr: above 0"),
        ({"lr": 1e30}, "lr: a lower rate than 1e\\+30 wanted; at step 2 the loss is"),
        ({"max_steps": -1}, "max_steps: a whole number from 0"),
        ({"rows_per_step": 0}, "rows_per_step: a whole number from 1"),
        ({"kl_weight": -1.0}, "kl_weight: from 0"),
        ({"stop_share": 1.5}, "stop_share"),
        ({"anchors": ["one"]}, "at least two prompts wanted, got 1"),
        ({"questions": []}, "at least one wanted, got none"),
        ({"max_minutes": 0}, "max_minutes above 0"),
        ({"colour": "red"}, "got \\['colour'\\]"),
    ],
)
def test_refused_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(**{"budget": LOOSE, "warmup": 0, **changes})


def test_refused_models() -> None:
    import peft

    tok = tokenizer()
    for wrong in (None, "a path", torch.nn.Linear(2, 2)):
        with pytest.raises(ArgumentError, match="a causal language model of transformers wanted"):
            learn(FACTS, wrong, tok, **FAST)
    with pytest.raises(ArgumentError, match="a tokenizer of transformers wanted, got NoneType"):
        learn(FACTS, model(), None, **FAST)
    injected = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules="all-linear"))
    for wrong in (injected, injected.model):
        with pytest.raises(ArgumentError, match="one with PEFT's layers"):
            learn(FACTS, wrong, tok, **FAST)
    with pytest.raises(ArgumentError, match="cubes: at least one memory"):
        learn([], model(), tok, **FAST)
    with pytest.raises(ArgumentError, match="that of m0 is empty"):
        learn(memories(""), model(), tok, **FAST)


def test_gate_reasons() -> None:
    good = Figures(recall=1.0, recall_trained=1.0, recall_base=0.0, p_half=1.0, anchor_kl=0.01,
                   stranger_kl=0.1, old_facts_base=0.8, old_facts=0.8,
                   old_facts_lost=0.0, num_questions=5, num_old_facts=5,
                   num_anchor_tokens=9)  # fmt: skip
    gate = Gate()
    assert gate.reasons(good) == []
    for change, reason in (
        ({"recall": 0.9}, "recall of the new facts is 0.900, at least 0.95"),
        ({"anchor_kl": 0.06}, "is 0.0600, at most 0.05"),
        ({"anchor_kl": float("nan")}, "is nan, at most"),
        ({"old_facts": 0.6}, "accuracy on old facts fell from 80.0% to 60.0%, by at most 2 points"),
    ):
        (found,) = gate.reasons(dataclasses.replace(good, **change))
        assert reason in found
    no_old = dataclasses.replace(good, old_facts=0.0, num_old_facts=0)
    assert gate.reasons(no_old) == []
    report = Report(good, gate, (), 3, 0.5, "settled")
    assert json.loads(json.dumps(report.as_dict()))["recall"] == 1.0
    for wrong in ({"min_recall": 2}, {"max_anchor_kl": -1.0}, {"max_old_fact_drop": -0.1}):
        with pytest.raises(ArgumentError):
            Gate(**wrong)


def random_items(seed: int, count: int) -> list[Item]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, 97, (size,), generator=generator).tolist()

    systems = [ids(5, 9), ids(5, 9), []]
    items = []
    for i in range(count):
        prompt = [*systems[i % 3], *ids(1, 7)]
        items.append(Item((*prompt, *ids(1, 6)), len(prompt)))
    return items


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("seed", range(3))
def test_a_packed_row_has_the_logits_it_has_alone(name: str, seed: int) -> None:
    tiny = shared_copy(build(name, sliding_window=64))
    items = random_items(seed, 7)
    batch = Batch(items, CPU, torch.float32)
    assert batch.ids.shape[1] < sum(len(item.ids) for item in items)
    with torch.no_grad():
        packed = batch.logits(tiny).split(batch.lengths)
        for item, got in zip(items, packed, strict=True):
            alone = tiny(torch.tensor([item.ids])).logits[0, item.start - 1 : -1]
            torch.testing.assert_close(got, alone, atol=2e-5, rtol=1e-4)
    targets = [token for item in items for token in item.ids[item.start :]]
    assert batch.targets.tolist() == targets


def test_divergence_of_a_cached_teacher() -> None:
    """With all tokens kept it is the KL divergence; with some it is no larger and 0 at itself."""
    generator = torch.Generator().manual_seed(0)
    logits, student = (3 * torch.randn(20, 97, generator=generator) for _ in range(2))
    logp, other = logits.log_softmax(-1), student.log_softmax(-1)
    exact = (logp.exp() * (logp - other)).sum(-1)
    torch.testing.assert_close(
        Targets.of(logits, 97).divergence(other), exact, atol=1e-4, rtol=1e-4
    )
    some = Targets.of(logits, 16)
    assert bool((some.divergence(other) <= exact + 1e-4).all())
    torch.testing.assert_close(some.divergence(logp), torch.zeros(20), atol=1e-5, rtol=0)
    items = random_items(0, 9)
    tiny = shared_copy(build("llama"))
    taught = teach(tiny, items, CPU, torch.float32, 4)
    assert [len(one.rest) for one in taught] == [item.num_targets for item in items]


def test_a_view_computes_what_the_model_computes() -> None:
    live = build("llama")
    live.model.layers[0].mlp.forward = None  # what an attachment might have put there
    ids = torch.tensor([[5, 6, 7]])
    view = LoraView(live.__class__(live.config), 4, 8.0, 0)
    assert len(view.layers) == 3 * 7
    del live.model.layers[0].mlp.forward
    view = LoraView(live, 4, 8.0, 0)
    with torch.no_grad():
        torch.testing.assert_close(view.model(ids).logits, live(ids).logits)
    assert not any(p.requires_grad for n, p in view.model.named_parameters() if "lora" not in n)
    assert all(p.requires_grad for p in live.parameters())


def test_fingerprints() -> None:
    tok = tokenizer()
    live = build("llama")
    first = fingerprint(live, tok)
    assert first == fingerprint(build("llama"), tok)
    assert first == fingerprint(build("llama").to(torch.bfloat16).float(), tok)
    assert first["weights"] != fingerprint(build("llama", seed=1))["weights"]
    assert first["config"] != fingerprint(build("llama", rope_theta=5e5))["config"]
    assert fingerprint(live)["tokenizer"] == ""
    assert first["tokenizer"] != fingerprint(live, tokenizer(with_chat=False))["tokenizer"]
    with torch.no_grad():
        live.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert first["weights"] != fingerprint(live, tok)["weights"]
