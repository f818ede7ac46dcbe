"""What a step minimises, one file an objective: a `draw` of all randomness and a `loss` that is exact in its draws."""
