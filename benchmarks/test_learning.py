"""What it takes to learn 30 facts by heart, with and without the guard.

SmolLM2-135M-Instruct learns facts about made-up people and products (facts.json). ``recall`` is of
two questions a fact whose wording was written by hand and stands in no training row, answered by
greedy decoding without the facts in the prompt; right is an answer that contains the gold answer.
``anchor_kl`` is KL(base || adapted) on prompts kept out of training, on the base model's own words,
in nats per token. ``old_fact_drop`` is the share lost of the questions of general knowledge that
the base model answers rightly and that were kept out of training.

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
from memos import MemCube  # noqa: E402

FACTS = Path(__file__).parent / "facts.json"
CASES = {"guarded": {}, "without the guard": {"kl_weight": 0.0}}


@pytest.mark.parametrize("case", CASES)
def test_learning(benchmark: Any, case: str) -> None:
    if (why := real.missing()) is not None:
        pytest.skip(why)
    if importlib.util.find_spec("peft") is None:
        pytest.skip("learning needs a package: pip install 'memos-native[adapters]'")
    from memos.adapters.learning.learn import Learnt, learn
    from memos.adapters.learning.rows import Question

    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    cubes = [MemCube(f"fact-{i}", "text", fact["statement"]) for i, fact in enumerate(facts)]
    questions = [Question(q, fact["answer"]) for fact in facts for q in fact["questions"]]
    model, tokenizer = real.load_model("bfloat16"), real.load_tokenizer()

    def run() -> Learnt:
        return learn(cubes, model, tokenizer, questions=questions, **CASES[case])

    cpu_s = time.process_time()
    report = benchmark.pedantic(run, rounds=1).report
    cpu_s = time.process_time() - cpu_s
    figures = asdict(report.figures)
    benchmark.extra_info.update(
        case=case, facts=len(facts), accepted=report.accepted, minutes=report.minutes,
        cpu_minutes=cpu_s / 60, threads=torch.get_num_threads(), steps=report.steps,
        stopped=report.stopped, **figures,
    )  # fmt: skip
    print(report)
    for mistake in (*report.wrong, *report.lost):
        print(*mistake, sep=" | ")
