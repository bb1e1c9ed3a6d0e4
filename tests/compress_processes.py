"""Processes for test_compress_crash.py that compress sessions and are killed.

    python compress_processes.py FOLDER KILLS

Prints one line of JSON at its end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compress_help import Layers, dense, once_more, same
from transformers.cache_utils import DynamicCache

from memos import KVCacheMemory
from memos.kv import recompress
from memos.kv.segment import SegmentWriter
from memos.kv.sessions import SessionTable
from memos.kv.tiers import DiskTier

P, SINKS, SESSIONS = 8, 2, 6
CONFIG = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_layers": 3,
    "dtype": "bfloat16", "vocab_size": 97,
}  # fmt: skip
HOT, COLD = "int8-g32", "int4-g32"


def opened(folder: Path, durable: bool = False) -> KVCacheMemory:
    return KVCacheMemory(
        "chat", CONFIG, revision="1", path=folder, codec=HOT, cold_codec=COLD, block_tokens=P,
        sink_tokens=SINKS, recent_tokens=5, durable=durable,
    )  # fmt: skip


def content(number: int) -> dict[str, Any]:
    """Sessions of odd numbers begin as the one before."""
    ids, cache = [], DynamicCache()
    length = 40 + 7 * number
    for start, stop, seed in ((0, 3 * P, number // 2), (3 * P, length, 100 + number)):
        rng = torch.Generator().manual_seed(seed)
        ids += torch.randint(0, 97, (stop - start,), generator=rng).tolist()
        for layer in range(3):
            k, v = (torch.randn(1, 2, stop - start, 8, generator=rng).bfloat16() for _ in range(2))
            cache.update(k, v, layer)
    return {"token_ids": ids, "cache": cache}


class Crash:
    """Ends this process before the n-th of the steps that change something on the disk."""

    def __init__(self, step: int) -> None:
        self.step = step
        for cls, name in (
            (SegmentWriter, "publish"), (SessionTable, "claim"), (SessionTable, "save"),
            (SessionTable, "release"), (DiskTier, "destroy"),
        ):  # fmt: skip
            setattr(cls, name, self.wrapped(getattr(cls, name)))

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            self.step -= 1
            if self.step < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return counted


def main(folder: Path, kills: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    recompress._AT_ONCE = 1  # block by block: many moments to be killed at
    rng = random.Random(1)
    result: Counter[str] = Counter()
    values: dict[str, dict[str, Layers]] = {}
    with opened(folder) as kv:
        for i in range(SESSIONS):
            hot = dense(kv.add(content(i), {"n": i}, id=str(i)).content)
            values[str(i)] = {HOT: hot, COLD: once_more(hot, COLD, P, SINKS)}
        whole = kv.store.stats()["disk"]["blocks"]
    for round in range(kills):
        child = os.fork()
        if not child:
            kv = opened(folder, rng.random() < 0.2)
            if round % 2:
                Crash(round // 2 % 60)
            for i in range(SESSIONS):
                kv.compress(str(i))
            os._exit(0)
        if not round % 2:
            time.sleep(rng.random() * 0.15)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        result["killed"] += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        with opened(folder) as kv:
            codecs = []
            for i in range(SESSIONS):
                cube = kv.get(str(i))
                assert cube.metadata["tokens"] == 40 + 7 * i, "whole"
                codecs.append(cube.content.codec.name)
                assert same(dense(cube.content), values[str(i)][codecs[-1]])
            result["half way"] += len(set(codecs)) > 1
            if rng.random() < 0.5:
                for i in range(SESSIONS):
                    kv.compress(str(i))
                assert kv.store.stats()["disk"]["blocks"] == whole, "nothing is left over"
            if (len(set(codecs)) == 1 and codecs[0] == COLD) or rng.random() < 0.5:
                for i in range(SESSIONS):
                    kv.delete(str(i))
                assert kv.store.stats()["disk"]["blocks"] == 0, "nothing is left of them"
                for i in range(SESSIONS):
                    kv.add(content(i), {"n": i}, id=str(i))
    return dict(result)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
