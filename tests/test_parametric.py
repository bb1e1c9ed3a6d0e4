"""ParametricMemory: adapters as cubes, under a model, beside PEFT."""

from __future__ import annotations

import contextvars
import copy
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="adapters work on torch models")
pytest.importorskip("peft", reason="adapters are compared with PEFT's own")

from memos import MOS, GeneralTextMemory, KVCacheMemory, ParametricMemory  # noqa: E402
from memos.doctor import examine  # noqa: E402
from memos.errors import ArgumentError, NotFoundError, StoreError  # noqa: E402

from . import models, peft_adapters  # noqa: E402
from .peft_adapters import build, peft_logits, save_adapter  # noqa: E402

IDS = models.prompt(9)


def logits(model: Any, ids: Any = IDS) -> Any:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters for the tiny Llama."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "medical": save_adapter(root / "medical", seed=1),
        "legal": save_adapter(root / "legal", seed=2, r=8, lora_alpha=4),
        "small": save_adapter(root / "small", seed=3, r=1, target_modules=["q_proj", "v_proj"]),
    }


@pytest.fixture
def skills(folders: dict[str, Path]) -> Any:
    """A memory with three adapters."""
    memory = MOS().register_memory(ParametricMemory("skills", embedder=None))
    for name, folder in folders.items():
        memory.add(folder, {"name": name})
    return memory


# Beside PEFT.


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "phi3"])
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    folder, model = save_adapter(tmp_path / "one", name), build(name)
    plain, want = logits(model), peft_logits(folder, build(name), IDS)
    memory = MOS().register_memory(ParametricMemory("skills", embedder=None)).attach(model)
    memory.add(folder)
    with memory.use("one"):
        got = logits(model)
    scale = want.abs().max()
    assert (got - want).abs().max() <= 2e-5 * scale
    assert (plain - want).abs().max() > 0.2 * scale
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "phi3"])
def test_bf16_is_as_near_to_the_truth_as_peft(name: str, tmp_path: Path) -> None:
    """Of factors that bf16 holds; others are rounded to it when they are loaded."""
    folder = save_adapter(tmp_path / "one", name, as_dtype=torch.bfloat16)
    model = build(name, torch.bfloat16)
    exact = build(name, torch.bfloat16).float()
    truth = peft_logits(folder, exact, IDS)
    theirs = peft_logits(folder, build(name, torch.bfloat16), IDS).float()
    memory = MOS().register_memory(ParametricMemory("skills", embedder=None)).attach(model)
    memory.add(folder)
    with memory.use("one"):
        ours = logits(model).float()
    error, their_error = ((x - truth).square().mean().sqrt() for x in (ours, theirs))
    assert error <= 1.25 * their_error
    assert error <= 0.02 * truth.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}},
        {"alpha_pattern": {"down_proj": 31}},
        {"target_modules": ["o_proj"], "layers_to_transform": [1]},
        {"r": 1},
        {"r": 33, "target_modules": ["gate_proj"]},
    ],
    ids=str,
)
def test_what_the_config_says(options: dict[str, Any], tmp_path: Path) -> None:
    folder, model = save_adapter(tmp_path / "one", **options), build("llama")
    want = peft_logits(folder, build("llama"), IDS)
    memory = MOS().register_memory(ParametricMemory("skills", embedder=None)).attach(model)
    memory.add(folder)
    with memory.use("one"):
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


# Rows.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_mixed_batch_is_the_row_alone(skills: Any, dtype: Any) -> None:
    model = build("llama", dtype)
    skills.attach(model)
    names = ["medical", None, "small", "legal", "medical"]
    ids = torch.cat([models.prompt(9, seed=i) for i in range(5)])
    with skills.use_batch(names):
        mixed = logits(model, ids)
    for row, name in enumerate(names):
        with skills.use_batch([name] * 5):
            same = logits(model, ids)[row]
        assert torch.equal(mixed[row], same), name


