"""Adapters under a whole model, beside PEFT in the same run.

Rows: case, dtype, and what fits it. "decode step", "prefill 512": a forward pass of a Llama of 84
linear layers (12 x 7, h = 512): ``base_ms``, then with one adapter of rank 16 ``memos_ms``,
``peft_ms`` and what they add in percent; added_us, peft_added_us: the same for one linear layer,
and ``ratio`` of the two; ``idle_percent``: attached and none in use. "8 rows, 8 adapters": the same
model decoding a mixed batch. The models take turns, a pass each; medians.

"activate": ``use`` of a ready adapter, entered and left, beside PEFT's set_adapter and
hotswap_adapter. "load from disk", "load": an adapter of these layers from the folder into its slab,
verified, beside one read of the same file into memory that is there (``share_of_read``), and PEFT's
load_adapter. Before each pass of the first the file is dropped from the page cache; in the second
it is there.

"200 adapters": of rank 8 to 64 under a budget for about 20, 2,000 uses by Zipf's law; ``wrong``
counts uses whose logits were not those of that adapter.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="adapters work on torch models")
peft = pytest.importorskip("peft", reason="PEFT stands beside")
transformers = pytest.importorskip("transformers", reason="the model is one of transformers")

from memos import MOS, ParametricMemory  # noqa: E402

ROUNDS = 41
RANK = 16


def llama(dtype: Any, layers: int = 12, hidden: int = 512) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=hidden, intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def save(path: Path, model: Any, seed: int, rank: int = RANK, std: float = 0.02) -> Path:
    """A random adapter on all linear layers, as PEFT saves it."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, std, generator=generator)
    wrapped.save_pretrained(path)
    wrapped.unload()
    return path


def in_turn(passes: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of each, one after the other, so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for i in range(rounds + 3):
        for name, one in passes.items():
            begin = time.perf_counter()
            one()
            if i >= 3:
                times[name].append(time.perf_counter() - begin)
    return {name: 1000 * statistics.median(found) for name, found in times.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, model = tmp_path_factory.mktemp("adapters"), llama(torch.bfloat16)
    return [save(root / f"a{i}", model, i) for i in range(8)]


def attached(model: Any, folders: list[Path], **options: Any) -> Any:
    memory = MOS().register_memory(ParametricMemory("skills", embedder=None, **options))
    memory.attach(model)
    for folder in folders:
        memory.add(folder)
    return memory


def wrapped(model: Any, folders: list[Path]) -> Any:
    found = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="a0").eval()
    for folder in folders[1:]:
        found.load_adapter(folder, adapter_name=folder.name)
    return found


def step(model: Any, batch: int, tokens: int, past: int, **more: Any) -> Callable[[], object]:
    """One forward pass behind a past."""
    ids = torch.zeros(batch, tokens, dtype=torch.long)

    @torch.inference_mode()
    def run() -> object:
        cache.crop(past - cache.get_seq_length())
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits

    with torch.inference_mode():
        cache = transformers.DynamicCache(config=model.config)
        if past:
            start = torch.zeros(batch, past, dtype=torch.long)
            model(input_ids=start, past_key_values=cache, **more)
    return run


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("case", "batch", "tokens", "past", "adapters"),
    [
        ("decode step", 1, 1, 64, 1),
        ("prefill 512", 1, 512, 0, 1),
        ("8 rows, 8 adapters", 8, 1, 64, 8),
    ],
    ids=["decode", "prefill", "mixed"],
)
def test_forward(
    benchmark: Any, folders: list[Path], dtype: str, case: str, batch: int, tokens: int,
    past: int, adapters: int,
) -> None:  # fmt: skip
    chosen, kind = folders[:adapters], getattr(torch, dtype)
    bare, unused, ours = llama(kind), llama(kind), llama(kind)
    other_memory, memory = attached(unused, chosen), attached(ours, chosen)
    theirs = wrapped(llama(kind), chosen)
    more = {"adapter_names": [f.name for f in chosen]} if adapters > 1 else {}
    names = [folder.name for folder in chosen]
    base, idle = step(bare, batch, tokens, past), step(unused, batch, tokens, past)
    with memory.use_batch(names):  # as around a whole generate
        used = step(ours, batch, tokens, past)
        other = step(theirs, batch, tokens, past, **more)
        found = in_turn({"base": base, "idle": idle, "memos": used, "peft": other})
        benchmark.pedantic(used, rounds=1)
    other_memory.detach()

    def added(name: str) -> float:
        return 100 * (found[name] / found["base"] - 1)

    def added_us(name: str) -> float:
        return 1000 * (found[name] - found["base"]) / len(memory._layout.modules)

    benchmark.extra_info.update(
        case=case, dtype=dtype, base_ms=found["base"], memos_ms=found["memos"],
        peft_ms=found["peft"], added_percent=added("memos"), peft_added_percent=added("peft"),
        idle_percent=added("idle"), added_us=added_us("memos"), peft_added_us=added_us("peft"),
        ratio=added_us("peft") / added_us("memos"),
    )  # fmt: skip


