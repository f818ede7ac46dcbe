"""The operations of an optimized XLA program, read from its text: their FLOPs, bytes, and kind."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

CONVOLUTION, MATRIX, ATTENTION, NORM, ELEMENTWISE, COPY, CONVERT, OTHER = KINDS = (
    "convolution",
    "matrix product",
    "attention",
    "norm, reduction",
    "elementwise",
    "copy, transpose",
    "convert",
    "other",
)
DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
CONTAINERS = {"while", "call", "conditional", "async-start", "async-done"}  # their operations run as kernels themselves
NEVER_RUN = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
FREE = NEVER_RUN | {"reshape", "broadcast", "iota"}  # within a fusion, whose kind they do not change
MOVES = {"copy", "transpose", "copy-start", "copy-done", "reverse"}
REDUCTIONS = {"reduce", "reduce-window", "select-and-scatter"}
COLLECTIVES = ("all-", "collective-", "reduce-scatter")
# How many matrix products of the size of the scores cuDNN's fused attention makes.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
# Attention itself in Flax's scopes: its projections are modules one level below, and the sum belongs to the block.
ATTENTION_SCOPE = re.compile(r"/(?:attn\d?|self_attn|attentions_\d+)/(?:[^/]*->[^/]*/)?(?!add$)[\w-]+$")
NORM_SCOPE = re.compile(r"/\w*norm\w*/")

HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Array(NamedTuple):
    """An array of a program; dtype in XLA's spelling, such as bf16."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)  # f32, bf16, s4, f8e4m3fn; a pred takes a byte, a token nothing
        return math.prod(self.shape) * (int(bits[0]) / 8 if bits else self.dtype == "pred")


