"""Groups of settings that the configs of all runs share: every key with its default and its meaning, once."""

from typing import Any

from ml_collections import ConfigDict


def data(**changes: Any) -> ConfigDict:
    """Return the group `data`: where captioned images come from, and how they are prepared."""
    return _group(
        "data",
        {
            "source": "shapes",  # or tar, folder
            "length": 5000,  # of shapes: training images
            "style": "fill",  # of shapes: or outline
            "shards": "",  # of tar: files, such as data/{00000..00015}.tar or data/*.tar
            "folder": "",  # of folder: of images at any depth, with name.txt, name.json, metadata.jsonl or metadata.csv
            "caption_field": "caption",  # in JSON files and metadata
            "caption": "",  # of folder: of all images without their own
            "repeats": 1,  # of folder: times that the training set has each image, with a crop and a flip each
            "crop": "center",  # of folder: a part in the middle, or random
            "flip": False,  # of folder: mirror half of the images
            "size": 64,  # pixels
            "held_out": 1024,  # images that are not trained on; the report compares with them
            "encode": "cache",  # once, before training; or step: each step encodes its own images and prompts
            "cache": "",  # a folder of python -m lcm_jax.cache, made if it is not there; workdir/latents if empty
        },
        changes,
    )


def mesh(**changes: Any) -> ConfigDict:
    """Return the group `mesh`: the axes by which devices share the work; -1 is all that are left."""
    return _group("mesh", {"data": -1, "fsdp": 1}, changes)


def checkpoint(**changes: Any) -> ConfigDict:
    """Return the group `checkpoint`: when the state is saved, and what is kept."""
    return _group(
        "checkpoint",
        {
            "every_steps": 100,
            "keep": 2,  # the newest ones
            "best": "",  # a figure of the previews, such as frechet@4; its best checkpoint is kept in best/
        },
        changes,
    )


def log(**changes: Any) -> ConfigDict:
    """Return the group `log`: when figures are printed and recorded."""
    return _group(
        "log",
        {
            "every_steps": 10,
            "wandb": "",  # a project of Weights & Biases, to record there as well; requires the extra `wandb`
        },
        changes,
    )


def _group(name: str, defaults: dict[str, Any], changes: dict[str, Any]) -> ConfigDict:
    if unknown := changes.keys() - defaults.keys():
        raise ValueError(f"{name}.{min(unknown)} is not a setting; use one of {', '.join(defaults)}")
    return ConfigDict(defaults | changes)
