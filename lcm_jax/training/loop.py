"""The training loop: every effect of a run (devices, files, clocks, signals) in one function, top to bottom."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcm_jax.training import sharding
from lcm_jax.training.checkpoint import Checkpoints
from lcm_jax.training.logging import ProgressReport, Recorder
from lcm_jax.training.state import Params, create_state, make_optimizer
from lcm_jax.training.step import make_train_step

# Groups of a config that say where and how often, not what: a run may be continued with other values.
FREE_GROUPS = ("mesh", "checkpoint", "log", "sample", "report")


class RunError(RuntimeError):
    """A run that cannot start or go on; its text is meant for the person who started it."""


@dataclass(frozen=True)
class Job:
    """What the loop needs to know of an objective: arrays and functions, no configuration.

    init() -> parameters to optimise. frozen: parameters that never change (teacher, text encoder), an argument of
    `loss`. draw, loss: see `training.step`. batches(step) -> endless batches of numpy arrays, beginning with that of
    `step` (0-based). preview(ema, path) writes a PNG to `path`, returns scalars. finish(ema, seconds) writes what the
    run leaves behind. origin: digests of the weights that it starts from, by name. example: the shapes and dtypes of a
    batch, by which the step is compiled before `batches` is asked for anything.
    """

    title: str
    init: Callable[[], Params]
    frozen: Params
    draw: Callable
    loss: Callable
    example: Mapping[str, jax.ShapeDtypeStruct]
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]]
    preview: Callable[[Params, Path], Mapping[str, float]]
    finish: Callable[[Params, float], None]
    origin: Mapping[str, str] = field(default_factory=dict)


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of all that decides the result of a run, in hexadecimal (config: plain nested dict)."""
    deciding = {name: value for name, value in config.items() if name not in FREE_GROUPS}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=list).encode()).hexdigest()


def check_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Raises RunError where the run of another config lives in `workdir`. Writes nothing."""
    path = workdir / "config.json"
    if not path.exists():
        return
    theirs, mine = json.loads(path.read_text()), json.loads(json.dumps(config, default=list))
    if config_digest(theirs) == config_digest(mine):
        return
    theirs, mine = _flatten(theirs), _flatten(mine)
    names = [
        f"{name} ({theirs.get(name)!r} there, {mine.get(name)!r} here)"
        for name in sorted(theirs.keys() | mine.keys())
        if theirs.get(name) != mine.get(name) and name.split(".")[0] not in FREE_GROUPS
    ]
    raise RunError(
        f"workdir {workdir} belongs to a run with another config; different: {', '.join(names[:6])}"
        f"{' ..' if len(names) > 6 else ''}\nChoose another --workdir, or set these keys back to continue that run."
    )


def check_run(workdir: Path, config) -> None:
    """All that can be refused before any work is done. Raises RunError or ValueError. Writes nothing."""
    check_workdir(workdir, config.to_dict())
    check_batch_size(config, sharding.make_mesh(config.mesh.data, config.mesh.fsdp).size)


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json`, by which `check_workdir` knows the run again."""
    write_whole(workdir / "config.json", json.dumps(config, default=list, indent=1, sort_keys=True) + "\n")


