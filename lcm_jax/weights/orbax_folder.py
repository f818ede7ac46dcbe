"""The folders with orbax checkpoints: models that `convert` wrote, and the workdirs of runs.

A model is a folder with configs.json, the tokenizers, and one step, 0, under checkpoints/, whose tree is
{component: parameters}. A run has its whole state there (params, ema, opt_state, step), and no configs of networks; in
the same form its best state is in best/.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.ranges import ABOVE_ZERO, GUIDANCE, MANY_STEPS, REAL, STEPS, check_setting
from lcm_jax.weights import layout, naming
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.single_file_family import COMPONENTS
from lcm_jax.weights.stored import Tensors, get_specs, placeholder

CONFIGS = "configs.json"  # in the folder of a model
# The keys that are read of this file and of a run's config.json, as `layout.read_json` takes them.
MODEL_KEYS = {"family": (str, True), "configs": ({str: dict}, True), "guessed": ([str], False)}
MODEL_KEYS |= dict.fromkeys(("index", "preset"), (dict, False))
RUN_KEYS = {"objective": (dict, True)} | dict.fromkeys(("lora", "sample"), (dict, False))
RUN_KEYS |= dict.fromkeys(("teacher", "init", "base"), (str, False))
OBJECTIVE_KEYS = {"name": (str, True), "num_ddim_steps": (int, False)}
RUN_VALUES = {
    "objective.num_ddim_steps": STEPS,
    "objective.w_min": REAL,
    "objective.w_max": REAL,
    "sample.steps": STEPS,
    "sample.student_steps": MANY_STEPS,
    "sample.guidance_scale": GUIDANCE,
    "lora.alpha": ABOVE_ZERO,  # required in the group
}
FILES = {"scheduler": "scheduler_config.json", "model_index": "model_index.json"}


def is_model(folder: Path) -> bool:
    """Return True if `folder` is a model that `convert` wrote as an orbax checkpoint."""
    return (folder / CONFIGS).is_file()


class RunPlace(NamedTuple):
    """A checkpoint of a run: the one of `step` in `folder`, by default the newest there."""

    workdir: Path
    folder: epath.Path
    step: int | None


def checkpoint_root(workdir: Path, folder: str) -> epath.Path:
    """Return the folder of a run's checkpoints/ and best/.

    folder: its `config.checkpoint.folder`, a path or a URL such as gs://bucket/run; the workdir if it is empty.
    """
    return epath.Path(folder) if "://" in folder else epath.Path((Path(folder) if folder else workdir).absolute())


def find_run(path: Path) -> RunPlace | None:
    """Return the checkpoint if `path` is a workdir (the newest one), its checkpoints/ or best/, or a step of these.

    They are looked for in `config.checkpoint.folder` of the run; in the workdir their names mean those there.
    """
    path = path.absolute()
    places: list[tuple[Path, str, int | None]] = [(path, "checkpoints", None), (path.parent, path.name, None)]
    if path.name.isdigit():
        places.append((path.parent.parent, path.parent.name, int(path.name)))
    for workdir, name, step in places:
        if name in ("checkpoints", "best") and (workdir / "config.json").is_file():
            folder = checkpoint_root(workdir, recorded_folder(workdir)) / name
            if folder.is_dir():
                return RunPlace(workdir, folder, step)
    return None


def recorded_folder(workdir: Path) -> str:
    """Return `config.checkpoint.folder` of a run, or "" if it has none or config.json is not that of a run."""
    try:
        folder = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["checkpoint"]["folder"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""
    return folder if isinstance(folder, str) else ""


def read_model_file(folder: Path) -> dict[str, Any]:
    """Return configs.json of a model: its family, configs, index, guessed options and preset. Raises ModelError."""
    path = folder / CONFIGS
    content = layout.read_json(path, MODEL_KEYS)
    for name, config in content["configs"].items():
        layout.check_keys(path, config, layout.KEYS[FILES.get(name, "config.json")])
    if content["family"] not in COMPONENTS:
        families = ", ".join(COMPONENTS)
        raise ModelError(f"{path}: family={layout.shown(content['family'])} is not supported; use one of {families}")
    return content


def read_run_file(workdir: Path) -> dict[str, Any]:
    """Return config.json of a run, with the values that are used here checked. Raises ModelError."""
    config = layout.read_json(workdir / "config.json", RUN_KEYS)
    layout.check_keys(workdir / "config.json", config["objective"], OBJECTIVE_KEYS)
    for key, allowed in RUN_VALUES.items():
        group, _, name = key.partition(".")
        settings = config.get(group)
        if settings is None or name not in settings and key != "lora.alpha":
            continue
        try:
            check_setting(key, settings.get(name), allowed)
        except ValueError as error:
            raise ModelError(f"{workdir / 'config.json'}: {error}") from None
    return config


def read_tree(folder: epath.PathLike, step: int | None) -> tuple[int, dict[str, Any]]:
    """Return (step, tree of shapes and dtypes) of a checkpoint, by default the newest. Raises ModelError."""
    from lcm_jax.weights import orbax_tree  # orbax takes seconds to import

    return orbax_tree.read_specs(folder, step)


def read_arrays(folder: epath.PathLike, step: int, *parents: str) -> dict[str, Any]:
    """Read a part of a checkpoint's tree, at the path `parents`, as it is. Raises ModelError."""
    from lcm_jax.weights import orbax_tree

    tree = orbax_tree.read_specs(folder, step)[1]
    for name in parents:
        tree = tree[name]
    leaves = orbax_tree.read_leaves(folder, step, [(*parents, *path) for path in flatten_dict(tree)])
    return unflatten_dict({path[len(parents) :]: leaf for path, leaf in leaves.items()})


