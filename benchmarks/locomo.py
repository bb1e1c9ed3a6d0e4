"""LoCoMo (Maharana et al., ACL 2024) as a test of retrieval without a language model.

Is the annotated evidence of a question among the first k turns? The unit is one turn of a
dialogue; scored are questions of the categories 1 to 4 that name at least one turn. The data is
CC BY-NC 4.0: it is read where it lies, never copied.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop"}
_TURN = re.compile(r"D\s*:?\s*(\d+)\s*:\s*(\d+)")


@dataclass(frozen=True)
class Turn:
    """One turn; ``id`` is unique in its conversation, "D<session>:<turn>"."""

    id: str
    speaker: str
    text: str
    timestamp: str
    session: int


@dataclass(frozen=True)
class Question:
    id: str
    conversation: str
    category: int
    text: str
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    conversations: Mapping[str, Sequence[Turn]]
    questions: Sequence[Question]


def path() -> Path:
    """``$MEMOS_DATA/locomo_dev.json``, or ../shared/data beside the project."""
    folder = os.environ.get("MEMOS_DATA") or ROOT.parent / "shared" / "data"
    return Path(folder) / "locomo_dev.json"


def missing() -> str | None:
    """None when the data is there, else where it was looked for."""
    if path().is_file():
        return None
    return f"LoCoMo is not at {path()}: set MEMOS_DATA to the folder with locomo_dev.json"


@functools.lru_cache(maxsize=1)
def load() -> Data:
    samples = json.loads(path().read_text(encoding="utf-8"))
    conversations = {sample["sample_id"]: _turns(sample["conversation"]) for sample in samples}
    questions = []
    for sample in samples:
        name = sample["sample_id"]
        known = {turn.id for turn in conversations[name]}
        for i, qa in enumerate(sample["qa"]):
            named = [
                f"D{int(a)}:{int(b)}"
                for text in qa.get("evidence", [])
                for a, b in _TURN.findall(text)
            ]
            evidence = tuple(turn for turn in dict.fromkeys(named) if turn in known)
            if qa["category"] in CATEGORIES and evidence:
                question = Question(f"{name}/{i}", name, qa["category"], qa["question"], evidence)
                questions.append(question)
    return Data(conversations, questions)


def score(rankings: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Percent over all questions, from the turns that were found for each, best first.

    recall_at_k: mean share of a question's evidence among the first k; all_at_k: share of
    questions with all of it there.
    """
    rows: list[dict[str, float]] = []
    by_category: dict[str, list[float]] = {name: [] for name in CATEGORIES.values()}
    for question in load().questions:
        place = {turn: i for i, turn in reversed(list(enumerate(rankings[question.id])))}
        ranks = [place.get(turn, 10**9) for turn in question.evidence]
        row = {"mrr": 1 / (1 + min(ranks))}
        for k in (1, 5, 10):
            row[f"recall_at_{k}"] = statistics.fmean(rank < k for rank in ranks)
        row["all_at_10"] = float(max(ranks) < 10)
        rows.append(row)
        by_category[CATEGORIES[question.category]].append(row["recall_at_10"])
    found = {name: 100 * statistics.fmean(row[name] for row in rows) for name in rows[0]}
    found |= {f"{name}_at_10": 100 * statistics.fmean(v) for name, v in by_category.items()}
    return found


def write(folder: Path, system: str, rankings: Mapping[str, Sequence[str]]) -> Path:
    """The rankings, a JSON object {"qid", "ranking"} a line, for other scorers."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{re.sub(r'[^a-z0-9]+', '-', system.lower())}.jsonl"
    lines = [json.dumps({"qid": id, "ranking": list(turns)}) for id, turns in rankings.items()]
    file.write_text("\n".join(lines) + "\n")
    return file


def _turns(conversation: Mapping[str, Any]) -> list[Turn]:
    numbers = sorted(
        int(match[1]) for key in conversation if (match := re.fullmatch(r"session_(\d+)", key))
    )
    found = []
    for number in numbers:
        said = conversation[f"session_{number}_date_time"]
        at = datetime.datetime.strptime(said, "%I:%M %p on %d %B, %Y")
        for turn in conversation[f"session_{number}"]:
            caption = turn.get("blip_caption")
            text = turn["text"] + (f" [image: {caption}]" if caption else "")
            found.append(Turn(turn["dia_id"], turn["speaker"], text, at.isoformat(), number))
    return found
