"""Multi-head attention, and the choice of the kernel that computes it.

The choice depends only on the device, the dtype and the shapes, so that it is made during tracing. A kernel is chosen
only if it supports both directions, since a program that is traced forward may be differentiated later.
`docs/performance.md` lists the choice for every attention of the supported models.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.models.layers import Dtype
from lcm_jax.models.remat import ATTENTION, mark

# With fewer keys the matrix of logits is small, and a fused kernel saves almost nothing.
MIN_FUSED_KEYS = 1024


class Device(NamedTuple):
    """The properties of an accelerator that decide which kernels run on it."""

    platform: str  # cpu, cuda, rocm or tpu
    capability: tuple[int, int] = (0, 0)  # CUDA's compute capability; A100 (8, 0), H100 and H200 (9, 0)


class Shape(NamedTuple):
    """The sizes and the dtype of one attention."""

    queries: int
    keys: int
    head_dim: int
    dtype: jnp.dtype
    masked: bool = False


def current_device() -> Device:
    """Return the device that programs are compiled for: the one of `jax.default_device`, or else JAX's first."""
    chosen = jax.default_device.value
    device = chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]
    if device.platform != "gpu":
        return Device(device.platform)
    if "cuda" not in device.client.platform_version:
        return Device("rocm")
    major, minor = device.compute_capability.split(".")
    return Device("cuda", (int(major), int(minor)))


def cudnn_refusal(device: Device, shape: Shape, backward: bool) -> str | None:
    """Return the reason that cuDNN's fused kernel cannot compute this attention, or None if it can.

    backward: the gradient is needed too. The rules are those of `check_is_flash_attention` in JAX 0.10, 0.11 and 0.12,
    except for the bias: JAX passes a placeholder for an absent one, so that its check for odd lengths, meant for a
    bias, always applies to the gradient.
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
    if backward and (shape.queries % 2 or shape.keys % 2):
        return "its gradient needs even lengths"
    return None


def choose_kernel(device: Device, shape: Shape) -> str:
    """Return "cudnn" or "xla", the kernel for an attention of this shape on this device.

    On a TPU this is "xla" too, since the compiler cannot partition a Pallas kernel over a mesh.
    """
    if shape.keys >= MIN_FUSED_KEYS and cudnn_refusal(device, shape, backward=True) is None:
        return "cudnn"
    return "xla"


def attention(query, key, value, mask=None):
    """Return softmax(q k^T / sqrt(d)) v in query's shape and dtype; the softmax is in float32.

    query: [B, N, heads, d]; key, value: [B, M, heads, d]; mask: bool broadcastable to [B, heads, N, M], True where a
    query attends to a key.
    """
    queries, keys, head_dim = query.shape[1], key.shape[1], query.shape[-1]
    shape = Shape(queries, keys, head_dim, jnp.dtype(query.dtype), mask is not None)
    if choose_kernel(current_device(), shape) == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    logits = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, value)


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