def check_origin(workdir: Path, origin: Mapping[str, str]) -> None:
    """Keeps what a run was begun from in `origin.json`. Raises RunError where that has changed since."""
    path = workdir / "origin.json"
    if not path.exists():
        write_whole(path, json.dumps(dict(origin), indent=1) + "\n")
    elif changed := [name for name, before in json.loads(path.read_text()).items() if origin.get(name) != before]:
        raise RunError(
            f"workdir {workdir} was begun with other weights: {', '.join(changed)} changed since. "
            f"Put them back to continue that run, or choose another --workdir."
        )


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def check_batch_size(config, devices: int) -> int:
    """Examples of a micro-batch on each device. Raises RunError where they do not come out even."""
    batch_size, rows = config.train.batch_size, devices * config.train.accumulate
    if batch_size % rows:
        raise RunError(
            f"train.batch_size {batch_size} is not a multiple of devices x train.accumulate = "
            f"{devices} x {config.train.accumulate}; choose a multiple of {rows}"
        )
    return batch_size // rows


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def train(job: Job, config, workdir: Path) -> bool:
    """Runs `job` to `config.train.steps` updates, from the newest checkpoint in `workdir` where there is one.

    Returns True when the run is complete, False when SIGTERM or Ctrl-C stopped it early, with its state saved.
    Raises RunError on a loss that is not finite; the last good checkpoint stays.
    """
    began = time.monotonic()
    check_run(workdir, config)
    steps, batch_size = config.train.steps, config.train.batch_size
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)

    optimizer = make_optimizer(config.optimizer, steps)
    create = lambda params: create_state(params, optimizer)  # noqa: E731
    abstract = jax.eval_shape(create, jax.eval_shape(job.init))
    shardings = sharding.tree_shardings(mesh, abstract)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    frozen_shardings, batch_sharding = sharding.tree_shardings(mesh, job.frozen), sharding.by_batch(mesh)
    train_step = jax.jit(
        make_train_step(
            job.draw,
            job.loss,
            optimizer,
            seed=config.train.seed,
            ema_rate=config.train.ema_rate,
            accumulate=config.train.accumulate,
        ),
        in_shardings=(shardings, frozen_shardings, batch_sharding),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    # A mistake that shows only here, in the step or in the data, must not claim the workdir for its config; and before
    # the step is compiled nothing is written or encoded.
    train_step = compile_step(train_step, (abstract, job.frozen, job.example), job.title, mesh)
    batches = job.batches(0)
    first = next(batches)
    frozen = jax.device_put(job.frozen, frozen_shardings)
    workdir.mkdir(parents=True, exist_ok=True)
    check_origin(workdir, job.origin)
    claim_workdir(workdir, config.to_dict())

    # Resume, in this order:
    # 1. the newest checkpoint of this workdir that can be read;
    # 2. where there is none, the job's initial parameters;
    # 3. randomness goes on by itself: every step folds its own number into the seed;
    # 4. the data goes on at the batch of that step.
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    state = checkpoints.restore(abstract)
    if state is None:
        # An argument, not a constant of the program: a teacher's gigabytes would be compiled into it.
        state = jax.jit(create, out_shardings=shardings)(jax.device_put(job.init(), shardings.params))
    step = int(state.step)
    progress = ProgressReport(steps, step, batch_size, job.title)
    if step:
        progress.say(f"resumed {workdir} at step {step}")
    recorder = Recorder(workdir, step)
    began -= recorder.seconds  # what earlier processes of this run have taken
    batches = job.batches(step) if step else chain([first], batches)

    stop = _StopSignal()
    pending: list[tuple[int, dict]] = []  # metrics still on the device: reading them each step would stall it
    clock, clocked = time.monotonic(), step
    try:
        while step < steps and not stop.requested:
            state, metrics = train_step(state, frozen, sharding.put_batch(mesh, next(batches)))
            step += 1
            pending.append((step, metrics))

            last = step == steps or stop.requested
            save = last or step % config.checkpoint.every_steps == 0
            if last or save or step % config.log.every_steps == 0:
                scalars = _read(pending, workdir)
                now = time.monotonic()
                scalars["steps_per_second"] = (step - clocked) / (now - clock)
                scalars["pictures_per_second"] = scalars["steps_per_second"] * batch_size
                scalars["seconds"] = now - began
                clock, clocked = now, step
                recorder.write(step, scalars)
                progress.update(step, scalars)
            if save:
                checkpoints.save(state)
            if step % config.sample.every_steps == 0 and not stop.requested:
                path = workdir / "samples" / f"{step:06d}.png"
                path.parent.mkdir(exist_ok=True)
                scalars = job.preview(state.ema, path)
                if scalars:
                    recorder.write(step, scalars)
                progress.say("  ".join([f"step {step}: {path}", *(f"{k} {v:.4g}" for k, v in scalars.items())]))
                clock, clocked = time.monotonic(), step
        if pending:  # the signal came after this step had been looked at
            _read(pending, workdir)
        checkpoints.save(state)  # which does nothing where the loop has saved this step
        checkpoints.wait()
    finally:
        stop.restore()
        progress.close()
        recorder.close()
        checkpoints.close()
    if step < steps:
        print(f"stopped at step {step} of {steps}; saved. The same command goes on from here.")
        return False
    job.finish(state.ema, time.monotonic() - began)
    return True


def compile_step(step: Callable, arguments: tuple, title: str, mesh: jax.sharding.Mesh) -> Callable:
    """Trace a jitted step for arguments of these shapes and dtypes, and compile it for the devices of `mesh`.

    Raises RunError that names the step, the devices and the remedy if that fails.
    """
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    print(f"compiling the {title} step for {devices}")
    began, stage = time.monotonic(), "traced"
    try:
        traced = step.trace(*arguments)
        stage = "compiled"
        compiled = traced.lower().compile()
    except Exception as error:  # whatever JAX, Flax, XLA or a kernel raises
        text = next(iter(str(error).strip().splitlines()), "")[:300]
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            remedy = "; lower train.batch_size, raise train.accumulate or mesh.fsdp, or set train.remat=True"
        elif isinstance(error, ValueError):  # a setting, whose text contains its remedy
            remedy = ""
        else:
            remedy = (
                "; use --config.train.dtype=float32, which uses no fused kernels, or JAX_PLATFORMS=cpu, and report this"
            )
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise RunError(f"the {title} step cannot be {stage} for {devices}: {kind}{text}{remedy}") from error
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total += memory.temp_size_in_bytes
    print(f"compiled in {time.monotonic() - began:.0f} s; it takes {total / 1e9:.2f} GB of memory per device")
    return compiled


def _read(pending: list[tuple[int, dict]], workdir: Path) -> dict[str, float]:
    """Fetches and empties `pending`; the mean of each scalar. Raises RunError at the first that is not finite."""
    values = [(step, {k: float(v) for k, v in metrics.items()}) for step, metrics in jax.device_get(pending)]
    pending.clear()
    for step, metrics in values:
        bad = {name: value for name, value in metrics.items() if not np.isfinite(value)}
        if bad:
            named = ", ".join(f"{name} is {value}" for name, value in bad.items())
            raise RunError(
                f"step {step}: {named}. The last good checkpoint in {workdir / 'checkpoints'} stands; "
                f"start in another --workdir with a lower optimizer.learning_rate or in float32 (train.dtype)."
            )
    return {name: float(np.mean([metrics[name] for _, metrics in values])) for name in values[0][1]}


class _StopSignal:
    """SIGTERM and the first Ctrl-C ask for a clean stop; a second Ctrl-C interrupts as usual."""

    def __init__(self):
        self.requested = False
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number, frame):
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
