"""FLOPs and memory of a traced program, counted from its jaxpr without compiling it."""

import math

import numpy as np
from jax.extend.core import Var

# Number of matrix products in cuDNN's fused attention; its first two inputs are the query and the key.
FUSED_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
# Published by the makers: dense bfloat16 TFLOP/s, by the beginning of JAX's name for a device.
PEAKS = {
    "NVIDIA A100": 312,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
}


def peak_flops(device_kind: str) -> float | None:
    """Return the bfloat16 FLOP/s that the maker of a device publishes, or None for one that `PEAKS` does not have."""
    return next((peak * 1e12 for name, peak in PEAKS.items() if device_kind.startswith(name)), None)


def count_flops(jaxpr, recomputed: bool = True) -> int:
    """Return 2 x the multiply-adds of every matrix product, convolution and fused attention in a program.

    Elementwise work is left out (below 5% for these networks). The body of a scan is multiplied by its length; a
    condition counts as its most expensive branch. recomputed: False to leave out the activations that a backward pass
    computes for a second time (remat).
    """
    total = 0
    for equation in jaxpr.eqns:
        name, shapes = equation.primitive.name, [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(shapes[2]) * math.prod(shapes[0][axis] for axis in contracted)
        elif name == "conv_general_dilated":
            features = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(shapes[2]) * math.prod(shapes[1]) // features
        elif name in FUSED_ATTENTION:
            batch, queries, heads, head_dim = shapes[0]
            total += FUSED_ATTENTION[name] * 2 * batch * heads * queries * shapes[1][1] * head_dim
        else:
            inner = [count_flops(sub, recomputed) for value in equation.params.values() for sub in _jaxprs(value)]
            if equation.params.get("differentiated") and not recomputed:
                inner = [count_flops(_backward(equation.params["jaxpr"]))]
            total += max(inner, default=0) if name == "cond" else sum(inner) * _repetitions(equation)
    return total


def _repetitions(equation) -> int:
    """Return how often the inner program of a scan, of a Pallas kernel's grid or of a mesh's devices is run."""
    if equation.primitive.name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    if equation.primitive.name == "shard_map":
        return equation.params["mesh"].size
    return equation.params.get("length", 1)


def _backward(jaxpr):
    """Return a rematerialized backward pass without the equations that repeat the forward pass.

    Its last input is the gradient of its output; what does not depend on that is computed for a second time.
    """
    dependent, kept = {jaxpr.invars[-1]}, []
    for equation in jaxpr.eqns:
        if any(isinstance(v, Var) and v in dependent for v in equation.invars):
            dependent.update(equation.outvars)
            kept.append(equation)
    return jaxpr.replace(eqns=kept)


def peak_bytes(jaxpr) -> int:
    """Estimate the peak memory of the intermediate values of `jaxpr`, run in its order, in bytes.

    Inputs and outputs are not counted. XLA fuses, reorders and needs workspace: on a CPU it allocates about 80% of the
    estimate for a small step without remat. CPU compilation undoes remat, so that the estimate with remat has not been
    compared.
    """

    def size(v) -> int:
        return int(np.prod(getattr(v.aval, "shape", ()))) * v.aval.dtype.itemsize

    variables = lambda values: {v for v in values if isinstance(v, Var)}  # noqa: E731
    last = {v: number for number, equation in enumerate(jaxpr.eqns) for v in variables(equation.invars)}
    outputs = variables(jaxpr.outvars)
    live: dict[Var, int] = {}
    now = peak = 0
    for number, equation in enumerate(jaxpr.eqns):
        made = {v: size(v) for v in variables(equation.outvars) - outputs}
        live |= made
        now += sum(made.values())
        inner = [sub for value in equation.params.values() for sub in _jaxprs(value)]
        peak = max(peak, now + max((peak_bytes(sub) for sub in inner), default=0))
        for v in variables([*equation.invars, *equation.outvars]) & live.keys():
            if last.get(v, number) <= number:
                now -= live.pop(v)
    return peak


def _jaxprs(value) -> list:
    """Return the jaxprs in a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [sub for each in value for sub in _jaxprs(each)]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    return [value] if hasattr(value, "eqns") else []
