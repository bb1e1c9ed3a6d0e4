"""Which way a search of the vector index takes: by the graph, or by a scan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memos.records._index_rows import GATHER_COST

# The graph's list is nearly complete in its first three quarters, at its end 0.9 of it is there.
TRUSTED = 0.75
# How much farther than k a filter may push a search into the list. Beyond the query's own cluster
# recall falls, however long the list: 10 % of vectors allowed would lower recall@10 to 0.98.
_DEPTH = 100


@dataclass(frozen=True)
class Plan:
    """Which way a search takes.

    Attributes:
        path:    "exact", "hnsw", or "hnsw, exact" where the graph's list had too few.
        reason:  why, in words with the numbers.
        size:    vectors in the index.
        allowed: how many of them at most may be returned.
        fetch:   candidates asked of the graph; 0 without it.
        tail:    rows that are not in the graph yet and are scanned beside it.
    """

    path: str
    reason: str
    size: int
    allowed: int
    fetch: int = 0
    tail: int = 0


@dataclass(frozen=True)
class Planner:
    """Arguments as those of ``VectorIndex``; ``exact_because``: why there is to be no graph."""

    hnsw_from: int
    ef_search: int
    fetch_cost: float
    exact_because: str | None

    def plan(self, k: int, few: int, size: int, total: int, tail: int | None) -> Plan:
        """The plan of one search.

        Args:
            k:     vectors wanted.
            few:   vectors allowed at most, of ``size``.
            total: rows, the dead ones included.
            tail:  rows beside the graph; None: there is no graph.
        """
        if tail is None:
            if self.exact_because:
                reason = self.exact_because
            elif size < self.hnsw_from:
                reason = f"{size} vectors: a graph is built from {self.hnsw_from}"
            else:
                reason = f"the graph over {size} vectors is being built, or build() was not called"
            return Plan("exact", reason, size, few)
        if not few:
            return Plan("exact", "nothing is allowed", size, few)
        # Of m candidates m * few / size are allowed, on average; three deviations more than k.
        needed = (k + 3 * math.sqrt(k)) * size / few
        fetch = max(self.ef_search, math.ceil(needed / TRUSTED))
        scan = min(few, total / GATHER_COST)
        cost = fetch * self.fetch_cost + tail / GATHER_COST
        numbers = (
            f"{few} of {size} vectors allowed cost {scan:.0f} to scan, "
            f"{cost:.0f} by {fetch} candidates of the graph and {tail} rows beside it"
        )
        if scan <= cost:
            return Plan("exact", numbers, size, few)
        if needed > k + _DEPTH:
            reason = f"{few} of {size} vectors allowed: {k} of them may reach to rank {needed:.0f}"
            return Plan("exact", reason, size, few)
        return Plan("hnsw", numbers, size, few, fetch, tail)
