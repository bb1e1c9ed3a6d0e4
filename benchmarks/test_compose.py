"""Memories put together out of order: what it costs in quality, and what it saves in time.

Each of 20 documents is 1,024 tokens of a LoCoMo dialogue and the 96 that follow. The 1,024 are cut
into 4 pieces of 256, which are prefilled apart, shuffled, and composed behind a system prompt; then
the model reads the 96. Compared with a full prefill of the same prompt: KL divergence of the
next-token distributions (mean over 1,920 positions, in nats), how often the most likely token is
the same, and how much of a greedy answer of 12 tokens is the same up to its first difference
(4 documents, where it is given). Arithmetic in fp32. How composing chooses its tokens was settled
on other dialogues. ``documents`` says how many a row is the mean of.

Rows: how the pieces were made and joined; ``share`` of their tokens computed anew.
  no memory                the system prompt alone
  joined                   prefilled from position 0 each, keys as they are
  re-rotated               the same, keys turned to where they stand
  behind the system prompt prefilled behind it, keys turned
  composed                 prefilled behind it with a gap, keys turned, tokens computed anew: those
                           that deviate most, or (first) those that each piece begins with; all of
                           them is a full prefill (4 documents)
  composed, int8 / int4    the same, the pieces packed in between
Time to the first logits of a question of 24 tokens: ``share_of_prefill`` is the median of pairs, a
full prefill beside each; the pieces come out of a KVCacheMemory in memory.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the model is a torch model")

from benchmarks import locomo  # noqa: E402
from benchmarks import model as real  # noqa: E402

DOCUMENTS, COMPARED, ANSWERED = 20, 10, 4
PIECES, TOKENS, NEXT, ANSWER = 4, 256, 96, 12
HELD_OUT = ("conv-42", "conv-43")
SYSTEM = "You are a helpful assistant with a memory. Notes from earlier conversations follow."
SHARES = (0.0, 0.05, 0.15, 0.25)
PACKED = ("int8", "int4")
SPOKEN = ("joined", "composed 0.05", "composed 0.15", "composed 0.25")  # asked for an answer
VARIANTS = (
    "no memory",
    "joined",
    "re-rotated",
    "behind the system prompt",
    *(f"composed {share}" for share in SHARES),
    "composed 1.0",
    "composed, first 0.15",
    *(f"composed, {codec} 0.15" for codec in PACKED),
)
ROUNDS = 3


def missing() -> str | None:
    return real.missing() or locomo.missing()


@functools.lru_cache(maxsize=1)
def documents() -> list[list[int]]:
    """Token ids of the held-out dialogues, cut where they lie; a fixed draw of them."""
    size, found = PIECES * TOKENS + NEXT, []
    for sample in json.loads(locomo.path().read_text(encoding="utf-8")):
        if sample["sample_id"] not in HELD_OUT:
            continue
        ids = real.load_tokenizer()(said(sample["conversation"]), verbose=False)["input_ids"]
        found += [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return random.Random(7).sample(found, DOCUMENTS)


def said(conversation: dict[str, Any]) -> str:
    lines, number = [], 1
    while f"session_{number}" in conversation:
        lines.append(f"[{conversation[f'session_{number}_date_time']}]")
        lines += [f"{t['speaker']}: {t['text']}" for t in conversation[f"session_{number}"]]
        lines.append("")
        number += 1
    return "\n".join(lines)


def system_ids() -> list[int]:
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    ids: list[int] = real.load_tokenizer()(text)["input_ids"]
    return ids


@functools.lru_cache(maxsize=1)
def figures() -> dict[str, list[dict[str, float]]]:
    """For each variant one row of figures per document."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for number, document in enumerate(documents()):
        pieces = [document[i : i + TOKENS] for i in range(0, PIECES * TOKENS, TOKENS)]
        random.Random(number).shuffle(pieces)
        parts = number < COMPARED, number < ANSWERED
        for name, row in one_document(pieces, document[-NEXT:], *parts).items():
            rows[name].append(row)
    return rows


def one_document(
    pieces: Sequence[list[int]], behind: list[int], with_others: bool, with_answer: bool
) -> dict[str, dict[str, float]]:
    from memos.kv.compose import compose
    from memos.kv.compose_curve import kl_of, read_on
    from memos.kv.pieces import Prefiller

    model = real.load_model("float32")
    maker, close = Prefiller(model), Prefiller(model, gap=0)
    lead, nothing = maker.system(system_ids()), maker.system([])
    near = [close.piece(lead, ids) for ids in pieces]
    far = [maker.piece(lead, ids) for ids in pieces]
    exact = full(maker, lead.token_ids, pieces)
    want = read_on(maker, exact.cache, behind)
    answer = answered(model, exact) if with_answer else None

    def row(name: str, composed: Any) -> None:
        got = read_on(maker, composed.cache, behind)
        rows[name] = {
            "share": composed.share,
            "kl": kl_of(want, got),
            "top1": float((want.argmax(-1) == got.argmax(-1)).float().mean()),
        }
        if answer is not None and name in SPOKEN:
            rows[name]["answer_same"] = same_start(answer, answered(model, composed))

    rows: dict[str, dict[str, float]] = {}
    row("no memory", compose(maker, lead, []))
    if with_others:
        apart = [close.piece(nothing, ids) for ids in pieces]
        row("joined", joined(close, lead, apart))
        row("re-rotated", compose(close, lead, apart, share=0.0))
    row("behind the system prompt", compose(close, lead, near, share=0.0))
    for share in SHARES:
        row(f"composed {share}", compose(maker, lead, far, share=share))
    row("composed, first 0.15", compose(maker, lead, far, first_tokens=round(0.15 * TOKENS)))
    for codec in PACKED if with_others else ():
        kept = [packed(maker, piece, codec) for piece in far]
        row(f"composed, {codec} 0.15", compose(maker, lead, kept, share=0.15))
    if with_answer:
        row("composed 1.0", compose(maker, lead, far, share=1.0))
    return rows


