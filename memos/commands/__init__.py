"""The commands of ``memos``, each a thin skin over a verb of MOS; memos/cli.py has the parser.

Importing these modules loads nothing heavy: what a command needs is imported when it runs.
"""
