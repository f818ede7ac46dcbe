"""The grid of a study: the runs that it consists of, and the config of each."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from lcm_jax import config_files
from lcm_jax.recipes.settings import leaves

DESIGNS = ("product", "one_at_a_time")


class Run(NamedTuple):
    """A run of a study. name: of its folder. settings: its value of every key of the grid, by dotted key."""

    name: str
    settings: Mapping[str, Any]


def make_runs(grid: Mapping[str, Sequence[Any]], design: str) -> list[Run]:
    """Return the runs of a grid: {dotted key: its values}.

    design: "product" for every combination, or "one_at_a_time" for the run that has the first value of each key, and
    one more for each other value of a key. Without keys it is a single run. Raises ValueError for another design.
    """
    if design not in DESIGNS:
        raise ValueError(f"design {design!r} is not supported; use {' or '.join(DESIGNS)}")
    default = {key: values[0] for key, values in grid.items()}
    if design == "product":
        return [name_run(dict(zip(grid, each, strict=True)), grid) for each in product(*grid.values())]
    others = [(key, value) for key, values in grid.items() for value in values[1:]]
    runs = [Run(name_run({key: value}, grid).name, default | {key: value}) for key, value in others]
    return [Run("default", default), *runs]


def name_run(settings: Mapping[str, Any], grid: Mapping[str, Any]) -> Run:
    """Return a run that is named by its settings, such as solver=ddim,num_ddim_steps=50.

    A key is shortened to its last part, unless another key of the grid has the same.
    """
    ends = [key.rpartition(".")[2] for key in grid]
    short = lambda key: end if ends.count(end := key.rpartition(".")[2]) == 1 else key  # noqa: E731
    safe = lambda text: "".join(letter if letter.isalnum() or letter in "+-._" else "_" for letter in text)  # noqa: E731
    parts = (f"{short(key)}={safe(format_value(value))}" for key, value in settings.items())
    return Run(",".join(parts) or "run", settings)


def format_value(value: Any) -> str:
    """Return a setting as text, a number without digits that it does not need."""
    return f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)


def read_grid(study) -> dict[str, tuple]:
    """Return {dotted key: its values} of a study. Raises ValueError for a key with no or equal values."""
    grid = {}
    for key, values in leaves(study.grid.to_dict()):
        if not isinstance(values, tuple | list) or not values:
            raise ValueError(f"grid.{key} {values!r} is not supported; use a tuple of values, such as (0.0, 0.95)")
        if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
            raise ValueError(f"grid.{key} has {repeated[0]!r} twice; use it once")
        grid[key] = tuple(values)
    return grid


def base_config(study) -> Any:
    """Return the base config of a study with its overrides. Raises ValueError for a base or a key that is not there."""
    base = load_base(study.base)
    apply_settings(base, dict(leaves(study.overrides.to_dict())), "overrides", study.base)
    return base


def load_base(name: str) -> Any:
    """Return a bundled config, or that of a file, with an argument after a colon. Raises ValueError of one line."""
    try:
        return config_files.load_file(config_files.locate(name))
    except Exception as error:  # a config file is code
        raise ValueError(config_files.explain(error, []).replace("--config=", "base ", 1)) from error


def apply_settings(config, settings: Mapping[str, Any], group: str, base: str) -> None:
    """Set dotted keys of a config. Raises ValueError that names a key which `base` lacks, and a wrong type."""
    known = [key for key, _ in leaves(config.to_dict())]
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else "see its file for valid keys"
            raise ValueError(f"{group}.{key} is not a key of the base config {base}; {hint}")
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError):
            here = dict(leaves(config.to_dict()))[key]
            raise ValueError(
                f"{group}.{key} {value!r} is not supported; use a {type(here).__name__}, as the base config {base} has"
            ) from None


def run_configs(study, workdir: Path) -> Iterator[tuple[Run, Any]]:
    """Yield every run of a study with its config, whose data cache is shared in the workdir of the study."""
    grid, base = read_grid(study), base_config(study)
    for run in make_runs(grid, study.design):
        config = base.copy_and_resolve_references()
        apply_settings(config, run.settings, "grid", study.base)
        if config.data.get("encode") == "cache" and not config.data.get("cache"):
            config.data.cache = str(workdir / "latents")
        yield run, config
