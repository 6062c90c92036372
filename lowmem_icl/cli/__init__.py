"""Commands, flags and exit codes, and everything that is printed."""
