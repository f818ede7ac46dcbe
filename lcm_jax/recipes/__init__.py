"""From a config to what the training loop runs: weights, networks, data, previews and what is left behind at the end.

A file for each objective builds its Job; `RECIPES` is the table of their names.
"""

from collections.abc import Callable, Mapping

from lcm_jax.recipes.autoencoder import autoencoder_job
from lcm_jax.recipes.diffusion import diffusion_job
from lcm_jax.recipes.lcd import lcd_job

RECIPES: Mapping[str, Callable] = {"autoencoder": autoencoder_job, "diffusion": diffusion_job, "lcd": lcd_job}
