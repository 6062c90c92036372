"""The experiments: a folder each, of plain functions (measure) and the story of their sweeps (stage)."""
