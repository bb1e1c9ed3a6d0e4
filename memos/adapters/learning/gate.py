"""The gate: what an adapter has to reach, what was measured, and whether it may pass."""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from memos.errors import ArgumentError


@dataclass(frozen=True)
class Gate:
    """The budget an adapter has to keep; beyond it the adapter is refused.

    Args:
        min_recall:        share of held-out questions about the new facts answered rightly without
            the facts in the prompt.
        max_anchor_kl:     mean KL(base || adapted) on held-out anchors, in nats per token.
        max_old_fact_drop: by how much the accuracy on held-out old facts may fall.

    Raises:
        ArgumentError: a share outside 0 to 1, or a divergence below 0.
    """

    min_recall: float = 0.95
    max_anchor_kl: float = 0.05
    max_old_fact_drop: float = 0.02

    def __post_init__(self) -> None:
        for name in ("min_recall", "max_old_fact_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name}: from 0 to 1 wanted, got {getattr(self, name)!r}")
        if not self.max_anchor_kl >= 0:
            raise ArgumentError(f"max_anchor_kl: from 0 wanted, got {self.max_anchor_kl!r}")

    def reasons(self, figures: Figures) -> list[str]:
        """Why an adapter with these figures is refused; empty where it passes."""
        found = []
        if not figures.recall >= self.min_recall:
            found.append(
                f"recall of the new facts is {figures.recall:.3f}, at least {self.min_recall:g} "
                "wanted: more steps, a higher rank or more questions help"
            )
        if not figures.anchor_kl <= self.max_anchor_kl:
            found.append(
                f"KL(base || adapted) on anchors is {figures.anchor_kl:.4f}, at most "
                f"{self.max_anchor_kl:g} wanted: a higher kl_weight or a lower lr helps"
            )
        if figures.num_old_facts and not figures.old_fact_drop <= self.max_old_fact_drop:
            found.append(
                f"accuracy on old facts fell from {figures.old_facts_base:.1%} to "
                f"{figures.old_facts:.1%}, by at most {100 * self.max_old_fact_drop:g} points "
                "wanted: a higher kl_weight or a lower lr helps"
            )
        return found


@dataclass(frozen=True)
class Figures:
    """What was measured on one adapter, all of it without the facts in the prompt.

    Args:
        recall:         of held-out questions about the new facts, by greedy decoding.
        recall_trained: of some of the questions trained on.
        recall_base:    of held-out questions by the base model.
        p_half:         share of target tokens with a probability above 0.5.
        anchor_kl:      mean KL(base || adapted) on held-out anchors, nats per token.
        stranger_kl:    the same on the trained questions about names nobody learnt anything of.
        old_facts_base: share of the held-out old facts that the base model answers rightly.
        old_facts:      the same of the adapted model.
        old_facts_lost: share no longer answered rightly of those that the base model knows; some
            that it does not know are won.
    """

    recall: float
    recall_trained: float
    recall_base: float
    p_half: float
    anchor_kl: float
    stranger_kl: float
    old_facts_base: float
    old_facts: float
    old_facts_lost: float
    num_questions: int
    num_old_facts: int
    num_anchor_tokens: int

    @property
    def old_fact_drop(self) -> float:
        """By how much the accuracy on old facts fell."""
        return self.old_facts_base - self.old_facts


@dataclass(frozen=True)
class Report:
    """What the gate says of an adapter; ``str(report)`` is a table.

    Args:
        reasons: why it is refused, a sentence each; empty where it is accepted.
        stopped: why training ended: "settled", "steps" or "minutes".
        wrong:   (question, wanted, answer) of held-out questions answered wrongly.
        lost:    the same of old facts.
    """

    figures: Figures
    gate: Gate
    reasons: tuple[str, ...]
    steps: int
    minutes: float
    stopped: str
    wrong: tuple[tuple[str, str, str], ...] = ()
    lost: tuple[tuple[str, str, str], ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        """JSON of all of it, for the card of the adapter."""
        figures = {k: v if math.isfinite(v) else None for k, v in asdict(self.figures).items()}
        return {
            "accepted": self.accepted, "reasons": list(self.reasons), **figures,
            "old_fact_drop": self.figures.old_fact_drop,
            "gate": asdict(self.gate), "steps": self.steps, "minutes": round(self.minutes, 3),
            "stopped": self.stopped,
        }  # fmt: skip

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        f, g = self.figures, self.gate
        verdict = "accepted" if self.accepted else "refused"
        table = Table(title=f"adapter {verdict}", title_justify="left")
        table.add_column("measured")
        table.add_column("value", justify="right")
        table.add_column("wanted", justify="right")
        for row in (
            (f"recall of new facts ({f.num_questions} held-out questions)", f"{f.recall:.3f}",
             f">= {g.min_recall:g}"),
            ("recall on trained questions", f"{f.recall_trained:.3f}", ""),
            ("recall of the base model", f"{f.recall_base:.3f}", ""),
            ("target tokens with p > 0.5", f"{f.p_half:.3f}", ""),
            (f"KL(base || adapted), {f.num_anchor_tokens} anchor tokens", f"{f.anchor_kl:.4f}",
             f"<= {g.max_anchor_kl:g}"),
            ("the same on unknown names", f"{f.stranger_kl:.4f}", ""),
            (f"accuracy on {f.num_old_facts} old facts, base {f.old_facts_base:.1%}: lower by",
             f"{f.old_fact_drop:.1%}", f"<= {g.max_old_fact_drop:.1%}"),
            ("known old facts lost", f"{f.old_facts_lost:.1%}", ""),
            ("steps, minutes", f"{self.steps}, {self.minutes:.1f}", ""),
            ("stopped by", self.stopped, ""),
        ):  # fmt: skip
            table.add_row(*row)
        text = io.StringIO()
        console = Console(file=text, width=100, force_terminal=False)
        console.print(table)
        lines = [text.getvalue().rstrip(), *(f"refused: {reason}" for reason in self.reasons)]
        return "\n".join(lines)


def normalized(text: str) -> str:
    """Small letters and digits, one space between words; no accents, articles or punctuation."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    words = re.sub(r"[^\w\s.]|\.(?!\d)", " ", plain).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def contains(answer: str, wanted: str | Iterable[str]) -> bool:
    """Whether an answer holds one of the wanted texts, as whole words; a plural counts."""
    said = normalized(answer)
    for one in (wanted,) if isinstance(wanted, str) else wanted:
        gold = normalized(one)
        if gold and re.search(rf"(?<!\w)(?<!\d\.){re.escape(gold)}(?:e?s)?(?!\w|\.\d)", said):
            return True
    return False
