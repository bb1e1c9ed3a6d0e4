"""Learning: memories of text become an adapter that a gate accepts or refuses (learn.py)."""
