"""From a checkpoint, wherever it lies, to a store."""
