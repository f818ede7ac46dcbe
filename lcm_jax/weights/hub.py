"""Models of the Hugging Face hub: `org/name` or `org/name@revision`, through huggingface_hub and its cache."""

import re
from collections.abc import Callable, Collection
from pathlib import Path

from lcm_jax.weights.errors import ModelError

ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\S+)?")


def download(model: str, choose: Callable[[Collection[str]], list[str]]) -> Path:
    """Return the cached folder of a model, with the files that `choose` selects from all their names.

    If the hub cannot be reached, the cache alone is used. Raises ModelError if it has nothing, if the hub has no such
    model or revision or requires a login, and if the cache cannot be written.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    name, _, revision = model.partition("@")
    at = revision or None  # the newest
    reason = lambda error: (str(error).strip().splitlines() or [type(error).__name__])[0][:120]  # noqa: E731
    try:
        there = HfApi().model_info(name, revision=at, timeout=10).siblings or []
        return Path(snapshot_download(name, revision=at, allow_patterns=choose([file.rfilename for file in there])))
    except ModelError:
        raise
    except errors.GatedRepoError:
        raise ModelError(
            f"{name} requires accepting its terms; do so on its hub page, then log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision!r} on the hub; use a branch, a tag or a commit") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(
            f"there is no model {name!r}, neither a folder here nor on the hub; check the name, or log in with "
            "`hf auth login` if it is private"
        ) from None
    # HTTPError is that of the hub's HTTP library.
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:  # pyright: ignore[reportPrivateImportUsage]
        unreachable = reason(error)
    except (errors.XetDownloadError, OSError) as error:
        cache = constants.HF_HUB_CACHE
        raise ModelError(f"{model} cannot be fetched into the cache {cache}: {reason(error)}") from error
    try:
        return Path(snapshot_download(name, revision=at, allow_patterns=["model_index.json"], local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        raise ModelError(
            f"{model!r} is not a folder here and not in the cache {constants.HF_HUB_CACHE}, and the hub cannot be "
            f"reached ({unreachable}); go online once, set HF_HOME to a cache that has it, or use a local folder"
        ) from None
