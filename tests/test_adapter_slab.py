"""Adapters as slabs, and the store they are loaded from: every byte where kernels expect it,
damage never served, crashes leave the whole or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest

torch = pytest.importorskip("torch", reason="adapters are torch tensors")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from memos.adapters import files  # noqa: E402
from memos.adapters.adapter import Adapter, Factors  # noqa: E402
from memos.adapters.files import digest, read_adapter  # noqa: E402
from memos.adapters.slab import SlabLayout, StoredSlabs, empty_slab  # noqa: E402
from memos.adapters.store import AdapterStore  # noqa: E402
from memos.errors import ArgumentError, NotFoundError, QuotaError, StoreError  # noqa: E402
from memos.kernels import _native  # noqa: E402
from memos.kernels.slabs import SlabJobs, fill_slab, reference_fill  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODULES = [("q", 24, 40), ("k", 24, 8), ("up", 24, 56), ("down", 56, 24), ("head", 33, 7)]
SHAPES = {name: (i, o) for name, i, o in MODULES}


def make(seed=0, ranks=None, dtypes=(torch.float32,), scale=2.0, card=None) -> Adapter:
    """Factors for the modules named in ``ranks`` (all, of rank 4, where it is silent)."""
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for i, (name, R) in enumerate((ranks or dict.fromkeys(SHAPES, 4)).items()):
        inputs, outputs = SHAPES[name]
        dtype = dtypes[i % len(dtypes)]
        down = torch.randn(R, inputs, generator=g).to(dtype)
        up = torch.randn(outputs, R, generator=g).to(dtype)
        factors[name] = Factors(down, up, scale * (i + 1))
    return Adapter(factors, {}, card or {})


def matrix(slab, start: int, rows: int, columns: int, dtype) -> torch.Tensor:
    size = rows * columns * dtype.itemsize
    return slab[start : start + size].view(dtype).view(rows, columns)


def check_slab(slab, offsets, adapter: Adapter, dtype, modules=MODULES) -> None:
    """Every byte: tensors, padding rows and gaps."""
    assert slab.data_ptr() % 256 == 0
    assert offsets.shape == (len(modules), 4)
    wanted = torch.zeros_like(slab)
    for (name, inputs, outputs), row in zip(modules, offsets.tolist(), strict=True):
        f = adapter.factors.get(name)
        if f is None:
            assert row == [0, 0, 0, 0]
            continue
        down, up, R, bits = row
        assert down % 256 == up % 256 == 0
        assert f.rank <= R < f.rank + 8
        assert R % 8 == 0
        assert numpy.int64(bits).astype(numpy.uint32).view(numpy.float32) == numpy.float32(f.scale)
        matrix(wanted, down, R, inputs, dtype)[: f.rank] = f.down.to(dtype)
        matrix(wanted, up, R, outputs, dtype)[: f.rank] = f.up.T.to(dtype)
    assert torch.equal(slab, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_a_slab_holds_the_factors(dtype, source) -> None:
    layout = SlabLayout(MODULES, dtype)
    for ranks in ({"q": 1}, {"head": 8, "q": 9}, dict.fromkeys(SHAPES, 16), {"down": 24, "k": 3}):
        adapter = make(1, ranks, (source,))
        slab, offsets = layout.make(adapter)
        check_slab(slab, offsets, adapter, dtype)


def test_dtypes_may_be_mixed() -> None:
    adapter = make(2, {"head": 3, "q": 5, "k": 1, "up": 7, "down": 2}, DTYPES)
    for dtype in DTYPES:
        check_slab(*SlabLayout(MODULES, dtype).make(adapter), adapter, dtype)


def test_adapters_of_one_shape_share_their_plan() -> None:
    layout = SlabLayout(MODULES, torch.float32)
    first, second = layout.make(make(1)), layout.make(make(2))
    assert first[1] is second[1]
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("ranks", "modules", "message"),
    [
        ({"q": 4}, [("k", 24, 8)], "got q, which it lacks"),
        ({"q": 4}, [("q", 24, 41)], r"q 24 -> 40 \(the model has 24 -> 41\)"),
        ({"q": 4}, [("q", 40, 24)], r"another base model"),
        (dict.fromkeys(SHAPES, 4), [("x", 1, 1)], "and 2 more, which it lacks"),
    ],
)
def test_the_wrong_model_is_named(ranks, modules, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SlabLayout(modules, torch.float32).make(make(0, ranks))


@pytest.mark.parametrize(
    ("modules", "dtype", "message"),
    [
        ([], torch.float32, "at least one"),
        ([("q", 1, 1), ("q", 1, 1)], torch.float32, "once"),
        ([("q", 0, 1)], torch.float32, "at least 1"),
        ([("q", 1, 1)], torch.float64, "got torch.float64"),
    ],
)
def test_layouts_out_of_contract(modules, dtype, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SlabLayout(modules, dtype)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(70000.0, torch.float16), (-65520.0, torch.float16), (3.4e38, torch.bfloat16)],
)
def test_numbers_beyond_the_dtype_are_refused(value: float, dtype) -> None:
    adapter = make()
    adapter.factors["up"].up[3, 2] = value
    with pytest.raises(ArgumentError, match="got 1 that become NaN or infinity"):
        SlabLayout(MODULES, dtype).make(adapter)
    store = AdapterStore(None)
    name = store.put(adapter)
    with pytest.raises(ArgumentError, match=f"{name}: .*got 1 that"):
        SlabLayout(MODULES, dtype).load(store, name)
    check_slab(*SlabLayout(MODULES, torch.float32).load(store, name), adapter, torch.float32)


# The one call that fills a slab, against its reference

SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 2.98e-8, 5.9e-8, 6.1e-5, 65504.0, 65519.9, 65520.0,
           -65536.0, 3.3895e38, 3.39e38, 3.4028e38, 1.00390625, 1.01171875, float("inf"),
           float("-inf"), float("nan")]  # fmt: skip


def jobs_of(data) -> tuple[numpy.ndarray, SlabJobs]:
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    source, jobs, at = b"", [], 0
    for _ in range(data.draw(st.integers(1, 4), label="jobs")):
        kind = data.draw(st.integers(0, 2), label="source dtype")
        rows = data.draw(st.sampled_from([1, 2, 7, 8, 16, 17, 33, 64, 100]), label="rows")
        columns = data.draw(st.sampled_from([1, 3, 8, 15, 16, 31, 64, 65]), label="columns")
        transposed = data.draw(st.booleans(), label="transposed")
        x = torch.randn(rows * columns, generator=torch.Generator().manual_seed(rows * columns))
        x *= 10.0 ** data.draw(st.integers(-9, 5), label="magnitude")
        for _ in range(data.draw(st.integers(0, 3), label="specials")):
            where = data.draw(st.integers(0, len(x) - 1))
            x[where] = data.draw(st.sampled_from(SPECIAL))
        source += b"\0" * data.draw(st.integers(0, 3), label="unaligned")
        height = (columns if transposed else rows) + data.draw(st.integers(0, 9), label="padding")
        width = rows if transposed else columns
        end = at + height * width * dtype.itemsize + data.draw(st.integers(0, 40), label="gap")
        jobs.append((len(source), kind, rows, columns, transposed, at, height, end))
        source += x.to(DTYPES[kind]).view(torch.uint8).numpy().tobytes()
        at = end
    return numpy.frombuffer(source, numpy.uint8), SlabJobs(numpy.array(jobs), dtype)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_filling_equals_its_reference(data) -> None:
    source, jobs = jobs_of(data)
    got, wanted = empty_slab(jobs.slab_bytes), empty_slab(jobs.slab_bytes)
    got[:], wanted[:] = 171, 205
    bad = fill_slab(got, source, jobs)
    assert bad == reference_fill(wanted, source, jobs)
    if not bad:  # what becomes of NaN is not promised
        assert torch.equal(got, wanted)


@pytest.mark.skipif(_native.missing() is not None, reason="the native core is not built")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_number_of_16_bits_and_many_of_32(isa: str) -> None:
    """The native conversions round as torch does: all fp16 and bf16, and fp32 around each fp16."""
    core = _native.core()
    if core.isas().get(isa) != "ready":
        pytest.skip(f"{isa}: {core.isas().get(isa)}")
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    centres = halves.view(torch.float16).float()
    centres = centres[centres.isfinite()]
    bits = centres.view(torch.int32)
    near = torch.cat([bits + d for d in (0, 1, -1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)])
    floats = near.view(torch.float32)
    before = core.isa()
    core.choose_isa(isa)
    try:
        for x in (halves.view(torch.float16), halves.view(torch.bfloat16), floats):
            x = x[x.isfinite()]
            source = x.view(torch.uint8).numpy()
            for dtype in DTYPES:
                n, kind = len(x), DTYPES.index(x.dtype)
                for rows, transposed in ((1, 0), (n, 1)):
                    size = n * dtype.itemsize
                    job = numpy.array([[0, kind, rows, n // rows, transposed, 0, 1, size]])
                    jobs = SlabJobs(job, dtype)
                    got, wanted = empty_slab(size), empty_slab(size)
                    bad = fill_slab(got, source, jobs)
                    assert bad == reference_fill(wanted, source, jobs)
                    good = wanted.view(dtype).isfinite()
                    assert torch.equal(got.view(dtype)[good], wanted.view(dtype)[good])
    finally:
        core.choose_isa(before)


def test_jobs_outside_of_the_buffers_are_refused() -> None:
    source, slab = numpy.zeros(64, numpy.uint8), empty_slab(256)
    good = [0, 0, 4, 4, 0, 0, 4, 256]
    jobs = SlabJobs(numpy.array([good]), torch.float32)
    assert fill_slab(slab, source, jobs) == 0
    for at, value in ((0, -1), (1, 3), (5, 240), (6, 3), (6, 99), (7, 63), (2, 5), (2, 2**40)):
        job = list(good)
        job[at] = value
        with pytest.raises(ArgumentError, match="between their bounds"):
            SlabJobs(numpy.array([job]), torch.float32)
    for table, dtype in (
        (numpy.array([good]), torch.float64),
        (numpy.array([good[:7]]), slab.dtype),
    ):
        with pytest.raises(ArgumentError):
            SlabJobs(table, dtype)
    for args in (
        (slab[:255], source),
        (slab, source[:63]),
        (slab.view(torch.int8), source),
        (slab, numpy.zeros(128, numpy.uint8)[::2]),
        (slab, source.view(numpy.int8)),
    ):
        with pytest.raises(ArgumentError):
            fill_slab(*args, jobs)


# The store


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters" if request.param == "folder" else None)


def same(a: Adapter, b: Adapter) -> bool:
    return digest(a) == digest(b) and a.card == b.card


def test_what_is_put_is_loaded(store: AdapterStore) -> None:
    adapters = [make(i, dtypes=DTYPES[: i % 3 + 1], card={"number": i}) for i in range(5)]
    names = [store.put(a) for a in adapters]
    assert names == [digest(a) for a in adapters]
    assert store.list() == sorted(names)
    assert store.put(adapters[0]) == names[0]
    for name, adapter in zip(names, adapters, strict=True):
        assert name in store
        assert same(store.load(name), adapter)
        assert store.card(name) == adapter.card
        assert store.check(name) is None
        for dtype in DTYPES:
            layout = SlabLayout(MODULES, dtype)
            source = StoredSlabs(store, layout)
            slab, offsets = source.load(name)
            check_slab(slab, offsets, adapter, dtype)
            assert len(slab) == source.num_bytes(name)
    assert store.stats() == {"bytes": store.num_bytes(), "budget": None, "adapters": 5}
    assert store.num_bytes() == sum(map(store.num_bytes, names))
    store.delete(names[0])
    assert names[0] not in store
    for act in (store.load, store.delete, store.open, store.check, store.num_bytes):
        with pytest.raises(NotFoundError, match="no adapter with this digest"):
            act(names[0])
    with pytest.raises(NotFoundError):
        store.load("../escape")
    removed = store.sweep({names[1]})
    assert sorted(removed) == sorted(names[2:])
    assert store.list() == [names[1]]


def test_large_adapters_are_read_in_pieces(store: AdapterStore) -> None:
    modules = [(f"layers.{i}.x", 512, 700) for i in range(12)]
    g = torch.Generator().manual_seed(0)
    factors = {
        name: Factors(
            torch.randn(16 + i, 512, generator=g), torch.randn(700, 16 + i, generator=g), 0.5
        )
        for i, (name, _, _) in enumerate(modules)
    }
    adapter = Adapter(factors, {})
    name = store.put(adapter)
    layout = SlabLayout(modules, torch.bfloat16)
    assert len(layout.plan(store.open(name).layers).by_leaf) > 1
    check_slab(*layout.load(store, name), adapter, torch.bfloat16, modules)
    assert same(store.load(name), adapter)


def test_a_folder_outlives_its_process(tmp_path: Path) -> None:
    adapter = make(card={"a": "b"})
    name = AdapterStore(tmp_path).put(adapter)
    again = AdapterStore(tmp_path, durable=False)
    assert again.list() == [name]
    assert same(again.load(name), adapter)
    assert same(read_adapter(tmp_path / name), adapter)


def test_peft_loads_a_stored_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT loads the folder")
    model = torch.nn.ModuleDict({n: torch.nn.Linear(i, o) for n, i, o in MODULES})
    adapter = Adapter(make().factors, {"task_type": None})
    name = AdapterStore(tmp_path).put(adapter)
    model.config = {"model_type": "none"}
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / name)
    for module, f in adapter.factors.items():
        layer = loaded.base_model.model[module]
        assert torch.equal(layer.lora_A["default"].weight, f.down)
        assert torch.equal(layer.lora_B["default"].weight, f.up)
        assert layer.scaling["default"] == f.scale


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    adapter = make(0, {"k": 2, "head": 1}, card={"base": "x"})
    store = AdapterStore(tmp_path)
    name = store.put(adapter)
    layout = SlabLayout(MODULES, torch.float32)
    slab = layout.load(store, name)[0]
    for file in (files.MODEL, files.CONFIG):
        path = tmp_path / name / file
        data = path.read_bytes()
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
            try:
                found = layout.load(store, name)[0]
            except StoreError as error:
                found = None
                message = str(error)
            if found is None:
                assert str(tmp_path / name) in message
                assert "damaged" in message
            else:  # a byte without meaning
                assert file == files.MODEL
                assert torch.equal(found, slab)
        for cut in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:cut])
            with pytest.raises(StoreError, match="damaged"):
                layout.load(store, name)
            assert name in store.check(name)
        path.unlink()
        with pytest.raises(StoreError, match=file):
            store.load(name)
        assert store.put(adapter) == name  # puts it in order
        assert store.check(name) is None
        assert same(store.load(name), adapter)
        assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def test_contents_under_another_digest_are_not_served(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    first, second = store.put(make(1)), store.put(make(2))
    store.load(first)
    os.replace(tmp_path / second / files.MODEL, tmp_path / first / files.MODEL)
    for act in (store.load, store.card):
        with pytest.raises(StoreError, match="damaged"):
            act(first)


def test_the_quota_is_hard(tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        size = AdapterStore(None).num_bytes()
        probe = AdapterStore(None if folder is None else tmp_path / "probe")
        size = probe.num_bytes(probe.put(make(0)))
        store = AdapterStore(None if folder is None else tmp_path / "s", disk_bytes=3 * size + 10)
        names = [store.put(make(i)) for i in range(3)]
        with pytest.raises(
            QuotaError, match=rf"disk_bytes={3 * size + 10}.*{3 * size} are taken by 3"
        ):
            store.put(make(3))
        assert store.list() == sorted(names)
        assert store.num_bytes() <= 3 * size + 10
        store.put(make(1))
        store.delete(names[0])
        store.put(make(3))


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits the size of files")
    store = AdapterStore(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StoreError, match="no space left"):
            store.put(make(0, {"up": 200}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == ["LOCK"]
    assert store.put(make(0, {"up": 200})) in store


def test_the_young_may_be_spared(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    old, young = store.put(make(1)), store.put(make(2))
    os.utime(tmp_path / old, (0, time.time() - 100))
    assert store.sweep(set(), older_than_s=50) == [old]
    assert store.list() == [young]
    assert store.sweep(set()) == [young]


# Crashes: a process that dies at the n-th call that changes the disk, for every n

_DRIVER = """
import builtins, os, sys
from pathlib import Path
import torch
from memos.adapters.adapter import Adapter, Factors
from memos.adapters.store import AdapterStore

