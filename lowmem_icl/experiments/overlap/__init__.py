"""How far rankings of heads agree."""
