"""The page and its figures, drawn from the tables."""
