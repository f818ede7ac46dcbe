"""Records -> batches: the embedded picture set, tokens, the latent cache, and the order in which they are read."""
