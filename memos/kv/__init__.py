"""KV blocks that survive: content-addressed, verified, compressed, for many tenants in one folder.

``KVStore`` and what it needs import no torch.
"""

from __future__ import annotations

from memos.kv.identity import KVIdentity
from memos.kv.sessions import Session
from memos.kv.store import KVStore
from memos.kv.tenant import Entry, Tenant
from memos.kv.verify import Report

__all__ = ["Entry", "KVIdentity", "KVStore", "Report", "Session", "Tenant"]
