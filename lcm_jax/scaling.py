"""The communication of a training step: read from its compiled program, and modeled for a cluster by its mesh."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

# ---- collectives of a compiled program ------------------------------------------------------------------------------


class Collective(NamedTuple):
    """A collective operation of a program.

    nbytes: of the whole array, which an all-gather ends with and a reduce-scatter begins with, on each device. group:
    the number of devices that take part together. times: how often a step runs it.
    """

    kind: str
    nbytes: int
    group: int
    times: int


class Traffic(NamedTuple):
    """All collectives of a kind. nbytes: their sum. largest: of the largest one."""

    count: int
    nbytes: int
    largest: int


NONE = Traffic(0, 0, 0)


def collectives(hlo: str) -> list[Collective]:
    """Return the collectives of an optimized HLO module, by its text (`compiled.as_text()`).

    The body of a loop counts as often as the loop runs, or once if XLA does not know how often. TPU compilers split a
    collective over several fusions, which counts once, and write a reduce-scatter as a fusion of an all-reduce. Raises
    ValueError if the text has no entry computation.
    """
    computations = dict(_computations(hlo))
    entry = next((lines for name, lines in computations.items() if name.startswith("ENTRY ")), None)
    if entry is None:
        raise ValueError("the text is not an HLO module: it has no ENTRY computation; pass compiled.as_text()")
    channels: set[str] = set()  # of collectives within fusions

    def walk(lines: list[str], name: str, times: int, fused: bool) -> Iterator[Collective]:
        for line in lines:
            if found := _OPERATION.match(line):
                if fused and not name.startswith(_SCATTERS) and (channel := _CHANNEL.search(line)):
                    if channel[0] in channels:
                        continue
                    channels.add(channel[0])
                yield _collective(found, line, name, times)
                continue
            runs = times * int(trips[1]) if (trips := _TRIPS.search(line)) else times
            for name_or_names in _CALLED.findall(line):
                for inner in re.findall(r"[\w.\-]+", name_or_names):
                    if inner in computations:
                        yield from walk(computations[inner], inner, runs, fused or " fusion(" in line)

    return list(walk(entry, "", 1, False))


def traffic(found: list[Collective]) -> dict[str, Traffic]:
    """Return the count and bytes of the collectives of each kind, of kinds that there are."""
    by_kind = {kind: [each for each in found if each.kind == kind] for kind in KINDS}
    return {
        kind: Traffic(
            sum(each.times for each in some),
            sum(each.nbytes * each.times for each in some),
            max(each.nbytes for each in some),
        )
        for kind, some in by_kind.items()
        if some
    }


_SCATTERS = "all-reduce-scatter"  # how the names of such fusions begin; they share one channel
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CHANNEL = re.compile(r"channel_id=\d+")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation|branch_computations)=(%[\w.\-]+|\{[^}]*\})"
)
_SHAPE = re.compile(r"\b(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, lines) of each computation of a module; the entry's name begins with "ENTRY "."""
    name, lines = None, []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            name, lines = (header[1] or "") + header[2], []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def _collective(found: re.Match, line: str, computation: str, times: int) -> Collective:
    sizes = [_array_bytes(dtype, shape) for dtype, shape in _SHAPE.findall(found[1])]
    kind, group = found[2], _group_size(line)
    if found[3] and kind != "all-reduce":  # (inputs, outputs, and of some backends scalars)
        sizes = [size for size in sizes if size > 4] or sizes
        sizes = sizes[len(sizes) // 2 :]
    nbytes = sum(sizes)
    if kind == "reduce-scatter":
        nbytes *= group
    elif kind == "all-reduce" and computation.startswith(_SCATTERS):
        kind = "reduce-scatter"
    return Collective(kind, nbytes, group, times)


def _array_bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(_BITS.search(dtype)[0])  # pyright: ignore[reportOptionalSubscript]
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


def _group_size(line: str) -> int:
    """Return the devices of a group: {{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'b'}; 2 for pairs."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 2


# ---- a model of the step's time -------------------------------------------------------------------------------------


class Cluster(NamedTuple):
    """A number of accelerators and what connects them, as published by their makers.

    peak: dense bfloat16 TFLOP/s. memory: GB. node: devices that are connected at `inside`, others at `across`, both in
    GB/s that each device can receive.
    """

    chips: int
    peak: float
    memory: float
    node: int
    inside: float
    across: float


# H100: NVLink's 900 GB/s are both directions; a DGX H100 has a 400 Gb/s adapter for each GPU. v5e: 1,600 Gb/s over the
# four links of a chip, of which a ring along one axis of the torus uses two.
CLUSTERS: Mapping[str, Cluster] = {
    "8 x H100": Cluster(8, 989, 80, 8, 450, 50),
    "64 x H100": Cluster(64, 989, 80, 8, 450, 50),
    "TPU v5e-256": Cluster(256, 197, 16, 256, 100, 100),
}
ASSUMED_MFU = 0.4  # of the peak, without communication: what diffusion training reaches on large matrices


class Load(NamedTuple):
    """Bytes that a step moves, of whole arrays.

    gathered: of parameters, over `fsdp`. reduced: of gradients, over `fsdp` and `data`.
    """

    gathered: float
    reduced: float


class StepTime(NamedTuple):
    """Seconds of a step: its arithmetic, and what each device receives for it if nothing overlaps."""

    compute: float
    communication: float

    @property
    def shortest(self) -> float:
        """With all communication behind the arithmetic, as far as it fits there."""
        return max(self.compute, self.communication)

    @property
    def longest(self) -> float:
        """With no overlap."""
        return self.compute + self.communication


def step_time(cluster: Cluster, mesh: Mapping[str, int], flops: float, load: Load) -> StepTime:
    """Return the modeled time of a step on a cluster.

    mesh: the sizes of `data`, `fsdp` and `tensor`, whose product is the number of devices. flops: of one device. Of the
    collectives, rings receive (n - 1) / n of an array to gather or scatter it, and twice that to reduce it. If there is
    a `data` axis, XLA reduces gradients over all devices at once and then takes each device's part: the model has that
    as a scatter over `fsdp`, a sum over `data` and a gather. Collectives of activations over `tensor` are not modeled.
    """
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    rate = lambda devices: 1e9 * (cluster.inside if devices <= cluster.node else cluster.across)  # noqa: E731
    received = lambda n: (n - 1) / n  # noqa: E731
    shard = load.reduced / fsdp  # after the scatter
    over_fsdp = load.gathered + load.reduced * (1 if data == 1 else 2)
    return StepTime(
        compute=flops / (cluster.peak * 1e12 * ASSUMED_MFU),
        communication=over_fsdp * received(fsdp) / rate(fsdp * tensor)
        + 2 * shard * received(data) / rate(data * fsdp * tensor),
    )
