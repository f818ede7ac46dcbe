"""Latent consistency models in JAX: distill, convert and sample few-step text-to-image diffusion models.

    import lcm_jax
    lcm_jax.Pipeline.from_pretrained("shapes-lcm")("a red circle", num_inference_steps=4).images[0]

The commands are `python -m` lcm_jax.main, lcm_jax.sample, lcm_jax.convert and lcm_jax.benchmark, each with --help.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcm_jax.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, so that the commands answer --help without loading jax.
    if name == "Pipeline":
        from lcm_jax.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
