"""The statistics of a reference set in .npz files, as pytorch-fid and clean-fid write and read them.

`mu` and `sigma` are the mean and the covariance of features. Files of this project have beside them the `flavour`, the
`count` of images and the name of the `reference` set, which the other tools pass over. clean-fid's files for KID have
the features themselves, `feats`. torch-fidelity caches .pt files of pickled NumPy arrays, which only torch can read.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.evaluation.frechet import check_features, moments
from lcm_jax.files import whole_file


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of a set.

    flavour, count, reference: None in files of other tools. features: float[N, D], or None where a file has none.
    """

    mean: np.ndarray  # float[D]
    covariance: np.ndarray  # float64[D, D]
    flavour: str | None = None
    count: int | None = None
    reference: str | None = None
    features: np.ndarray | None = None


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write a .npz file that `read_statistics`, pytorch-fid and clean-fid read. Raises OSError, ValueError."""
    if path.suffix != ".npz":
        raise ValueError(f"{path} does not end in .npz, by which tools recognize statistics; rename it")
    recorded = {
        "flavour": statistics.flavour,
        "count": statistics.count,
        "reference": statistics.reference,
        "feats": statistics.features,
    }
    arrays: dict[str, Any] = {name: value for name, value in recorded.items() if value is not None}
    with whole_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, mu=statistics.mean, sigma=statistics.covariance, **arrays)


def read_statistics(path: Path, flavour: str, dimensions: int) -> Statistics:
    """Read a .npz file. flavour, dimensions: of the features that its own are compared with.

    Raises ValueError for a file that is not a .npz file or has other arrays, that declares another flavour, or has
    another dimension or values that are not finite. Nothing in it is executed.
    """
    found = _read(path)
    if found.flavour not in (None, flavour):
        raise ValueError(
            f"{path} has statistics of flavour {found.flavour!r}, which cannot be compared with {flavour!r}; use "
            f"--fid_flavour={found.flavour}, or other statistics"
        )
    if len(found.mean) != dimensions:
        raise ValueError(
            f"{path} has statistics of {len(found.mean)} dimensions, and the features have {dimensions}; use "
            "statistics of the same network"
        )
    return found


def _read(path: Path) -> Statistics:
    """Raise ValueError as `read_statistics` does, but for the flavour and the dimension."""
    if path.suffix in (".pt", ".pth"):
        raise ValueError(
            f"{path} is a cache of torch-fidelity, which only torch can read; load it with torch.load, and write its "
            "'mu' and 'sigma' with numpy.savez"
        )
    try:
        with path.open("rb") as raw:
            file = np.load(raw, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; use a .npz file of statistics") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise ValueError(f"{path} is not a .npz file of statistics ({error}); write it again") from None
    features = arrays.get("feats")
    if features is not None:
        _check_numbers(path, "feats", features, 2)
        try:
            check_features(features)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if "mu" in arrays and "sigma" in arrays:
        mean, covariance = arrays["mu"], arrays["sigma"]
    elif features is not None:
        mean, covariance = features.mean(0), moments(features).covariance
    else:
        names = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"{path} contains {names}, not the 'mu' and 'sigma' of statistics; use another file")
    _check_numbers(path, "mu", mean, 1)
    _check_numbers(path, "sigma", covariance, 2)
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: 'sigma' is {list(covariance.shape)} for a 'mu' of {len(mean)}; write the file again")
    labels = {name: str(arrays[name]) for name in ("flavour", "reference") if name in arrays}
    count = arrays.get("count")
    if count is not None and (count.ndim or count.dtype.kind not in "iu"):
        raise ValueError(f"{path}: 'count' is {count.dtype.name}{list(count.shape)}; write the file again")
    return Statistics(
        mean,
        covariance.astype(np.float64),
        labels.get("flavour"),
        None if count is None else int(count),
        labels.get("reference"),
        features,
    )


def _check_numbers(path: Path, name: str, array: np.ndarray, rank: int) -> None:
    if array.dtype.kind != "f" or array.ndim != rank:
        raise ValueError(
            f"{path}: {name!r} is {array.dtype.name}{list(array.shape)}, not floating-point numbers of rank {rank}; "
            "write the file again"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {name!r} has values that are not finite; write the file again from finite features")
