"""Networks with quantized kernels: int8 or float8 numbers, and a float32 scale for each output channel, by qwix.

Kernels are quantized once, and the inputs of their layers while the network is computed, if the device multiplies in 8
bits: with one scale for each pixel or token before a matrix product, and one for each image before a convolution, so
that an image does not depend on the others of its batch. Quantized are the blocks of the UNet and the layers of the
text encoders. The autoencoder, ControlNets, biases, norms, attention, embeddings, and the UNet's first and last
convolution are not.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.models import layers
from lcm_jax.models.attention import Device, current_device
from lcm_jax.models.layers import Conv

QUANTIZED_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# First parts of paths. The rest of the UNet is a small share of the work and changes images most.
PLACES = ("down_blocks", "mid_block", "up_blocks", "text_model")
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class QuantizedKernel(NamedTuple):
    """A kernel, about values * scale. values: int8 or float8_e4m3fn[..., out]; scale: float32[1, ..., 1, out]."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        return self.values.dtype


def import_qwix() -> Any:
    """Return the module qwix. Raises ValueError if it is not installed."""
    try:
        import qwix  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "qwix":
            raise
        raise ValueError("dtype int8 and fp8 need qwix; install it: pip install 'lcm_jax[quantized]'") from None
    return qwix


def compute_dtype(dtype: str) -> Any:
    """Return the dtype of all that is not quantized: for int8 and fp8 float32 on a CPU, else bfloat16.

    Raises ValueError if qwix is needed and is not installed.
    """
    if dtype not in QUANTIZED_DTYPES:
        return jnp.dtype(dtype)
    import_qwix()
    return jnp.dtype(jnp.float32 if current_device().platform == "cpu" else jnp.bfloat16)


def is_quantized(path: tuple[str, ...]) -> bool:
    """Return True if the parameter at this path of a UNet or a text encoder is quantized."""
    return path[-1] == "kernel" and path[0].startswith(PLACES)


@partial(jax.jit, static_argnums=1)
def quantize_kernel(kernel: jax.Array, dtype: Any) -> QuantizedKernel:
    """Return a kernel, [..., out] of any dtype, in int8 or float8_e4m3fn. Raises ValueError without qwix."""
    array = quantize(kernel, dtype, [kernel.ndim - 1])
    return QuantizedKernel(array.qvalue, array.scale)


def quantize(x: jax.Array, dtype: Any, axes: list[int]) -> Any:
    """Return x as a qwix.QArray, with a float32 scale for each index of `axes`, infinite if x has NaN or infinity."""
    # XLA's maximum on a CPU skips NaN, and not infinity; times an infinite scale, every value is NaN.
    x = jnp.where(jnp.isnan(x), jnp.inf, x.astype(jnp.float32))
    # Of int8, qwix scales the largest number to 127.5, which errors of a last bit round up or down.
    method = f"absmax,{127.5 / 127}" if dtype == jnp.int8 else "absmax"
    return import_qwix().quantize(x, dtype, channelwise_axes=axes, calibration_method=method)


def cast_like(array: Any, like: Any) -> Any:
    """Return `array` in the dtype of `like`, quantized if that is."""
    return quantize_kernel(array, like.dtype) if isinstance(like, QuantizedKernel) else array.astype(like.dtype)


def multiplies(device: Device, dtype: Any, convolution: bool) -> bool:
    """Return True if the device computes products, or convolutions, of two arrays of this dtype as such.

    cuDNN supports convolutions in 8 bits only in patterns that XLA may not find, and fails without them. XLA's
    convolution in int8 on a CPU takes a hundred times as long as in float32 without the micro-kernels of
    `xla_cpu_experimental_ynn_fusion_type`.
    """
    if jnp.dtype(dtype) == jnp.int8:
        return device.platform == "tpu" or (device.platform == "cuda" and not convolution)
    return device.platform == "cuda" and device.capability >= (8, 9) and not convolution


def apply(network: nn.Module, params: Any, *inputs, **options) -> Any:
    """Return the output of a network, as `layers.apply`, whose kernels may be quantized."""
    with nn.intercept_methods(_multiply_quantized):
        return layers.apply(network, params, *inputs, **options)


def _multiply_quantized(call, args, kwargs, context):
    """Compute a layer with a quantized kernel, and call any other method."""
    module = context.module
    if not isinstance(module, nn.Dense | Conv) or context.method_name != "__call__":
        return call(*args, **kwargs)
    kernel = module.get_variable("params", "kernel")
    if not isinstance(kernel, QuantizedKernel):
        return call(*args, **kwargs)
    y = multiply(args[0].astype(module.dtype), kernel, module)
    bias = module.get_variable("params", "bias")
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape(*[1] * (y.ndim - 1), -1)
    return y.astype(module.dtype)


def multiply(x: jax.Array, kernel: QuantizedKernel, layer: nn.Dense | Conv) -> jax.Array:
    """Return the product, or the convolution that `layer` describes, of x: [..., C] and a quantized kernel.

    If the device multiplies these 8 bits, x is quantized too, and the output is float32[..., out]. Otherwise the kernel
    is dequantized to the dtype of x, which the output has; a CPU rounds x to 8 bits all the same, so that its images
    have the errors of both.
    """
    qwix, device = import_qwix(), current_device()
    convolution = isinstance(layer, Conv) and layer.size > 1
    # One scale for an image, since a window has many pixels; else one for each of them, or each token.
    own_scale = [0] if convolution else list(range(x.ndim - 1))
    if multiplies(device, kernel.dtype, convolution):
        if isinstance(layer, Conv) and layer.upsample:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        inputs, weights = quantize(x, kernel.dtype, own_scale), qwix.QArray(*kernel)
        if not convolution:
            return qwix.dot_general(inputs, weights.reshape(kernel.shape[-2:]), (((x.ndim - 1,), (0,)), ((), ())))
        half = layer.size // 2
        padding, strides = layer.padding or ((half, half), (half, half)), (layer.stride, layer.stride)
        return qwix.conv_general_dilated(inputs, weights, strides, padding, dimension_numbers=DIMENSIONS)
    if device.platform == "cpu":
        x = qwix.dequantize(quantize(x, kernel.dtype, own_scale)).astype(x.dtype)
    dense = qwix.dequantize(qwix.QArray(*kernel)).astype(x.dtype)
    return layer.convolve(x, dense) if isinstance(layer, Conv) else x @ dense
