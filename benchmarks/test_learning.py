"""What it takes to learn 30 facts by heart, with and without the guard.

SmolLM2-135M-Instruct learns facts about made-up people and products (facts.json), everything as
``learn`` does it by default. All answers are greedy, without the facts in the prompt; right is one
that contains the gold answer. ``recall`` is of the wordings that ``learn`` keeps out of training;
``recall_reworded`` of two questions a fact written by hand, most of them far from any template,
asked through a ParametricMemory under the model. ``anchor_kl`` is KL(base || adapted) on prompts
kept out of training, on the base model's own words, in nats per token. ``old_fact_drop`` is by how
much the accuracy on questions of general knowledge fell that were kept out of training;
``old_facts_lost`` the share lost of those that the base model answers rightly.

The second case is the same run without the KL to the base model in its loss.
"""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the model is a torch model")

from benchmarks import model as real  # noqa: E402
from memos import MOS, MemCube, ParametricMemory  # noqa: E402

FACTS = Path(__file__).parent / "facts.json"
CASES = {"guarded": {}, "without the guard": {"kl_weight": 0.0}}


def recall_reworded(adapter: Any, model: Any, tokenizer: Any, facts: list[Any]) -> float:
    """Share of the questions written by hand that the model with this adapter answers rightly."""
    from memos.adapters.learning.batch import Encoder
    from memos.adapters.learning.gate import contains

    encoder = Encoder(tokenizer)
    memory = MOS().register_memory(ParametricMemory("skills", embedder=None)).attach(model)
    memory.add(adapter, {"name": "learnt"})
    right = []
    with memory.use("learnt"), torch.inference_mode():
        for fact in facts:
            for question in fact["questions"]:
                ids = torch.tensor([encoder.prompt(question, True)])
                made = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
                )
                answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
                right.append(contains(answer, fact["answer"]))
                if not right[-1]:
                    print(question, fact["answer"], answer, sep=" | ")
    memory.detach()
    return sum(right) / len(right)


@pytest.mark.parametrize("case", CASES)
def test_learning(benchmark: Any, case: str) -> None:
    if (why := real.missing()) is not None:
        pytest.skip(why)
    if importlib.util.find_spec("peft") is None:
        pytest.skip("learning needs a package: pip install 'memos-native[adapters]'")
    from memos.adapters.learning.learn import Learnt, learn

    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    cubes = [MemCube(f"fact-{i}", "text", fact["statement"]) for i, fact in enumerate(facts)]
    model, tokenizer = real.load_model("bfloat16"), real.load_tokenizer()

    def run() -> Learnt:
        return learn(cubes, model, tokenizer, **CASES[case])

    cpu_s = time.process_time()
    learnt = benchmark.pedantic(run, rounds=1)
    report = learnt.report
    cpu_s = time.process_time() - cpu_s
    figures = asdict(report.figures)
    benchmark.extra_info.update(
        case=case, facts=len(facts), accepted=report.accepted, minutes=report.minutes,
        cpu_minutes=cpu_s / 60, threads=torch.get_num_threads(), steps=report.steps,
        stopped=report.stopped, old_fact_drop=report.figures.old_fact_drop,
        recall_reworded=recall_reworded(learnt.adapter, model, tokenizer, facts), **figures,
    )  # fmt: skip
    print(report)
    for mistake in (*report.wrong, *report.lost):
        print(*mistake, sep=" | ")