def make(seed):
    torch.manual_seed(seed)
    return Adapter({"x": Factors(torch.randn(4, 6), torch.randn(5, 4), 1.0)}, {})

calls, die = 0, 0
def counted(act):
    def run(*args, **kwargs):
        global calls
        calls += 1
        if calls == die:
            os._exit(9)
        return act(*args, **kwargs)
    return run

ACTS = {
    "put": lambda store: store.put(make(2)),
    "delete": lambda store: store.delete(store.put(make(2))),
    "sweep": lambda store: store.sweep(()),
}
for name, act in ACTS.items():
    for n in range(1, 100):
        pid = os.fork()
        if not pid:
            folder = Path(sys.argv[1], name, str(n))
            AdapterStore(folder).put(make(1))
            for call in ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink"):
                setattr(os, call, counted(getattr(os, call)))
            builtins.open = counted(open)
            store = AdapterStore(folder)
            calls, die = 0, n
            act(store)
            os._exit(0)
        if os.waitpid(pid, 0)[1] == 0:
            break
"""


def test_a_killed_process_leaves_the_whole_or_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _DRIVER, str(tmp_path)], check=True)
    for act in ("put", "delete", "sweep"):
        folders = sorted((tmp_path / act).iterdir())
        assert 5 < len(folders) < 99
        counts = set()
        for folder in folders:
            store = AdapterStore(folder)
            counts.add(len(store.list()))
            for name in store.list():
                assert store.check(name) is None
                store.load(name)
            kept = store.put(make(3))
            store.sweep({kept})
            assert sorted(os.listdir(folder)) == sorted([kept, "LOCK"])
        assert len(counts) == 2  # before and after


def test_threads_and_processes_share_a_folder(tmp_path: Path) -> None:
    errors = []

    def work(first: int) -> None:
        try:
            store = AdapterStore(tmp_path, durable=False)
            for i in range(12):
                name = store.put(make((first + i) % 6))
                try:
                    assert digest(store.load(name)) == name
                    if i % 3 == first % 3:
                        store.delete(name)
                except NotFoundError:
                    pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    store = AdapterStore(tmp_path)
    assert all(store.check(name) is None for name in store.list())
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]
