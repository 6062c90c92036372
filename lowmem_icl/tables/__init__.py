"""The tables of a run folder: their columns and the one way into them."""
