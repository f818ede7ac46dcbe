"""The choice of attention kernels: the table of the docs, JAX's own checks, and the numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from whole_runs import ROOT

from lcm_jax.models import attention as attentions
from lcm_jax.models.attention import Device, Shape, choose_kernel, cudnn_refusal
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion

A100, H100 = Device("cuda", (8, 0)), Device("cuda", (9, 0))
OTHERS = {"CPU": Device("cpu"), "TPU": Device("tpu")}
# The family, the side of its images in pixels, and the name of its text encoders in the table.
MODELS = {"SD 1.5": ("sd15", 512), "SD 2.1": ("sd21-768", 768), "SDXL": ("sdxl", 1024)}

abstract = jax.ShapeDtypeStruct


@pytest.fixture
def on(monkeypatch):
    """Pretend that programs are compiled for another device: for our choice, and for JAX's checks."""

    def pretend(device: Device) -> None:
        monkeypatch.setattr(attentions, "current_device", lambda: device)
        monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91200)
        version = lambda text: tuple(int(part) for part in text.split("."))  # noqa: E731
        monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda least: device.capability >= version(least))

    return pretend


def attentions_of(family: str, size: int, monkeypatch) -> list[tuple[str, Shape]]:
    """Return the (network, shape) of every distinct attention of a full-size model in bfloat16, in order of use."""
    found: dict[tuple[str, Shape], None] = {}
    network = ""

    def record(device, shape):
        found[network, shape] = None
        return "xla"

    monkeypatch.setattr(attentions, "choose_kernel", record)
    model = StableDiffusion.from_configs(FAMILIES[family], jnp.bfloat16)
    side, rng, unet = size // model.downscale, jax.random.key(0), model.unet.config
    ids, t, sizes = abstract((1, 77), jnp.int32), abstract((1,), jnp.int32), abstract((1, 6), jnp.float32)
    z, image = abstract((1, side, side, 4), jnp.float32), abstract((1, size, size, 3), jnp.float32)
    context = abstract((1, 77, unet["cross_attention_dim"]), jnp.float32)
    added = (None, abstract((1, 1280), jnp.float32), sizes) if model.text_encoder_2 else ()
    # Traced by their initialization, which calls each network once.
    network = "CLIP"
    for encoder in filter(None, (model.text_encoder, model.text_encoder_2)):
        jax.eval_shape(encoder.init, rng, ids)
    network = "UNet"
    jax.eval_shape(model.unet.init, rng, z, t, context, *added)
    network = "VAE"
    jax.eval_shape(model.vae.init, rng, image, z)
    monkeypatch.undo()
    return list(found)


def describe_choice(device: Device, shape: Shape) -> str:
    """Return a cell of the table: the kernel, and what cuDNN could compute."""
    could = [name for name, back in [("forward", False), ("backward", True)] if not cudnn_refusal(device, shape, back)]
    return f"{choose_kernel(device, shape)} ({' and '.join(could) or 'neither'})"


def test_the_docs_list_the_choice_for_every_attention(monkeypatch):
    expected = []
    for name, (family, size) in MODELS.items():
        for network, shape in attentions_of(family, size, monkeypatch):
            sizes = f"{shape.queries} | {shape.keys} | {shape.head_dim} | {'causal' if shape.masked else ''}"
            gpus = " | ".join(describe_choice(device, shape) for device in (A100, H100))
            others = " | ".join(choose_kernel(device, shape) for device in OTHERS.values())
            expected.append(f"| {name}, {size} x {size} | {network} | {sizes} | {gpus} | {others} |")
    text = (ROOT / "docs" / "performance.md").read_text()
    rows = [" ".join(line.split()) for line in text.splitlines() if re.match(r"\| SD[ X]", line)]
    assert rows == [" ".join(row.split()) for row in expected], "expected:\n" + "\n".join(expected)


