"""The latent cache: every image through the autoencoder once, so that training steps never pay for it again."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax import files, locks
from lcm_jax.data.captioned import time_ids

Encoder = Callable[[np.ndarray], Any]  # uint8[B, H, W, 3] -> moments [B, h, w, 2c]
Tokenize = Callable[[Sequence[str]], np.ndarray]  # captions -> int32[B, L], for SDXL int32[B, 2, L]
LOG_SECONDS = 10


class LatentCache:
    """Random access to {"moments": float32[h, w, 2c], "token_ids": int32[L] (SDXL: [2, L]), "time_ids": float32[6]} in
    a folder that `cache_latents` wrote."""

    def __init__(self, folder: Path):
        self.folder = str(folder)
        self._arrays = None

    def _open(self):
        if self._arrays is None:  # opened on first use, so that the object travels to worker processes as a path
            folder = Path(self.folder)
            others = (np.load(folder / f"{name}.npy") for name in ("token_ids", "time_ids"))
            self._arrays = (np.load(folder / "moments.npy", mmap_mode="r"), *others)
        return self._arrays

    def __getstate__(self):
        return {"folder": self.folder, "_arrays": None}

    def __len__(self) -> int:
        return len(self._open()[1])

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        moments, token_ids, sizes = self._open()
        return {"moments": moments[i].astype(np.float32), "token_ids": token_ids[i], "time_ids": sizes[i]}


def cache_latents(
    records: Sequence[Mapping[str, Any]],
    make_encoder: Callable[[], Encoder],
    tokenize: Tokenize,
    folder: Path,
    fingerprint: Mapping[str, str],
    batch_size: int = 64,
    log: Callable[[str], None] = print,
) -> LatentCache:
    """Encode captioned images into folder/<digest of fingerprint>/, or reuse it.

    records: random access to {"image": uint8[H, W, 3], "caption": str}, with "time_ids" if images were cropped.
    make_encoder: returns the encoder, whose moments are stored in float16; called only if there is something to encode.
    fingerprint: everything the cache depends on (data, autoencoder, tokenizer); another one gets its own folder.
    The folder appears under its name only when it is complete. If another process encodes the same, wait for it.
    """
    fingerprint = {**fingerprint, "layout": "2"}
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    target = Path(folder) / key
    if (target / "fingerprint.json").exists():
        return LatentCache(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    wait = lambda holder: log(f"waiting for {holder}, which encodes the same images into {target}")  # noqa: E731
    lock = target.with_name(f"{key}.lock")
    with locks.lock(lock, wait):
        if (target / "fingerprint.json").exists():  # the other process has finished
            return LatentCache(target)
        for unfinished in files.temporary_folders(target):  # of a run that was killed while encoding
            shutil.rmtree(unfinished)
        with files.whole_folder(target) as temporary:
            _encode_all(records, make_encoder(), tokenize, temporary, batch_size, log)
            (temporary / "fingerprint.json").write_text(json.dumps(fingerprint, indent=1) + "\n")
        lock.unlink()  # whoever waits for it, or comes now, finds the whole folder
    return LatentCache(target)


def _encode_all(records, encode: Encoder, tokenize: Tokenize, folder: Path, batch_size: int, log) -> None:
    """Write moments.npy, token_ids.npy and time_ids.npy of `cache_latents`."""
    began = logged = time.monotonic()
    token_ids, sizes = [], []
    # Written in order, not through a memory map, on which a full disk kills the process.
    with (folder / "moments.npy").open("wb") as file:
        for first in range(0, len(records), batch_size):
            chunk = [records[i] for i in range(first, min(first + batch_size, len(records)))]
            images = np.stack([record["image"] for record in chunk])
            padding = batch_size - len(images)  # the last batch is padded, so that `encode` compiles for one shape
            encoded = encode(np.concatenate([images, np.repeat(images[-1:], padding, 0)]) if padding else images)
            moments = np.ascontiguousarray(encoded[: len(images)], np.float16)
            if first == 0:
                header = np.lib.format.header_data_from_array_1_0(moments)
                np.lib.format.write_array_header_1_0(file, header | {"shape": (len(records), *moments.shape[1:])})
            file.write(moments.data)
            token_ids.append(tokenize([record["caption"] for record in chunk]))
            sizes += [time_ids(record) for record in chunk]
            now = time.monotonic()
            if now - logged > LOG_SECONDS:
                logged, done = now, first + len(images)
                left = (now - began) / done * (len(records) - done)
                log(f"encoding images {done}/{len(records)}  {done / (now - began):.0f}/s  {left:.0f} s left")
    np.save(folder / "token_ids.npy", np.concatenate(token_ids).astype(np.int32))
    np.save(folder / "time_ids.npy", np.array(sizes, np.float32))
    log(f"encoded {len(records)} images in {time.monotonic() - began:.0f} s")
