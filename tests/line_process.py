"""A tiny run over two devices, a line through points, in one process or as one of two: see test_distributed.py."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from whole_runs import QUICK, shrunk_lcd

from lcm_jax.data import loader
from lcm_jax.training import distributed
from lcm_jax.training.loop import TrainTask, train

POINTS = [{"x": np.float32(x), "y": np.float32(3 * x)} for x in np.linspace(-1, 1, 24)]
STEPS = 3
STOP_AT = 5  # the batch at which process 1 is told to stop


def squared_error(slopes, batch, draws):
    total = jnp.mean(jnp.square(slopes.mean() * batch["x"] - batch["y"]) + 0.1 * draws)
    return total, {"loss": total}


def line(stops: bool) -> TrainTask:
    def make_batches(frozen, step):
        process, count = jax.process_index(), jax.process_count()
        every = loader.batches(POINTS, 8, seed=0, first=step, process=process, processes=count)
        for number, batch in enumerate(every, step):
            if stops and number == STOP_AT and process == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def write_preview(ema, frozen, path):
        path.write_text(str(float(ema["slopes"].mean()) + float(frozen["zero"])))
        return {"slope": float(ema["slopes"].mean())}

    draw = lambda rng, latents: jax.random.normal(rng, latents.shape)  # noqa: E731
    row = jax.ShapeDtypeStruct((8,), jnp.float32)
    return TrainTask(
        title="line",
        objective=SimpleNamespace(draw=draw, loss=squared_error),
        bind=lambda params, target, frozen: params["slopes"],
        prepare=lambda params, frozen, batch, draws: batch,
        # Large enough to be shared by both processes if mesh.fsdp=2.
        params={"slopes": jax.ShapeDtypeStruct((2**14,), jnp.float32)},
        frozen={"zero": jax.ShapeDtypeStruct((), jnp.float32)},
        load_params=lambda: {"slopes": np.linspace(0, 1, 2**14, dtype=np.float32)},
        load_frozen=lambda: {"zero": np.float32(0)},
        latents=lambda batch: row,
        batch={"x": row, "y": row},
        make_batches=make_batches,
        write_preview=write_preview,
        on_complete=lambda ema, frozen, seconds: print(f"complete: {float(ema['slopes'].mean())}"),
        weight_digests=lambda: {"line": "digest"},
        figures={"slope": False},
    )


def run(workdir: Path, fsdp: int, steps: int = STEPS, stops: bool = False) -> bool:
    settings = {"mesh.data": 2 // fsdp, "mesh.fsdp": fsdp, "train.steps": steps, "checkpoint.every_steps": 2}
    previews = {"sample.every_steps": 2, "checkpoint.best": "slope"}
    config = shrunk_lcd("a teacher that is never read", **QUICK | settings | previews)
    return train(line(stops), config, workdir)


if __name__ == "__main__":
    folder, port, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    distributed.initialize(f"127.0.0.1:{port}", 2, process)
    assert run(folder / "data", fsdp=1)
    assert run(folder / "fsdp", fsdp=2)
    assert run(folder / "data", fsdp=1), "a complete run is complete"
    assert not run(folder / "stopped", fsdp=1, steps=1000, stops=True)
