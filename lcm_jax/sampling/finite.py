"""Flags of a program that generates images: the stages whose output has NaN or infinity, and the error for them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.weights import naming
from lcm_jax.weights.errors import ModelError


class Finite(NamedTuple):
    """bool[] by stage, in order, True if all of its output is finite. None for a stage that did not run."""

    text_encoder: jax.Array
    vae_encoder: jax.Array | None  # of an inpainting model
    unet: jax.Array
    vae_decoder: jax.Array | None


CONTROLNET = "ControlNet "  # its residuals enter the UNet, and are a part of this stage
STAGES = {  # name in an error, and the networks of the stage
    "text_encoder": ("text encoder", ("text_encoder", "text_encoder_2")),
    "vae_encoder": ("autoencoder's encoder", ("vae",)),
    "unet": ("UNet", ("unet",)),
    "vae_decoder": ("autoencoder's decoder", ("vae",)),
}


def all_finite(tree: Any) -> jax.Array:
    """Return bool[], True if no array of the tree has NaN or infinity."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def check_finite(finite: Finite, params: Mapping[str, Any], dtype: Any, name: str) -> None:
    """Raise ModelError for the first stage whose output is not finite.

    params: by network, searched for NaN only then; those of ControlNets have names that begin with CONTROLNET. dtype:
    of the computation. name: of the model.
    """
    flags = jax.device_get(finite)._asdict()
    stage = next((stage for stage, flag in flags.items() if flag is not None and not flag), None)
    if stage is None:
        return
    label, networks = STAGES[stage]
    if stage == "unet" and (nets := tuple(name for name in params if name.startswith(CONTROLNET))):
        label, networks = f"{label} with {' and '.join(nets)}", (*networks, *nets)
    for network in networks:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params.get(network, {})):
            if not np.isfinite(np.asarray(leaf, np.float32)).all():
                names = tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
                key = naming.to_key(names)  # of a quantized kernel, the scale
                wider = "use dtype float32 or bfloat16, " if leaf.dtype == jnp.float16 else ""
                raise ModelError(
                    f"{name}: {key} of the {network} contains NaN or infinity; "
                    f"{wider}fetch the weights again, or unload the LoRA that changes it"
                )
    remedy = "use dtype float32 or bfloat16" if jnp.dtype(dtype) == jnp.float16 else "lower guidance_scale"
    raise ModelError(
        f"{name}: the {label} gives NaN or infinity in {jnp.dtype(dtype)}, though its weights are finite; {remedy}"
    )
