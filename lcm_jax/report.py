"""A few-step student beside its teacher: pictures for the same captions from the same noise, scored and timed."""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import lcm_jax
from lcm_jax.evaluation.frechet import Moments, frechet_distance, moments

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# pictures(sampler, steps) -> (uint8[N, H, W, 3], seconds without compilation)
Pictures = Callable[[str, int], tuple[np.ndarray, float]]


def figures_of(
    pictures: Pictures,
    plan: Mapping[str, Sequence[int]],
    captions: list[str],
    features: Callable,
    reference: Moments,
    score: Callable | None,
    say,
) -> dict:
    """{sampler: {steps: {"verifier", "tasks", "frechet", "pictures_per_s"}}} for every sampler and steps of `plan`.

    features: uint8[N, H, W, 3] -> float[N, D]; reference: the moments of the real pictures' features. score: that of
    the verifier, or None where nothing can tell whether a picture satisfies its caption; its two figures are then left
    out.
    """
    result: dict = {}
    for sampler, every in plan.items():
        for steps in every:
            images, seconds = pictures(sampler, steps)
            found = {
                "frechet": round(frechet_distance(moments(features(images)), reference), 4),
                "pictures_per_s": round(len(images) / seconds, 2),
            }
            told = f"Frechet {found['frechet']:.2f}, {len(images) / seconds:.1f} pictures/s"
            if score is not None:
                scored = score(images, captions)
                tasks = {task: round(value, 4) for task, value in scored["tasks"].items()}
                found = {"verifier": round(scored["overall"], 4), "tasks": tasks} | found
                told = f"verifier {scored['overall']:.3f}, {told}"
            result.setdefault(sampler, {})[str(steps)] = found
            say(f"  {sampler} {steps}: {told}")
    return result


def environment() -> dict:
    """What the figures were taken with: device and versions."""
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind} x {jax.device_count()} ({platform.machine()})",
        "versions": {name: version(name) for name in PACKAGES}
        | {"lcm_jax": lcm_jax.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
    }


def table(report: Mapping) -> Table:
    """The report's figures as a table for the terminal."""
    head = columns(report)
    scored = "verifier and " if "verifier" in head else ""
    view = Table(title=f"{scored}Frechet distance over {report['captions']} held-out captions")
    for column in head:
        view.add_column(column, justify="left" if column in ("model", "sampler") else "right")
    for row in rows(report):
        view.add_row(*row)
    return view


def columns(report: Mapping) -> list[str]:
    figures = next(iter(next(iter(report["teacher"].values())).values()))
    scored = ["verifier"] if "verifier" in figures else []
    tasks = [task.replace("_", " ") for task in figures.get("tasks", ())]
    return ["model", "sampler", "steps", *scored, "Frechet", "pictures/s", *tasks]


def rows(report: Mapping) -> list[list[str]]:
    return [
        [
            model,
            sampler,
            steps,
            *([f"{f['verifier']:.1%}"] if "verifier" in f else []),
            f"{f['frechet']:.2f}",
            f"{f['pictures_per_s']:.1f}",
            *(f"{value:.0%}" for value in f.get("tasks", {}).values()),
        ]
        for model in ("teacher", "student")
        for sampler, every in report[model].items()
        for steps, f in every.items()
    ]


def composition(report: Mapping) -> str:
    """The verifier's score on what no training picture shows, as a sentence; empty where it was not taken."""
    if (found := report.get("composition")) is None:
        return ""
    scores = [
        f"{who} {sampler} {steps} {score:.1%}"
        for who in ("teacher", "student")
        for sampler, every in found[who].items()
        for steps, score in every.items()
    ]
    return f"Pairs of colour and shape that no training picture has, {found['captions']} captions: {', '.join(scores)}."


def markdown(report: Mapping) -> str:
    head = columns(report)
    scored = "The verifier's score is the mean over the six tasks. " if "verifier" in head else ""
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows(report)]]
    return "\n".join(
        [
            "# Student and teacher",
            "",
            f"{report['captions']} held-out captions, guidance scale {report['guidance_scale']}, the same noise for "
            f"all; {report['device']}. Training took {report['seconds']['training']:.0f} s.",
            "",
            *lines,
            "",
            *([found, ""] if (found := composition(report)) else []),
            f"{scored}The Frechet distance compares the features of the autoencoder's encoder, averaged over "
            "positions, with those of real pictures; with this few pictures it is biased upwards, for all rows alike.",
            "",
        ]
    )


def write(report: Mapping, workdir: Path) -> None:
    """report.json and report.md in `workdir`."""
    (workdir / "report.md").write_text(markdown(report))
    temporary = workdir / "report.json.part"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(workdir / "report.json")


def show(report: Mapping) -> None:
    Console(width=None if Console().is_terminal else 140).print(table(report))
    if found := composition(report):
        print(found)
