"""The UNet against diffusers' UNet2DConditionModel on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.models.unet_blocks import TimestepEmbedding
from lcm_jax.weights import naming

TWO = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "sample_size": 8,
}

XL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 3],
    "attention_head_dim": [1, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 46,
}

# Together they take every option away from its default.
SMALL = {
    "as SD1": TWO | {"layers_per_block": 2},
    "as an LCM": TWO | {"time_cond_proj_dim": 16, "act_fn": "swish", "norm_eps": 1e-3},
    "as SD2": TWO
    | {
        "attention_head_dim": [2, 4, 8],
        "use_linear_projection": True,
        "upcast_attention": True,
        "block_out_channels": [8, 16, 16],
        "layers_per_block": [1, 2, 1],
        "transformer_layers_per_block": [1, 2, 1],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "attention at the bottom": TWO
    | {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "norm_num_groups": 2,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "mid_block_scale_factor": 1.5,
        "transformer_layers_per_block": 2,
        "time_embedding_dim": 24,
    },
    "other activation and kernels": TWO
    | {
        "act_fn": "gelu",
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "in_channels": 3,
        "out_channels": 5,
        "center_input_sample": True,
        "downsample_padding": 0,
        "time_cond_proj_dim": 6,
    },
    "no middle": TWO | {"mid_block_type": None, "act_fn": "mish", "cross_attention_dim": [6, 6], "sample_size": [6, 9]},
    "one level": TWO
    | {
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "block_out_channels": [12],
        "norm_num_groups": 3,
        "act_fn": "relu",
        "attention_head_dim": 3,
        "conv_in_kernel": 1,
    },
    "as SDXL": TWO | XL,
    "as SSD-1B": TWO
    | XL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 3, 2], 1],
        "time_cond_proj_dim": 8,
    },
}

# Height and width that no halving divides, so that the way up has to remember the sizes of the way down.
SIZES = {
    "as SD2": (7, 10),
    "as SDXL": (6, 11),
    "attention at the bottom": (5, 3),
    "other activation and kernels": (7, 6),
}

# The unet/config.json of Stable Diffusion 1.5, as published, and of its LCM.
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}


def reference_model(config, seed=0):
    """diffusers' UNet with every weight random, norms and biases included, so that no term can hide."""
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    model = UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def reference_params(model):
    """A torch model's tensors as this project's parameter tree."""
    flat = {}
    for key, tensor in model.state_dict().items():
        path = naming.to_path(key, tensor.ndim)
        flat[path] = naming.to_array(path, tensor.numpy())
    return unflatten_dict(flat)


def inputs(config, size=(8, 8), batch=2):
    rng = np.random.default_rng(1)
    width = config["cross_attention_dim"]
    width = width[0] if isinstance(width, list) else width
    z = rng.standard_normal((batch, *size, config.get("in_channels", 4))).astype(np.float32)
    context = rng.standard_normal((batch, 5, width)).astype(np.float32)
    dim = config.get("time_cond_proj_dim")
    condition = rng.standard_normal((batch, dim)).astype(np.float32) if dim else None
    t = np.array([999, 19] * batch)[:batch].astype(np.int32)
    if "addition_embed_type" not in config:
        return z, t, context, condition
    time_ids = rng.integers(0, 1024, (batch, 6)).astype(np.float32)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return z, t, context, condition, rng.standard_normal((batch, pooled)).astype(np.float32), time_ids


def reference_output(model, z, t, context, condition, pooled=None, time_ids=None):
    torch = pytest.importorskip("torch")

    tensor = lambda x: None if x is None else torch.from_numpy(np.asarray(x))  # noqa: E731
    with torch.no_grad():
        sample = tensor(z).permute(0, 3, 1, 2)
        added = None if pooled is None else {"text_embeds": tensor(pooled), "time_ids": tensor(time_ids)}
        out = model(sample, tensor(t), tensor(context), timestep_cond=tensor(condition), added_cond_kwargs=added).sample
    return out.permute(0, 2, 3, 1).numpy()


def assert_equal_output(config, size):
    reference = reference_model(config)
    arguments = inputs(config, size)
    expected = reference_output(reference, *arguments)
    network = UNet2DCondition.from_config(config)
    params = reference_params(reference)
    out = jax.jit(lambda p, *a: network.apply({"params": p}, *a))(params, *arguments)
    assert out.dtype == jnp.float32
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() <= 1e-4 * np.abs(expected).max()
    return network, params


@pytest.mark.parametrize("name", SMALL)
def test_equals_diffusers(name):
    config = SMALL[name]
    network, params = assert_equal_output(config, SIZES.get(name, (8, 8)))
    own = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs(config)))["params"]
    shapes = lambda tree: {k: v.shape for k, v in flatten_dict(tree).items()}  # noqa: E731
    assert shapes(own) == shapes(params)


