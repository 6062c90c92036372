"""A run told to experiment trackers as it goes: what it was asked for, what stages find, page and masks."""
