"""learn: memories of text become an adapter, and the gate says whether it may be used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memos.adapters.adapter import Adapter
from memos.adapters.fingerprint import fingerprint
from memos.adapters.learning import general
from memos.adapters.learning.batch import Encoder, Item
from memos.adapters.learning.endpoint import Generate, pairs_by
from memos.adapters.learning.exam import Asked, ask, ask_all, continue_all, divergence
from memos.adapters.learning.gate import Figures, Gate, Report
from memos.adapters.learning.rows import Question, Row, Rows, rows_from
from memos.adapters.learning.sentences import parse, resolve_pronouns, split_sentences
from memos.adapters.learning.targets import teach
from memos.adapters.learning.train import Progress, Recipe, Step, Trainer
from memos.adapters.learning.view import LoraView
from memos.errors import ArgumentError

ANCHOR_TOKENS = 16  # the base model's own words after each anchor
TRAINED = 64  # of the questions that were trained on are asked, at most
FACT_TOKENS = 16  # an old fact is answered within so many


@dataclass(frozen=True)
class Learnt:
    """An adapter and what was measured on it. ``report.accepted`` says whether it may be used."""

    adapter: Adapter
    report: Report


def learn(cubes: Sequence[Any], model: Any, tokenizer: Any, *, recipe: Recipe | None = None,
          questions: Sequence[Question] | None = None, anchors: Sequence[str] | None = None,
          old_facts: Sequence[Question] | None = None, budget: Gate | None = None,
          endpoint: Generate | None = None, checkpoint: str | Path | None = None,
          checkpoint_every: int = 50, max_minutes: float = 60.0,
          progress: Progress | bool | None = None, **settings: Any) -> Learnt:  # fmt: skip
    """Train low-rank factors on all linear layers until the model knows the memories by itself.

    The model is not changed: its weights are read where they are.

    Args:
        cubes:      memories: .id, .content (text) and .metadata; metadata may bring "questions".
        model:      a causal language model of transformers on one device, bare.
        tokenizer:  its tokenizer. Questions are asked in its chat form where it has one.
        recipe:     how; ``settings`` are its fields by name, such as rank=8, lr=5e-4, seed=1.
        questions:  what the gate asks about the memories. Default: wordings of the templates that
            are kept out of training.
        anchors:    prompts on which the model must stay as it is. Default: general ones. Those of
            even places are trained on, the others measured.
        old_facts:  questions of general knowledge. Default: bundled ones. Every third is an
            anchor, the others are the gate's.
        budget:     of the gate.
        endpoint:   a language model that writes questions, such as ``ChatEndpoint``.
        checkpoint: a folder. Training continues what stands there, and the same call ends with
            the same bytes as one that was not interrupted.
        max_minutes: of the training loop.
        progress:   called after every step; None: a bar where stderr is a terminal.

    Returns:
        The adapter in the model's dtype, accepted or refused.

    Raises:
        ArgumentError: no memories, no text, no such model, or a loss that is not finite.
        BackendError: peft is missing, or the endpoint fails.
        StoreError: the checkpoint cannot be written or read.

    Cost: per step two passes over its tokens; before and after a pass over all rows and greedy
    answers to all questions. Memory: the factors with AdamW's state, 16 bytes each, and the
    activations of one step.

    Source: context distillation as in Cartridges (arXiv:2506.06266) and Deep Context Distillation
    (arXiv:2503.08727); learning rate and layers as in LoRA Without Regret (Thinking Machines,
    2025); p > 0.5 as in How LoRA Remembers (arXiv:2605.30260).
    """
    begun = time.monotonic()
    recipe = _recipe(recipe, settings)
    gate = budget or Gate()
    if checkpoint_every < 1 or not max_minutes > 0:
        raise ArgumentError("checkpoint_every from 1 and max_minutes above 0 wanted")
    rows = rows_from(cubes, pairs_by(endpoint) if endpoint is not None else None)
    recipe = recipe.for_rows(len(rows.train))
    view = LoraView(model, recipe.rank, recipe.alpha, recipe.seed)
    encoder = Encoder(tokenizer)
    tests = _tests(questions, rows)
    items = [encoder.item(row.prompt, row.answer, row.is_chat) for row in rows.train]
    identity = _identity(recipe, rows, fingerprint(model, tokenizer), anchors, old_facts)

    exam = _Exam(view, encoder, rows, tests, anchors, old_facts)
    with view.base():
        bases = teach(view.model, exam.train, view.device, view.dtype, recipe.K)
        teachers = None
        if recipe.distil_weight:
            told = [_told(encoder, row) for row in rows.train]
            teachers = teach(view.model, told, view.device, view.dtype, recipe.K)
    trainer = Trainer(view, recipe, items, teachers, exam.train, bases, identity)
    folder = Path(checkpoint) if checkpoint is not None else None
    with _progress(progress, recipe.max_steps) as hear:
        ended = trainer.run(hear, folder, checkpoint_every, 60 * max_minutes)
    figures, wrong, lost = exam.measure(ended.p_half)
    report = Report(figures, gate, tuple(gate.reasons(figures)), ended.steps,
                    (time.monotonic() - begun) / 60, ended.stopped, wrong, lost)  # fmt: skip
    card = {
        "base": fingerprint(model, tokenizer),
        "recipe": {**dataclasses.asdict(recipe), "digest": identity},
        "evaluation": report.as_dict(),
        "sources": [str(cube.id) for cube in cubes],
    }
    return Learnt(view.adapter(card), report)


class _Exam:
    """What the base model says before training, and the questions asked again after it."""

    def __init__(self, view: LoraView, encoder: Encoder, rows: Rows, tests: Sequence[Question],
                 anchors: Sequence[str] | None,
                 old_facts: Sequence[Question] | None) -> None:  # fmt: skip
        self.view, self.encoder, self.tests = view, encoder, tests
        self.trained = rows.trained[:: 1 + len(rows.trained) // TRAINED]
        facts = general.facts() if old_facts is None else [(q, (a,)) for q, a in old_facts]
        chat = list(general.INSTRUCTIONS if anchors is None else anchors)
        if len(chat) < 2:
            raise ArgumentError(f"anchors: at least two prompts wanted, got {len(chat)}")
        texts = list(general.TEXTS) if anchors is None else []
        strangers = strangers_of(rows.train)
        half = len(strangers) // 2
        with view.base():
            self.recall_base = ask_all(view, encoder, tests).share
            asked = ask(view, encoder, [q for q, _ in facts], [a for _, a in facts], FACT_TOKENS)
            # Every third fact is an anchor, known or not. The others are kept, known or not: a list
            # of what the base model answers rightly could only get worse, by chance alone.
            trained = set(range(0, len(facts), 3))
            seen = {*chat[::2], *(facts[i][0] for i in trained)}
            kept_facts = [i for i in range(len(facts)) if facts[i][0] not in seen]
            self.facts = [facts[i] for i in kept_facts]
            self.known = [asked.right[i] for i in kept_facts]
            kept = [prompt for prompt in chat[1::2] if prompt not in seen]
            self.train = self._continued([*chat[::2], *strangers[:half]], texts[::2])
            self.anchors = self._continued(kept, texts[1::2])
            self.strangers = self._continued(strangers[half:], [])
        self.train += [
            encoder.continued(encoder.prompt(facts[i][0], True), asked.ids[i])
            for i in sorted(trained) if asked.ids[i]
        ]  # fmt: skip

    def _continued(self, chat: Sequence[str], texts: Sequence[str]) -> list[Item]:
        """Anchors with the model's own greedy words after them."""
        prompts = [self.encoder.prompt(text, True) for text in chat]
        prompts += [self.encoder.prompt(text, False) for text in texts]
        words = continue_all(self.view, self.encoder, prompts, ANCHOR_TOKENS)
        return [self.encoder.continued(p, w) for p, w in zip(prompts, words, strict=True) if w]

    def measure(self, p_half: float) -> tuple[Figures, _Mistakes, _Mistakes]:
        """Figures of the view as it is now, and what it gets wrong of new and of old facts."""
        new = ask_all(self.view, self.encoder, self.tests)
        trained = ask_all(self.view, self.encoder, self.trained)
        old = ask(self.view, self.encoder, [q for q, _ in self.facts], [a for _, a in self.facts],
                  FACT_TOKENS)  # fmt: skip
        kl, count = divergence(self.view, self.anchors)
        stranger_kl, _ = divergence(self.view, self.strangers)
        figures = Figures(
            recall=new.share, recall_trained=trained.share, recall_base=self.recall_base,
            p_half=p_half, anchor_kl=kl, stranger_kl=stranger_kl,
            old_facts_base=sum(self.known) / max(1, len(self.known)), old_facts=old.share,
            old_facts_lost=sum(
                before and not after
                for before, after in zip(self.known, old.right, strict=True)
            ) / max(1, sum(self.known)),
            num_questions=len(self.tests), num_old_facts=len(self.facts), num_anchor_tokens=count,
        )  # fmt: skip
        facts = [(question, " or ".join(answers)) for question, answers in self.facts]
        wrong = _mistakes(facts, old)
        known = {question for (question, _), is_known in zip(facts, self.known, strict=True)
                 if is_known}  # fmt: skip
        return figures, _mistakes(self.tests, new), tuple(m for m in wrong if m[0] in known)


