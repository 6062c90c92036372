"""Sets of removed units, their files, and the rankings they are made from."""
