"""Governance: views with a principal's rights, audit records, and traces."""
