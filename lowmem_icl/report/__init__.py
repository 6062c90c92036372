"""Figures and one page from a run's tables."""
