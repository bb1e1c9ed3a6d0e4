"""Hybrid retrieval: text and vector search, fusion, graph expansion, reranking, synthesis.

No language model takes part. Stages stand in a list, ``Pipeline.stages``.
"""

from __future__ import annotations

from memos.retrieval.candidates import Candidate, Candidates, Signal, Stage, StageTrace
from memos.retrieval.expand import Expand
from memos.retrieval.explain import Explained, Explanation, explain
from memos.retrieval.pagerank import PageRank
from memos.retrieval.pipeline import Pipeline, default_pipeline, default_stages
from memos.retrieval.query import Query, parse
from memos.retrieval.rerank import CrossEncoder, LateInteraction, Rerank
from memos.retrieval.source import Source, TokenSource, Unit
from memos.retrieval.stages import Fuse, TextSearch, VectorSearch
from memos.retrieval.synthesis import Citation, Context, synthesise

__all__ = [
    "Candidate",
    "Candidates",
    "Citation",
    "Context",
    "CrossEncoder",
    "Expand",
    "Explained",
    "Explanation",
    "Fuse",
    "LateInteraction",
    "PageRank",
    "Pipeline",
    "Query",
    "Rerank",
    "Signal",
    "Source",
    "Stage",
    "StageTrace",
    "TextSearch",
    "TokenSource",
    "Unit",
    "VectorSearch",
    "default_pipeline",
    "default_stages",
    "explain",
    "parse",
    "synthesise",
]
