"""The page of a run, its figures and its main numbers, all from the tables and run.json."""