def dot_product(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn").astype(jnp.float32).sum()


@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
def test_the_rules_are_those_of_jax(device, on):
    """What is refused fails in JAX while traced, and what is not lowers to CUDA, in both directions."""
    on(device)
    for queries, keys, head_dim, dtype in [
        (64, 64, 40, "bfloat16"),
        (64, 64, 64, "float16"),
        (64, 64, 80, "bfloat16"),
        (64, 64, 128, "bfloat16"),
        (64, 64, 160, "bfloat16"),
        (64, 64, 256, "bfloat16"),
        (64, 64, 264, "bfloat16"),
        (64, 64, 512, "bfloat16"),
        (64, 64, 44, "bfloat16"),
        (64, 77, 40, "bfloat16"),
        (77, 77, 64, "bfloat16"),
        (64, 64, 64, "float32"),
    ]:
        shape = Shape(queries, keys, head_dim, jnp.dtype(dtype))
        query = abstract((2, queries, 4, head_dim), dtype)
        other = abstract((2, keys, 4, head_dim), dtype)
        for backward, function in [(False, dot_product), (True, jax.grad(dot_product, (0, 1, 2)))]:
            try:
                jax.jit(function).trace(query, other, other).lower(lowering_platforms=("cuda",))
                refused = False
            except NotImplementedError:
                refused = True
            assert refused == (cudnn_refusal(device, shape, backward) is not None), (shape, backward)


@pytest.mark.parametrize(
    "device, change, reason",
    [
        (Device("cpu"), {}, "CUDA"),
        (Device("rocm"), {}, "CUDA"),
        (Device("tpu"), {}, "CUDA"),
        (Device("cuda", (7, 5)), {}, "8.0"),
        (H100, {"masked": True}, "mask"),
        (H100, {"dtype": jnp.dtype("float32")}, "float16"),
        (A100, {"head_dim": 160}, "up to 128"),
        (H100, {"head_dim": 512}, "up to 256"),
        (H100, {"keys": 4095}, "even lengths"),
    ],
)
def test_what_cudnn_cannot_compute_is_left_to_xla(device, change, reason):
    shape = Shape(4096, 4096, 64, jnp.dtype(jnp.bfloat16))
    assert choose_kernel(H100, shape) == "cudnn"
    shape = shape._replace(**change)
    assert choose_kernel(device, shape) == "xla"
    assert reason in cudnn_refusal(device, shape, backward=True)


def test_a_full_size_unet_is_differentiated_for_an_h100(on):
    """The program that failed: SD 1.5 in bfloat16 at 512 x 512, whose 77 keys cuDNN cannot differentiate."""
    on(H100)
    model = StableDiffusion.from_configs(FAMILIES["sd15"], jnp.bfloat16, remat="block")
    params = model.abstract_params()["unet"]
    inputs = (
        abstract((2, 64, 64, 4), jnp.float32),
        abstract((2,), jnp.int32),
        Conditioning(abstract((2, 77, 768), jnp.float32)),
    )
    gradient = jax.grad(lambda params, *inputs: model.denoise(params, *inputs).sum())
    text = jax.jit(gradient).trace(params, *inputs).lower(lowering_platforms=("cuda",)).as_text()
    # Ten self-attentions have 1,024 positions or more; rematerialized, each runs forward twice.
    calls = {name: text.count(f"__cudnn$fmha{name}(") for name in ("Softmax", "SoftmaxBackward")}
    assert calls["SoftmaxBackward"] == 10 and calls["Softmax"] >= 10, calls


def test_the_device_is_the_one_that_is_computed_on():
    assert attentions.current_device() == Device("cpu")
    for chosen in ("cpu", jax.devices()[3]):
        with jax.default_device(chosen):
            assert attentions.current_device() == Device("cpu")


def test_numbers():
    """Against float64 NumPy, masked and not, and the gradient of a masked key is zero."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, n, 3, 8)) for n in (5, 7, 7))
    mask = np.arange(7) < 4
    for chosen in (None, mask[None, None, None]):
        logits = np.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(8)
        logits = logits if chosen is None else np.where(chosen, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        expected = np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), value)
        found = attentions.attention(*(np.float32(x) for x in (query, key, value)), chosen)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    gradient = jax.grad(lambda v: attentions.attention(np.float32(query), np.float32(key), v, chosen).sum())
    assert not np.asarray(gradient(np.float32(value)))[:, ~mask].any()