def test_generate_with_a_mixed_batch(skills: Any) -> None:
    model = build("llama")
    skills.attach(model)
    ids = torch.cat([models.prompt(9)] * 3)
    names = ["medical", None, "legal"]
    options = {"max_new_tokens": 6, "do_sample": False}
    with skills.use_batch(names):
        got = model.generate(ids, **options)
        beams = model.generate(ids, num_beams=3, num_return_sequences=2, **options)
    for row, name in enumerate(names):
        with skills.use(name):
            assert model.generate(ids[:1], **options)[0].tolist() == got[row].tolist()
            one = model.generate(ids[:1], num_beams=3, num_return_sequences=2, **options)
        assert beams[2 * row : 2 * row + 2].tolist() == one.tolist()
    assert len({tuple(row.tolist()) for row in got}) == 3


def test_rows_that_do_not_fit_are_refused(skills: Any) -> None:
    model = build("llama")
    skills.attach(model)
    with skills.use_batch(["medical", None]):
        with pytest.raises(ArgumentError, match="as many adapters as rows wanted, got 2 for 3"):
            logits(model, torch.cat([IDS] * 3))
        layer = model.model.layers[0].self_attn.q_proj
        with pytest.raises(ArgumentError, match=r"whose tokens these are is not known"):
            layer(torch.zeros(4, 32))
    with pytest.raises(ArgumentError, match="a list with a name or None per row wanted"), \
            skills.use_batch("medical"):  # fmt: skip
        pass


# The model.


def test_detaching_gives_the_model_back(skills: Any) -> None:
    model = build("llama")
    before, plain = {k: dict(m.__dict__) for k, m in model.named_modules()}, logits(model)
    state = {k: (t.data_ptr(), t.clone()) for k, t in model.state_dict().items()}
    for _ in range(2):
        skills.attach(model)
        with skills.use("medical"):
            assert not torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
        skills.detach()
    assert torch.equal(logits(model), plain)
    assert {k: dict(m.__dict__) for k, m in model.named_modules()} == before
    for key, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[key][0]
        assert torch.equal(tensor, state[key][1])


def test_uses_nest(skills: Any) -> None:
    model = build("llama")
    skills.attach(model)
    plain = logits(model)
    with skills.use("medical"):
        medical = logits(model)
        with skills.use(None):
            assert torch.equal(logits(model), plain)
            with skills.use("legal"):
                legal = logits(model)
        assert torch.equal(logits(model), medical)
    assert not torch.equal(legal, medical)
    assert torch.equal(logits(model), plain)


