"""The sources of captioned images by the names that config.data.source has. A new one is a file and a line here."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path

from lcm_jax.data.array_record import ArrayRecordSource
from lcm_jax.data.captioned import CaptionedDataset, Source
from lcm_jax.data.folder import FolderSource
from lcm_jax.data.parquet import ParquetSource
from lcm_jax.data.shapes import ShapesSource
from lcm_jax.data.tar_shards import TarSource
from lcm_jax.data.tfds import TfdsSource

SOURCES: Mapping[str, type[Source]] = {
    "shapes": ShapesSource,
    "tar": TarSource,
    "folder": FolderSource,
    "parquet": ParquetSource,
    "array_record": ArrayRecordSource,
    "tfds": TfdsSource,
}
HELD_OUT_USERS = ("sample.images", "sample.prompts", "sample.scored_prompts", "report.prompts", "report.reference")


def check_data(config) -> Source:
    """Return the source that `config.data` names, with its settings checked.

    config: of a run, a ConfigDict. Raises ValueError that names the key and the remedy if the source is unknown, if a
    key that it requires is absent, and for settings that it refuses. Writes nothing, reads no record.
    """
    data = config.data
    if data.source not in SOURCES:
        raise ValueError(f"data.source {data.source!r} is not supported; use one of {', '.join(SOURCES)}")
    source = SOURCES[data.source]
    for field in fields(source):
        if field.name not in data and field.default is MISSING:
            raise ValueError(
                f"the config has no data.{field.name}, which data.source={data.source} requires; add it to the config "
                "file, as bundled configs have it (--list_configs)"
            )
    names = {field.name for field in fields(source)}
    for name in ("filters", "buckets"):
        if data.get(name) and name not in names:
            raise ValueError(f"data.{name} is not supported for data.source={data.source}; remove it")
    settings = config.to_dict()
    for key in HELD_OUT_USERS:
        group, name = key.split(".")
        needed = settings.get(group, {}).get(name, 0)
        if needed > data.held_out:
            raise ValueError(f"{key} {needed} is more than data.held_out {data.held_out}; raise that, or lower {key}")
    source = source(**{field.name: data[field.name] for field in fields(source) if field.name in data})
    source.check(config.train.batch_size)
    return source


def load_dataset(config, workdir: Path, log: Callable[[str], None] = print) -> CaptionedDataset:
    """Open the data that `config.data` names. Raises ValueError as `check_data` does, and if there is too little.

    workdir: the folder of the run, for an index. log: is called with a line for whatever is skipped.
    """
    return check_data(config).open(config.train.seed, workdir / "index", log)
