"""The two sides of `lcm_jax.benchmark`, processes that run cases on request, and what compares and times them."""