def test_the_small_configs_take_every_option_away_from_its_default():
    from lcm_jax.models.unet import DEFAULTS, SUPPORTED

    seen = {option for config in SMALL.values() for option, value in config.items() if value != DEFAULTS[option]}
    kinds = (range, list, tuple)
    single = {o for o, values in SUPPORTED.items() if values and len(values) == 1 and not isinstance(values[0], kinds)}
    # diffusers refuses num_attention_heads in its constructor: it means attention_head_dim there.
    assert set(DEFAULTS) - seen - single == {"num_attention_heads"}


@pytest.fixture(scope="module")
def lcm():
    config = SMALL["as an LCM"]
    return UNet2DCondition.from_config(config), reference_params(reference_model(config)), inputs(config)


def test_the_guidance_embedding_is_projected_in_float32_by_a_network_in_bfloat16():
    embed = TimestepEmbedding(16, 6, "silu", jnp.bfloat16)
    inputs = jnp.ones((2, 8)), jnp.ones((2, 6))
    params = embed.init(jax.random.key(0), *inputs)
    equations = jax.make_jaxpr(embed.apply)(params, *inputs).jaxpr.eqns
    products = [each for each in equations if each.primitive.name == "dot_general"]
    dtypes = {
        each.invars[1].aval.shape: {str(v.aval.dtype) for v in (*each.invars, *each.outvars)} for each in products
    }
    assert dtypes == {(6, 8): {"float32"}, (8, 16): {"bfloat16"}, (16, 16): {"bfloat16"}}


def test_half_precision_stays_close_and_comes_out_in_float32(lcm):
    network, params, arguments = lcm
    half = UNet2DCondition.from_config(SMALL["as an LCM"], jnp.bfloat16)
    full, out = (jax.jit(net.apply)({"params": params}, *arguments) for net in (network, half))
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - full).max() < 0.1 * np.abs(full).max()


def test_a_new_guidance_input_changes_nothing_at_the_start():
    layer, rng = TimestepEmbedding(12, 16, "silu", jnp.float32), np.random.default_rng(0)
    time, condition = (rng.standard_normal((2, n)).astype(np.float32) for n in (8, 16))
    variables = layer.init(jax.random.key(0), time, condition)
    without = layer.apply(variables, time)
    assert without.any()
    np.testing.assert_array_equal(layer.apply(variables, time, condition), without)


def test_a_guidance_embedding_that_the_network_has_no_input_for_is_an_error():
    network = UNet2DCondition.from_config(TWO)
    z, t, context, _ = inputs(TWO)
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        jax.eval_shape(lambda: network.init(jax.random.key(0), z, t, context, np.zeros((2, 256))))


def test_sizes_and_the_pooled_prompt_go_where_there_is_an_input_for_them():
    def output(config, *arguments):
        network = UNet2DCondition.from_config(config)
        return jax.eval_shape(lambda: network.init(jax.random.key(0), *arguments))

    z, t, context, _, pooled, time_ids = inputs(TWO | XL)
    with pytest.raises(ValueError, match="does not support pooled and time_ids"):
        output(TWO, z, t, context, None, pooled, time_ids)
    with pytest.raises(ValueError, match="requires pooled and time_ids, since its addition_embed_type is 'text_time'"):
        output(TWO | XL, z, t, context)
    with pytest.raises(ValueError, match="have 40 features, and projection_class_embeddings_input_dim is 46"):
        output(TWO | XL, z, t, context, None, pooled, time_ids[:, :5])


@pytest.mark.parametrize(
    "option, value",
    [
        ("resnet_time_scale_shift", "scale_shift"),
        ("addition_embed_type", "text"),
        ("class_embed_type", "timestep"),
        ("dual_cross_attention", True),
        ("encoder_hid_dim", 64),
        ("act_fn", "tanh"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("addition_embed_type", "text_time"),
        ("num_towers", 3),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
        ("up_block_types", ["UpBlock2D"]),
        ("attention_head_dim", [2, 2, 2]),
        ("layers_per_block", [1]),
        ("transformer_layers_per_block", [[1], 2]),
        ("transformer_layers_per_block", [1, 2, 3]),
        ("reverse_transformer_layers_per_block", [[1], 2]),
        ("downsample_padding", 2),
        ("conv_in_kernel", 4),
    ],
)
def test_an_unsupported_option_is_named_with_its_value(option, value):
    with pytest.raises(ValueError) as error:
        UNet2DCondition.from_config(TWO | {option: value})
    assert option in str(error.value) and repr(value) in str(error.value)


def test_every_unsupported_option_is_in_one_error():
    with pytest.raises(ValueError, match="(?s)encoder_hid_dim=64.*class_embed_type='timestep'"):
        UNet2DCondition.from_config(TWO | {"encoder_hid_dim": 64, "class_embed_type": "timestep"})


@pytest.mark.slow
def test_full_size_stable_diffusion_equals_diffusers():
    assert_equal_output(SD15 | {"time_cond_proj_dim": 256}, (16, 16))
