"""Accuracies and log-probabilities of tasks, clean and under masks."""
