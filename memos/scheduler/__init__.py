"""What lives where: one budget per tier, policies of what goes first, and plans with their reasons.

``Scheduler`` plans from measured use and measured cost; ``make_policy`` gives what engines ask
when a quota is full; ``replay`` says what a policy would have reached on recorded requests.
"""

from __future__ import annotations

from memos.scheduler.engines import AdapterPolicy, BlockPolicy, install
from memos.scheduler.plan import Action, Rules, plan
from memos.scheduler.policy import Policy, make_policy, policies
from memos.scheduler.replay import Replay, Request, clairvoyant, load_trace, replay
from memos.scheduler.scheduler import Scheduler
from memos.scheduler.units import Costs, Estimate, State, Unit
from memos.scheduler.worker import Executor, Ledger, Outcome, Worker

__all__ = [
    "Action",
    "AdapterPolicy",
    "BlockPolicy",
    "Costs",
    "Estimate",
    "Executor",
    "Ledger",
    "Outcome",
    "Policy",
    "Replay",
    "Request",
    "Rules",
    "Scheduler",
    "State",
    "Unit",
    "Worker",
    "clairvoyant",
    "install",
    "load_trace",
    "make_policy",
    "plan",
    "policies",
    "replay",
]
