"""How good pictures are: metrics on arrays."""