def test_activate(benchmark: Any, folders: list[Path]) -> None:
    from peft.utils.hotswap import hotswap_adapter

    memory, theirs = (
        attached(llama(torch.bfloat16), folders),
        wrapped(llama(torch.bfloat16), folders[:2]),
    )
    names = [folder.name for folder in folders]
    for name in names:
        with memory.use(name):
            pass

    def use(name: str = "a1") -> None:
        with memory.use(name):
            pass

    turn = iter(range(10**9))
    found = in_turn(
        {
            "memos": use,
            "set_adapter": lambda: theirs.set_adapter(f"a{next(turn) % 2}"),
            "hotswap": lambda: hotswap_adapter(theirs, str(folders[next(turn) % 8]), "a0"),
        },
        21,
    )
    benchmark.pedantic(use, rounds=1)
    benchmark.extra_info.update(
        case="activate", dtype="bfloat16", memos_ms=found["memos"],
        peft_ms=found["set_adapter"], peft_hotswap_ms=found["hotswap"],
    )  # fmt: skip


@pytest.mark.parametrize("cached", [False, True], ids=["from disk", "from the page cache"])
def test_load(benchmark: Any, folders: list[Path], tmp_path: Path, cached: bool) -> None:
    with MOS(tmp_path / "store") as mos:
        memory = mos.register_memory(ParametricMemory("skills", embedder=None))
        digests = [memory.add(folder).content["digest"] for folder in folders]
        files = [memory.files.folder / one / "adapter_model.safetensors" for one in digests]
        os.sync()  # pages that are not written yet cannot be dropped
        memory.attach(llama(torch.bfloat16))
        theirs = peft.PeftModel.from_pretrained(llama(torch.bfloat16), folders[0])
        size, turn = files[0].stat().st_size, iter(range(10**9))
        into = bytearray(size)

        def read(file: Path) -> None:
            with open(file, "rb", buffering=0) as opened:
                opened.readinto(into)

        def timed(one: Callable[[int], object]) -> float:
            i = next(turn) % len(files)
            if not cached:
                with open(files[i], "rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            one(i)
            return time.perf_counter() - begin

        def load(i: int) -> None:
            memory._layout.load(memory.files, digests[i])

        def peft_load(i: int) -> None:
            theirs.load_adapter(folders[i], adapter_name="other")

        times: dict[str, list[float]] = {"memos": [], "read": []}
        for _ in range(61):
            times["memos"].append(timed(load))
            times["read"].append(timed(lambda i: read(files[i])))
        found = {name: 1000 * statistics.median(each) for name, each in times.items()}
        slow = []
        for _ in range(3):
            slow.append(timed(peft_load))
            theirs.delete_adapter("other")
        benchmark.pedantic(load, args=(0,), rounds=1)
        benchmark.extra_info.update(
            case="load" if cached else "load from disk", dtype="float32 file",
            memos_ms=found["memos"], peft_ms=1000 * statistics.median(slow),
            read_ms=found["read"], file_bytes=size, gb_s=size / found["memos"] / 1e6,
            share_of_read=found["read"] / found["memos"],
        )  # fmt: skip


def test_many_under_a_budget(benchmark: Any, tmp_path: Path) -> None:
    uses, count = 2000, 200
    model = llama(torch.float32, layers=2, hidden=64)
    ranks = [8 * (1 + i % 8) for i in range(count)]
    folders = [save(tmp_path / f"a{i}", model, i, rank, 0.2) for i, rank in enumerate(ranks)]
    ids = torch.arange(8).view(1, 8)

    @torch.inference_mode()
    def logits() -> Any:
        return model(ids, use_cache=False).logits

    with MOS(tmp_path / "store") as mos:
        memory = mos.register_memory(ParametricMemory("skills", embedder=None))
        for folder in folders:
            memory.add(folder)
        memory.attach(model)
        want = []
        for i in range(count):
            with memory.use(f"a{i}"):
                want.append(logits())
        assert len({float(one.sum()) for one in want}) == count
        budget = memory.stats()["device"]["bytes"] // count * 20
        memory.detach()
        memory.device_bytes = budget
        memory.attach(model)
        weights = 1 / torch.arange(1, count + 1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(count, generator=generator)
        drawn = order[torch.multinomial(weights, uses, True, generator=generator)].tolist()
        wrong = highest = 0

        def run() -> None:
            nonlocal wrong, highest
            for i in drawn:
                with memory.use(f"a{i}"):
                    wrong += not torch.equal(logits(), want[i])
                    highest = max(highest, memory.stats()["device"]["bytes"])

        benchmark.pedantic(run, rounds=1)
        stats = memory.stats()
        assert wrong == 0
        assert highest <= budget
        benchmark.extra_info.update(
            case=f"{count} adapters", dtype="float32", uses=uses, wrong=wrong,
            hit_rate=stats["hit_rate"], evictions=stats["evictions"],
            share_of_budget=highest / budget, load_ms=1000 * stats["load_s"] / stats["loads"],
        )  # fmt: skip
