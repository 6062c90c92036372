"""Masks outside this tool: on plain models, as checkpoints, for other libraries, on the hub."""
