"""The model on disk and in pieces: convert once, read ahead, one decoder layer at a time."""
