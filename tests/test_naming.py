"""The naming rule on every key of the full-size networks of Stable Diffusion 1.5, without their weights."""

import jax
import pytest
from flax.traverse_util import flatten_dict
from transformers import CLIPTextConfig, CLIPTextModel

from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.weights import naming
from lcm_jax.weights.naming import modern_key

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD15 = {name: FAMILIES["sd15"][name] for name in ("unet", "vae", "text_encoder")}


@pytest.fixture(scope="module")
def reference():
    """Every key of diffusers and transformers, with its tensor's shape, by network."""
    plain = lambda config: {k: v for k, v in config.items() if not k.startswith("_")}  # noqa: E731
    text = {k: v for k, v in SD15["text_encoder"].items() if k not in ("architectures", "model_type")}
    with torch.device("meta"):
        networks = {
            "unet": diffusers.UNet2DConditionModel(**plain(SD15["unet"])),
            "vae": diffusers.AutoencoderKL(**plain(SD15["vae"])),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
    shapes = {}
    for name, network in networks.items():
        keys = {modern_key(name, key): tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        shapes[name] = {key: shape for key, shape in keys.items() if key is not None}
    return shapes


def test_every_key_comes_back(reference):
    assert {name: len(keys) for name, keys in reference.items()} == {"unet": 686, "vae": 248, "text_encoder": 196}
    for keys in reference.values():
        paths = {key: naming.to_path(key, len(shape)) for key, shape in keys.items()}
        assert {naming.to_key(path) for path in paths.values()} == set(keys)
        assert all(naming.to_key(path) == key for key, path in paths.items())


def test_the_networks_have_these_keys_and_shapes(reference):
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    configs = SD15 | {"scheduler": scheduler}
    params = StableDiffusion.from_configs(configs).abstract_params()
    for name, tree in params.items():
        leaves = flatten_dict(tree).items()
        own = {naming.to_key(path): tuple(naming.tensor_shape(path, leaf.shape)) for path, leaf in leaves}
        assert own == reference[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(params["unet"])) == 859_520_964
