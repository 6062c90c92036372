"""Pruning curves and greedy masks."""
