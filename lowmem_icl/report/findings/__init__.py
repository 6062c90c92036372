"""What is said of a run in words: the answer first, and what it rests on."""