_Mistakes = tuple[tuple[str, str, str], ...]


def _mistakes(questions: Sequence[tuple[str, str]], asked: Asked) -> _Mistakes:
    """(question, wanted, answer) of those answered wrongly."""
    return tuple(
        (question, wanted, answer)
        for (question, wanted), answer, right in zip(
            questions, asked.answers, asked.right, strict=True
        )
        if not right
    )


def _recipe(recipe: Recipe | None, settings: dict[str, Any]) -> Recipe:
    known = {field.name for field in dataclasses.fields(Recipe)}
    if unknown := sorted(set(settings) - known):
        raise ArgumentError(f"settings of {', '.join(sorted(known))} wanted, got {unknown}")
    return dataclasses.replace(recipe or Recipe(), **settings)


def _tests(questions: Sequence[Question] | None, rows: Rows) -> tuple[Question, ...]:
    """The gate's questions; those given may not be rows."""
    if questions is None:
        return rows.held_out
    tests = tuple(Question(*question) for question in questions)
    if not tests:
        raise ArgumentError("questions: at least one wanted, got none")
    prompts = {row.prompt for row in rows.train}
    if same := [q.question for q in tests if q.question in prompts]:
        raise ArgumentError(f"questions: wordings that no training row has wanted, got {same[0]!r}")
    return tests


