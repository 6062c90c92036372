"""Which heads carry learning in context: induction heads or function-vector heads."""
