"""The training loop: every effect of a run (devices, files, clocks, signals) in one file, top to bottom."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.errors import Interrupted, RunError, phase
from lcm_jax.objectives.networks import Bind, Objective, Prepare
from lcm_jax.profiling.trace import Tracer
from lcm_jax.training import distributed, sharding
from lcm_jax.training.agreement import check_code_and_config, check_data
from lcm_jax.training.best import BestCheckpoint, check_best
from lcm_jax.training.checkpoint import STABLER, Checkpoints, check_root
from lcm_jax.training.compilation import STEP_MEMORY, Programs, compile_step
from lcm_jax.training.logging import BEST, PREVIEW, ProgressReport, Recorder
from lcm_jax.training.meter import Meter, ProfiledSteps
from lcm_jax.training.sharded_step import ShardedStep, make_sharded_step, placement
from lcm_jax.training.state import Params, TrainState, learning_rate_schedule
from lcm_jax.training.stop import StopSignal
from lcm_jax.training.workdir import check_origin, check_workdir, claim_workdir, hold_workdir
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.orbax_folder import checkpoint_root, recorded_folder

MAX_PENDING = 100  # updates whose losses wait on the device if log.every_steps=0


class WritePreview(Protocol):
    def __call__(self, average: Params, frozen: Params, path: Path, /) -> Mapping[str, float]:
        """Write a PNG to `path`; return its figures by name. average: see `TrainState`."""
        ...


class OnComplete(Protocol):
    def __call__(self, average: Params, frozen: Params, seconds: float, /) -> None:
        """Write what a complete run leaves behind. seconds: the time that its training took."""
        ...


@dataclass(frozen=True)
class TrainTask:
    """All that the loop needs to know of a run's models and data: arrays and functions, no configuration.

    objective, bind, prepare: see `objectives.networks`. params, frozen: the shapes and dtypes of what is optimized, and
    of what never changes (teacher, text encoder). load_params(), load_frozen(): those parameters, as arrays on the host
    that nothing else refers to. latents(batch): the shape of z of a whole batch. batch: the shapes of the largest
    batch, for which the step is compiled before anything is loaded; for another shape it is compiled when a batch of it
    comes. encode_data(): encodes the data before anything is loaded, each process its part, unless that has been done;
    None if steps encode it. make_batches(step): endless batches of numpy arrays, beginning with that of `step`
    (0-based). skipped(): how many records of this process's batches could not
    be read so far, by cause. weight_digests(): of the weights that the run starts from, by name. figures: those of
    previews by which a checkpoint can be the best, True if lower is better. data(): what all processes must have read
    alike, by name, once there are batches.
    """

    title: str
    objective: Objective
    bind: Bind
    prepare: Prepare
    params: Params
    frozen: Params
    load_params: Callable[[], Params]
    load_frozen: Callable[[], Params]
    latents: Callable[[Mapping[str, Any]], jax.ShapeDtypeStruct]
    batch: Mapping[str, jax.ShapeDtypeStruct]
    make_batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]]
    write_preview: WritePreview
    on_complete: OnComplete
    weight_digests: Callable[[], Mapping[str, str]]
    figures: Mapping[str, bool] = field(default_factory=dict)
    skipped: Callable[[], Mapping[str, int]] = dict
    data: Callable[[], Mapping[str, str]] = dict
    encode_data: Callable[..., None] | None = None


def check_run(workdir: Path, config) -> None:
    """Check the workdir, the folder of the checkpoints and the batch size. Raises RunError or ValueError; writes
    nothing."""
    check_workdir(workdir, config.to_dict())
    check_root(workdir, config.checkpoint.folder, recorded_folder(workdir))
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_batch_size(config, sharding.batch_parts(mesh.shape))


def check_batch_size(config, devices: int) -> int:
    """Return the examples of a micro-batch on each device. Raises RunError if the batch cannot be split evenly.

    devices: those that share a batch, see `sharding.batch_parts`.
    """
    batch_size, rows = config.train.batch_size, devices * config.train.accumulate
    if batch_size % rows:
        raise RunError(
            f"train.batch_size {batch_size} is not a multiple of devices x train.accumulate = "
            f"{devices} x {config.train.accumulate}; use a multiple of {rows}"
        )
    return batch_size // rows


def train(
    task: TrainTask,
    config,
    workdir: Path,
    profile: Path | None = None,
    profile_steps: tuple[int, int] | None = None,
    ignore_unreadable: bool = False,
) -> bool:
    """Run `task` to `config.train.steps` updates, from the newest checkpoint in `workdir` if there is one.

    profile: new folder for a profile of some updates, of process 0. profile_steps: the first and the last of them, by
    default the third to the fifth of this process. ignore_unreadable: train from the beginning if there are checkpoints
    and none can be read.
    Returns True when the run is complete, False when SIGTERM or SIGHUP stopped it early, with its state saved.
    Raises ValueError if `config.checkpoint.best` is not a figure of the task; RunError on a loss or a state that is not
    finite, on too little memory and on a full disk, and Interrupted on Ctrl-C, with the state saved if updates had
    begun; the last good checkpoint stays.
    """
    began = time.monotonic()
    check_code_and_config(config.to_dict())
    check_run(workdir, config)
    check_best(config, task.figures)
    tracer = Tracer(profile, config.train.dtype) if profile is not None and distributed.is_main() else None
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    step = make_sharded_step(task, config, mesh)
    # A mistake that shows only here, in the step or in the data, must not claim the workdir for its config; and before
    # the step is compiled nothing is written or encoded.
    again = "run the same command to begin again"
    with phase("compiling the step", memory=STEP_MEMORY, kept=again):
        fixed = (step.state, step.frozen)
        programs = Programs(lambda batch: compile_step(step.jitted, (*fixed, batch), task.title, mesh))
        programs.of(task.batch)
    distributed.wait_for_all("checked")  # one of them takes the lock that all have just looked at
    with hold_workdir(workdir):
        if task.encode_data is not None:
            task.encode_data()
        with phase("loading the weights", memory=STEP_MEMORY, kept=again):
            frozen = jax.device_put(task.load_frozen(), placement(step.frozen))
        with phase("opening the data", memory=STEP_MEMORY, kept=again):
            with distributed.main_first("data"):  # which makes indices
                batches = task.make_batches(0)
                batches = chain([next(batches)], batches)
            check_data(task.data())
        with distributed.main_first("workdir"):
            check_origin(workdir, task.weight_digests())
            claim_workdir(workdir, config.to_dict())
        root, keep = checkpoint_root(workdir, config.checkpoint.folder), config.checkpoint.keep
        with closing(Checkpoints(root / "checkpoints", keep, config.checkpoint.keep_every)) as checkpoints:
            # Resume, in this order:
            # 1. the newest checkpoint of this workdir that can be read;
            # 2. if there is none, the task's initial parameters;
            # 3. randomness resumes by itself: every step folds its own number into the seed;
            # 4. the data resumes at the batch of that step.
            kept = partial(checkpoints.summary, wait=False)
            with phase("training", memory=STEP_MEMORY, kept=checkpoints.summary), distributed.ending_with_others(kept):
                state = checkpoints.restore(step.state, ignore_unreadable=ignore_unreadable)
                if state is None:
                    state = first_state(task, step)
                first = int(state.step)
                if first:
                    batches = task.make_batches(first)
                inputs = (sharding.put_batch(mesh, batch) for batch in batches)
                meter = Meter(config.train.batch_size, mesh.devices.flatten().tolist(), task.skipped)

                def advance(state: TrainState) -> tuple[TrainState, dict]:
                    with meter.waiting():
                        batch = next(inputs)
                    program = programs.of(batch)
                    meter.count(program.flops)
                    return program.run(state, frozen, batch)

                state, seconds, stopped = run_steps(
                    task, frozen, config, workdir, advance, state, checkpoints, began, meter, tracer, profile_steps
                )
        done = int(state.step)
        if stopped is not None:
            text = f"at step {done} of {config.train.steps}; checkpoint saved; run the same command to resume"
            if stopped == signal.SIGINT:
                raise Interrupted(f"interrupted {text}")
            print(f"stopped {text}")
            return False
        average, alone = distributed.local((state.average, frozen))
        del state, advance  # what the report has no use for leaves the device
        memory = "lower report.batch_size" if "report" in config else "use a device with more memory"
        with phase("writing the export and the report", memory=memory, kept=checkpoints.summary):
            if distributed.is_main():
                task.on_complete(average, alone, seconds)
            distributed.wait_for_all("report")
    return True


def first_state(task: TrainTask, step: ShardedStep) -> TrainState:
    """Return the state before the first update, on its devices."""
    # An argument, not a constant of the program, and donated, so that it exists once. Copied before: on a CPU
    # device_put would lend the host's arrays, mapped from files that must not be written to.
    put = lambda x, like: jax.device_put(jnp.array(x, copy=True), like.sharding)  # noqa: E731
    params = jax.tree.map(put, task.load_params(), step.state.params)
    return jax.jit(step.create, out_shardings=placement(step.state), donate_argnums=0)(params)


def run_steps(
    task: TrainTask,
    frozen: Params,
    config,
    workdir: Path,
    advance: Callable[[TrainState], tuple[TrainState, dict]],
    state: TrainState,
    checkpoints: Checkpoints,
    began: float,
    meter: Meter,
    tracer: Tracer | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> tuple[TrainState, float, int | None]:
    """Update `state` by `advance(state) -> (state, metrics)` to the last step or to a signal, and save it.

    frozen: on the devices. began: when this process began, by time.monotonic(). meter: counts what `advance` does.
    profile_steps: see `train`. Return (state, seconds of the run in all, the signal that has stopped it or None).
    """
    steps, step = config.train.steps, int(state.step)
    learning_rate = learning_rate_schedule(config.optimizer, steps)
    due = lambda group: bool(group.every_steps) and step % group.every_steps == 0  # noqa: E731
    pending: list[tuple[int, dict]] = []  # metrics still on the device: reading them each step would stall it
    with ExitStack() as stack:
        hold = lambda each: stack.enter_context(closing(each))  # noqa: E731
        progress = hold(ProgressReport(steps, step, task.title))
        recorder = hold(Recorder(workdir, step, progress.log, config, write=distributed.is_main()))
        profile = hold(ProfiledSteps(tracer, profile_steps or (step + 3, step + 5), progress.log))
        best = hold(open_best(task, config, workdir, checkpoints)) if config.checkpoint.best else None
        stop = hold(StopSignal())
        if step:
            progress.log(f"resumed {workdir} at step {step}")
        began -= recorder.seconds  # what earlier processes of this run have taken
        stopping = lambda: stop.reached(step)  # noqa: E731
        saved, minutes = time.monotonic(), config.checkpoint.every_minutes
        previewed = distributed.any_process(recorder.previewed)
        meter.restart()
        while True:
            # At the start as well, at the end, and again if the preview of the step that the run resumes at was lost.
            if (due(config.sample) or (step == steps and config.sample.every_steps)) and not (
                previewed or distributed.any_process(stop.requested is not None)
            ):
                path = workdir / "samples" / f"{step:06d}.png"
                scalars = write_preview(task, state, frozen, path, checkpoints.summary, stop, progress.log)
                # Recorded after that: the preview of a run that is killed meanwhile is made again.
                if best is not None and best.consider(state, scalars):
                    progress.log(f"step {step}: the best {best.figure} so far; its checkpoint is in {best.folder}")
                if scalars:
                    recorder.write(step, scalars | ({BEST: best.step} if best and best.step is not None else {}))
                    shown = [config.checkpoint.best] if config.checkpoint.best else [*task.figures][-1:]
                    progress.show_preview(step, {name: scalars[name] for name in shown if name in scalars})
                meter.restart()
            if step >= steps or stopping():
                break
            profile.before(step + 1, state)
            state, metrics = advance(state)
            step, previewed = step + 1, False
            profile.after(step, metrics)
            pending.append((step, metrics))

            read = due(config.log) or (not config.log.every_steps and len(pending) >= MAX_PENDING)
            save = step == steps or stopping() or due(config.checkpoint)
            if read and minutes and not save:  # by the clock of one process
                save = distributed.any_process(distributed.is_main() and time.monotonic() - saved >= 60 * minutes)
            if save or due(config.log):
                scalars = _read(pending, checkpoints) | {"learning_rate": float(np.asarray(learning_rate(step - 1)))}
                scalars |= meter.read()
                if save:  # before anything is logged, which may fail
                    saving = time.monotonic()
                    checkpoints.save(state)
                    scalars["checkpoint_seconds"] = time.monotonic() - saving
                    saved = time.monotonic()
                    meter.restart()
                scalars["seconds"] = time.monotonic() - began
                recorder.write(step, scalars)
                progress.update(step, scalars)
            elif read:
                _read(pending, checkpoints)
        if pending:  # the signal came after this step had been looked at
            _read(pending, checkpoints)
        checkpoints.save(state)  # which does nothing where the loop has saved this step
        checkpoints.wait()
        # At its last step a process may not have come to what the others have asked for.
        signals = [number for number in StopSignal.SIGNALS if distributed.any_process(stop.requested == number)]
        stopped = signals[0] if signals else None
    return state, time.monotonic() - began, stopped


def open_best(task: TrainTask, config, workdir: Path, checkpoints: Checkpoints) -> BestCheckpoint:
    """Open the checkpoint in best/ that has the best value of `config.checkpoint.best`."""
    figure, settings = config.checkpoint.best, json.loads(json.dumps(config.sample.to_dict()))
    del settings["every_steps"]  # by which no value changes
    settings["reference"] = config.report.reference if "report" in config else None
    folder = checkpoint_root(workdir, config.checkpoint.folder) / "best"
    return BestCheckpoint(folder, figure, task.figures[figure], settings, checkpoints)


def write_preview(
    task: TrainTask,
    state: TrainState,
    frozen: Params,
    path: Path,
    kept: Callable[[], str],
    stop: StopSignal,
    log: Callable[[str], None],
) -> dict[str, float]:
    """Write the preview of `state` to `path`; return its scalars in the main process, in the others none.

    kept: see `phase`. There are none either if a stop is asked for, which leaves the preview at once, or if an image is
    NaN, which is logged: training itself checks its loss and its state.
    """
    began, step, scalars = time.monotonic(), int(state.step), {}
    path.parent.mkdir(exist_ok=True)
    average, alone = distributed.local((state.average, frozen))
    with phase("sampling a preview", memory="lower sample.batch_size", kept=kept), stop.at_once():
        if distributed.is_main():
            try:
                figures = task.write_preview(average, alone, path)
            except ModelError as error:
                log(f"step {step}: no preview, since {error}")
            else:
                scalars = dict(figures) | {PREVIEW: time.monotonic() - began}
                log("  ".join([f"step {step}: {path}", *(f"{name} {value:.4g}" for name, value in figures.items())]))
    distributed.wait_for_all("preview")
    return scalars


def _read(pending: list[tuple[int, dict]], checkpoints: Checkpoints) -> dict[str, float]:
    """Fetch and empty `pending`; return the mean of each metric, and the ratio of the means of each pair.

    A pair whose second mean is 0 is left out. Raises RunError at the first value that is not finite.
    """
    values = jax.device_get(pending)
    pending.clear()
    for step, metrics in values:
        if bad := [f"{name} is {value}" for name, value in metrics.items() if not np.isfinite(value).all()]:
            raise RunError(f"step {step}: {', '.join(bad)}; {checkpoints.summary(resume=False)}; {STABLER}")
    means = {name: np.mean([metrics[name] for _, metrics in values], axis=0) for name in values[0][1]}
    scalars = {name: float(mean) for name, mean in means.items() if mean.ndim == 0}
    return scalars | {name: float(mean[0] / mean[1]) for name, mean in means.items() if mean.ndim and mean[1]}
