"""Patching: units' outputs put from one prompt into another, and function vectors."""
