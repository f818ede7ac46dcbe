"""The published models at full size, without their weights: counts and names, against diffusers and transformers."""

from functools import cache

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.weights import naming

COUNTS = {  # as published
    ("sd15", "unet"): 859_520_964,
    ("sd15", "vae"): 83_653_863,
    ("sd15", "text_encoder"): 123_060_480,
    ("sd21", "unet"): 865_910_724,
    ("sd21", "text_encoder"): 340_387_840,
    ("sd21-768", "unet"): 865_910_724,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "vae"): 83_653_863,
    ("sdxl", "text_encoder"): 123_060_480,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("ssd1b", "unet"): 1_331_334_404,
    ("sd15-taesd", "vae"): 2_445_063,
    # The guidance weight's projection is 256 x 320; five more input channels are 5 x 3 x 3 x 320.
    ("lcm-dreamshaper", "unet"): 859_520_964 + 81_920,
    ("lcm-sdxl", "unet"): 2_567_463_684 + 81_920,
    ("lcm-ssd1b", "unet"): 1_331_334_404 + 81_920,
    ("sd15-inpainting", "unet"): 859_520_964 + 14_400,
    ("sd2-inpainting", "unet"): 865_910_724 + 14_400,
    ("sdxl-inpainting", "unet"): 2_567_463_684 + 14_400,
}


def torch_shapes(component: str, config: dict) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the reference network, built on the `meta` device."""
    torch = pytest.importorskip("torch")
    import diffusers
    import transformers

    options = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        if component.startswith("text_encoder"):
            architecture = options.pop("architectures")[0]
            options.pop("model_type")
            model = getattr(transformers, architecture)(transformers.CLIPTextConfig(**options))
        else:
            model = getattr(diffusers, config["_class_name"])(**options)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if "position_ids" not in key}


NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
WITHOUT_SHAPES = ("sample_size", "scaling_factor", "force_upcast")


def alike(config: dict) -> str:
    """The same for networks of the same parameters, which families share."""
    return repr(sorted((name, value) for name, value in config.items() if name not in WITHOUT_SHAPES))


UNIQUE: dict[str, tuple[str, str]] = {}  # alike -> the family named first that has it, and where
for family, configs in FAMILIES.items():
    for network in (name for name in NETWORKS if name in configs):
        UNIQUE.setdefault(alike(configs[network]), (family, network))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_fits_together(name):
    assert set(StableDiffusion.from_configs(FAMILIES[name]).networks) == {c for c in FAMILIES[name] if c in NETWORKS}


@cache
def abstract_of(name: str):
    return StableDiffusion.from_configs(FAMILIES[name]).abstract_params()


@pytest.mark.parametrize(("name", "component"), UNIQUE.values())
def test_full_size_names_and_shapes(name, component):
    leaves = flatten_dict(abstract_of(name)[component])
    ours = {naming.to_key(path): tuple(naming.tensor_shape(path, leaf.shape)) for path, leaf in leaves.items()}
    theirs = {
        key if not component.startswith("text") or key.startswith("text_") else f"text_model.{key}": shape
        for key, shape in torch_shapes(component, FAMILIES[name][component]).items()
    }
    assert ours == theirs


@pytest.mark.parametrize(("name", "component"), COUNTS)
def test_full_size_counts(name, component):
    family, network = UNIQUE[alike(FAMILIES[name][component])]
    leaves = jax.tree.leaves(abstract_of(family)[network])
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == COUNTS[name, component]
