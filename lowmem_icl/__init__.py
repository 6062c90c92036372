"""Take a large language model apart on one workstation."""

__version__ = "0.1.0"
