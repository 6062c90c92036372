"""What differs between architectures: a family is a row of data and few functions."""
