"""Quantized networks beside exact arithmetic, and pipelines that have them beside those in float32."""

import pickle
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from lcm_jax.models import quantized
from lcm_jax.models.attention import Device
from lcm_jax.models.layers import Conv, apply
from lcm_jax.models.quantized import QUANTIZED_DTYPES, QuantizedKernel, multiplies, quantize_kernel
from lcm_jax.pipeline import Pipeline
from lcm_jax.sampling.finite import Finite, check_finite
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import compute_digests, open_model

pytest.importorskip("qwix", reason="needs the extra quantized")

CPU, H100, TPU = Device("cpu"), Device("cuda", (9, 0)), Device("tpu")
STEP = {"int8": 0.5 / 127, "fp8": 2**-4}  # largest error: of the largest number, and of each number
LAYERS = {
    "Dense": (nn.Dense(16, dtype=jnp.float32), (3, 5, 12)),
    "1 x 1": (Conv(16, size=1), (3, 6, 4, 12)),
    "3 x 3": (Conv(16), (3, 6, 4, 12)),
    "stride 2, uneven padding": (Conv(16, stride=2, padding=((0, 1), (0, 1))), (3, 6, 4, 12)),
    "without bias": (Conv(16, bias=False), (3, 6, 4, 12)),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def round_to(x, dtype, axes):
    """Return x rounded to the numbers that have one scale over `axes`, in float64."""
    largest = {"int8": 127.0, "fp8": 448.0}[dtype]
    scale = np.abs(x).max(axis=axes, keepdims=True) / np.float32(largest)
    values = np.rint(x / scale) if dtype == "int8" else (x / scale).astype(QUANTIZED_DTYPES[dtype])
    return values.astype(np.float64) * scale


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("models") / "model", unet=tiny_model.SHALLOW)


@pytest.fixture(scope="module")
def pipe(folder):
    return Pipeline.from_pretrained(folder, dtype="int8")


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_kernels_are_rounded_to_the_nearest_number_of_their_channel(dtype):
    kernel = normal(0, 3, 3, 8, 6) * np.logspace(-3, 3, 6, dtype=np.float32)
    kernel[..., 2] = 0
    values, scale = quantize_kernel(kernel, QUANTIZED_DTYPES[dtype])
    assert values.dtype == QUANTIZED_DTYPES[dtype] and values.shape == kernel.shape
    assert scale.dtype == jnp.float32 and scale.shape == (1, 1, 1, 6)
    rounded = np.asarray(values, np.float32) * scale
    largest = np.abs(kernel).max((0, 1, 2)) if dtype == "int8" else np.abs(kernel)
    small = np.abs(kernel).max((0, 1, 2)) * 2**-12  # below float8's normal numbers
    assert (np.abs(rounded - kernel) <= 1.01 * STEP[dtype] * np.maximum(largest, small)).all()
    assert not rounded[..., 2].any()


