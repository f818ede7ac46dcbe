"""The two sides of `lcm_jax.benchmark`, a file each, run as processes that time one case on request."""
