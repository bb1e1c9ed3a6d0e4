"""Policy over the life of cubes: what is archived, merged, distilled and forgotten, and when.

The states and the moves between them stand in memos/records/states.py, one table for all.
"""

from __future__ import annotations

from memos.lifecycle.sweep import Policy, Swept, sweep
from memos.records.life import Transition
from memos.records.states import EDGES, STATES, Edge

__all__ = ["EDGES", "STATES", "Edge", "Policy", "Swept", "Transition", "sweep"]
