"""The ops in torch's library: their schemas, and one graph without a break around each."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the ops work on torch tensors")

from memos import kernels  # noqa: E402
from memos.errors import ArgumentError  # noqa: E402
from memos.kernels import AdapterTable, Codec  # noqa: E402
from memos.kernels.adapters import AdapterRows  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
adapters = importlib.import_module("test_adapter_ops")

kernels.load_all()
NAMES = (
    "gather_blocks", "write_blocks", "pack_kv", "unpack_kv", "rotate_positions_",
    "apply_adapters_", "merge_adapter",
)  # fmt: skip
CHECKS = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
)  # fmt: skip
IDS = torch.tensor([2, 0])


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def caches(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    keys = [numbers(3, 33, 2, 40, seed=seed + i) for i in range(2)]
    return keys, [numbers(3, 33, 2, 24, seed=seed + 5 + i) for i in range(2)]


def turning() -> tuple[Any, ...]:
    """Keys of two layers, positions before and after, frequencies of the first 12 pairs."""
    keys = [numbers(1, 2, 6, 32, seed=i) for i in range(2)]
    at = torch.arange(6)
    return keys, at, at + 1000, 10000.0 ** -(torch.arange(12) / 12)


def adapted(T: int = 5) -> tuple[Any, ...]:
    """y, x, table, module and plan of a call of apply_adapters_."""
    table = adapters.table_of([(9, 9), (48, 24)], [(8, 8), (8, 16)], torch.bfloat16)
    plan = kernels.plan_adapters(torch.arange(T) % 3 - 1, 2)
    return numbers(T, 24), numbers(T, 48, seed=1), table, 1, plan


def library_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """An op of the library and arguments."""
    keys, values = caches()
    packed = kernels.pack_kv(keys, values, IDS, Codec.parse("int4"))
    y, x, table, module, plan = adapted()
    yield "gather_blocks", (numbers(3, 40), IDS)
    yield "write_blocks", (numbers(3, 40), IDS, numbers(2, 40, seed=1))
    for name in ("raw", "int4", "fp8-g32-rot"):
        yield "pack_kv", (keys, values, IDS, name)
    yield "unpack_kv", (*caches(3), IDS, packed, "int4")
    at = torch.arange(66).view(2, 33)
    yield "unpack_kv", (*caches(3), IDS, packed, "int4", at, at + 90, turning()[3], True, 4)
    yield "rotate_positions_", (*turning(), False)
    yield "apply_adapters_", (y, x, table.rows, plan.order, plan.starts, module, table.max_rank)
    yield "merge_adapter", (numbers(9, 33), numbers(8, 33), numbers(9, 8), 0.5)


CALLS = list(library_calls())


@pytest.mark.parametrize("call", CALLS, ids=[f"{i} {name}" for i, (name, _) in enumerate(CALLS)])
def test_opcheck(call: tuple[str, tuple[Any, ...]]) -> None:
    name, arguments = call
    twin = getattr(torch.ops.memos, name).default
    done = torch.library.opcheck(twin, copy.deepcopy(arguments), test_utils=CHECKS)
    assert dict(done) == dict.fromkeys(CHECKS, "SUCCESS")


def test_every_named_op_has_a_twin() -> None:
    assert {name for name, op in kernels.ops.items() if op.in_graph is not None} == set(NAMES)


# What a user compiles: the calls of eager code, between operations of torch.


def gather(cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return kernels.gather_blocks(cache * 2, ids) + 1


def write(cache: torch.Tensor, ids: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    kernels.write_blocks(cache, ids, blocks + 1)
    return cache.sum(1)


def pack(keys: Any, values: Any, ids: torch.Tensor, codec: Codec) -> torch.Tensor:
    return kernels.pack_kv([key * 2 for key in keys], values, ids, codec)


def unpack(keys: Any, values: Any, ids: torch.Tensor, packed: Any, codec: Codec) -> torch.Tensor:
    kernels.unpack_kv(keys, values, ids, packed, codec)
    return keys[0].float().sum() + values[1].float().sum()


def unpack_turned(
    keys: Any, values: Any, ids: torch.Tensor, packed: Any, codec: Codec, at: torch.Tensor
) -> torch.Tensor:
    by = kernels.Rerotation(at, at + 90, torch.ones(12), True, 4)
    kernels.unpack_kv(keys, values, ids, packed, codec, by)
    return keys[0].float().sum() + values[1].float().sum()


def turn(keys: Any, old: torch.Tensor, new: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    kernels.rotate_positions_(keys, old, new + 1, inv_freq)
    return keys[0].float().sum() + keys[1].float().sum()


def apply(y: Any, x: Any, table: AdapterTable, module: int, plan: Any) -> torch.Tensor:
    y = y + 1
    kernels.apply_adapters_(y, x * 2, table, module, plan)
    return y * 2


def merge(weight: Any, down: Any, up: Any, scale: float) -> torch.Tensor:
    return kernels.merge_adapter(weight, down, up, scale) @ down.T


def compiled_calls() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    keys, values = caches()
    int4 = Codec.parse("int4")
    packed = kernels.pack_kv(keys, values, IDS, int4)
    yield "gather_blocks", gather, (numbers(3, 40), IDS)
    yield "write_blocks", write, (numbers(3, 40), IDS, numbers(2, 40, seed=1))
    yield "pack_kv", pack, (keys, values, IDS, int4)
    yield "unpack_kv", unpack, (*caches(3), IDS, packed, int4)
    at = torch.arange(66).view(2, 33)
    yield "unpack_kv", unpack_turned, (*caches(3), IDS, packed, int4, at)
    yield "rotate_positions_", turn, turning()
    yield "apply_adapters_", apply, adapted()
    yield "merge_adapter", merge, (numbers(9, 33), numbers(8, 33), numbers(9, 8), 0.5)


def tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [t for v in values for t in tensors(v)] if isinstance(values, list | tuple) else []


def same(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors of their own; a table stays (it holds addresses)."""
    return tuple(v if isinstance(v, AdapterTable) else copy.deepcopy(v) for v in values)


