"""A model as a store on disk, and its layers in memory one at a time."""
