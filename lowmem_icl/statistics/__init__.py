"""Intervals, significance and agreement, computed from plain arrays."""
