"""The networks of latent diffusion in Flax linen, NHWC, with submodule names that mirror the keys of diffusers' weights."""
