"""Intervals, tests and agreement measures, computed from plain arrays."""