def test_each_thread_has_its_own(skills: Any) -> None:
    model = build("llama")
    skills.attach(model)
    want = {}
    for name in ("medical", "legal", "small", None):
        with skills.use(name):
            want[name] = logits(model)
    wrong = []

    def run(name: str | None) -> None:
        for _ in range(20):
            with skills.use(name):
                if not torch.equal(logits(model), want[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_did_not_say_is_refused(skills: Any) -> None:
    model = build("llama")
    skills.attach(model)
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            logits(model)
        except ArgumentError as error:
            errors.append(error)

    with skills.use("medical"):
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
    assert "this thread has not said which adapter it wants" in str(errors[0])
    with skills.use("medical"):
        late = contextvars.copy_context()
        thread = threading.Thread(target=late.run, args=(logits, model))
        thread.start()
        thread.join()
    with pytest.raises(ArgumentError, match="has ended"):
        late.run(logits, model)


def test_a_copy_of_an_attached_model_is_refused(skills: Any) -> None:
    model = build("llama")
    skills.attach(model)
    with pytest.raises(ArgumentError, match="detach them first"):
        copy.deepcopy(model)
    skills.detach()
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_gradients_go_through(skills: Any, folders: dict[str, Path]) -> None:
    model = build("llama")
    skills.attach(model)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with skills.use("medical"):
        model(inputs_embeds=embeds).logits.square().sum().backward()
    ours = embeds.grad.clone()
    embeds.grad = None
    wrapped = peft_adapters.peft.PeftModel.from_pretrained(build("llama"), folders["medical"])
    wrapped(inputs_embeds=embeds).logits.square().sum().backward()
    torch.testing.assert_close(ours, embeds.grad, rtol=1e-3, atol=1e-2)


def test_attach_refuses(skills: Any) -> None:
    model = build("llama")
    skills.attach(model)
    with pytest.raises(ArgumentError, match="it is attached to a model"):
        skills.attach(build("llama"))
    other = MOS().register_memory(ParametricMemory("other", embedder=None))
    with pytest.raises(ArgumentError, match="one without adapters of memos wanted"):
        other.attach(model)
    with pytest.raises(ArgumentError, match="attach it to a model first"), other.use(None):
        pass
    config = peft_adapters.peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ArgumentError, match=r"unload\(\)"):
        other.attach(peft_adapters.peft.get_peft_model(build("llama"), config))
    with skills.use("medical"), pytest.raises(ArgumentError, match="no adapter in use wanted"):
        skills.detach()
    with pytest.raises(NotFoundError, match="no adapter 'nobody'"), skills.use("nobody"):
        pass
    layer = model.model.layers[0].mlp.up_proj
    ours = layer.forward
    layer.forward = lambda x: ours(x)
    with pytest.raises(ArgumentError, match=r"layers.0.mlp.up_proj got another forward"):
        skills.detach()
    layer.forward = ours
    skills.detach()


# As a memory.


def test_adapters_are_cubes(tmp_path: Path, folders: dict[str, Path]) -> None:
    with MOS(tmp_path / "store") as mos:
        mos.register_memory(ParametricMemory("skills", embedder=None))
        cube = mos.add("skills", folders["medical"], {"domain": "medicine", "name": "medical"})
        assert cube.kind == "parametric"
        assert cube.content["rank"] == 4
        assert cube.content["layers"] == 21
        assert mos.retrieve("skills", "medicine")[0].id == cube.id
        assert mos.retrieve(query="medicine") == []  # adapters are no text for a prompt
        again = mos.add("skills", folders["medical"], {"domain": "medicine", "name": "medical"})
        assert again.id == cube.id
        with pytest.raises(ArgumentError, match="'medical', which another adapter has"):
            mos.add("skills", folders["legal"], {"name": "medical"})
        mos.update("skills", cube.id, folders["legal"])
        assert [v.content["rank"] for v in mos.history(cube.id)] == [4, 8]
    with MOS(tmp_path / "store") as mos:
        skills = mos.memory("skills")
        model = build("llama")
        skills.attach(model)
        with skills.use("medical"):
            got = logits(model)
        want = peft_logits(folders["legal"], build("llama"), IDS)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        mos.delete("skills", cube.id)
        with pytest.raises(NotFoundError), skills.use("medical"):
            pass
        mos.add("skills", folders["small"], {"name": "medical"})
        with skills.use("medical"):
            want = peft_logits(folders["small"], build("llama"), IDS)
            torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


def test_an_export_is_what_peft_loads(skills: Any, tmp_path: Path, folders: Any) -> None:
    folder = skills.export("legal", tmp_path / "out")
    want = peft_logits(folders["legal"], build("llama"), IDS)
    assert torch.equal(peft_logits(folder, build("llama"), IDS), want)


def test_an_adapter_of_another_model_is_refused(skills: Any, tmp_path: Path) -> None:
    model = build("llama")
    skills.attach(model)
    other = save_adapter(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ArgumentError, match=r"transformer\.h\.0\.attn\.c_attn"):
        skills.add(other)
    skills.detach()
    skills.add(other)  # whose model may come later
    skills.attach(model)
    plain = logits(model)
    with pytest.raises(ArgumentError, match=r"transformer\.h\.0\.attn\.c_attn"), \
            skills.use("gpt2"):  # fmt: skip
        pass
    assert torch.equal(logits(model), plain)
    assert skills.stats()["device"]["adapters"] == 0


def test_what_was_learnt_from_a_source_becomes_stale(folders: dict[str, Path]) -> None:
    mos = MOS()
    mos.register_memory(GeneralTextMemory("notes", embedder=None))
    skills = mos.register_memory(ParametricMemory("skills", embedder=None))
    one = mos.add("notes", "Zorvath lives in Quillby.")
    two = mos.add("notes", "Zorvath drinks fennel tea.")
    edges = [{"type": "learnt_from", "target": cube.id} for cube in (one, two)]
    cube = mos.add("skills", folders["medical"], {"name": "zorvath"}, relations=edges)
    mos.update("notes", one.id, metadata={"seen": 1})
    assert "stale" not in skills.named("zorvath").metadata
    mos.delete("notes", two.id)
    assert skills.named("zorvath").metadata["stale"] == [two.id]
    assert mos.retrieve("skills", "zorvath", filters={"stale": two.id})[0].id == cube.id
    mos.update("notes", one.id, "Zorvath moved away.")
    assert skills.named("zorvath").metadata["stale"] == sorted([one.id, two.id])
    assert mos.history(cube.id)[-1].author == "memos"
    assert [c.id for c in skills.cubes(filters={"stale": {"$exists": True}})] == [cube.id]
    mos.update("skills", cube.id, folders["legal"])  # learnt anew
    assert "stale" not in skills.named("zorvath").metadata


# Made of others.


def test_combined_adapters_know_their_parents(skills: Any) -> None:
    model = build("llama")
    cube = skills.combine(["medical", "legal"], [0.7, -0.2], "exact", name="both")
    parents = [skills.named(name) for name in ("medical", "legal")]
    assert cube.content["recipe"]["parents"] == [one.content["digest"] for one in parents]
    assert list(cube.derived_from) == [one.id for one in parents]
    assert {(r.type, r.target) for r in cube.relations} == {
        ("merged_from", one.id) for one in parents
    }
    skills.attach(model)
    with skills.use("both"):
        used = logits(model)
    plain = logits(model)
    with skills.merge_into_base(["medical", "legal"], [0.7, -0.2]):
        torch.testing.assert_close(logits(model), used, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), plain)
    one = skills.combine(["medical", "legal"], name="small both", rank=4)
    assert one.content["rank"] == 4
    with pytest.raises(ArgumentError, match="another adapter has"):
        skills.combine(["medical", "legal"], name="both", rank=3)
    with pytest.raises(NotFoundError, match="nobody"):
        skills.combine(["medical", "nobody"], name="new")


