"""The choice of attention kernels: the table of the docs, JAX's own checks, and the numbers of all kernels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from jax.experimental.pallas import tpu as pallas_tpu
from jax.sharding import NamedSharding, PartitionSpec
from whole_runs import ROOT

from lcm_jax.models import attention as attentions
from lcm_jax.models.attention import KERNELS, REFUSALS, Device, Shape, choose_kernel, compiling_for
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.training import sharding

A100, H100, TPU = Device("cuda", (8, 0)), Device("cuda", (9, 0)), Device("tpu")
# By column of the table, with the dtype that models are used with there.
DEVICES = {A100: "bfloat16", H100: "bfloat16", TPU: "bfloat16", Device("cpu"): "float32"}
# The family and the side of its images in pixels by the name in the table.
MODELS = {"SD 1.5": ("sd15", 512), "SD 2.1": ("sd21-768", 768), "SDXL": ("sdxl", 1024)}

abstract = jax.ShapeDtypeStruct


@pytest.fixture
def on(monkeypatch):
    """Compile for another device, by our choice and by JAX's checks."""

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
    with compiling_for(TPU):
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
    """Return a cell of the table: the kernel, and a fused one that could compute this attention and is not chosen."""
    shape = shape._replace(dtype=jnp.dtype(DEVICES[device]))
    chosen = choose_kernel(device, shape)
    could = [name for name, refusal in REFUSALS.items() if refusal(device, shape) is None and name != chosen]
    return f"{chosen} ({could[0]} could)" if could else chosen


def test_the_docs_list_the_choice_for_every_attention(monkeypatch):
    expected = []
    for name, (family, size) in MODELS.items():
        for network, shape in attentions_of(family, size, monkeypatch):
            sizes = f"{shape.matrices} | {shape.queries} | {shape.keys} | {shape.head_dim}"
            cells = " | ".join(describe_choice(device, shape) for device in DEVICES)
            causal = "causal" if shape.masked else ""
            expected.append(f"| {name}, {size} x {size} | {network} | {sizes} | {causal} | {cells} |")
    text = (ROOT / "docs" / "performance.md").read_text()
    rows = [" ".join(line.split()) for line in text.splitlines() if re.match(r"\| SD[ X][^|]* x ", line)]
    assert rows == [" ".join(row.split()) for row in expected], "expected:\n" + "\n".join(expected)


def both_ways(kernel, *inputs):
    """Return the output and the gradients by query, key and value of the sum of its squares."""
    out, pull = jax.vjp(kernel, *inputs)
    return out, *pull(2 * out)


def lowers(platform: str, function, *inputs) -> bool:
    """Return False if JAX refuses to trace the program, or to lower it for a platform."""
    try:
        jax.jit(function).trace(*inputs).lower(lowering_platforms=(platform,))
    except (NotImplementedError, ValueError):
        return False
    return True


@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize(
    "queries, keys, head_dim, dtype",
    [
        (64, 64, 40, "bfloat16"),
        (64, 64, 64, "float16"),
        (64, 64, 128, "bfloat16"),
        (64, 64, 160, "bfloat16"),
        (64, 64, 256, "bfloat16"),
        (64, 64, 264, "bfloat16"),
        (64, 64, 44, "bfloat16"),
        (64, 77, 40, "bfloat16"),
        (77, 64, 64, "bfloat16"),
        (77, 77, 64, "bfloat16"),
        (64, 64, 64, "float32"),
    ],
)
def test_cudnn_supports_what_jax_supports(device, queries, keys, head_dim, dtype, on):
    """What is refused fails in JAX while traced, and what is not lowers to CUDA, in both directions."""
    on(device)
    shape = Shape(queries, keys, head_dim, jnp.dtype(dtype))
    query, key = abstract((2, queries, 4, head_dim), dtype), abstract((2, keys, 4, head_dim), dtype)
    supported = attentions.cudnn_refusal(device, shape) is None
    kernel = attentions.cudnn_attention
    assert lowers("cuda", kernel, query, key, key) == supported
    assert lowers("cuda", lambda *inputs: both_ways(kernel, *inputs), query, key, key) == supported


@pytest.mark.parametrize("queries, keys, head_dim", [(256, 128, 40), (1152, 1152, 64), (64, 128, 64), (128, 77, 64)])
def test_the_pallas_kernel_supports_what_is_not_refused(queries, keys, head_dim):
    shape = Shape(queries, keys, head_dim, jnp.dtype(jnp.bfloat16))
    query, key = abstract((2, queries, 4, head_dim), "bfloat16"), abstract((2, keys, 4, head_dim), "bfloat16")
    supported = attentions.flash_refusal(TPU, shape) is None
    kernel = lambda *inputs: both_ways(attentions.flash_attention, *inputs)  # noqa: E731
    assert lowers("tpu", kernel, query, key, key) == supported


@pytest.mark.parametrize(
    "name, device, change, reason",
    [
        ("cudnn", Device("cpu"), {}, "CUDA"),
        ("cudnn", Device("rocm"), {}, "CUDA"),
        ("cudnn", TPU, {}, "CUDA"),
        ("cudnn", Device("cuda", (7, 5)), {}, "8.0"),
        ("cudnn", H100, {"masked": True}, "mask"),
        ("cudnn", H100, {"dtype": jnp.dtype("float32")}, "float16"),
        ("cudnn", A100, {"head_dim": 160}, "up to 128"),
        ("cudnn", H100, {"head_dim": 512}, "up to 256"),
        ("flash", H100, {}, "TPU"),
        ("flash", TPU, {"masked": True}, "mask"),
        ("flash", TPU, {"dtype": jnp.dtype("float16")}, "bfloat16"),
        ("flash", TPU, {"queries": 4160}, "multiples of 128"),
        ("flash", TPU, {"divided": False}, "mesh"),
    ],
)
def test_what_a_fused_kernel_cannot_compute_is_left_to_xla(name, device, change, reason):
    shape = Shape(4096, 4096, 64, jnp.dtype(jnp.bfloat16))
    assert choose_kernel(H100, shape) == "cudnn" and choose_kernel(TPU, shape) == "flash"
    shape = shape._replace(**change)
    assert choose_kernel(device, shape) != name
    assert reason in REFUSALS[name](device, shape)


