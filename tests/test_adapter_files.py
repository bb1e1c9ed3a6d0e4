"""Adapters in PEFT's layout: what PEFT writes is read, what is written PEFT loads, and whatever is
damaged or more than low-rank factors is refused."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="adapters are torch tensors")

from blake3 import blake3  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from memos.adapters import files  # noqa: E402
from memos.adapters.adapter import Adapter, Factors  # noqa: E402
from memos.adapters.files import digest, read_adapter, write_adapter  # noqa: E402
from memos.errors import ArgumentError, StoreError  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = [f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.up_proj")]


def make(
    seed=0, names=NAMES, ranks=(4,), dtype=torch.float32, scale=2.0, inputs=24, outputs=40, **more
):
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for i, name in enumerate(names):
        R = ranks[i % len(ranks)]
        down = torch.randn(R, inputs, generator=g).to(dtype)
        up = torch.randn(outputs, R, generator=g).to(dtype)
        factors[name] = Factors(down, up, scale)
    return Adapter(factors, more.get("config", {}), more.get("card", {}))


def same(a: Adapter, b: Adapter) -> bool:
    return a.factors.keys() == b.factors.keys() and all(
        torch.equal(f.down, b.factors[n].down)
        and torch.equal(f.up, b.factors[n].up)
        and f.down.dtype == b.factors[n].down.dtype
        and math.isclose(f.scale, b.factors[n].scale, rel_tol=1e-7)
        for n, f in a.factors.items()
    )


# Files as another program writes them: every part can be wrong.

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(adapter: Adapter, form="base_model.model.{}.lora_{}.weight"):
    found = {}
    for name, f in adapter.factors.items():
        found[form.format(name, "A")] = f.down
        found[form.format(name, "B")] = f.up
    return found


CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def container(named, change=lambda header: None, extra=b"") -> bytes:
    header, payload = {}, b""
    for name, tensor in named.items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(payload), len(payload) + len(data)],
        }
        payload += data
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload + extra


def put_files(folder: Path, config=CONFIG, model: bytes | None = b"", **others: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    if config is not None:
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "adapter_config.json").write_bytes(text)
    if model is not None:
        (folder / "adapter_model.safetensors").write_bytes(model or container(tensors(make())))
    for name, data in others.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    card = {"base": "abc", "evaluation": {"recall": 0.5}, "text": 'quotes " and \u00fc'}
    adapter = make(ranks=(1, 8, 3), dtype=dtype, card=card, config={"base_model_name_or_path": "x"})
    write_adapter(tmp_path / "a", adapter)
    found = read_adapter(tmp_path / "a")
    assert same(found, adapter)
    assert found.card == card
    assert found.config["base_model_name_or_path"] == "x"
    assert digest(found) == digest(adapter)
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_several_dtypes_stand_in_one_file(tmp_path: Path) -> None:
    parts = [make(i, [NAMES[i]], (3,), d, inputs=5, outputs=7) for i, d in enumerate(DTYPES)]
    adapter = Adapter({k: v for p in parts for k, v in p.factors.items()}, {})
    write_adapter(tmp_path / "a", adapter)
    assert same(read_adapter(tmp_path / "a"), adapter)
    # The same tensors in an order that leaves some of them unaligned.
    named = dict(reversed(tensors(adapter).items()))
    put_files(tmp_path / "b", {**CONFIG, "r": 3, "lora_alpha": 6}, container(named))
    found = read_adapter(tmp_path / "b")
    assert same(found, adapter)
    assert digest(found) == digest(adapter)


# PEFT itself


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("transformers", reason="the model comes from it")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def peft_factors(model, name="default"):
    """What PEFT computes with, by layer: (A, B, scaling)."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and name in module.lora_A:
            A, B = module.lora_A[name].weight, module.lora_B[name].weight
            path = path.removeprefix("base_model.model.")
            found[path] = (A.detach(), B.detach(), module.scaling[name])
    return found