def open_components(folder: epath.PathLike, step: int | None, *parents: str) -> tuple[int, dict[str, Tensors]]:
    """Return (step, tensors by component and diffusers' key) of a checkpoint in `folder`, by default the newest.

    parents: the path of the components in the tree. An array is read from the file when it is used, together with
    some of its neighbors, and these stay in memory until others are read. Raises ModelError.
    """
    from lcm_jax.weights import orbax_tree  # orbax takes seconds to import

    step, tree = orbax_tree.read_specs(folder, step)
    for name in parents:
        tree = tree[name]

    def open_component(name: str) -> Tensors:
        leaves: dict[tuple[str, ...], Any] = flatten_dict(tree[name])
        paths = {naming.to_key(path): path for path in leaves}
        keys = sorted(paths)
        sizes = [leaves[paths[key]].dtype.itemsize * leaves[paths[key]].size for key in keys]
        groups = [[paths[keys[i]] for i in group] for group in orbax_tree.make_groups(sizes)]
        group_of = {path: i for i, group in enumerate(groups) for path in group}

        @lru_cache(maxsize=1)
        def read_group(i: int) -> dict[tuple[str, ...], np.ndarray]:
            return orbax_tree.read_leaves(folder, step, [(*parents, name, *path) for path in groups[i]])

        def read(key: str) -> np.ndarray:
            path = paths[key]
            return naming.to_tensor(path, read_group(group_of[path])[*parents, name, *path])

        shape_of = lambda path: tuple(naming.tensor_shape(path, leaves[path].shape))  # noqa: E731
        return Tensors({key: placeholder(leaves[path].dtype, shape_of(path)) for key, path in paths.items()}, read)

    return step, {name: open_component(name) for name in tree}


def by_path(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Tensors by diffusers' key -> our arrays by the names of their path, joined by dots; each is read when used."""
    specs = get_specs(tensors)
    paths = {key: naming.to_path(key, spec.ndim) for key, spec in specs.items()}
    keys = {".".join(path): key for key, path in paths.items()}
    arrays = {name: naming.to_array(paths[key], specs[key]) for name, key in keys.items()}
    return Tensors(arrays, lambda name: naming.to_array(paths[keys[name]], tensors[keys[name]]))
