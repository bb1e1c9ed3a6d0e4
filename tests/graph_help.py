"""What the tests of graphs share: contents, and a small graph."""

from __future__ import annotations

from typing import Any

from memos.memories.graph import GraphMemory
from memos.memories.source import MemorySource


def node(label: str, name: str | None = None, **properties: Any) -> dict[str, Any]:
    named = properties if name is None else {"name": name, **properties}
    return {"type": "node", "label": label, "properties": named}


def edge(label: str, source: str, target: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "relationship",
        "label": label,
        "source_id": source,
        "target_id": target,
        "properties": properties,
    }


def medical(memory: GraphMemory) -> tuple[str, str, str]:
    disease = memory.add(
        node(
            "Disease",
            "Diabetes Mellitus",
            description="A metabolic disorder characterized by high blood sugar levels",
            types=["Type 1", "Type 2", "Gestational"],
        )
    )["id"]
    symptom = memory.add(node("Symptom", "Polyuria", description="Excessive urination"))["id"]
    link = memory.add(
        edge(
            "EXHIBITS_SYMPTOM",
            disease,
            symptom,
            frequency="common",
            mechanism="Osmotic diuresis due to hyperglycemia",
        )
    )["id"]
    return disease, symptom, link


def words(memory: GraphMemory, text: str) -> list[str]:
    """Ids of the cubes that full text finds."""
    source = MemorySource(memory)
    seqs, _ = source.search_text(text, 10, memory.scope(), every_word=True)
    return [source.cubes([seq], memory.scope())[seq].id for seq in map(int, seqs)]