# KV.


def test_kv_of_one_adapter_is_never_used_under_another(skills: Any) -> None:
    model = build("llama")
    skills.attach(model)
    kv = KVCacheMemory("chat", model=model, codec="raw", block_tokens=4, recent_tokens=4)
    ids = models.prompt(33)[0].tolist()
    options = {"max_new_tokens": 4, "do_sample": False}
    answers = {}
    for name in ("medical", None, "legal", "small"):
        with skills.use(name):
            turn = kv.begin(f"session {name}", ids)
            assert turn.reused_tokens == 0, name
            answers[name] = model.generate(**turn.inputs, **options)
            turn.commit(answers[name])
    for name, answer in answers.items():
        with skills.use(name):
            turn = kv.begin("again", ids)
            assert turn.reused_tokens == 32
            assert torch.equal(model.generate(**turn.inputs, **options), answer)
    turn = kv.begin("outside", ids)  # the base model's
    assert turn.reused_tokens == 32
    with skills.use("medical"), pytest.raises(ArgumentError, match="its K and V were made"):
        model.generate(**turn.inputs, **options)
    skills.detach()
    turn = kv.begin("detached", ids)
    assert turn.reused_tokens == 32
    assert torch.equal(model.generate(**turn.inputs, **options), answers[None])


# A budget.