@dataclass(frozen=True)
class Op:
    """One operation. arrays: of its result, several for a tuple. attributes: the rest of its line."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def scope(self) -> str:
        """The operation and the modules that it comes from, such as jit(generate)/UNet2DCondition/conv_in/add."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The library function of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that the operation refers to."""
        branches = BRANCHES.search(self.attributes)
        return (*CALLED.findall(self.attributes), *(NAME.findall(branches[1]) if branches else ()))

    def axes(self, name: str) -> tuple[int, ...]:
        """Return the axes of an attribute such as lhs_contracting_dims={1,2}."""
        found = re.search(rf"{name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(axis) for axis in found[1].split(",") if axis) if found else ()


class Kernel(NamedTuple):
    """The work of one run of an operation. dtype: of the products, in JAX's spelling, or "" if there are none."""

    op: Op
    kind: str
    flops: int
    nbytes: float
    dtype: str
    scope: str
    looped: bool


class Program:
    """An optimized program. name: of its module. computations: operations by name, for each computation by name."""

    def __init__(self, text: str):
        """Read what `compiled.as_text()` returns. Raises ValueError for text that is not HLO."""
        head = re.match(r"HloModule ([\w.\-]+)", text)
        if head is None:
            raise ValueError("it does not begin with HloModule")
        self.name = head[1]
        self.computations: dict[str, dict[str, Op]] = {}
        self.entry = ""
        inside: dict[str, Op] = {}
        for line in text.splitlines():
            if line.startswith(" ") and " = " in line:
                op = read_op(line)
                inside[op.name] = op
            elif (found := HEAD.match(line)) and not line.startswith("HloModule"):
                inside = self.computations[found[2]] = {}
                self.entry = found[2] if found[1] else self.entry
        if not self.entry:
            raise ValueError("it has no ENTRY computation")

    @cached_property
    def kernels(self) -> Mapping[str, Kernel]:
        """The operations that the device runs one by one, by name: a fusion is one, a loop is those of its body."""
        found = {}
        for computation, looped in self._run_one_by_one(self.entry, False):
            ops = self.computations[computation]
            for op in ops.values():
                if op.opcode not in CONTAINERS | NEVER_RUN:
                    found[op.name] = self._kernel(op, ops, looped)
        return found

    @cached_property
    def containers(self) -> frozenset[str]:
        """The names of loops, calls and branches, whose time is that of the operations in them."""
        every = (op for ops in self.computations.values() for op in ops.values())
        return frozenset(op.name for op in every if op.opcode in CONTAINERS)

    def _run_one_by_one(self, computation: str, looped: bool) -> Iterator[tuple[str, bool]]:
        yield computation, looped
        for op in self.computations[computation].values():
            if op.opcode in CONTAINERS:
                for called in op.called:
                    yield from self._run_one_by_one(called, looped or op.opcode == "while")

    def _kernel(self, op: Op, ops: Mapping[str, Op], looped: bool) -> Kernel:
        fused = self.computations[op.called[0]] if op.opcode == "fusion" else None
        inner = list(fused.values()) if fused is not None else [op]
        work = [each for each in inner if each.opcode not in FREE]
        products = [each for each in work if product_kind(each)]
        # Where XLA leaves out the scope, a part of the fusion or what it reads is near it.
        read = [ops[name] for name in op.operands]
        scopes = [each.scope for each in (op, *reversed(inner), *read) if each.scope]
        scope = scopes[0] if scopes else ""
        around = fused if fused is not None else ops
        dtype = around[products[0].operands[0]].arrays[0].dtype if products else ""
        return Kernel(
            op,
            kind_of(work, scope),
            sum(flops(each, around) for each in products),
            fusion_bytes(op, ops, fused) if fused is not None else op_bytes(op, ops),
            DTYPES.get(dtype, dtype),
            scope,
            looped,
        )


def read_op(line: str) -> Op:
    """Return the operation of a line `%name = type opcode(operands), attributes`. Raises ValueError for another."""
    left, _, right = line.strip().partition(" = ")
    end = closing(right, 0) if right.startswith("(") else right.find(" ")
    opening = right.find("(", end)
    close = closing(right, opening)
    if min(end, opening, close) < 0:
        raise ValueError(f"{line.strip()[:80]!r} is not an operation")
    return Op(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=right[end:opening].strip(),
        arrays=arrays_of(right[:end]),
        operands=tuple(NAME.findall(right[opening:close])),
        attributes=right[close:],
        root=left.startswith("ROOT "),
    )


def closing(text: str, start: int) -> int:
    """Return the place after the parenthesis that closes the one at `start`, or -1."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:] if start >= 0 else ""):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    return -1


def arrays_of(text: str) -> tuple[Array, ...]:
    """Return the arrays of a type, f32[2,3]{1,0} or a tuple of such."""
    return tuple(Array(d, tuple(int(n) for n in shape.split(",") if n)) for d, shape in ARRAY.findall(text))


def product_kind(op: Op) -> str | None:
    """Return the kind of an operation that multiplies matrices, or None for any other."""
    if op.opcode == "convolution" or op.target.startswith("__cudnn$conv"):
        return CONVOLUTION
    if op.target.startswith("__cudnn$fmha"):
        return ATTENTION
    if op.opcode == "dot" or op.target.startswith(("__cublas$gemm", "__cublas$lt$matmul")):
        return MATRIX
    return None


def kind_of(work: list[Op], scope: str) -> str:
    """Return one of KINDS for a kernel of these operations, without the free ones."""
    products = {product_kind(op) for op in work} - {None}
    opcodes = {op.opcode for op in work}
    attention = ATTENTION_SCOPE.search(scope) is not None
    if CONVOLUTION in products:
        return CONVOLUTION
    if products:
        return ATTENTION if attention or ATTENTION in products else MATRIX
    if opcodes & MOVES and opcodes <= MOVES | {"convert"}:
        return COPY
    if opcodes == {"convert"}:
        return CONVERT
    if "custom-call" in opcodes or any(code.startswith(COLLECTIVES) for code in opcodes):
        return OTHER
    if attention:
        return ATTENTION
    return NORM if opcodes & REDUCTIONS or NORM_SCOPE.search(scope) else ELEMENTWISE


def flops(op: Op, ops: Mapping[str, Op]) -> int:
    """Return 2 x the multiply-adds of a matrix product, convolution or fused attention, as `cost.count_flops` does.

    ops: the computation that it is in, by name.
    """
    shapes = [ops[name].arrays[0].shape for name in op.operands]
    result = math.prod(op.arrays[0].shape)
    if op.opcode == "dot":
        return 2 * result * math.prod(shapes[0][axis] for axis in op.axes("lhs_contracting_dims"))
    if op.opcode == "convolution" or op.target.startswith("__cudnn$conv"):
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
        if labels is None:
            raise ValueError(f"the convolution {op.name} has no dim_labels")
        # cuDNN's gradients keep the labels of the convolution that they are gradients of.
        kernel, output = shapes[1], result
        if "BackwardFilter" in op.target:
            kernel, output = op.arrays[0].shape, math.prod(shapes[1])
        elif "BackwardInput" in op.target:
            output = math.prod(shapes[0])
        return 2 * output * math.prod(kernel) // kernel[labels[2].index("o")]
    config = backend_config(op)
    if "gemm_backend_config" in config:
        contracted = config["gemm_backend_config"]["dot_dimension_numbers"]["lhs_contracting_dimensions"]
        return 2 * result * math.prod(shapes[0][int(axis)] for axis in contracted)
    if "cudnn_fmha_backend_config" in config:
        scores = [int(n) for n in config["cudnn_fmha_backend_config"]["intermediate_tensor_shape"]["dimensions"]]
        head = math.prod(shapes[0]) // math.prod(scores[:3])
        return 2 * (BACKWARD_PRODUCTS if "Backward" in op.target else FORWARD_PRODUCTS) * math.prod(scores) * head
    raise ValueError(f"the custom call {op.target} of {op.name} has no size in its backend_config")


def backend_config(op: Op) -> dict:
    """Return the JSON object in backend_config={...}."""
    _, _, text = op.attributes.partition("backend_config=")
    return json.JSONDecoder().raw_decode(text)[0] if text.startswith("{") else {}


def op_bytes(op: Op, ops: Mapping[str, Op]) -> float:
    """Return the bytes that an operation reads and writes; of what it slices, only the slice."""
    workspace = op.opcode == "custom-call" and len(op.arrays) > 1 and op.arrays[-1].dtype in ("u8", "s8")
    written = sum(array.nbytes for array in (op.arrays[:-1] if workspace else op.arrays))
    if op.opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * written
    if op.opcode == "dynamic-update-slice":
        return 2 * ops[op.operands[1]].arrays[0].nbytes
    return written + sum(array.nbytes for name in {*op.operands} for array in ops[name].arrays)


def fusion_bytes(op: Op, ops: Mapping[str, Op], fused: Mapping[str, Op]) -> float:
    """Return the bytes that a fusion reads and writes: of its inputs that it only slices, the slices."""
    total = 0.0
    for inner in fused.values():
        if inner.opcode == "parameter":
            users = [each for each in fused.values() if inner.name in each.operands]
            parts = [sliced(each, inner.name, fused) for each in users]
            known = [part for part in parts if part is not None]
            whole = sum(array.nbytes for array in inner.arrays)
            total += min(whole, sum(known)) if parts and len(known) == len(parts) else whole
    updated = [each for each in fused.values() if each.root and each.opcode == "dynamic-update-slice"]
    if updated:
        return total + fused[updated[0].operands[1]].arrays[0].nbytes
    return total + sum(array.nbytes for array in op.arrays)


def sliced(user: Op, name: str, fused: Mapping[str, Op]) -> float | None:
    """Return the bytes that `user` reads of the array `name` if it slices or updates it, otherwise None."""
    if user.operands[0] != name:
        return None
    if user.opcode in ("slice", "dynamic-slice", "gather"):
        return user.arrays[0].nbytes
    return 0.0 if user.opcode == "dynamic-update-slice" else None
