"""Declarative memory: rows, versions, full text, vectors and relations in one SQLite file.

Importing this package loads nothing; its modules load sqlalchemy or numpy.
"""
