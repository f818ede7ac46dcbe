"""Multi-head attention, and the choice of the kernel that computes it.

The choice depends only on the device, the mesh, the dtype and the shapes, so that it is made during tracing. A kernel
is chosen only if it supports both directions, since a program that is traced forward may be differentiated later.
`docs/performance.md` lists the choice for every attention of the supported models.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lcm_jax.models.layers import Dtype
from lcm_jax.models.remat import ATTENTION, mark

# With fewer keys the matrix of scores is small, and a fused kernel saves little. 1 leaves the 77 tokens of a prompt to
# it too, which has not been measured.
MIN_FUSED_KEYS = 1024
# float32 scores that are in memory at a time, in bytes. Those of a CPU fit its caches, which is faster by far.
MAX_SCORES, MAX_SCORES_ON_CPU = 2**28, 2**23
# Axes of `training.sharding`'s mesh that split the batch, and the heads.
BATCH_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"
FLASH_BLOCKS = (512, 256, 128)  # positions; the largest that divides a length is used


class Device(NamedTuple):
    """The properties of an accelerator that decide which kernels run on it."""

    platform: str  # cpu, cuda, rocm or tpu
    capability: tuple[int, int] = (0, 0)  # CUDA's compute capability; A100 (8, 0), H100 and H200 (9, 0)
    count: int = 1  # devices that a program can be spread over


class Shape(NamedTuple):
    """The sizes and the dtype of one attention, as a device of the mesh in context computes it.

    matrices: batch x heads on the device. divided: False if the compiler would have to divide a kernel between devices,
    since there is no mesh in context, or the batch or the heads are not multiples of its axes.
    """

    queries: int
    keys: int
    head_dim: int
    dtype: jnp.dtype
    masked: bool = False
    matrices: int = 1
    divided: bool = True


_TARGET: ContextVar[Device | None] = ContextVar("target", default=None)


@contextmanager
def compiling_for(device: Device) -> Iterator[None]:
    """Choose kernels for `device`, which need not exist, in programs that are traced in this context.

    jit does not trace a function again that it has traced for another device: use a new one.
    """
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)


def current_device() -> Device:
    """Return the device that programs are compiled for.

    It is the one of `compiling_for`, or else of `jax.default_device`, or else JAX's first.
    """
    if (target := _TARGET.get()) is not None:
        return target
    chosen = jax.default_device.value
    device = chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]
    count = device.client.device_count()
    if device.platform != "gpu":
        return Device(device.platform, count=count)
    if "cuda" not in device.client.platform_version:
        return Device("rocm", count=count)
    major, minor = device.compute_capability.split(".")
    return Device("cuda", (int(major), int(minor)), count)


def describe(query: jax.Array, keys: int, masked: bool, device: Device) -> Shape:
    """Return the Shape of an attention of query: [B, N, heads, d] to `keys` keys under the mesh in context."""
    batch, queries, heads, head_dim = query.shape
    mesh = jax.sharding.get_abstract_mesh()
    matrices, divided = batch * heads, mesh.size == 1 or (mesh.empty and device.count == 1)
    if {*BATCH_AXES, HEAD_AXIS} <= set(mesh.axis_names):
        batch_parts, head_parts = math.prod(mesh.shape[name] for name in BATCH_AXES), mesh.shape[HEAD_AXIS]
        divided = batch % batch_parts == 0 and heads % head_parts == 0
        matrices = -(-batch // batch_parts) * -(-heads // head_parts)
    return Shape(queries, keys, head_dim, jnp.dtype(query.dtype), masked, matrices, divided)


def cudnn_refusal(device: Device, shape: Shape) -> str | None:
    """Return the reason that cuDNN's fused kernel cannot compute this attention, or None if it can in both directions.

    The rules are those of `check_is_flash_attention` in JAX 0.10, 0.11 and 0.12. Its gradient needs even lengths, even
    without the bias that the check is for, since JAX passes a placeholder for an absent one: `cudnn_attention` pads.
    """
    largest = 256 if device.capability >= (9, 0) else 128
    if device.platform != "cuda":
        return "it needs CUDA"
    if device.capability < (8, 0):
        return "it needs compute capability 8.0 (Ampere)"
    if shape.dtype not in (jnp.bfloat16, jnp.float16):
        return "it needs bfloat16 or float16"
    if shape.masked:
        return "it does not support masks"
    if shape.head_dim % 8 or shape.head_dim > largest:
        return f"it needs a head size that is a multiple of 8 up to {largest}"
    return None


def flash_refusal(device: Device, shape: Shape) -> str | None:
    """Return the reason that the Pallas kernel cannot compute this attention, or None if it can in both directions."""
    if device.platform != "tpu":
        return "it needs a TPU"
    if shape.dtype != jnp.bfloat16:
        return "it needs bfloat16"
    if shape.masked:
        return "it does not support masks"
    if shape.queries % FLASH_BLOCKS[-1] or shape.keys % FLASH_BLOCKS[-1]:
        return f"it needs lengths that are multiples of {FLASH_BLOCKS[-1]}"
    if not shape.divided:
        return "it needs a mesh in context, whose axes divide the batch and the heads"
    return None


REFUSALS: Mapping[str, Callable[[Device, Shape], str | None]] = {"cudnn": cudnn_refusal, "flash": flash_refusal}


def max_scores(device: Device) -> int:
    """Return the bytes of float32 scores that XLA computes at a time, as far as it has a choice."""
    return MAX_SCORES_ON_CPU if device.platform == "cpu" else MAX_SCORES


def choose_kernel(device: Device, shape: Shape) -> str:
    """Return the name in KERNELS for an attention of this shape on this device."""
    if shape.keys >= MIN_FUSED_KEYS:
        for name, refusal in REFUSALS.items():
            if refusal(device, shape) is None:
                return name
    scores = 4 * shape.matrices * shape.queries * shape.keys
    return "xla in blocks" if scores > max_scores(device) and not shape.masked else "xla"


def plain_attention(query, key, value, mask=None):
    """Compute `attention` by XLA, with all scores in memory."""
    # A CPU multiplies matrices whose batch axes come first several times faster, and others transpose them anyway.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(_scores_to_values(query, key, value, mask), 1, 2)


def _scores_to_values(query, key, value, mask=None):
    """Return [B, heads, N, d] of query: [B, heads, N, d] and key, value: [B, heads, M, d]."""
    scores = _products(query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, value)


@jax.custom_vjp
def _products(query, key):
    """Return query key^T, float32[B, heads, N, M]."""
    return jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)


def _products_backward(inputs, gradient):
    # In the dtype of the inputs: the transpose of a product with float32 output multiplies float32 matrices.
    (query, key), gradient = inputs, gradient.astype(inputs[0].dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", gradient, key), jnp.einsum("bhnm,bhnd->bhmd", gradient, query)


_products.defvjp(lambda query, key: (_products(query, key), (query, key)), _products_backward)


def attention_in_blocks(query, key, value):
    """Compute `attention` by XLA, for some queries after the other; the backward pass computes their scores again."""
    batch, queries, heads, head_dim = query.shape
    device = current_device()
    matrices = describe(query, key.shape[1], False, device).matrices
    count = min(-(-4 * matrices * queries * key.shape[1] // max_scores(device)), queries)
    size = -(-queries // count)
    count = -(-queries // size)
    blocks = jnp.pad(query, ((0, 0), (0, count * size - queries), (0, 0), (0, 0)))
    blocks = jnp.transpose(blocks.reshape(batch, count, size, heads, head_dim), (1, 0, 3, 2, 4))
    # float32 outside the loop, whose backward pass sums the gradients of all blocks in this dtype.
    key, value = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (key, value))
    attend = jax.checkpoint(
        lambda block: _scores_to_values(block, key.astype(query.dtype), value.astype(query.dtype)), prevent_cse=False
    )
    out = jnp.transpose(jax.lax.map(attend, blocks), (1, 0, 3, 2, 4))
    return out.reshape(batch, count * size, heads, head_dim)[:, :queries]


def cudnn_attention(query, key, value):
    """Compute `attention` by cuDNN's fused kernel, with odd numbers of queries and keys padded by one."""
    queries, keys = query.shape[1], key.shape[1]
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))  # noqa: E731
    lengths = jnp.full(len(query), keys, jnp.int32) if keys % 2 else None
    out = jax.nn.dot_product_attention(
        even(query), even(key), even(value), key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :queries]


