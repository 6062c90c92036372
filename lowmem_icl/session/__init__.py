"""One run's state: what is prepared, its parts, its folder, and the work that stages ask for."""
