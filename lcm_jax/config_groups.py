"""Groups of settings that the configs of all runs share: every key with its default and its meaning, once."""

from typing import Any

from ml_collections import ConfigDict


def data(**changes: Any) -> ConfigDict:
    """Return the group `data`: where captioned images come from, and how they are prepared."""
    return _group(
        "data",
        {
            "source": "shapes",  # or tar, folder, parquet, array_record, tfds
            "length": 5000,  # of shapes: training images
            "style": "fill",  # of shapes: or outline
            "shards": "",  # of tar, parquet, array_record: files, such as data/{00000..00015}.tar, data/*.tar or URLs
            "folder": "",  # of folder: of images at any depth, with name.txt, name.json, metadata.jsonl or metadata.csv
            "tfds": "",  # of tfds: a data set, such as coco_captions or my_set:1.0.0, below data.tfds_dir
            "tfds_dir": "",  # of tfds: the folder of data sets; TFDS_DATA_DIR or ~/tensorflow_datasets if empty
            "split": "train",  # of tfds
            "image_field": "image",  # of parquet, array_record, tfds
            "caption_field": "caption",  # in JSON files, metadata and records; of several, such as a,b, one at random
            "caption": "",  # of folder: of all images without their own
            "filters": (),  # rules, such as ("width>=512", "pwatermark<0.5", "min_size>=256")
            "repeats": 1,  # times that the training set has each image, with a crop, a flip and a caption each
            "crop": "center",  # a part in the middle, or random
            "flip": False,  # mirror half of the images
            "size": 64,  # pixels
            "buckets": (),  # (height, width) of training images, each cropped to the nearest; () is a square of size
            "held_out": 1024,  # images that are not trained on; the report compares with them
            "max_skipped": 0.05,  # the part of training records that may be unreadable; more is an error
            "workers": 0,  # processes that decode images; 0 is threads of this one
            "encode": "cache",  # once, before training; or step: each step encodes its own images and prompts
            "cache": "",  # a folder of python -m lcm_jax.cache, made if it is not there; workdir/latents if empty
        },
        changes,
    )


def mesh(**changes: Any) -> ConfigDict:
    """Return the group `mesh`: the axes by which devices share the work."""
    return _group(
        "mesh",
        {
            "data": -1,  # copies of the state, each with its own rows of a batch; -1 is all devices that are left
            "fsdp": 1,  # devices that share one copy of the state, each with its own rows of a batch
            "tensor": 1,  # devices that share layers, and the rows of a batch
            "frozen": "sharded",  # networks that are not trained: over fsdp as well, or replicated
        },
        changes,
    )


def checkpoint(**changes: Any) -> ConfigDict:
    """Return the group `checkpoint`: when the state is saved, and what is kept."""
    return _group(
        "checkpoint",
        {
            "every_steps": 100,
            "every_minutes": 0.0,  # since the last one, looked at whenever losses are logged; 0 is never
            "keep": 2,  # the newest ones
            "keep_every": 0,  # those of steps that it divides are kept as well; 0 is none
            "best": "",  # a figure of the previews, such as frechet@4; its best checkpoint is kept in best/
            "folder": "",  # of checkpoints/ and best/, such as gs://bucket/run; the workdir if empty
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


def coco(**changes: Any) -> ConfigDict:
    """Return the group `data` of an evaluation on COCO: its captions, and the images that are compared with."""
    return _group(
        "data",
        {
            "source": "coco",
            "captions": "",  # captions_val2014.json or captions_val2017.json of COCO's annotations
            "images": "",  # the folder of the images: val2014 or val2017
            "size": 512,  # pixels of the images that are made
            "per_image": "any",  # captions drawn from all; or first: the first caption of each image
            "compared": "paired",  # with the images of the captions; or all: with every image
            "real_size": 0,  # pixels that real images are cropped to; 0 leaves them to the FID's own resizing
        },
        changes,
    )


def full_size_evaluation(data: ConfigDict, metrics: tuple[str, ...], prompts: int, **settings: Any) -> ConfigDict:
    """Return the config of an evaluation of full-size models.

    prompts: images that are made, and real ones that are compared with where the source does not pair them. settings:
    of the metrics.
    """
    config = ConfigDict()
    config.metrics = metrics
    config.settings = ConfigDict(settings)
    config.autoencoder = "shapes"  # of the metric frechet alone
    config.data = data
    config.plan = ConfigDict({"lcm": (1, 2, 4, 8), "ddim": (4, 8, 50), "dpmsolver++": (4, 8)})  # or --plan
    config.report = ConfigDict(
        {
            "prompts": prompts,
            "batch_size": 16,
            "reference": prompts,
            "guidance_scale": 0.0,  # of all models; 0 is that of each model's preset
            "seed": 0,  # of the captions that are drawn, and of the noise
        }
    )
    return config


def _group(name: str, defaults: dict[str, Any], changes: dict[str, Any]) -> ConfigDict:
    if unknown := changes.keys() - defaults.keys():
        raise ValueError(f"{name}.{min(unknown)} is not a setting; use one of {', '.join(defaults)}")
    return ConfigDict(defaults | changes)
