"""What a run will hold, read, compute and take, before it starts."""