@pytest.mark.parametrize("layer, shape", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype, device", [("int8", CPU), ("fp8", CPU), ("int8", TPU), ("fp8", H100)])
def test_layers_multiply_rounded_numbers(layer, shape, dtype, device, monkeypatch):
    monkeypatch.setattr(quantized, "current_device", lambda: device)
    x = normal(1, *shape) * np.logspace(0, 2, shape[0], dtype=np.float32).reshape(-1, *[1] * (len(shape) - 1))
    params = jax.tree.map(lambda leaf: normal(2, *leaf.shape), layer.init(jax.random.key(0), x)["params"])
    mine = params | {"kernel": quantize_kernel(params["kernel"], QUANTIZED_DTYPES[dtype])}
    y = quantized.apply(layer, mine, x)
    assert y.dtype == jnp.float32
    convolves = isinstance(layer, Conv) and layer.size > 1
    inputs = round_to(x, dtype, (1, 2, 3) if convolves else -1)
    if device == H100 and convolves:
        inputs = x
    kernel = round_to(params["kernel"], dtype, tuple(range(params["kernel"].ndim - 1)))
    expected = apply(layer, params | {"kernel": jnp.asarray(kernel, jnp.float32)}, jnp.asarray(inputs, jnp.float32))
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    # An example does not depend on the others of its batch, although their scales differ by a hundred.
    np.testing.assert_allclose(quantized.apply(layer, mine, x[:1]), y[:1], rtol=1e-5, atol=1e-5)


def test_products_in_8_bits_are_left_to_devices_that_have_them():
    table = {
        # int8: product, convolution; fp8: product, convolution
        CPU: (False, False, False, False),
        Device("cuda", (8, 0)): (True, False, False, False),
        Device("cuda", (8, 9)): (True, False, True, False),
        H100: (True, False, True, False),
        Device("rocm"): (False, False, False, False),
        TPU: (True, True, False, False),
    }
    for device, expected in table.items():
        kinds = [(dtype, convolution) for dtype in QUANTIZED_DTYPES.values() for convolution in (False, True)]
        assert tuple(multiplies(device, *kind) for kind in kinds) == expected, device


@pytest.mark.parametrize("dtype, letters", [("int8", "i8"), ("fp8", "f8E4M3FN")])
def test_a_program_for_cuda_multiplies_matrices_in_8_bits_and_convolves_in_bfloat16(dtype, letters, monkeypatch):
    monkeypatch.setattr(quantized, "current_device", lambda: H100)
    lines = []
    for layer, shape in (LAYERS["Dense"], LAYERS["3 x 3"]):
        layer, x = layer.clone(dtype=jnp.bfloat16), normal(0, *shape)
        params = layer.init(jax.random.key(0), x)["params"]
        params |= {"kernel": quantize_kernel(params["kernel"], QUANTIZED_DTYPES[dtype])}
        traced = jax.jit(lambda params, x, layer=layer: quantized.apply(layer, params, x)).trace(params, x)
        lines += traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
    sums = {"int8": "i32", "fp8": "f32"}[dtype]
    (product,) = (line for line in lines if "dot_general" in line)
    (convolution,) = (line for line in lines if "stablehlo.convolution" in line)
    assert product.count(f"x{letters}>") == 2 and product.endswith(f"x{sums}>"), product
    assert convolution.count("xbf16>") == 3 and letters not in convolution, convolution


def test_compute_dtype_of_the_rest(monkeypatch):
    assert quantized.compute_dtype("int8") == jnp.float32 and quantized.compute_dtype("float16") == jnp.float16
    monkeypatch.setattr(quantized, "current_device", lambda: TPU)
    assert quantized.compute_dtype("fp8") == jnp.bfloat16 and quantized.compute_dtype("float32") == jnp.float32


def test_blocks_are_quantized_and_the_rest_is_not(pipe):
    leaves = {(name, *path): leaf for name, tree in pipe.params.items() for path, leaf in flatten_dict(tree).items()}
    kinds = {path: type(leaf) is QuantizedKernel for path, leaf in leaves.items()}
    ours = {path for path, is_ours in kinds.items() if is_ours}
    assert {path[:2] for path in ours} == {
        ("unet", "down_blocks_0"),
        ("unet", "mid_block"),
        ("unet", "up_blocks_0"),
        ("text_encoder", "text_model"),
    }
    rest = {path[1] for path in kinds if path[0] == "unet" and path[-1] == "kernel"} - {path[1] for path in ours}
    assert rest == {"conv_in", "conv_out", "time_embedding"}
    assert all(path[-1] == "kernel" for path in ours)
    assert pipe.model.unet.dtype == pipe.model.vae.dtype == jnp.float32 and pipe.dtype == "int8"


def test_the_bundled_model_stays_near_float32_in_a_quarter_of_the_memory():
    latents, sizes = {}, {}
    for dtype in ("float32", *QUANTIZED_DTYPES):
        pipe = Pipeline.from_pretrained("shapes-lcm", dtype=dtype)
        latents[dtype] = pipe(["a red circle above a blue square"] * 2, 2, seed=3, output_type="latent").images
        sizes[dtype] = sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params["unet"]))
    assert max(sizes["int8"], sizes["fp8"]) < 0.29 * sizes["float32"]
    errors = {dtype: relative(latents[dtype], latents["float32"]) for dtype in QUANTIZED_DTYPES}
    assert 1e-3 < errors["int8"] < 0.05 and 1e-3 < errors["fp8"] < 0.15, errors


