"""Tasks from lm-eval's definitions to scored documents, and their packing into rows."""
