"""Token ids of rows, and batches of them without padding: one sequence, one mask.

Rows that begin alike (the system prompt of a chat) share that beginning: it is computed once. The
mask lets a token see the beginning it belongs to and its own row, so every row has the logits that
it has alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from memos.errors import ArgumentError

LONGEST = 2048  # tokens of a row
_ALIKE = 4  # tokens that rows have to share before a common beginning is looked for
_MARK = "Zq7"


@dataclass(frozen=True)
class Item:
    """Token ids of one row; what stands from ``start`` on is its target."""

    ids: tuple[int, ...]
    start: int

    @property
    def num_targets(self) -> int:
        return len(self.ids) - self.start


class Encoder:
    """Rows as token ids, in the form the tokenizer's chat template has; without one as plain text.

    Raises:
        ArgumentError: what came is no tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
            raise ArgumentError(
                f"tokenizer: a tokenizer of transformers wanted, got {type(tokenizer).__name__}"
            )
        self.tokenizer = tokenizer
        self.has_chat = bool(getattr(tokenizer, "chat_template", None))

    def prompt(self, text: str, is_chat: bool) -> list[int]:
        """What stands before the answer."""
        if is_chat and self.has_chat:
            return self._ids(self._chat(text), special=False)
        return self._ids(f"Question: {text}\nAnswer:" if is_chat else text, special=True)

    def item(self, prompt: str, answer: str, is_chat: bool) -> Item:
        """A prompt with the answer that is its target.

        Raises:
            ArgumentError: more than 2,048 tokens, or none to learn.
        """
        if is_chat and self.has_chat:
            head = self.prompt(prompt, True)
            ids = [*head, *self._ids(answer, special=False), *self._turn_end]
            start = len(head)
        else:
            text = f"Question: {prompt}\nAnswer:" if is_chat else prompt
            head = self._ids(text, special=True)
            tail = f" {answer.lstrip()}"
            ids = self._ids(text + tail, special=True)
            both = zip(head, ids, strict=False)
            start = next((i for i, (a, b) in enumerate(both) if a != b), min(len(head), len(ids)))
            end = getattr(self.tokenizer, "eos_token_id", None)
            if is_chat and end is not None:
                ids = [*ids, int(end)]
        if not 0 < start < len(ids):
            raise ArgumentError(f"a row with a prompt and an answer wanted, got {prompt!r}")
        if len(ids) > LONGEST:
            raise ArgumentError(
                f"rows of at most {LONGEST} tokens wanted, got {len(ids)}: {prompt[:60]!r}"
            )
        return Item(tuple(ids), start)

    def continued(self, prompt: Sequence[int], answer: Sequence[int]) -> Item:
        """A prompt of ids with ids that go on."""
        return Item((*prompt, *answer), len(prompt))

    @cached_property
    def _turn_end(self) -> list[int]:
        """What the template puts after an answer, up to the first special token."""
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}]
        whole = self.tokenizer.apply_chat_template(turns, tokenize=False)
        ids = self._ids(whole.rpartition(_MARK)[2], special=False)
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        for i, token in enumerate(ids):
            if token in special:
                return ids[: i + 1]
        end = getattr(self.tokenizer, "eos_token_id", None)
        return [] if end is None else [int(end)]

    def _chat(self, text: str) -> str:
        turns = [{"role": "user", "content": text}]
        made: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return made

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return [int(i) for i in ids]


class Batch:
    """Rows packed into one sequence.

    Attributes:
        targets: [n] int64, the target tokens of all rows, in the order of ``items``.
        lengths: how many of them each row has.
    """

    def __init__(self, items: Sequence[Item], device: torch.device, dtype: torch.dtype) -> None:
        ids: list[int] = []
        positions: list[int] = []
        group_of: list[int] = []
        row_of: list[int] = []
        keep: list[list[int]] = [[] for _ in items]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(item.ids[: min(_ALIKE, item.start)], []).append(i)
        for group, members in enumerate(groups.values()):
            shared = _num_shared([items[i] for i in members]) if len(members) > 1 else 0
            first = items[members[0]].ids[:shared]
            for row, part, begin in [
                (-1, first, 0),
                *((i, items[i].ids[shared:], shared) for i in members),
            ]:
                offset = len(ids)
                ids += part
                positions += range(begin, begin + len(part))
                group_of += [group] * len(part)
                row_of += [row] * len(part)
                if row >= 0:
                    # The logits before a token predict it.
                    at = items[row].start - shared - 1 + offset
                    keep[row] = list(range(at, at + items[row].num_targets))
        self.ids = torch.tensor([ids], device=device)
        self.positions = torch.tensor([positions], device=device)
        self.keep = torch.tensor([i for row in keep for i in row], device=device)
        self.lengths = [len(row) for row in keep]
        flat = [token for item in items for token in item.ids[item.start :]]
        self.targets = torch.tensor(flat, device=device)
        groups_, rows = (torch.tensor(x, device=device) for x in (group_of, row_of))
        order = torch.arange(len(ids), device=device)
        seen = (order[:, None] >= order) & (groups_[:, None] == groups_)
        seen &= (rows[:, None] == rows) | (rows == -1)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        self.mask = mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]

    def logits(self, model: Any) -> torch.Tensor:
        """[n, vocabulary] float32: what the model says before each target token."""
        options: dict[str, Any] = {
            "input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions,
            "use_cache": False,
        }  # fmt: skip
        if _keeps_some(type(model)):
            out: torch.Tensor = model(**options, logits_to_keep=self.keep).logits[0]
            return out.float()
        out = model(**options).logits[0]
        return out[self.keep].float()


def _num_shared(items: Sequence[Item]) -> int:
    """Tokens with which all begin, each keeping at least the last one of its prompt."""
    most = min(item.start for item in items) - 1
    first = items[0].ids
    for i in range(most):
        if any(item.ids[i] != first[i] for item in items):
            return i
    return max(0, most)


def _keeps_some(kind: type) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
