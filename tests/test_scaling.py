"""The reader of collectives, the model of a step's time, and a full-size step compiled for eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcm_jax import scaling
from lcm_jax.scaling import Cluster, Collective, Load
from lcm_jax.training import sharding

ROOT = Path(__file__).resolve().parent.parent


def test_collectives_of_a_sharded_update():
    """A matrix in eight parts, used three times in a loop: gathered for each direction, its gradient summed in it."""
    mesh = sharding.make_mesh(1, 8)
    split, rows = NamedSharding(mesh, PartitionSpec("fsdp", None)), sharding.by_batch(mesh)

    def update(w, x):
        def loss(w):
            return jnp.mean(jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, length=3)[0] ** 2)

        return w - jax.grad(loss)(w)

    w, x = jax.ShapeDtypeStruct((256, 256), jnp.float32), jax.ShapeDtypeStruct((64, 256), jnp.float32)
    text = jax.jit(update, in_shardings=(split, rows), out_shardings=split).lower(w, x).compile().as_text()
    assert text is not None
    found = scaling.collectives(text)
    whole = 4 * 256**2
    assert {each for each in found if each.kind == "all-gather"} == {Collective("all-gather", whole, 8, 1)}
    assert [each for each in found if each.kind != "all-gather"] == [Collective("all-reduce", whole, 8, 3)]
    summed = scaling.traffic(found)
    assert summed["all-reduce"] == scaling.Traffic(3, 3 * whole, whole) and summed.keys() == {
        "all-gather",
        "all-reduce",
    }


PROGRAM = """
%all-reduce-scatter.1 (input: f32[16,20]) -> f32[2,20] {
  %input = f32[16,20]{1,0} parameter(0)
  %all-reduce.1 = (f32[16,20]{1,0}, f32[4]{0}) all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
}

%all-reduce-scatter.2 (input: f32[8]) -> f32[1] {
  %all-reduce.2 = f32[8]{0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
}

%async_collective_fusion.1 (p: bf16[2,8]) -> bf16[16,8] {
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=2, replica_groups=mesh['a'=2,'b'=8] {'b'}
}

%async_collective_fusion.2 (p: bf16[2,8]) -> bf16[16,8] {
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%p), channel_id=2, replica_groups=mesh['a'=2,'b'=8] {'b'}
}

%body (p: (s32[], pred[6])) -> (s32[], pred[6]) {
  %all-to-all.1 = pred[6]{0} all-to-all(%p), channel_id=3, replica_groups=[4,2]<=[8]
}

ENTRY %main (p: bf16[2,8]) -> bf16[16,8] {
  %fusion.1 = f32[2,20]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.0 = f32[1]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2
  %fusion.2 = bf16[16,8]{1,0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.3 = bf16[16,8]{1,0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.2
  %while.1 = (s32[], pred[6]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %permute = (u8[64]{0}, u8[64]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %done = u8[64]{0} collective-permute-done(%permute)
  %scatter = f32[10]{0} reduce-scatter(%p), channel_id=4, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %gather = ((f32[2], f32[1]), (f32[4], f32[2])) all-gather-start(%p), channel_id=5, replica_groups={{0,1}}
}
"""


def test_collectives_in_each_form_that_compilers_write():
    assert scaling.collectives(PROGRAM) == [
        Collective("reduce-scatter", 4 * 16 * 20 + 16, 8, 1),  # an all-reduce in a fusion that scatters it
        Collective("reduce-scatter", 4 * 8, 8, 1),  # such fusions share a channel
        Collective("all-gather", 2 * 16 * 8, 8, 1),  # in two fusions, by one channel
        Collective("all-to-all", 6, 2, 5),
        Collective("collective-permute", 64, 2, 1),
        Collective("reduce-scatter", 2 * 40, 2, 1),
        Collective("all-gather", 16 + 8, 2, 1),
    ]
    with pytest.raises(ValueError, match="the text is not an HLO module: it has no ENTRY computation; pass"):
        scaling.collectives("HloModule nothing")


def test_the_time_of_a_step_by_hand():
    """Eight devices in two nodes: what is sharded within a node takes its links, copies across nodes the others."""
    cluster = Cluster(8, peak=100.0, memory=16, node=4, inside=100.0, across=10.0)
    load = Load(gathered=80e9, reduced=40e9)
    time = scaling.step_time(cluster, {"data": 2, "fsdp": 4, "tensor": 1}, 20e12, load)
    assert time.compute == pytest.approx(20 / 100 / scaling.ASSUMED_MFU)
    inside, across = (80 + 2 * 40) * 3 / 4 / 100, 2 * (40 / 4) * 1 / 2 / 10
    assert time.communication == pytest.approx(inside + across)
    assert (time.shortest, time.longest) == (time.communication, time.compute + time.communication)
    alone = scaling.step_time(cluster, {"data": 1, "fsdp": 1, "tensor": 1}, 20e12, load)
    assert alone.communication == 0 and alone.shortest == alone.longest == alone.compute
    wide = scaling.step_time(cluster, {"data": 1, "fsdp": 8, "tensor": 1}, 20e12, load)
    assert wide.communication == pytest.approx(120 * 7 / 8 / 10)


@pytest.mark.slow
def test_no_gather_of_a_full_size_step_has_the_whole_model():
    """SD 1.5 on eight host devices, compiled and not run, by the command of docs/scaling.md."""
    command = [sys.executable, "docs/scaling.py", "--model=sd15", "--platform=cpu", "--images=1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=3600)
    assert done.returncode == 0, done.stderr
    row = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert row[:4] == ["sd15", "8", "1 x 8 x 1", "1"]
    gathered, largest = float(row[5].split("/")[1]) * 1e9, float(row[-1]) * 1e6
    parameters = 860e6 * 2
    assert largest < parameters / 20 and parameters < gathered