def test_many_scores_are_computed_in_blocks():
    shape = Shape(4096, 4096, 512, jnp.dtype("bfloat16"))
    assert choose_kernel(H100, shape) == "xla", "67 MB"
    assert choose_kernel(H100, shape._replace(matrices=8)) == "xla in blocks", "537 MB"
    assert choose_kernel(H100, shape._replace(matrices=8, masked=True)) == "xla"
    assert choose_kernel(Device("cpu"), shape) == "xla in blocks"
    assert choose_kernel(Device("cpu"), shape._replace(queries=256, keys=256)) == "xla"


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "cudnn"])
@pytest.mark.parametrize("dtype, atol", [("float32", 3e-6), ("bfloat16", 3e-2)])
def test_every_kernel_equals_float64(name, dtype, atol, monkeypatch):
    """Output and gradients at random shapes. cuDNN's kernel is compared in test_gpu.py."""
    monkeypatch.setattr(attentions, "MAX_SCORES_ON_CPU", 4 * 2 * 3 * 128 * 40)  # at most 40 queries at a time
    rng = np.random.default_rng(0)
    for _ in range(1 if name == "flash" else 3):
        batch, heads = rng.integers(1, 3), rng.integers(1, 4)
        queries, keys = (128, 256) if name == "flash" else rng.integers(2, 129, 2)
        head_dim = rng.choice([8, 20, 40])
        inputs = [rng.standard_normal((batch, n, heads, head_dim)) for n in (queries, keys, keys)]
        inputs = [np.float64(jnp.asarray(x, dtype)) for x in inputs]
        with jax.enable_x64(True):
            expected = both_ways(reference, *map(jnp.asarray, inputs))
        with pallas_tpu.force_tpu_interpret_mode():
            found = jax.jit(lambda *x: both_ways(KERNELS[name], *x))(*(jnp.asarray(x, dtype) for x in inputs))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            scale = max(1.0, np.abs(theirs).max())
            np.testing.assert_allclose(np.float64(ours), theirs, atol=atol * scale)


def reference(query, key, value):
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), value)


def test_blocks_need_no_score_matrix():
    """Neither direction has an array of all scores, at the size of SD 1.5's largest attention."""
    inputs = [abstract((1, 4096, 8, 40), jnp.float32)] * 3
    text = jax.jit(lambda *x: both_ways(attentions.attention, *x)).trace(*inputs).lower().as_text()
    largest = max(np.prod([int(n) for n in shape.split("x")]) for shape in re.findall(r"tensor<([\dx]+)xf32>", text))
    assert largest * 4 <= attentions.MAX_SCORES_ON_CPU


def test_a_mesh_in_context_divides_the_pallas_kernel(monkeypatch):
    """Over batch and heads, in both directions; without a mesh, or where it does not fit, XLA computes it."""
    monkeypatch.setattr(attentions, "MIN_FUSED_KEYS", 128)
    mesh, eight = sharding.make_mesh(2, 2, 2), Device("tpu", count=8)
    assert set(sharding.AXES) == {*attentions.BATCH_AXES, attentions.HEAD_AXIS}
    rng = np.random.default_rng(0)
    chosen = []
    choose = lambda *x: chosen.append(choose_kernel(*x)) or chosen[-1]  # noqa: E731
    monkeypatch.setattr(attentions, "choose_kernel", choose)

    def run(batch, heads, context):
        inputs = [jnp.asarray(rng.standard_normal((batch, 128, heads, 8)), jnp.bfloat16) for _ in range(3)]
        expected = both_ways(attentions.plain_attention, *inputs)

        def step(*inputs):
            with compiling_for(eight), jax.sharding.use_abstract_mesh(context):
                return both_ways(attentions.attention, *inputs)

        rows = NamedSharding(mesh, PartitionSpec(attentions.BATCH_AXES if batch % 4 == 0 else None))
        with pallas_tpu.force_tpu_interpret_mode():
            found = jax.jit(step, in_shardings=rows)(*inputs)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.float32(ours), np.float32(theirs), atol=0.05)

    run(4, 2, mesh.abstract_mesh)
    run(4, 2, sharding.AbstractMesh((), ()))
    run(4, 3, mesh.abstract_mesh)
    run(2, 2, mesh.abstract_mesh)
    assert chosen == ["flash", "xla", "xla", "xla"]


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
    cpu = Device("cpu", count=8)
    assert attentions.current_device() == cpu
    for chosen in ("cpu", jax.devices()[3]):
        with jax.default_device(chosen):
            assert attentions.current_device() == cpu
    with compiling_for(H100):
        assert attentions.current_device() == H100
    assert attentions.current_device() == cpu


def test_numbers_of_masked_attention():
    """Against float64 NumPy, and the gradient of a masked key is zero."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, n, 3, 8)) for n in (5, 7, 7))
    mask = np.arange(7) < 4
    chosen = mask[None, None, None]
    logits = np.where(chosen, np.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(8), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), value)
    found = attentions.attention(np.float32(query), np.float32(key), np.float32(value), chosen)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    gradient = jax.grad(lambda v: attentions.attention(np.float32(query), np.float32(key), v, chosen).sum())
    assert not np.asarray(gradient(np.float32(value)))[:, ~mask].any()
