"""Published weights of feature networks, under their published names: in a folder, on the hub, or at an address."""

import hashlib
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lcm_jax.errors import first_line
from lcm_jax.files import whole_file
from lcm_jax.weights.diffusers_folder import open_file
from lcm_jax.weights.errors import ModelError

TIMEOUT = 30  # seconds without a byte


class Published(NamedTuple):
    """A published file of weights.

    file: its name. source: the hub's `org/name`, or an https:// address whose last part may be another name. sha256:
    how its digest begins, or "" if none was published. folder: in the folder of weights, for a name that the files of
    several models share.
    """

    file: str
    source: str
    sha256: str = ""
    folder: str = ""


class Weights(NamedTuple):
    """Published weights, from `folder`, or where it is None, from the hub or the address where they were published.

    What is downloaded is kept in the hub's cache, or in ~/.cache/lcm_jax (XDG_CACHE_HOME).
    """

    folder: Path | None

    def open(self, published: Published) -> Mapping[str, np.ndarray]:
        """Return {published key: tensor, mapped from the file}, of .safetensors or of torch.save.

        Raises ModelError for a file that is neither here nor can be fetched, and for one that is damaged.
        """
        return open_file(self.find(published))[0]

    def find(self, published: Published) -> Path:
        """Return the path of a published file. Raises ModelError if it is neither here nor can be fetched."""
        file = f"{published.folder}/{published.file}" if published.folder else published.file
        remedy = f"put {published.file} of {published.source} at {file} in a folder, and name it by --weights_dir"
        if self.folder is not None:
            path = self.folder / file
            if not path.is_file():
                raise ModelError(f"{path} does not exist; get {published.file} from {published.source}")
            return path
        if published.source.startswith("https://"):
            return _fetch(published, remedy)
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(published.source, published.file))
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ConnectionError, OSError) as error:
            raise ModelError(
                f"{published.file} of {published.source} is not in the hub's cache and cannot be fetched "
                f"({first_line(error)}); {remedy}"
            ) from error


def _fetch(published: Published, remedy: str) -> Path:
    """Download a file from its address into the cache, unless it is there, and return its path."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcm_jax"
    path = cache / published.file
    if path.is_file():
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part, part.open("wb") as written:
            digest = hashlib.sha256()
            with urllib.request.urlopen(published.source, timeout=TIMEOUT) as answer:
                while block := answer.read(2**20):
                    digest.update(block)
                    written.write(block)
            if not digest.hexdigest().startswith(published.sha256):
                raise ModelError(
                    f"{published.source} is damaged: its sha256 is {digest.hexdigest()} and should begin with "
                    f"{published.sha256}; {remedy}"
                )
    except OSError as error:
        raise ModelError(f"{published.source} cannot be fetched ({first_line(error)}); {remedy}") from error
    return path
