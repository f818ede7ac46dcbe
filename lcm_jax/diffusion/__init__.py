"""The mathematics of diffusion and of latent consistency models, on arrays."""