def test_loras_are_added_before_quantizing(pipe, folder, tmp_path):
    rng = np.random.default_rng(0)
    whole = Pipeline.from_pretrained(folder)
    before = jax.tree.leaves(pipe.params)
    path = write_lora(tmp_path / "style.safetensors", whole.params["unet"], rng)
    for each in (whole, pipe):
        assert each.load_lora(path, 0.7) == "style"
    wholes, ours = (flatten_dict(each.params["unet"]) for each in (whole, pipe))
    for place, leaf in ours.items():
        if isinstance(leaf, QuantizedKernel):
            expected = quantize_kernel(wholes[place], leaf.dtype)
            assert all((a == b).all() for a, b in zip(leaf, expected, strict=True)), place
    assert any((a != b).any() for a, b in zip(before, jax.tree.leaves(pipe.params), strict=True))
    pipe.save_pretrained(tmp_path / "ours")
    whole.save_pretrained(tmp_path / "whole")
    assert compute_digests(open_model(tmp_path / "ours")) == compute_digests(open_model(tmp_path / "whole"))
    pipe.unload_lora()
    assert all((a == b).all() for a, b in zip(before, jax.tree.leaves(pipe.params), strict=True))


def write_lora(path, params, rng):
    """Write a LoRA of an attention projection and a convolution."""
    tensors = {}
    for module, shape in (
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", (16, 16)),
        ("mid_block.resnets.0.conv1", (16, 16, 3, 3)),
    ):
        down, up = (2, *shape[1:]), (shape[0], 2, *[1] * (len(shape) - 2))
        for name, size in (("lora_A", down), ("lora_B", up)):
            tensors[f"unet.{module}.{name}.weight"] = rng.standard_normal(size).astype(np.float32) * 0.1
    save_file(tensors, path)
    return path


def test_saved_models_are_the_originals(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    assert compute_digests(open_model(tmp_path / "saved")) == compute_digests(open_model(folder))
    with pytest.raises(ModelError, match="^export does not support dtype int8; open the model in float32 or bfloat16$"):
        pipe.export(tmp_path / "exported")


def test_parameters_are_on_all_devices_and_can_be_pickled(pipe, folder):
    shared = Pipeline.from_pretrained(folder, dtype="int8", mesh=jax.make_mesh((2,), ("data",)))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(shared.params)} == {2}
    for each in (shared, pickle.loads(pickle.dumps(pipe))):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), each.params, pipe.params))


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_not_hidden(dtype, value):
    for layer, shape in (LAYERS["Dense"], LAYERS["3 x 3"]):
        x = normal(0, *shape)
        params = layer.init(jax.random.key(0), x)["params"]
        params |= {"kernel": quantize_kernel(params["kernel"], QUANTIZED_DTYPES[dtype])}
        for some in (np.s_[1, 2, 3], np.s_[1]):  # XLA's maximum skips NaN, even if there is nothing else
            broken = x.copy()
            broken[some] = value
            y = quantized.apply(layer, params, broken)
            assert np.isnan(y[1, 2, 3]).all() and np.isfinite(y[0]).all()
        bad = {"kernel": quantize_kernel(np.full(params["kernel"].shape, value, np.float32), QUANTIZED_DTYPES[dtype])}
        assert np.isnan(quantized.apply(layer, params | bad, x)).all()
    finite = Finite(*(np.array(each) for each in (True, True, False, True)))
    with pytest.raises(ModelError, match=r"^it: mid_block\.conv1\.weight of the unet contains NaN or infinity"):
        check_finite(finite, {"unet": {"mid_block": {"conv1": bad}}}, jnp.float32, "it")


def test_unknown_dtypes_and_a_missing_package_are_errors(folder, monkeypatch):
    names = "float32, bfloat16, float16, int8, fp8"
    for dtype in ("int4", "float8_e4m3fn", ""):
        with pytest.raises(ValueError, match=f"^dtype is {dtype!r}; choose {names}$"):
            Pipeline.from_pretrained(folder, dtype=dtype)
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"^dtype int8 and fp8 need qwix; .*pip install 'lcm_jax\[quantized\]'$"):
        Pipeline.from_pretrained(folder, dtype="fp8")
    Pipeline.from_pretrained(folder)