def _told(encoder: Encoder, row: Row) -> Item:
    """A row as the teacher sees it: the memory before the prompt."""
    between = "\n\n" if row.is_chat else "\n"
    return encoder.item(f"{row.context}{between}{row.prompt}", row.answer, row.is_chat)


def strangers_of(rows: Sequence[Row]) -> list[str]:
    """Questions of the rows about names that nobody learnt anything of."""
    found: dict[str, None] = {}
    topics: dict[str, str] = {}
    for row in rows:
        if row.is_chat and row.context not in topics:
            sentence = next(resolve_pronouns(split_sentences(row.context)[:1]), "")
            clause = parse(sentence)
            topics[row.context] = clause.topic if clause is not None else ""
    asked = [(row.prompt, topics[row.context]) for row in rows if topics.get(row.context)]
    asked = [(prompt, topic) for prompt, topic in asked if topic in prompt and len(topic) > 2]
    names = general.STRANGERS
    stride = max(1, len(asked) // (2 * len(names)))
    for i, (prompt, topic) in enumerate(asked[::stride]):
        found.setdefault(prompt.replace(topic, names[i * len(names) // len(asked[::stride])]))
    return list(found)


def _identity(recipe: Recipe, rows: Rows, base: dict[str, Any], anchors: Sequence[str] | None,
              old_facts: Sequence[Question] | None) -> str:  # fmt: skip
    """Digest of all that training depends on."""
    parts = [dataclasses.asdict(recipe), [dataclasses.astuple(row) for row in rows.train], base,
             None if anchors is None else list(anchors),
             None if old_facts is None else [list(q) for q in old_facts]]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _progress(progress: Progress | bool | None, max_steps: int) -> Iterator[Progress]:
    """A callback, a bar on a terminal, or nothing."""
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("learning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=max_steps)

        def hear(step: Step) -> None:
            said = f"p > 0.5: {step.settled:.0%}, anchor KL {step.anchor_kl:.4f}"
            bar.update(task, completed=step.number, description=said)

        yield hear
