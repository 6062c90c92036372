"""Files, devices, memory and progress: what the machine gives."""
