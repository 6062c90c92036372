"""Rows through a streamed model: the only loops over layers, the waves they run in and the clean cache."""
