"""Pairs of a clean and a corrupted prompt, made of few-shot documents or given in files."""
