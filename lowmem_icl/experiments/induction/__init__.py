"""Induction heads: their scores and what removing them costs."""
