"""Other projects' stores beside ours, each as its own documentation sets it up for local use.

A peer stands in a folder of its own with all conversations, and takes its vectors from the
embedder of the run, so that neither what it finds nor its time depends on another model. Nothing
of it calls a language model or reaches for the network.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.locomo import Turn


class Peer(Protocol):
    def add(self, conversation: str, turns: Sequence[Turn], texts: Sequence[str]) -> None:
        """Store the texts of these turns."""

    def search(self, conversation: str, question: str, limit: int) -> list[str]:
        """The ids of the best turns of one conversation, best first."""

    def close(self) -> None: ...


class Chroma:
    """A collection per conversation, its own HNSW search, on disk."""

    package, module = "chromadb", "chromadb"

    def __init__(self, folder: Path, embedder: Any) -> None:
        import chromadb
        from chromadb.config import Settings

        self._embedder = embedder
        settings = Settings(anonymized_telemetry=False)
        self._client = chromadb.PersistentClient(folder, settings)
        self._collections: dict[str, Any] = {}

    def add(self, conversation: str, turns: Sequence[Turn], texts: Sequence[str]) -> None:
        collection = self._client.create_collection(
            conversation, embedding_function=None, metadata={"hnsw:space": "cosine"}
        )
        vectors = self._embedder.embed(texts)
        collection.add([turn.id for turn in turns], vectors, documents=list(texts))
        self._collections[conversation] = collection

    def search(self, conversation: str, question: str, limit: int) -> list[str]:
        vectors = self._embedder.embed([question], "query")
        found = self._collections[conversation].query(vectors, n_results=limit)
        return list(found["ids"][0])

    def close(self) -> None:
        self._client.close()


class Mem0:
    """Raw messages (infer=False) of a user per conversation, on its local Qdrant.

    Ranked by meaning alone: its keyword search and its entities want models that do not install
    from PyPI. A client of a language model is made, as it must be, and never called.
    """

    package, module = "mem0ai", "mem0"

    def __init__(self, folder: Path, embedder: Any) -> None:
        os.environ["MEM0_TELEMETRY"] = "False"  # both are read by the import
        os.environ["MEM0_DIR"] = str(folder)
        import mem0
        from mem0.embeddings.base import EmbeddingBase

        class Given(EmbeddingBase):  # type: ignore[misc]
            def embed(self, text: str, memory_action: str | None = None) -> list[float]:
                kind = "query" if memory_action == "search" else "document"
                vector: list[float] = embedder.embed([text], kind)[0].tolist()
                return vector

        model = {"provider": "openai", "config": {"api_key": "none"}}
        qdrant = {"path": str(folder / "qdrant"), "embedding_model_dims": embedder.dim}
        self._memory = mem0.Memory.from_config(
            {
                "embedder": model,
                "llm": model,
                "vector_store": {"provider": "qdrant", "config": qdrant},
                "history_db_path": str(folder / "history.db"),
            }
        )
        self._memory.embedding_model = Given(self._memory.embedding_model.config)
        self._ids: dict[str, str] = {}

    def add(self, conversation: str, turns: Sequence[Turn], texts: Sequence[str]) -> None:
        messages = [
            {"role": "user", "content": text, "name": turn.speaker}
            for turn, text in zip(turns, texts, strict=True)
        ]
        added = self._memory.add(messages, user_id=conversation, infer=False)["results"]
        self._ids |= {one["id"]: turn.id for one, turn in zip(added, turns, strict=True)}

    def search(self, conversation: str, question: str, limit: int) -> list[str]:
        filters = {"user_id": conversation}
        found = self._memory.search(question, top_k=limit, filters=filters, threshold=0.0)
        return [self._ids[hit["id"]] for hit in found["results"]]

    def close(self) -> None:
        self._memory.vector_store.client.close()
        self._memory.close()


def missing(peer: type[Chroma] | type[Mem0]) -> str | None:
    """None when the peer is installed, else how to install it."""
    if importlib.util.find_spec(peer.module) is not None:
        return None
    return f"{peer.module} is not installed: pip install {peer.package}"


def version(peer: type[Chroma] | type[Mem0]) -> str:
    return importlib.metadata.version(peer.package)