COMPILED = list(compiled_calls())


@pytest.mark.parametrize("call", COMPILED, ids=[f.__name__ for _, f, _ in COMPILED])
def test_one_graph_gives_the_bytes_of_eager_code(call: tuple[str, Any, tuple[Any, ...]]) -> None:
    name, function, arguments = call
    torch._dynamo.reset()
    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    ours, theirs = same(arguments), same(arguments)
    want = function(*theirs)
    got = torch.compile(function, backend="aot_eager", fullgraph=True)(*ours)
    for a, b in zip(tensors([got, ours]), tensors([want, theirs]), strict=True):
        assert torch.equal(a, b), name
    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*same(arguments))
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(f"memos.{name}.default") == 1, called


def test_a_graph_follows_the_table() -> None:
    """A compiled step sees the adapter that is put into a slot after it was compiled."""
    torch._dynamo.reset()
    y, x, table, module, plan = adapted()
    step = torch.compile(apply, backend="aot_eager", fullgraph=True)
    first = step(y, x, table, module, plan)
    other = adapters.table_of([(9, 9), (48, 24)], [(8, 8), (8, 16)], torch.bfloat16, seed=9)
    for slot in (0, 1):
        table.put(slot, other._slabs[slot], other._offsets[slot])
    second = step(y, x, table, module, plan)
    assert torch.equal(second, apply(y, x, table, module, plan))
    assert not torch.equal(first, second)


def test_a_graph_of_another_batch_size() -> None:
    torch._dynamo.reset()
    step = torch.compile(apply, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (5, 9, 2):
        assert torch.equal(step(*adapted(T)), apply(*adapted(T)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_alone_are_a_table(backend: str) -> None:
    y, x, table, module, plan = adapted()
    rows = AdapterRows(table.rows, table.shapes[module], table.dtype, table.max_rank)
    want = y.clone()
    with kernels.using(backend):
        kernels.apply_adapters_(want, x, table, module, plan)
        kernels.apply_adapters_(y, x, rows, module, plan)
    assert torch.equal(y, want)
    for bad in (table.rows[0], table.rows.int(), table.rows[:, :, :3].contiguous()):
        with pytest.raises(ArgumentError, match="rows"):
            AdapterRows(bad, (48, 24), table.dtype, 16)


def test_rows_that_lie_apart_are_refused_in_a_graph() -> None:
    keys, values = caches()
    int4 = Codec.parse("int4")
    rows = kernels.PackedRows(kernels.pack_kv(keys, values, IDS, int4))
    with pytest.raises(ArgumentError, match="one tensor wanted in a graph"):
        kernels.unpack_kv.in_graph(keys, values, IDS, rows, int4)
