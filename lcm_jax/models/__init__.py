"""The networks of latent diffusion in Flax linen, NHWC, with submodule names that mirror diffusers' keys."""