def flash_attention(query, key, value):
    """Compute `attention` by JAX's Pallas kernel for TPUs (arXiv 2205.14135), each device with its rows and heads."""
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas  # half a second, only on TPUs

    q, k = (next((size for size in FLASH_BLOCKS if x.shape[1] % size == 0), FLASH_BLOCKS[-1]) for x in (query, key))
    sizes = pallas.BlockSizes(
        block_q=q,
        block_k_major=k,
        block_k=k,
        block_b=1,
        block_q_major_dkv=q,
        block_q_dkv=q,
        block_k_major_dkv=k,
        block_k_dkv=k,
        block_q_dq=q,
        block_k_major_dq=k,
        block_k_dq=k,
    )

    def kernel(query, key, value):
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        out = pallas.flash_attention(query, key, value, sm_scale=query.shape[-1] ** -0.5, block_sizes=sizes)
        return jnp.swapaxes(out, 1, 2)

    if jax.sharding.get_abstract_mesh().size > 1:
        split = PartitionSpec(BATCH_AXES, None, HEAD_AXIS)
        kernel = jax.shard_map(kernel, in_specs=(split, split, split), out_specs=split, check_vma=False)
    return kernel(query, key, value)


KERNELS: Mapping[str, Callable] = {
    "xla": plain_attention,
    "xla in blocks": attention_in_blocks,
    "cudnn": cudnn_attention,
    "flash": flash_attention,
}


def attention(query, key, value, mask=None):
    """Return softmax(q k^T / sqrt(d)) v in query's shape and dtype; the softmax is in float32.

    query: [B, N, heads, d]; key, value: [B, M, heads, d]; mask: bool broadcastable to [B, heads, N, M], True where a
    query attends to a key. A program that is spread over devices has its mesh in context
    (`jax.sharding.use_abstract_mesh`), as the compiler cannot divide a Pallas kernel; without it XLA computes it.
    """
    device = current_device()
    kernel = KERNELS[choose_kernel(device, describe(query, key.shape[1], mask is not None, device))]
    return kernel(query, key, value) if mask is None else kernel(query, key, value, mask)


class Attention(nn.Module):
    """Multi-head attention of x: [B, N, C] to context: [B, M, D], or to x if there is none."""

    heads: int
    head_dim: int
    bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, context=None):
        context = x if context is None else context
        inner = self.heads * self.head_dim

        def dense(y, name):
            y = nn.Dense(inner, use_bias=self.bias, dtype=self.dtype, name=name)(y)
            return y.reshape(*y.shape[:2], self.heads, self.head_dim)

        out = mark(attention(dense(x, "to_q"), dense(context, "to_k"), dense(context, "to_v")), ATTENTION)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="to_out_0")(out.reshape(*x.shape[:2], inner))
