"""What files for other libraries begin as: each stands alone, and is written with a mask's own numbers."""
