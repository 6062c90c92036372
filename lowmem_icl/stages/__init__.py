"""From experiments to a run: sweeps in parts that resume, rows for the tables, masks."""
