"""What is asked before and after: new facts, old facts and anchors, by greedy decoding and KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memos.adapters.learning.batch import Batch, Encoder, Item
from memos.adapters.learning.gate import contains
from memos.adapters.learning.rows import Question
from memos.adapters.learning.targets import batches
from memos.adapters.learning.view import LoraView

_ROWS = 64  # answered at once


@dataclass(frozen=True)
class Asked:
    """Answers to questions, and which of them are right."""

    ids: tuple[list[int], ...]
    answers: tuple[str, ...]
    right: tuple[bool, ...]

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right) if self.right else 0.0


@torch.no_grad()
def continue_all(view: LoraView, encoder: Encoder, prompts: Sequence[Sequence[int]],
                 num_tokens: int) -> list[list[int]]:  # fmt: skip
    """Up to num_tokens token ids that follow each prompt by greedy decoding, the end included."""
    from transformers import GenerationConfig

    own = view.model.generation_config
    ends = own.eos_token_id
    if ends is None:
        ends = getattr(encoder.tokenizer, "eos_token_id", None)
    stops = set() if ends is None else set(ends) if isinstance(ends, list) else {int(ends)}
    pad = getattr(encoder.tokenizer, "pad_token_id", None)
    pad = next((p for p in (pad, own.pad_token_id, *sorted(stops)) if p is not None), 0)
    config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, num_beams=1, pad_token_id=pad,
        eos_token_id=sorted(stops) or None, use_cache=True,
    )  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[list[int]] = [[] for _ in prompts]
    for lo in range(0, len(order), _ROWS):
        numbers = order[lo : lo + _ROWS]
        width = max(len(prompts[i]) for i in numbers)
        ids = torch.full((len(numbers), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(numbers):
            ids[row, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[row, width - len(prompts[i]) :] = 1
        made = view.model.generate(
            ids.to(view.device), attention_mask=mask.to(view.device), generation_config=config
        )
        for i, new in zip(numbers, made[:, width:].tolist(), strict=True):
            end = next((k + 1 for k, token in enumerate(new) if token in stops), len(new))
            found[i] = new[:end]
    return found


def ask(view: LoraView, encoder: Encoder, questions: Sequence[str],
        wanted: Sequence[str | Sequence[str]], num_tokens: int = 32) -> Asked:  # fmt: skip
    """The model's answers; right is one that contains what is wanted."""
    prompts = [encoder.prompt(question, True) for question in questions]
    ids = continue_all(view, encoder, prompts, num_tokens)
    answers = [encoder.tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]
    right = [contains(a, w) for a, w in zip(answers, wanted, strict=True)]
    return Asked(tuple(ids), tuple(answers), tuple(right))


def ask_all(view: LoraView, encoder: Encoder, questions: Sequence[Question]) -> Asked:
    """Answers to questions about the new facts."""
    return ask(view, encoder, [q.question for q in questions], [q.answer for q in questions])


@torch.no_grad()
def divergence(view: LoraView, items: Sequence[Item]) -> tuple[float, int]:
    """Mean KL(base || adapted) over the targets of items, in nats, and how many targets."""
    total, count = 0.0, 0
    for numbers in batches(items):
        batch = Batch([items[i] for i in numbers], view.device, view.dtype)
        adapted = batch.logits(view.model).log_softmax(-1)
        with view.base():
            base = batch.logits(view.model).log_softmax(-1)
        total += float((base.exp() * (base - adapted)).sum(-1).double().sum())
        count += len(base)
    return (total / count if count else 0.0), count