def test_many_adapters_under_a_budget(folders: dict[str, Path], tmp_path: Path) -> None:
    """Every use computes with its own adapter, whatever was evicted before."""
    from memos.adapters.adapter import Adapter, Factors
    from memos.adapters.files import read_adapter

    one = read_adapter(folders["small"])
    generator = torch.Generator().manual_seed(0)
    memory = MOS(tmp_path / "store").register_memory(ParametricMemory("skills", embedder=None))
    for i in range(24):
        rank = 8 * (1 + i % 4)
        factors = {
            name: Factors(
                torch.randn(rank, f.down.shape[1], generator=generator) / 8,
                torch.randn(f.up.shape[0], rank, generator=generator) / 8,
                0.5,
            )
            for name, f in one.factors.items()
        }
        memory.add(Adapter(factors, {"peft_type": "LORA"}), {"name": f"a{i}"})
    model = build("llama")
    memory.attach(model)
    want = {}
    for i in range(24):
        with memory.use(f"a{i}"):
            want[f"a{i}"] = logits(model)
    memory.detach()
    every = sum(8 * (1 + i % 4) for i in range(24))
    memory.device_bytes = 2 * (32 + 16) * 4 * 6 * every // 4  # about a quarter of them
    memory.attach(model)
    memory.pin("a0")
    rows = torch.cat([IDS] * 2)
    for i in torch.randint(0, 24, (120,), generator=generator).tolist():
        with memory.use(f"a{i}"):
            assert torch.equal(logits(model), want[f"a{i}"])
            assert memory.stats()["device"]["bytes"] <= memory.device_bytes
        names = [f"a{i}", f"a{(i + 7) % 24}"]
        with memory.use_batch(names):
            for row, name in enumerate(names):
                torch.testing.assert_close(logits(model, rows)[row : row + 1], want[name])
    stats = memory.stats()
    assert stats["evictions"] > 20
    assert 0 < stats["hit_rate"] < 1
    assert stats["device"]["bytes"] <= memory.device_bytes
    with memory.use("a0"):
        pass
    assert memory.stats()["misses"] == stats["misses"]  # it was pinned
    memory.detach()


def test_what_no_version_names_is_swept(tmp_path: Path, folders: dict[str, Path]) -> None:
    with MOS(tmp_path) as mos:
        skills = mos.register_memory(ParametricMemory("skills", embedder=None))
        cube = skills.add(folders["medical"], {"name": "one"})
        skills.update(cube.id, folders["legal"])
        with pytest.raises(ArgumentError, match="another adapter has"):
            skills.add(folders["small"], {"name": "one"})
        left = {digest: skills.files.folder / digest for digest in skills.files.list()}
        assert len(left) == 3  # the refused one was written before its row was
        assert skills.sweep() == 0
        for folder in left.values():
            os.utime(folder, (0, 0))
        assert skills.sweep() == 1
        digests = {version.content["digest"] for version in skills.history(cube.id)}
        assert set(skills.files.list()) == digests
        assert skills.check() == []
        shutil.rmtree(skills.files.folder / skills.named("one").content["digest"])
        assert "its files are missing" in skills.check()[0]


def test_prefetch(skills: Any) -> None:
    skills.attach(build("llama"))
    skills.prefetch("legal")
    skills._ready().wait_prefetched()
    with skills.use("legal"):
        pass
    assert skills.stats()["misses"] == 0
    with pytest.raises(NotFoundError):
        skills.prefetch("nobody")


def test_a_damaged_file_is_never_used(tmp_path: Path, folders: dict[str, Path]) -> None:
    with MOS(tmp_path) as mos:
        skills = mos.register_memory(ParametricMemory("skills", embedder=None))
        cube = skills.add(folders["medical"])
        file = skills.files.folder / cube.content["digest"] / "adapter_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
        model = build("llama")
        plain = logits(model)
        skills.attach(model)
        with pytest.raises(StoreError, match="damaged"), skills.use("medical"):
            pass
        (problem,) = examine(store=str(tmp_path)).problems
        assert "medical" not in problem
        assert f"adapter {cube.content['digest'][:12]}: {file}: damaged" in problem
        assert torch.equal(logits(model), plain)
        skills.add(folders["medical"], {"name": "again"})  # put in order
        with skills.use("medical"):
            assert not torch.equal(logits(model), plain)
