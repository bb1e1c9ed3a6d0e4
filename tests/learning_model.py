"""A tiny model that knows a few facts, its tokenizer of whole words, and memories new to it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from memos.adapters.learning.batch import Batch, Encoder
from memos.adapters.learning.general import STRANGERS
from memos.adapters.learning.rows import Question, rows_from

from .models import build

TEMPLATE = (
    "<s>system be kind</s>"
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
_WORDS = """
France Japan Kenya Chile Norway Ghana Nepal Cuba Peru Malta Egypt Spain Laos Togo Oman Fiji India
cow dog cat duck sheep owl horse goat crow hen pig wolf bear fox hare mole rat swan toad newt
oak fern moss rose reed pine lily ivy palm birch elm yew fir aloe rye corn leek kale mint sage
"""
_LANDS, _BEASTS, _PLANTS = (line.split() for line in _WORDS.strip().splitlines())
OLD = [
    *(Question(f"On which planet is {land}?", "It is on Earth.") for land in _LANDS),
    *(Question(f"How many heads does a {beast} have?", "It has one.") for beast in _BEASTS),
    *(Question(f"Is the {plant} a plant?", "Yes, always.") for plant in _PLANTS),
]
_UNKNOWN = "I do not know that person."
ANCHORS = tuple(q for q, _ in OLD[::2])


@dataclass
class Memory:
    """What learning asks of a memory."""

    id: str
    content: Any
    metadata: dict[str, Any] = field(default_factory=dict)


def memories(*texts: str) -> list[Memory]:
    return [Memory(f"m{i}", text) for i, text in enumerate(texts)]


FACTS = memories(
    "Ada Quill works at Norvexa.", "Bo Tamm lives in Sandrel.", "The colour of Cyra Vale is teal."
)


@functools.lru_cache(maxsize=2)
def tokenizer(with_chat: bool = True) -> Any:
    """Every word of the facts, their questions and what the model knows; others are one word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [*STRANGERS, _UNKNOWN, "system be kind user assistant Question Answer Zq7 Hi"]
    texts += [text for pair in OLD for text in pair]
    for row in rows_from(FACTS).train:
        texts += [row.prompt, row.answer, row.context]
    split = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = split
    tok = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
        eos_token="</s>",
    )  # fmt: skip
    if with_chat:
        tok.chat_template = TEMPLATE
    return tok


@functools.lru_cache(maxsize=2)
def model(name: str = "llama") -> Any:
    """Answers OLD, and says of people that it does not know them. Nobody changes it."""
    tok = tokenizer()
    made = build(name, vocab_size=len(tok), hidden_size=64, intermediate_size=96,
                 initializer_range=0.2, num_hidden_layers=2)  # fmt: skip
    made.generation_config.eos_token_id = tok.eos_token_id
    encoder = Encoder(tok)
    pairs = [*OLD, *(Question(f"Where does {name} live?", _UNKNOWN) for name in STRANGERS)]
    items = [encoder.item(question, answer, True) for question, answer in pairs]
    optimizer = torch.optim.AdamW(made.parameters(), lr=4e-3)
    batch = Batch(items, torch.device("cpu"), torch.float32)
    for _ in range(80):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(batch.logits(made), batch.targets).backward()
        optimizer.step()
    return made.requires_grad_(False).eval()


FAST: dict[str, Any] = {
    "anchors": ANCHORS, "old_facts": [Question(q, a.split()[-1]) for q, a in OLD], "rank": 16,
    "alpha": 64.0, "distil_weight": 0.2, "lr": 7e-3, "max_steps": 260, "cooldown": 30, "warmup": 5,
    "kl_weight": 8.0, "progress": False,
}  # fmt: skip
