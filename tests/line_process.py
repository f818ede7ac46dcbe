"""A tiny run, a line through points, in one process or as one of several: see test_distributed.py."""

import json
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from whole_runs import QUICK, shrunk_lcd

from lcm_jax import command
from lcm_jax.data import loader
from lcm_jax.training import distributed, sharding
from lcm_jax.training.checkpoint import Checkpoints
from lcm_jax.training.loop import TrainTask, train
from lcm_jax.training.state import create_state, make_optimizer

POINTS = [{"x": np.float32(x), "y": np.float32(3 * x)} for x in np.linspace(-1, 1, 24)]
STEPS = 3
LONG = 40  # updates of the run that is stopped and killed
STOP_AT = 5  # the batch at which process 2 is told to stop
KILL_AFTER = 6  # batches of a resumed process
HEARTBEAT = 10  # seconds


def squared_error(slopes, batch, draws):
    total = jnp.mean(jnp.square(slopes.mean() * batch["x"] - batch["y"]) + 0.1 * draws)
    return total, {"loss": total}


def line(signals: dict[int, tuple[int, int]] | None = None, rows: Path | None = None) -> TrainTask:
    """signals: by the process that sends itself one, (the signal, how many batches it has had by then). rows: a folder
    for what each process reads."""

    def make_batches(step):
        process, count = jax.process_index(), jax.process_count()
        every = loader.batches(POINTS, 8, seed=0, first=step, process=process, processes=count)
        number, after = (signals or {}).get(process, (0, -1))
        for had, batch in enumerate(every):
            if had == after:
                os.kill(os.getpid(), number)
            if signals:
                time.sleep(0.02)  # longer than an agreement takes
            if rows is not None:
                with (rows / f"{process}_of_{count}.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step + had, "x": batch["x"].tolist()}) + "\n")
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
        # Large enough to be shared by the processes if mesh.fsdp is above 1.
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
        data=lambda: {"points": str(len(POINTS))},
    )


def config_of(fsdp: int, steps: int = STEPS, previews: bool = True):
    settings = {"mesh.data": -1, "mesh.fsdp": fsdp, "train.steps": steps, "checkpoint.every_steps": 2}
    settings |= {"sample.every_steps": 2, "checkpoint.best": "slope"} if previews else {}
    return shrunk_lcd("a teacher that is never read", **QUICK | settings)


def run(workdir: Path, fsdp: int) -> bool:
    return train(line(), config_of(fsdp), workdir)


def run_long(workdir: Path, fsdp: int, signals: dict[int, tuple[int, int]] | None = None) -> bool:
    workdir.mkdir(parents=True, exist_ok=True)
    return train(line(signals, rows=workdir), config_of(fsdp, LONG, previews=False), workdir)


def copy_newest(source: Path, target: Path, fsdp: int) -> None:
    """Read the newest checkpoint of `source` on this run's mesh, and save what was read to `target`."""
    config = config_of(fsdp, LONG)
    create = lambda params: create_state(params, make_optimizer(config.optimizer, LONG))  # noqa: E731
    shapes = jax.eval_shape(create, line().params)
    shardings = sharding.tree_shardings(sharding.make_mesh(-1, fsdp), shapes)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    with closing(Checkpoints(source, keep=9)) as before, closing(Checkpoints(target, keep=9)) as after:
        state = before.restore(shapes)
        assert state is not None and (fsdp == 1 or not state.params["slopes"].is_fully_replicated)
        after.save(state)


def work() -> None:
    folder, plan = Path(sys.argv[1]), sys.argv[2]
    del sys.argv[1:]
    distributed.initialize(heartbeat=HEARTBEAT)
    complete = True
    with distributed.ending_together():
        if plan == "whole":
            number = jax.process_index()
            rows = {"x": np.full((number + 1, 2), number + 1e-12), "ok": np.arange(number + 1) > 0}
            np.savez(folder / f"gathered_{number}.npz", **distributed.gather_rows(rows))
            assert run(folder / "data", fsdp=1)
            assert run(folder / "fsdp", fsdp=2)
            assert run(folder / "data", fsdp=1), "a complete run is complete"
            complete = run_long(folder / "long", fsdp=2, signals={2: (signal.SIGTERM, STOP_AT)})
        elif plan == "resumed":
            copy_newest(folder / "long" / "checkpoints", folder / "by two" / "checkpoints", fsdp=2)
            complete = run_long(folder / "long", fsdp=2, signals={1: (signal.SIGKILL, KILL_AFTER)})
        elif plan == "once more":
            complete = run_long(folder / "long", fsdp=2)
        elif plan == "to be killed":  # with everything that is written: previews, the best, the export
            complete = train(line({0: (0, -1)}), config_of(1, 4 * LONG), folder)
        elif plan == "without the first":
            complete = run_long(folder / "first", fsdp=1, signals={0: (signal.SIGKILL, KILL_AFTER)})
        if not complete:
            sys.exit(distributed.RESUMABLE)


if __name__ == "__main__":
    command.run(work, lambda arguments: arguments[:1], lambda: "", "use less")
