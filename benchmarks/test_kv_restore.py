"""Time to the first logits of 32 new tokens behind a context: computed, kept in memory, restored.

The clock runs from token ids to first logits, with the model loaded:
  ttft_cold_s      the whole prompt is computed
  ttft_restored_s  a fresh process restores the context from the folder: keys hashed, frames
                   read, verified and unpacked. The file was written shortly before, so the system
                   may have it in its page cache, as after a restart of a service.
  ttft_disk_s      the same after the system was told to drop the file from its page cache
  ttft_warm_s      transformers' own DynamicCache of the context is still in that process
cut = 1 - ttft_restored_s / ttft_cold_s. Medians; all in one run on one machine. The last three
are measured in turn in one process, so that a neighbour's load falls on all of them.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the model is a torch model")

from benchmarks import model as real  # noqa: E402

NEW, ROUNDS = 32, 5
CONTEXTS = (256, 1024, 2048, 4096)
CODECS = ("raw", "int8", "int4")


@functools.lru_cache(maxsize=1)
def text() -> torch.Tensor:
    return real.text_segments(real.load_tokenizer(), 1, max(CONTEXTS) + NEW)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def computed(dtype: str, context: int) -> tuple[Any, float]:
    """The context's cache and ttft_cold_s."""
    from transformers import DynamicCache

    model = real.load_model(dtype)
    ids = text()[:, : context + NEW]

    def cold() -> None:
        model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=NEW)

    cold_s = statistics.median(seconds(cold) for _ in range(3 if context < 2048 else 1))
    cache = DynamicCache(config=model.config)
    model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    return cache, cold_s


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kv_restore(benchmark: Any, tmp_path: Path, dtype: str, context: int, codec: str) -> None:
    if (why := real.missing()) is not None:
        pytest.skip(why)
    from memos import KVCacheMemory

    cache, cold_s = computed(dtype, context)
    with KVCacheMemory("b", model=real.load_model(dtype), path=tmp_path, codec=codec) as kv:
        content = {"token_ids": text()[0, :context], "cache": cache}
        cube = kv.add(content, {"user_id": "reader"})
    stored, raw = cube.metadata["stored_bytes"], cube.metadata["raw_bytes"]

    def run() -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.test_kv_restore", str(tmp_path)]
        done = subprocess.run(
            [*command, dtype, str(context), codec],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return figures

    figures = benchmark.pedantic(run, rounds=1)
    assert figures["reused_tokens"] == context
    benchmark.extra_info.update(
        context=context,
        codec=codec,
        dtype=dtype,
        ttft_cold_s=cold_s,
        ttft_warm_s=figures["warm_s"],
        ttft_restored_s=figures["page_cache_s"],
        ttft_disk_s=figures["disk_s"],
        cut=1 - figures["page_cache_s"] / cold_s,
        restored_over_warm=figures["page_cache_s"] / figures["warm_s"],
        stored_bytes=stored,
        raw_bytes=raw,
    )


@torch.no_grad()
def restore(folder: Path, dtype: str, context: int, codec: str) -> dict[str, Any]:
    """What the fresh process does: the same restore several times, from a newly opened folder."""
    from memos import KVCacheMemory

    model = real.load_model(dtype)
    ids = text()[0, : context + NEW]
    model(ids[None, :NEW])  # what torch sets up at the first call is no part of a restore
    token_ids = ids.tolist()
    with KVCacheMemory("b", model=model, path=folder, codec=codec) as kv:
        turn = kv.begin("reader", token_ids)
        reused = turn.reused_tokens
        kept = turn.inputs["past_key_values"].dense()  # for ttft_warm_s: a DynamicCache
    del turn

    def warm() -> None:
        model(ids[None, reused:], past_key_values=kept)

    def restored() -> None:
        turn = kv.begin("reader", token_ids)
        model(ids[None, turn.reused_tokens :], past_key_values=turn.inputs["past_key_values"])

    times: dict[str, list[float]] = {"warm_s": [], "page_cache_s": [], "disk_s": []}
    for _ in range(ROUNDS + 1):
        times["warm_s"].append(seconds(warm))
        kept.crop(reused - len(token_ids))
        for kind in ("page_cache_s", "disk_s"):
            if kind == "disk_s":
                for file in folder.rglob("segments/*"):
                    with open(file, "rb") as f:
                        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with KVCacheMemory("b", model=model, path=folder, codec=codec) as kv:
                times[kind].append(seconds(restored))
    return {"reused_tokens": reused, **{k: statistics.median(v) for k, v in times.items()}}


if __name__ == "__main__":
    _, where, kind, length, name = sys.argv
    print(json.dumps(restore(Path(where), kind, int(length), name)))