def full(maker: Any, system: Sequence[int], pieces: Sequence[Sequence[int]]) -> Any:
    """A prefill of the whole prompt by transformers."""
    from transformers import DynamicCache

    from memos.kv.cache import MemosCache
    from memos.kv.compose import Composed

    ids = [*system, *(t for piece in pieces for t in piece)]
    cache = DynamicCache(config=maker.model.config)
    maker.forward(ids, range(len(ids)), past_key_values=cache)
    mine = MemosCache.from_cache(cache, maker.shape, ids, codec="raw", recent_tokens=len(ids) * 2)
    return Composed(mine, ids, (), (), 1.0)


def packed(maker: Any, piece: Any, codec: str) -> Any:
    """A piece as it comes back from a memory of this codec."""
    from transformers import DynamicCache

    from memos.kv.cache import MemosCache
    from memos.kv.pieces import StoredPiece

    dense = DynamicCache()
    for i, (key, value) in enumerate(zip(piece.keys, piece.values, strict=True)):
        dense.update(key, value, i)
    cache = MemosCache.from_cache(dense, maker.shape, codec=codec, recent_tokens=0)
    return StoredPiece(piece.token_ids, cache.layers)


def joined(maker: Any, lead: Any, pieces: Sequence[Any]) -> Any:
    """Pieces one behind the other, their keys where they were prefilled."""
    from memos.kv import compose
    from memos.kv.pieces import Piece

    own = []
    for piece in pieces:
        keys = [key.clone() for key in piece.keys]
        maker.positions.move_(keys, 0, torch.arange(len(piece)))
        own.append(Piece(piece.token_ids, keys, piece.values))
    whole = compose.compose(maker, lead, pieces, share=0.0)
    for i, layer in enumerate(whole.cache.layers):
        layer.tail[0].copy_(torch.cat([lead.keys[i], *(piece.keys[i] for piece in own)], dim=2))
    return whole


def answered(model: Any, composed: Any) -> list[int]:
    """Greedy tokens behind what was composed, and the end of the user's turn."""
    tail = real.load_tokenizer()("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    inputs = composed.cache.copy().inputs(composed.token_ids + tail)
    out = model.generate(**inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)
    ids: list[int] = out[0, -ANSWER:].tolist()
    return ids


def same_start(a: Sequence[int], b: Sequence[int]) -> float:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / len(a)


@pytest.mark.parametrize("variant", VARIANTS)
def test_quality(benchmark: Any, variant: str) -> None:
    if (why := missing()) is not None:
        pytest.skip(why)
    rows = benchmark.pedantic(lambda: figures()[variant], rounds=1)
    name = variant.rpartition(" ")[0] if variant[-1].isdigit() else variant
    mean = functools.partial(mean_of, rows)
    if variant == "composed 1.0":
        assert max(row["kl"] for row in rows) == 0, "all tokens anew are a full prefill"
    benchmark.extra_info.update(
        case=name,
        share=mean("share"),
        kl=mean("kl"),
        kl_worst_document=max(row["kl"] for row in rows),
        top1=mean("top1"),
        answer_same=mean("answer_same"),
        documents=len(rows),
    )


def mean_of(rows: Sequence[dict[str, float]], name: str) -> float | None:
    found = [row[name] for row in rows if name in row]
    return statistics.mean(found) if found else None


@functools.lru_cache(maxsize=4)
def activated(dtype: str, codec: str) -> tuple[Any, list[list[int]], list[int]]:
    """A memory with the pieces of a document, the pieces, and a question."""
    from memos import KVCacheMemory

    document = documents()[0]
    pieces = [document[i : i + TOKENS] for i in range(0, PIECES * TOKENS, TOKENS)]
    kv = KVCacheMemory("pieces", model=real.load_model(dtype), codec=codec)
    kv.activate(pieces, system=system_ids())
    return kv, pieces[::-1], document[-24:]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("dtype", "codec"), [("float32", "raw"), ("bfloat16", "int8")])
@torch.no_grad()
def test_time_to_first_token(benchmark: Any, dtype: str, codec: str, share: float) -> None:
    if (why := missing()) is not None:
        pytest.skip(why)
    from transformers import DynamicCache

    model = real.load_model(dtype)
    kv, pieces, question = activated(dtype, codec)
    prompt = torch.tensor([[t for p in (system_ids(), *pieces, question) for t in p]])

    def prefilled() -> None:
        model(prompt, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    def composed() -> None:
        inputs = kv.compose(system_ids(), pieces, question, share=share).inputs
        model(prompt[:, -1:], past_key_values=inputs["past_key_values"], logits_to_keep=1)

    composed()
    pairs = []

    def run() -> None:
        pairs.extend((seconds(prefilled), seconds(composed)) for _ in range(ROUNDS))

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(
        case=f"time, {codec}",
        dtype=dtype,
        share=share,
        ttft_s=statistics.median(b for _, b in pairs),
        prefill_s=statistics.median(a for a, _ in pairs),
        share_of_prefill=statistics.median(b / a for a, b in pairs),
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
