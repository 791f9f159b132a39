"""Faults on purpose: what a run survives, tested by causing it. Long forms run by command."""
