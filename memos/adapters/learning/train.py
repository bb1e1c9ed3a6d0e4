"""The loop: new rows learnt beside a KL to the base model on anchors, until the rows are settled.

Loss of a step, over the target tokens t of its rows and the tokens s of its anchors:

    mean_t w_t (CE_t + distil_weight KL(teacher || student)_t)
        + kl_weight mean_s KL(base || student)_s

The teacher is the base model with the memory in its prompt. ``w_t`` is lower where the token has
p > 0.5 already: greedy decoding says it then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from memos.adapters.learning import checkpoint as checkpoints
from memos.adapters.learning.batch import Batch, Item
from memos.adapters.learning.targets import Targets, batches, cat
from memos.adapters.learning.view import LoraView
from memos.errors import ArgumentError

_OF_A_STEP = 0.05  # its part in a running mean
_HALF = math.log(0.5)
Progress = Callable[["Step"], None]


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained.

    Args:
        rank, alpha:      of the factors; the scale is alpha / rank.
        lr:               of AdamW after ``warmup`` steps.
        max_steps:        the most steps; 0: four times over all rows, and at least 120.
        cooldown:         steps in which the rate falls to zero, after the stop rule or before
            ``max_steps``.
        rows_per_step, anchors_per_step: how many of them one step learns from.
        kl_weight:        of the KL to the base model on anchors; 0: no guard.
        distil_weight:    of the KL to the teacher that reads the memory.
        settled_weight:   of target tokens with p > 0.5 already.
        stop_share:       of target tokens with p > 0.5 when last seen, from which training ends.
        stop_kl:          the running mean of the anchors' KL has to be this low, too.
        K:                tokens kept of a teacher's distribution.
    """

    rank: int = 16
    alpha: float = 32.0
    lr: float = 5e-4
    max_steps: int = 0
    warmup: int = 10
    cooldown: int = 30
    rows_per_step: int = 8
    anchors_per_step: int = 6
    kl_weight: float = 6.0
    distil_weight: float = 0.5
    settled_weight: float = 0.2
    stop_share: float = 0.96
    stop_kl: float = 0.04
    clip: float = 1.0
    K: int = 64
    seed: int = 0

    def for_rows(self, count: int) -> Recipe:
        """The recipe with its number of steps, for so many rows."""
        if self.max_steps:
            return self
        return replace(self, max_steps=max(120, 4 * count // self.rows_per_step))

    def __post_init__(self) -> None:
        for name in ("rows_per_step", "anchors_per_step", "K"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ArgumentError(f"{name}: a whole number from 1 wanted, got {value!r}")
        for name in ("max_steps", "warmup", "cooldown"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ArgumentError(f"{name}: a whole number from 0 wanted, got {value!r}")
        for name in ("lr", "alpha", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ArgumentError(f"{name}: above 0 wanted, got {getattr(self, name)!r}")
        for name in ("kl_weight", "distil_weight", "settled_weight", "stop_kl"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ArgumentError(f"{name}: from 0 wanted, got {getattr(self, name)!r}")
        if not 0 < self.stop_share <= 1:
            raise ArgumentError(f"stop_share: above 0, up to 1 wanted, got {self.stop_share!r}")


@dataclass(frozen=True)
class Step:
    """What a progress callback hears after every step.

    Args:
        number:  of steps done.
        settled: share of target tokens that had p > 0.5 when they were last seen.
    """

    number: int
    max_steps: int
    loss: float
    anchor_kl: float
    settled: float


@dataclass(frozen=True)
class Ended:
    """Where training ended: why, and the share of target tokens with p > 0.5."""

    steps: int
    stopped: str
    p_half: float


class Trainer:
    """One training of one view.

    Args:
        items:    rows with what the teachers said at their targets.
        anchors:  rows that the base model wrote, with what it said there.
        identity: of memories, model and recipe: a checkpoint of another one is refused.
    """

    def __init__(self, view: LoraView, recipe: Recipe, items: Sequence[Item],
                 teachers: Sequence[Targets] | None, anchors: Sequence[Item],
                 bases: Sequence[Targets], identity: str) -> None:  # fmt: skip
        self.view, self.recipe = view, recipe
        self.items, self.teachers = items, teachers
        self.anchors, self.bases = anchors, bases
        self.identity = identity
        self.parameters = view.parameters()
        # The optimizer's own, in float32: a step may be smaller than a bfloat16 can tell.
        self.masters = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()), lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.99)
        )
        self.step = 0
        self.cooling_from: int | None = None
        self.settled = [0] * len(items)
        self.kl = 0.0  # of the anchors, a running mean
        self.seconds = 0.0
        self._orders: dict[tuple[str, int], list[int]] = {}

    def run(self, progress: Progress, folder: Path | None, every: int,
            max_seconds: float) -> Ended:  # fmt: skip
        """Train until the rows are settled, the steps are done or the time is over.

        Raises:
            ArgumentError: the loss is not finite, or the checkpoint is another training's.
            StoreError: the checkpoint cannot be written or read.
        """
        if folder is not None:
            self._resume(folder)
        begun = time.monotonic() - self.seconds
        stopped = "steps"
        while self.step < self._last_step():
            self.seconds = time.monotonic() - begun
            if self.seconds >= max_seconds and self.cooling_from is None:
                self.cooling_from, stopped = self.step, "minutes"
                continue
            progress(self._train_one())
            if self.cooling_from is None and self._is_settled():
                self.cooling_from = self.step
            self.seconds = time.monotonic() - begun
            if folder is not None and self.step % every == 0:
                self._publish(folder)
        if stopped == "steps" and self.cooling_from is not None:
            stopped = "settled"
        self.view.round()
        return Ended(self.step, stopped, self.p_half())

    def _last_step(self) -> int:
        if self.cooling_from is None:
            return self.recipe.max_steps
        return min(self.recipe.max_steps, self.cooling_from + self.recipe.cooldown)

    def _train_one(self) -> Step:
        recipe = self.recipe
        rows = self._chosen("rows", len(self.items), recipe.rows_per_step)
        anchors = self._chosen("anchors", len(self.anchors), recipe.anchors_per_step)
        if recipe.kl_weight == 0:
            anchors = []
        packed = [*(self.items[i] for i in rows), *(self.anchors[i] for i in anchors)]
        batch = Batch(packed, self.view.device, self.view.dtype)
        logp = batch.logits(self.view.model).log_softmax(-1)
        num = sum(batch.lengths[: len(rows)])
        targets = batch.targets[:num, None]
        right = logp[:num].gather(1, targets)[:, 0]
        is_settled = right.detach() > _HALF
        weight = torch.where(is_settled, recipe.settled_weight, 1.0)
        loss = -right
        if self.teachers is not None and recipe.distil_weight:
            said = cat([self.teachers[i] for i in rows])
            loss = loss + recipe.distil_weight * said.divergence(logp[:num])
        loss = (weight * loss).mean()
        kl = loss.new_zeros(())
        if anchors:
            kl = cat([self.bases[i] for i in anchors]).divergence(logp[num:]).mean()
        total = loss + recipe.kl_weight * kl
        value = float(total.detach())
        if not math.isfinite(value):
            raise ArgumentError(
                f"lr: a lower rate than {recipe.lr:g} wanted; at step {self.step + 1} the loss is "
                f"{value}"
            )
        total.backward()
        self._update()
        self.step += 1
        step_kl = float(kl.detach())
        self.kl += (step_kl - self.kl) * max(_OF_A_STEP, 1 / self.step)
        for i, part in zip(rows, is_settled.split(batch.lengths[: len(rows)]), strict=True):
            self.settled[i] = int(part.sum())
        return Step(self.step, recipe.max_steps, value, step_kl, self._seen())

    @torch.no_grad()
    def _update(self) -> None:
        """One step of AdamW on the masters, with the gradients of the factors."""
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            grad, parameter.grad = parameter.grad, None
            master.grad = None if grad is None else grad.float()
        torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * self._pace()
        self.optimizer.step()
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)

    def _pace(self) -> float:
        """The rate of this step, as a share of the full one."""
        recipe = self.recipe
        warm = min(1.0, (self.step + 1) / (recipe.warmup + 1))
        if not recipe.cooldown:
            return warm
        left = self._last_step() - self.step
        return min(warm, left / (recipe.cooldown + 1))

    def _chosen(self, name: str, size: int, count: int) -> list[int]:
        """The numbers of this step: every epoch is a new order, made of the seed alone."""
        found = []
        for place in range(self.step * count, (self.step + 1) * count):
            key = (name, place // size)
            if key not in self._orders:
                self._orders = {k: v for k, v in self._orders.items() if k[0] != name}
                seed = self.recipe.seed * 1_000_003 + 2 * key[1] + (name == "anchors")
                generator = torch.Generator().manual_seed(seed % (1 << 62))
                self._orders[key] = torch.randperm(size, generator=generator).tolist()
            found.append(self._orders[key][place % size])
        return list(dict.fromkeys(found))

    def _seen(self) -> float:
        return sum(self.settled) / max(1, sum(item.num_targets for item in self.items))

    def _is_settled(self) -> bool:
        """Whether every row was seen, and enough of their tokens had p > 0.5 when they were last
        seen: a little less than have it now, and known without a pass over all rows."""
        return (
            self.step * self.recipe.rows_per_step >= len(self.items)
            and self._seen() >= self.recipe.stop_share
            and self.kl <= self.recipe.stop_kl
        )

    @torch.no_grad()
    def p_half(self) -> float:
        """Share of all target tokens with p > 0.5 now."""
        count = 0
        for numbers in batches(self.items):
            batch = Batch([self.items[i] for i in numbers], self.view.device, self.view.dtype)
            logp = batch.logits(self.view.model).log_softmax(-1)
            right = logp.gather(1, batch.targets[:, None])[:, 0]
            count += int((right > _HALF).sum())
        return count / max(1, sum(item.num_targets for item in self.items))

    def _publish(self, folder: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self.masters.items():
            tensors["factor." + name] = master
            for key, value in self.optimizer.state[master].items():
                tensors[f"{key}.{name}"] = value
        checkpoints.save(folder, tensors, {
            "recipe": self.identity, "step": self.step, "cooling_from": self.cooling_from,
            "settled": self.settled, "kl": self.kl, "seconds": self.seconds,
        })  # fmt: skip

    @torch.no_grad()
    def _resume(self, folder: Path) -> None:
        found = checkpoints.load(folder, self.identity)
        if found is None:
            return
        tensors, state = found
        self.step, self.cooling_from = int(state["step"]), state["cooling_from"]
        self.settled, self.kl = list(state["settled"]), float(state["kl"])
        self.seconds = float(state["seconds"])
        for name, master in self.masters.items():
            master.copy_(tensors["factor." + name])
            self.parameters[name].copy_(master)
            self.optimizer.state[master] = {
                key: tensors[f"{key}.{name}"].to(master.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
