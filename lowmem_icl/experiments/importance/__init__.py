"""Importance of heads and FFNs from one backward pass."""
