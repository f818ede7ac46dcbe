"""Runs of small configs in this process: whole, without images, or stopped by Ctrl-C."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from lcm_jax.errors import Interrupted
from lcm_jax.recipes import make_task
from lcm_jax.training.loop import TrainTask, train
from lcm_jax.training.step import make_loss


def run(config, workdir: Path) -> bool:
    return train(make_task(config, workdir), config, workdir)


def run_without_images(config, workdir: Path) -> bool:
    """Train and write checkpoints, without previews, export and report."""
    task = make_task(config, workdir)
    return train(replace(task, write_preview=lambda *_: {}, on_complete=lambda *_: None), config, workdir)


def run_until(config, workdir: Path, step: int) -> None:
    """Train until Ctrl-C comes after `step` updates, of which the last checkpoint is kept."""
    task: TrainTask = make_task(config, workdir)

    def batches(first: int) -> Iterator:
        for number, batch in enumerate(task.make_batches(first), first):
            if number == step:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(Interrupted):
        train(replace(task, make_batches=batches), config, workdir)


def trace_loss(task: TrainTask) -> None:
    """Trace the loss of a step, by the shapes alone."""
    draws = jax.eval_shape(lambda key: task.objective.draw(key, task.latents(task.batch)), jax.random.key(0))
    loss = make_loss(task.objective, task.bind, task.prepare)
    total, metrics = jax.eval_shape(loss, task.params, task.params, task.frozen, dict(task.batch), draws)
    assert total.shape == () and "loss" in metrics