PEFT_CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"layers\.0\..*q_proj": 6, "q_proj": 3, "^model.layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"up_proj": 7, "0.self_attn.q_proj": 9},
    },
    "rslora patterns": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"proj": 5, "q_proj": 7},
        "alpha_pattern": {"layers.1.mlp.up_proj": 11},
    },
    "one layer": {"r": 4, "lora_alpha": 8, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("how", PEFT_CONFIGS)
def test_what_peft_saves_is_read(llama, tmp_path: Path, how: str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT writes the file")
    import copy

    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], **PEFT_CONFIGS[how])
    model = peft.get_peft_model(copy.deepcopy(llama), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    found, wanted = read_adapter(tmp_path), peft_factors(model)
    assert found.factors.keys() == wanted.keys()
    for name, (A, B, scale) in wanted.items():
        assert torch.equal(found.factors[name].down, A)
        assert torch.equal(found.factors[name].up, B)
        assert found.factors[name].scale == scale


@pytest.mark.parametrize("how", ["as read", "bare config", "wrong config", "mixed ranks"])
def test_peft_loads_what_is_written(llama, tmp_path: Path, how: str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT loads the file")
    import copy

    names = [n for n, m in llama.named_modules() if n.endswith(("q_proj", "down_proj"))]
    shapes = {n: (m.in_features, m.out_features) for n, m in llama.named_modules() if n in names}
    configs = {
        "as read": {**CONFIG, "target_modules": ["q_proj", "down_proj"]},
        "bare config": {},
        "wrong config": {**CONFIG, "r": 9, "target_modules": ["v_proj"], "use_rslora": True},
        "mixed ranks": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    }
    factors = {}
    for i, name in enumerate(names):
        R = 4 if how != "mixed ranks" else (1, 2, 8)[i % 3]
        scale = 2.0 if how != "mixed ranks" else (0.1, 1 / 3, 2.0)[i % 3]
        inputs, outputs = shapes[name]
        factors[name] = Factors(torch.randn(R, inputs), torch.randn(outputs, R), scale)
    write_adapter(tmp_path / "a", Adapter(factors, configs[how], {"base": "x"}))
    model = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "a")
    found = peft_factors(model)
    for name, f in factors.items():
        A, B, scale = found.pop(name)
        assert torch.equal(A, f.down)
        assert torch.equal(B, f.up)
        assert torch.tensor(scale) == torch.tensor(f.scale)
    assert all(not B.any() for _, B, _ in found.values())  # all-linear: the others add nothing


@pytest.mark.parametrize(
    "form",
    [
        "base_model.model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.default.weight",
        "{}.lora_{}.weight",
        "{}.lora_{}.my_adapter.weight",
    ],
)
def test_names_in_all_their_forms(tmp_path: Path, form: str) -> None:
    put_files(tmp_path / "a", model=container(tensors(make(), form)))
    assert same(read_adapter(tmp_path / "a"), make())


def test_peft_defaults_stand_where_the_config_is_silent(tmp_path: Path) -> None:
    put_files(tmp_path / "a", {"peft_type": "LORA"}, container(tensors(make(ranks=(8,)))))
    assert {f.scale for f in read_adapter(tmp_path / "a").factors.values()} == {1.0}


# Refusals: each says what it is about.

ONE = dict(list(tensors(make()).items())[:2])
A, B = ONE


def with_(name: str, tensor: torch.Tensor) -> bytes:
    return container({**ONE, name: tensor})


def header_with(**entry) -> bytes:
    def change(header):
        header[A] = {**header[A], **entry}

    return container(ONE, change)


F = torch.zeros
REFUSED = {
    "pickle": ({"model": None, "adapter_model__bin": b"x"}, r"adapter_model\.bin.*pickle"),
    "no model": ({"model": None}, r"adapter_model\.safetensors wanted"),
    "no config": ({"config": None}, r"adapter_config\.json wanted"),
    "config no JSON": ({"config": b"{"}, "JSON wanted"),
    "config no text": ({"config": b"\xff\xfe"}, "JSON wanted"),
    "config a list": ({"config": b"[]"}, "object wanted, got list"),
    "config NaN": ({"config": b'{"peft_type": "LORA", "lora_alpha": NaN}'}, "got NaN"),
    "config deep": ({"config": b'{"a":' + b"[" * 100_000}, "JSON wanted"),
    "config digits": ({"config": b'{"r": ' + b"9" * 100_000 + b"}"}, "digits"),
    "IA3": ({"config": {"peft_type": "IA3"}}, "'LORA' wanted, got 'IA3'"),
    "no type": ({"config": {"r": 4}}, "'LORA' wanted, got None"),
    "DoRA": ({"config": {**CONFIG, "use_dora": True}}, "use_dora"),
    "DoRA tensor": ({"model": with_(f"{Q}.lora_magnitude_vector", F(4))}, "DoRA"),
    "modules_to_save": ({"config": {**CONFIG, "modules_to_save": ["lm_head"]}}, "modules_to_save"),
    "bias": ({"config": {**CONFIG, "bias": "all"}}, "bias 'none' wanted, got 'all'"),
    "lora_bias": ({"config": {**CONFIG, "lora_bias": True}}, "lora_bias"),
    "bias tensor": ({"model": with_(f"{Q}.lora_B.bias", F(4))}, "a bias"),
    "parameters": ({"config": {**CONFIG, "target_parameters": ["w"]}}, "target_parameters"),
    "parameter tensor": ({"model": container(tensors(make(names=["mlp.w.base_layer"])))}, "bare"),
    "aLoRA": ({"config": {**CONFIG, "alora_invocation_tokens": [1, 2]}}, "alora_invocation_tokens"),
    "tokens": ({"config": {**CONFIG, "trainable_token_indices": [1]}}, "trainable_token_indices"),
    "replication": ({"config": {**CONFIG, "layer_replication": [[0, 2]]}}, "layer_replication"),
    "pissa": ({"config": {**CONFIG, "init_lora_weights": "pissa_niter_4"}}, "pissa_niter_4"),
    "olora": ({"config": {**CONFIG, "init_lora_weights": "olora"}}, "olora"),
    "kasa": ({"config": {**CONFIG, "kasa_config": {"x": 1}}}, "kasa_config"),
    "future": ({"config": {**CONFIG, "use_something": True}}, "use_something"),
    "experts": ({"model": container(tensors(make(names=["mlp.experts.0.up"])))}, "expert"),
    "embedding": ({"model": with_(f"{Q}.lora_embedding_A", F(4, 4))}, "an embedding"),
    "unknown": ({"model": with_(f"{Q}.lora_C.weight", F(4, 4))}, "lora_C.weight"),
    "A alone": ({"model": container({A: ONE[A]})}, "lora_B of .*q_proj wanted"),
    "B alone": ({"model": container({B: ONE[B]})}, "lora_A of .*q_proj wanted"),
    "nothing": ({"model": container({})}, "at least one layer"),
    "two names": (
        {"model": with_("model.layers.1.x.lora_A.other.weight", F(4, 4))},
        "one adapter wanted",
    ),
    "twice": ({"model": with_(A.removeprefix("base_model.model."), ONE[A])}, "each tensor once"),
    "twice in JSON": (
        {"model": container(ONE, lambda h: json.dumps(h).replace(B, A).encode())},
        "twice",
    ),
    "ranks differ": ({"model": container({**ONE, B: F(40, 5)})}, "of one rank"),
    "one axis": ({"model": container({**ONE, A: F(96)})}, "of one rank"),
    "three axes": ({"model": container({**ONE, A: F(4, 2, 12)})}, "of one rank"),
    "rank 0": ({"model": container({A: F(0, 24), B: F(40, 0)})}, "of one rank"),
    "rank 513": ({"model": container({A: F(513, 2), B: F(2, 513)})}, "at most 512 wanted, got 513"),
    "r 0": ({"config": {**CONFIG, "r": 0}}, "from 1 to 512 wanted, got 0"),
    "r 513": ({"config": {**CONFIG, "rank_pattern": {"q_proj": 513}}}, "got 513"),
    "r true": ({"config": {**CONFIG, "r": True}}, "got True"),
    "alpha text": ({"config": {**CONFIG, "lora_alpha": "8"}}, "lora_alpha: a finite number"),
    "r of others": ({"config": {**CONFIG, "r": 5}}, "rank 5 wanted .* got 4"),
    "no pattern": ({"config": {**CONFIG, "rank_pattern": {"(": 4}}}, "regular expressions wanted"),
    "patterns a list": ({"config": {**CONFIG, "alpha_pattern": [1]}}, "an object wanted"),
    "dtypes differ": ({"model": container({**ONE, B: ONE[B].half()})}, "one dtype wanted"),
    "fp64": ({"model": container({**ONE, A: ONE[A].double()})}, "F32, F16, BF16 wanted, got 'F64'"),
    "NaN": ({"model": container({**ONE, A: ONE[A] * math.nan})}, "infinity in lora_A of .*q_proj"),
    "inf": ({"model": container({**ONE, B: ONE[B] / 0})}, "infinity in lora_B"),
    "empty file": ({"model": b"\0"}, "a safetensors file wanted, got 1 bytes"),
    "header too long": ({"model": struct.pack("<Q", 2**63) + b"{}"}, "got 9223372036854775808"),
    "header past the end": ({"model": struct.pack("<Q", 99) + b"{}"}, "cut off"),
    "header no JSON": ({"model": struct.pack("<Q", 4) + b"{,,}"}, "JSON wanted"),
    "header a list": ({"model": struct.pack("<Q", 2) + b"[]"}, "object wanted"),
    "payload cut": ({"model": container(ONE)[:-1]}, "cut off"),
    "payload long": ({"model": container(ONE, extra=b"x")}, "bytes too many"),
    "overlap": ({"model": header_with(data_offsets=[4, 388])}, "gap|overlap"),
    "outside": ({"model": header_with(data_offsets=[2**40, 2**40 + 384])}, "gap|overlap"),
    "backwards": ({"model": header_with(data_offsets=[384, 0])}, "between its offsets"),
    "size": ({"model": header_with(shape=[5, 24])}, "between its offsets"),
    "huge shape": ({"model": header_with(shape=[2**17] * 60)}, "between its offsets"),
    "negative": ({"model": header_with(shape=[-4, -24])}, "integers from 0 wanted"),
    "float shape": ({"model": header_with(shape=[4.0, 24])}, "integers from 0 wanted"),
    "dtype a list": ({"model": header_with(dtype=["F32"])}, "dtype one of"),
    "more keys": ({"model": header_with(other=1)}, "dtype, shape and data_offsets"),
    "no entry": ({"model": container(ONE, lambda h: {**h, "x": 3})}, "data_offsets of x wanted"),
    "metadata": ({"model": container(ONE, lambda h: {**h, "__metadata__": {"a": 1}})}, "strings"),
    "card": (
        {"model": container(ONE, lambda h: {**h, "__metadata__": {"memos": "no"}})},
        "card: JSON",
    ),
    "control": ({"model": container({A.replace("q_", "\n"): ONE[A], B: ONE[B]})}, "printable"),
    "surrogate": (
        {"model": container({A.replace("q_", "\ud800"): ONE[A], B: ONE[B]})},
        "printable",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(tmp_path: Path, what: str) -> None:
    parts, message = REFUSED[what]
    put_files(tmp_path / "a", **parts)
    with pytest.raises(ArgumentError) as caught:
        read_adapter(tmp_path / "a")
    said = str(caught.value).replace(str(tmp_path), "")  # the folder is named after the case
    assert re.search(message, said, re.DOTALL)
    assert len(said) < 900


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a folder with adapter_config"):
        read_adapter(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {}, "at least one layer"),
        (lambda f: {"experts.0": f}, "expert"),
        (lambda f: {"": f}, "names of layers"),
        (lambda f: {"x": Factors(f.down, f.up.half(), 1.0)}, "one dtype"),
        (lambda f: {"x": Factors(f.down.double(), f.up.double(), 1.0)}, "one dtype"),
        (lambda f: {"x": Factors(f.down, f.up.T, 1.0)}, "of one rank"),
        (lambda f: {"x": Factors(f.down, f.up, math.inf)}, "finite scale"),
        (lambda f: {"x": Factors(f.down, f.up, 1e39)}, "finite scale"),
        (lambda f: {"x": Factors(f.down / 0, f.up, 1.0)}, "infinity in lora_A of x"),
        (lambda f: {"x": Factors(torch.ones(513, 2), torch.ones(2, 513), 1.0)}, "at most 512"),
    ],
)
def test_what_may_not_be_written(tmp_path: Path, change, message: str) -> None:
    factors = change(next(iter(make().factors.values())))
    with pytest.raises(ArgumentError, match=message):
        write_adapter(tmp_path / "a", Adapter(factors, {}))
    assert not os.listdir(tmp_path)


def test_config_and_card_must_be_json_of_lora(tmp_path: Path) -> None:
    for more in ({"config": {"use_dora": True}}, {"card": {"x": math.nan}}, {"card": {"x": {1}}}):
        with pytest.raises(ArgumentError):
            write_adapter(tmp_path / "a", make(**more))
    assert not os.listdir(tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", make(0))
    with pytest.raises(ArgumentError, match="new or empty folder"):
        write_adapter(tmp_path / "a", make(1))
    assert same(read_adapter(tmp_path / "a"), make(0))
    with pytest.raises(ArgumentError, match="to write into"):
        write_adapter(tmp_path / "b" / "c", make(1))


# Digests


def test_the_digest_is_of_what_is_computed(tmp_path: Path) -> None:
    adapter = make(card={"a": 1})
    reordered = dict(reversed(adapter.factors.items()))
    views = {n: Factors(f.down.T.contiguous().T, f.up, f.scale) for n, f in reordered.items()}
    assert digest(Adapter(views, {"r": 4}, {})) == digest(adapter)
    assert len(digest(adapter)) == 64
    first = NAMES[0]
    f = adapter.factors[first]
    bits = f.down.view(torch.int32).clone()
    bits[0, 0] ^= 1
    for other in (
        {**adapter.factors, first: Factors(bits.view(torch.float32), f.up, f.scale)},
        {**adapter.factors, first: Factors(f.down, f.up, f.scale + 1e-6)},
        {**adapter.factors, first: Factors(f.down, f.up.view(40, 4).flip(0), f.scale)},
        {n + "x": f for n, f in adapter.factors.items()},
        {n: Factors(f.down.half(), f.up.half(), f.scale) for n, f in adapter.factors.items()},
        dict(list(adapter.factors.items())[1:]),
    ):
        assert digest(Adapter(other, {})) != digest(adapter)


def digest_of_file(folder: Path) -> str:
    """Written from docs/format/adapter.md alone."""
    data = (folder / "adapter_model.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    assert (8 + n) % 64 == 0
    header, payload = json.loads(data[8 : 8 + n]), data[8 + n :]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert list(header)[-1] == "__metadata__"
    seal = json.loads(header.pop("__metadata__")["memos.seal"])
    layers = {}
    for name, entry in header.items():
        layer, which = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()
        layers.setdefault(layer, {})[which] = entry
    table, leaves, leaf, at = [], b"", b"", 0
    for layer in sorted(layers, key=lambda x: (layers[x]["A"]["dtype"] != "F32", x)):
        (R, inputs), (outputs, _) = (layers[layer][which]["shape"] for which in "AB")
        alpha = config["lora_alpha"]
        for key, value in config.get("alpha_pattern", {}).items():
            if re.match(rf"(.*\.)?({key})$", layer):
                alpha = value
                break
        bits = struct.unpack("<I", struct.pack("<f", alpha / R))[0]
        table.append([layer, R, inputs, outputs, layers[layer]["A"]["dtype"], bits])
        for which in "AB":
            start, end = layers[layer][which]["data_offsets"]
            assert start == at
            leaf += payload[start:end]
            at = end
        if len(leaf) >= 1 << 20:
            leaves += blake3(leaf).digest()
            leaf = b""
    leaves += blake3(leaf).digest() if leaf else b""
    text = json.dumps(table, separators=(",", ":")).encode()
    length = len(text).to_bytes(8, "little")
    found = blake3(b"memos adapter 1\n" + length + text + leaves).hexdigest()
    assert found == seal["digest"]
    return found


def test_the_page_on_the_format_says_enough(tmp_path: Path) -> None:
    mixed = [
        make(i, [f"{n}.{i}" for n in NAMES], (3, 5), d, scale=0.3) for i, d in enumerate(DTYPES)
    ]
    several = Adapter({k: v for part in mixed for k, v in part.factors.items()}, {})
    large = make(1, [f"x.{i}.\u00e9" for i in range(7)], (64, 128), inputs=1024, outputs=700)
    for i, adapter in enumerate((several, large, make())):
        write_adapter(tmp_path / str(i), adapter)
        assert digest_of_file(tmp_path / str(i)) == digest(adapter)


def test_any_scale_survives_the_file(tmp_path: Path) -> None:
    for i, scale in enumerate((0.1, 1 / 3, math.pi * 1e-20, -2.5, 0.0, 3e38, 1 - 2**-25)):
        adapter = make(scale=scale, ranks=(3, 7))
        write_adapter(tmp_path / str(i), adapter)
        assert digest(read_adapter(tmp_path / str(i))) == digest(adapter)


# Damage: equal tensors or an error, never a crash, never other numbers.


def damaged_read(folder: Path, wanted: Adapter) -> None:
    try:
        found = read_adapter(folder)
    except (ArgumentError, StoreError):
        return
    assert same(found, wanted)
    assert found.card == wanted.card


def test_every_truncation_is_found(tmp_path: Path) -> None:
    adapter = make(names=NAMES[:2], inputs=8, outputs=8)
    write_adapter(tmp_path / "a", adapter)
    for name in (files.MODEL, files.CONFIG):
        path = tmp_path / "a" / name
        data = path.read_bytes()
        for n in range(len(data)):
            path.write_bytes(data[:n])
            if name == files.CONFIG and not data[n:].strip():
                continue
            with pytest.raises(ArgumentError):
                read_adapter(tmp_path / "a")
        path.write_bytes(data)
    assert same(read_adapter(tmp_path / "a"), adapter)


def test_every_flipped_byte_of_ours(tmp_path: Path) -> None:
    adapter = make(names=NAMES[:2], ranks=(2,), inputs=4, outputs=4, card={"base": "abc"})
    write_adapter(tmp_path / "a", adapter)
    for name in (files.MODEL, files.CONFIG):
        path = tmp_path / "a" / name
        data = path.read_bytes()
        for at in range(len(data)):
            for flip in (0x01, 0x80, 0x20):
                path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
                damaged_read(tmp_path / "a", adapter)
        path.write_bytes(data)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_damage_never_crashes(tmp_path: Path, data) -> None:
    """Of files without a seal: flipped numbers cannot be seen, all else must be sound."""
    good = container(tensors(make(names=NAMES[:2], ranks=(2,), inputs=4, outputs=4)))
    n = len(good)
    pieces = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(pieces) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "drop", "digit"]))
        if how == "flip":
            pieces[at] ^= data.draw(st.integers(1, 255))
        elif how == "cut":
            del pieces[at:]
            pieces += b"\0"
        elif how == "insert":
            pieces[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif how == "drop":
            del pieces[at : at + data.draw(st.integers(1, 8))]
            pieces += b"\0" * (not pieces)
        else:
            digits = [i for i in range(8, min(len(pieces), n)) if chr(pieces[i]).isdigit()]
            if digits:
                pieces[data.draw(st.sampled_from(digits))] = data.draw(st.integers(48, 57))
    put_files(tmp_path / "a", {**CONFIG, "r": 2, "lora_alpha": 4}, bytes(pieces))
    try:
        found = read_adapter(tmp_path / "a")
    except ArgumentError:
        return
    for f in found.factors.values():
        assert f.down.shape[0] == f.up.shape[1] == f.rank
        assert f.down.isfinite().all()
        assert f.up.isfinite().all()
