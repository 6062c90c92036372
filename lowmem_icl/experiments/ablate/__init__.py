"""Heads and FFNs removed alone."""
