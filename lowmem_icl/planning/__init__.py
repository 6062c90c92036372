"""What a run will hold, read, compute and take, before it starts: this machine measured, memory dealt out, costs summed."""
