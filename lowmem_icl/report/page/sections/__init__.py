"""The page's sections, in its order: what each says of a run."""
