"""Every backend of every op equals the op's reference, bit for bit, on one table of cases."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="the ops work on torch tensors")

from memos import kernels  # noqa: E402
from memos.errors import ArgumentError, BackendError  # noqa: E402
from memos.kernels import Codec, _native  # noqa: E402
from memos.kernels.hashing import hash_blocks  # noqa: E402

kernels.load_all()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODECS = (
    "raw",
    "int8-g64",
    "int8-g32-rot",
    "int4-g64",
    "int4-g32-rot",
    "int2-g32",
    "int2-g64-rot",
    "fp8-g64",
    "fp8-g32-rot",
    "k:int8-g64,v:int4-g32",
    "k:raw,v:int2-g32",
)


def spoil(x: torch.Tensor, how: str) -> torch.Tensor:
    """Put into x what breaks quantisers."""
    flat = x.view(-1)
    n = flat.numel()
    if how == "specials":
        for i, bad in enumerate((float("nan"), float("inf"), -float("inf"), 65535.0, -1e5, 3e38)):
            flat[(i * 7919) % n] = bad
            flat[(i * 104729 + n // 2) % n] = bad
    elif how == "constant":
        x[:] = -0.37
        x[..., ::3] = 0.0
    elif how == "tiny":
        x *= 1e-7
        flat[::5] = -0.0
    elif how == "all nan":
        x[:] = float("nan")
    elif how == "wide":
        x *= 30000
    elif how == "outliers":
        x[..., ::17] *= 100
    return x


def cache(dtype, L=2, N=3, P=64, H=2, Dk=64, Dv=64, how="", seed=0, layout="paged"):
    """L keys and L values as [N, P, H, D] views; transformers keeps [H, N * P, D]."""
    g = torch.Generator().manual_seed(seed)

    def one(D: int) -> torch.Tensor:
        if layout == "transformers":
            x = torch.randn(H, N * P, D, generator=g)
            return spoil(x, how).to(dtype).unflatten(1, (N, P)).permute(1, 2, 0, 3)
        return spoil(torch.randn(N, P, H, D, generator=g), how).to(dtype)

    return [one(Dk) for _ in range(L)], [one(Dv) for _ in range(L)]


SHAPES = {
    "one token": {"P": 1, "H": 1},
    "odd tokens": {"P": 37, "H": 3, "Dk": 80, "Dv": 96},
    "small head": {"P": 65, "Dk": 8, "Dv": 16},
    "unequal": {"P": 130, "H": 1, "Dk": 192, "Dv": 128},
    "large head": {"P": 32, "H": 1, "N": 2, "L": 1, "Dk": 576, "Dv": 512},
    "transformers": {"layout": "transformers", "H": 3},
    **{how: {"how": how, "N": 2} for how in
       ("specials", "constant", "tiny", "all nan", "wide", "outliers")},
    "specials, large": {"how": "specials", "P": 16, "Dk": 256, "Dv": 256, "H": 1, "N": 2},
    "specials, odd": {"how": "specials", "P": 33, "Dk": 40, "Dv": 24, "N": 2},
}  # fmt: skip


def kv_cases() -> Iterator[tuple[str, tuple]]:
    for shape, spec in SHAPES.items():
        for dtype in DTYPES:
            for name in CODECS:
                keys, values = cache(dtype, **spec)
                N = len(keys[0])
                for ids in ([N - 1, 0], [0] * 3 if shape == "one token" else []):
                    label = f"{shape}, {str(dtype)[6:]}, {name}, {len(ids)} blocks"
                    yield label, (keys, values, torch.tensor(ids, dtype=torch.int64), name)


def pack_cases() -> Iterator[tuple[str, tuple]]:
    for label, (keys, values, ids, name) in kv_cases():
        yield label, (keys, values, ids, Codec.parse(name))


def unpack_cases() -> Iterator[tuple[str, tuple]]:
    for label, (keys, values, ids, name) in kv_cases():
        if len(ids) == 3:
            continue  # ids must differ
        codec = Codec.parse(name)
        packed = kernels.pack_kv.reference(keys, values, ids, codec)
        target = [torch.zeros_like(t) for t in keys], [torch.zeros_like(t) for t in values]
        rows = kernels.PackedRows(packed) if "odd" in label else packed
        yield label, (*target, ids, rows, codec)


def block_cases() -> Iterator[tuple[str, tuple]]:
    for label, N, B, M, dtype in (
        ("one element", 1, 1, 1, torch.int8),
        ("none", 3, 5, 0, torch.float32),
        ("odd", 9, 127, 5, torch.int8),
        ("one past a vector", 9, 65, 7, torch.bfloat16),
        ("streamed", 5, 1 << 20, 5, torch.float32),
        ("streamed, odd", 5, (3 << 20) + 3, 4, torch.int8),
    ):
        g = torch.Generator().manual_seed(1)
        x = torch.randint(-100, 100, (N, B), generator=g).to(dtype)
        yield label, (x, torch.randperm(N, generator=g)[:M])


def write_cases() -> Iterator[tuple[str, tuple]]:
    for label, (x, ids) in block_cases():
        yield label, (x, ids, x.index_select(0, ids.flip(0)))


def hash_cases() -> Iterator[tuple[str, tuple]]:
    yield "none", ([], 4, b"k" * 32, bytes(32), b"i" * 32)
    yield "some", (list(range(1000)), 64, b"k" * 32, bytes(32), b"i" * 32)


def plan_cases() -> Iterator[tuple[str, tuple]]:
    for label, slots, num_slots in (
        ("none", [], 1),
        ("one", [0], 1),
        ("base alone", [-1, -1], 3),
        ("mixed", [i * 7 % 5 - 1 for i in range(100)], 6),
    ):
        yield label, (torch.tensor(slots, dtype=torch.int64), num_slots)


def rotate_cases() -> Iterator[tuple[str, tuple]]:
    g = torch.Generator().manual_seed(5)
    for D, R, T in ((64, 32, 9), (80, 16, 1), (128, 64, 33), (10, 5, 3), (6, 1, 2), (64, 32, 0)):
        for dtype in DTYPES:
            rows = torch.randn(2, 2, T, 3, D + 2, generator=g).to(dtype)
            keys = [row.permute(0, 2, 1, 3)[..., 2:] for row in rows]
            old, new = torch.randint(-5, 1 << 20, (2, T), generator=g)
            inv_freq = 10000 ** -torch.arange(0, 1, 1 / R)[:R]
            for interleaved in (False, True):
                label = f"{D}, {R}, {str(dtype)[6:]}, interleaved {interleaved}"
                yield label, (keys, old, new, inv_freq, interleaved)


def merge_cases() -> Iterator[tuple[str, tuple]]:
    g = torch.Generator().manual_seed(3)
    for dtype in DTYPES:
        factors = (torch.randn(*shape, generator=g) for shape in ((9, 33), (8, 33), (9, 8)))
        yield str(dtype), (*(x.to(dtype) for x in factors), 0.5)


CASES = {
    "gather_blocks": block_cases,
    "write_blocks": write_cases,
    "pack_kv": pack_cases,
    "unpack_kv": unpack_cases,
    "rotate_positions_": rotate_cases,
    "hash_blocks": hash_cases,
    "plan_adapters": plan_cases,
    "merge_adapter": merge_cases,
}
# Sums in another order are not bit-equal: its cases and their tolerance stand in that file.
ELSEWHERE = {"apply_adapters_": "test_adapter_ops.py"}


def test_every_op_has_cases() -> None:
    assert {*CASES, *ELSEWHERE} == set(kernels.ops)


def isas() -> list[str]:
    # avx512bf16 has all kernels but that of test_adapter_ops.py from avx512.
    return ["avx512", "avx2", "baseline"] if _native.missing() is None else ["native"]


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if (why := _native.missing()) is not None:
        pytest.skip(why)
    if (why := _native.isas().get(request.param, "not built for this processor")) != "ready":
        pytest.skip(f"{request.param}: {why}")
    before = _native.isa()
    _native.core().choose_isa(request.param)
    yield request.param
    _native.core().choose_isa(before)


def bytes_of(x: object) -> object:
    """Tensors as bytes (NaN equals itself); what is no tensor is left out."""
    if isinstance(x, torch.Tensor):
        return x.contiguous().view(torch.uint8)
    if isinstance(x, kernels.AdapterPlan):
        x = [x.order, x.starts, torch.tensor([x.tokens])]
    return [bytes_of(y) for y in x] if isinstance(x, list | tuple) else None


def same(a: object, b: object) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", list(CASES))
def test_cpu_equals_reference(name: str, isa: str) -> None:
    op = kernels.ops[name]
    if "cpu" not in op.backends:
        pytest.skip(f"{name} has no cpu backend beside its reference")
    for label, args in CASES[name]():
        theirs, ours = copy.deepcopy(args), copy.deepcopy(args)
        want = op.reference(*theirs)
        with kernels.using("cpu"):
            got = op(*ours)
        for what, a, b in (("result", got, want), ("arguments", ours, theirs)):
            assert same(bytes_of(a), bytes_of(b)), f"{label}: the {what} differ"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_writes_nothing_beside_its_channels(dtype: torch.dtype, isa: str) -> None:
    for D, R, interleaved in ((64, 32, False), (64, 20, True), (35, 17, False), (9, 4, True)):
        room = torch.randn(2, 3, 5, D + 7).to(dtype)
        before, key = room.clone(), room[:, 1:, :, 3 : 3 + D]
        at = torch.arange(5)
        with kernels.using("cpu"):
            kernels.rotate_positions_([key], at, at + 9, torch.rand(R), interleaved)
        assert not torch.equal(key[..., : 2 * R], before[:, 1:, :, 3 : 3 + 2 * R])
        room[:, 1:, :, 3 : 3 + 2 * R] = before[:, 1:, :, 3 : 3 + 2 * R]
        assert torch.equal(room, before), f"{D}, {R}, {interleaved}"


def test_packed_rows() -> None:
    """Rows stay where they are; a copy has its own; what does not fit is refused."""
    blocks = [torch.arange(24, dtype=torch.uint8).view(3, 8) + 100 * i for i in range(2)]
    layers = kernels.PackedRows.split_layers(blocks, 3)
    assert [len(rows) for rows in layers] == [2, 2, 2]
    for i, rows in enumerate(layers):
        assert [r.data_ptr() for r in rows] == [b[i].data_ptr() for b in blocks]
        assert all(torch.equal(r, b[i : i + 1]) for r, b in zip(rows, blocks, strict=True))
        assert list(rows[1:].addresses) == [blocks[1][i].data_ptr()]
    both = layers[0] + layers[1][:1]
    assert [r.tolist()[0][0] for r in both] == [0, 100, 8]
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert [r.tolist() for r in twin] == [r.tolist() for r in both]
        assert list(twin.addresses) == [r.data_ptr() for r in twin]
        assert not set(twin.addresses) & set(both.addresses)
    both.extend([torch.zeros(1, 8, dtype=torch.uint8)])
    assert len(both) == 4
    assert len(layers[0]) == 2
    for bad in (torch.zeros(1, 9, dtype=torch.uint8), torch.zeros(1, 8), both[0].expand(2, 8)):
        with pytest.raises(ArgumentError, match="packed"):
            both.extend([bad])
    with pytest.raises(ArgumentError, match="packed"):
        layers[0] + kernels.PackedRows([torch.zeros(1, 9, dtype=torch.uint8)])
    with pytest.raises(ArgumentError, match="packed"):
        kernels.PackedRows.split_layers(blocks, 4)
    assert [len(rows) for rows in kernels.PackedRows.split_layers([], 2)] == [0, 0]


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_threads_do_not_change_bytes(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOS_THREADS", threads)
    keys, values = cache(torch.bfloat16, L=3, N=24, H=4)
    ids = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    codec = Codec.parse("int4")
    packed = kernels.pack_kv(keys, values, ids, codec)
    assert torch.equal(packed, kernels.pack_kv.reference(keys, values, ids, codec))
    target = [torch.zeros_like(t) for t in keys], [torch.zeros_like(t) for t in values]
    kernels.unpack_kv(*target, ids, packed, codec)
    again = [torch.zeros_like(t) for t in keys], [torch.zeros_like(t) for t in values]
    kernels.unpack_kv.reference(*again, ids, packed, codec)
    assert torch.equal(torch.stack(target[0]), torch.stack(again[0]))
    assert torch.equal(torch.stack(target[1]), torch.stack(again[1]))


def test_nothing_outside_the_blocks_is_written(isa: str) -> None:
    """Guard tokens between the heads and around the packed bytes keep their marks."""
    keys, values = cache(torch.bfloat16, L=1, N=2, P=33, H=2, Dk=72, Dv=40)
    for name in CODECS:
        codec = Codec.parse(name)
        packed = kernels.pack_kv(keys, values, torch.tensor([0, 1]), codec)
        guarded = [torch.full((2, 35, 3, D), 7.0, dtype=torch.bfloat16) for D in (72, 40)]
        views = [[g[:, 1:34, :2]] for g in guarded]
        kernels.unpack_kv(*views, torch.tensor([0, 1]), packed, codec)
        for g in guarded:
            assert (g[:, 0] == 7).all()
            assert (g[:, 34] == 7).all()
            assert (g[:, :, 2] == 7).all()


@pytest.mark.parametrize("name", [n for n in CODECS if n != "raw"])
def test_specials_decode_to_finite_numbers(name: str) -> None:
    """NaN counts as 0; what is beyond fp16 as +-65504; the rest of the block keeps its error."""
    keys, values = cache(torch.float32, L=1, N=1, how="specials")
    codec = Codec.parse(name)
    ids = torch.tensor([0])
    packed = kernels.pack_kv(keys, values, ids, codec)
    out = [torch.empty_like(keys[0])], [torch.empty_like(values[0])]
    kernels.unpack_kv(*out, ids, packed, codec)
    for (decoded,), scheme in zip(out, (codec.key, codec.value), strict=True):
        assert scheme.kind == "raw" or torch.isfinite(decoded).all()


def test_error_is_within_half_a_step() -> None:
    """|x - decode(encode(x))| <= scale / 2 + the rounding of the target, unrotated integers."""
    keys, values = cache(torch.float32, L=1, N=1, P=64)
    for name, levels in (("int8-g64", 255), ("int4-g64", 15), ("int2-g64", 3)):
        codec = Codec.parse(name)
        ids = torch.tensor([0])
        out = [torch.empty_like(keys[0])], [torch.empty_like(values[0])]
        kernels.unpack_kv(*out, ids, kernels.pack_kv(keys, values, ids, codec), codec)
        for x, y, dim in ((keys[0], out[0][0], 1), (values[0], out[1][0], 3)):
            step = (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)) / levels
            assert ((x - y).abs() <= step * 0.502 + 1e-3 / levels).all(), name


def test_constant_groups_decode_to_their_value() -> None:
    keys, values = [torch.full((1, 64, 1, 64), -1.5)], [torch.full((1, 64, 1, 64), 0.25)]
    for name in ("int8-g64", "int4-g32", "int2-g64", "fp8-g64"):
        codec = Codec.parse(name)
        out = [torch.empty_like(keys[0])], [torch.empty_like(values[0])]
        ids = torch.tensor([0])
        kernels.unpack_kv(*out, ids, kernels.pack_kv(keys, values, ids, codec), codec)
        exact = name != "fp8-g64"  # fp8 rounds its scale up to fp16: 2^-11 of the value
        for x, y in ((keys, out[0]), (values, out[1])):
            torch.testing.assert_close(y[0], x[0], rtol=0 if exact else 1e-3, atol=0)


def test_raw_is_bit_equal_and_sizes_agree() -> None:
    for dtype in DTYPES:
        keys, values = cache(dtype, how="specials", H=3, Dk=7, Dv=5)
        codec = Codec.parse("raw")
        ids = torch.tensor([1, 2, 0])
        packed = kernels.pack_kv(keys, values, ids, codec)
        assert packed.shape[2] == codec.layer_bytes(64, 3, 7, 5, keys[0].element_size())
        out = [torch.empty_like(t) for t in keys], [torch.empty_like(t) for t in values]
        kernels.unpack_kv(*out, ids, packed, codec)
        for x, y in zip([*keys, *values], [*out[0], *out[1]], strict=True):
            assert torch.equal(bytes_of(x), bytes_of(y))


ONE = torch.tensor([0])


def pack(k, v, c, ids=ONE):
    kernels.pack_kv(k, v, ids, c)


def unpack(k, v, c, *shape):
    kernels.unpack_kv(k, v, ONE, torch.zeros(*shape, dtype=torch.uint8), c)


BAD_CALLS = {
    "id beyond": (lambda k, v, c: pack(k, v, c, ids=ONE + 3), r"\[0, 3\)"),
    "negative id": (lambda k, v, c: pack(k, v, c, ids=ONE - 1), r"\[0, 3\)"),
    "ids int32": (lambda k, v, c: pack(k, v, c, ids=ONE.int()), "int64 wanted, got int32"),
    "layers": (lambda k, v, c: pack(k, v[:1], c), "got 2 and 1"),
    "no layers": (lambda k, v, c: pack([], [], c), "got 0 and 0"),
    "dtype": (lambda k, v, c: pack(k, [x.half() for x in v], c), r"float32 wanted, got float16"),
    "heads": (lambda k, v, c: pack(k, [x[:, :, :1] for x in v], c), r"axis 2 is 1, but K = 2"),
    "stride": (lambda k, v, c: pack([x[..., ::2] for x in k], v, c), "stride 1"),
    "head size": (lambda k, v, c: pack([x[..., :20] for x in k], v, c), "multiple of 8"),
    "rows": (lambda k, v, c: unpack(k, v, c, 2, 2, 9), "M = 1 rows wanted, got 2"),
    "row bytes": (lambda k, v, c: unpack(k, v, c, 1, 2, 9), "uint8 rows of shape"),
    "codec": (lambda k, v, c: pack(k, v, "int4"), "a Codec wanted, got str"),
    "gather": (lambda k, v, c: kernels.gather_blocks(torch.zeros(3, 4), ONE + 3), "range"),
    "write": (
        lambda k, v, c: kernels.write_blocks(torch.zeros(3, 4), ONE, torch.zeros(1, 5)),
        "axis 1 is 5, but B = 4",
    ),
}


@pytest.mark.parametrize("what", list(BAD_CALLS))
def test_bad_arguments_are_named(what: str) -> None:
    call, message = BAD_CALLS[what]
    keys, values = cache(torch.float32)
    with pytest.raises(ArgumentError, match=message):
        call(keys, values, Codec.parse("int4"))


def test_codec_names() -> None:
    for name in CODECS:
        assert Codec.parse(name).name == name
    assert Codec.parse("int4").bits(64, 3, 64, 64, 2) == 4.5
    assert Codec.parse("int8").bits(64, 3, 64, 64, 2) == 8.5
    for bad in ("int5", "int4-g16", "k:int4", "", "int4-rot"):
        with pytest.raises(ArgumentError):
            Codec.parse(bad)


def test_forcing_a_backend() -> None:
    x, ids = torch.zeros(2, 3), torch.tensor([1])
    with kernels.using("reference"):
        kernels.gather_blocks(x, ids)
    with kernels.using("nonsense"), pytest.raises(BackendError, match="nonsense"):
        kernels.gather_blocks(x, ids)


def test_hash_chain() -> None:
    """Keys are equal exactly where secret, identity and every token up to there are."""
    secret, identity, zero = b"s" * 32, b"i" * 32, bytes(32)
    tokens = list(range(300))
    keys = hash_blocks(tokens, 64, secret, zero, identity)
    assert len(keys) == 4
    assert len(set(keys)) == 4
    assert hash_blocks(tokens[:256], 64, secret, zero, identity) == keys
    assert hash_blocks(tokens[64:], 64, secret, keys[0], identity) == keys[1:]
    changed = [*tokens[:70], -1 + 10**6, *tokens[71:]]
    other = hash_blocks(changed, 64, secret, zero, identity)
    assert [a == b for a, b in zip(keys, other, strict=True)] == [True, False, False, False]
    assert not set(keys) & set(hash_blocks(tokens, 64, b"t" * 32, zero, identity))
    assert not set(keys) & set(hash_blocks(tokens, 64, secret, zero, b"j" * 32))
    for bad in ([-1], [2**63], ["a"], [1.5]):
        with pytest.raises(ArgumentError):
            hash_blocks(bad, 1, secret, zero, identity)
    with pytest.raises(ArgumentError, match="secret: 32 bytes wanted, got 3"):
        hash_blocks(tokens, 64, b"abc", zero, identity)
