"""Benchmarks are not tests: ``make bench`` runs them, prints tables and writes results/*.json."""
