"""The latent cache: every picture through the autoencoder once, so that training steps never pay for it again."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lcm_jax import locks


class LatentCache:
    """Random access to {"moments": float32[h,w,2c], "token_ids": int32[L] (SDXL: [2,L]), "time_ids": float32[6]} in a
    folder of `cache_latents`."""

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
        moments, token_ids, time_ids = self._open()
        return {"moments": moments[i].astype(np.float32), "token_ids": token_ids[i], "time_ids": time_ids[i]}


def cache_latents(
    source: Sequence[Mapping],
    encode: Callable[[np.ndarray], np.ndarray],
    tokenize: Callable[[list[str]], np.ndarray],
    folder: Path,
    identity: Mapping[str, str],
    batch_size: int = 64,
    say: Callable[[str], None] = print,
) -> LatentCache:
    """Encodes {"image": uint8[H,W,3], "caption": str} records into folder/<digest of identity>/, or reuses it.

    A record may have "time_ids", the sizes that SDXL is told, float32[6]: (height, width) of the picture as it was,
    (top, left) of the crop, (H, W); one without them was not cropped.
    encode: uint8[B,H,W,3] -> moments [B,h,w,2c], stored in float16. tokenize: captions -> int32[B,L]. identity: what
    the cache depends on (data, autoencoder, tokenizer); another identity gets a folder of its own. The folder
    appears under its name only when it is complete. If another process encodes the same, it is waited for.
    """
    identity = {**identity, "layout": "2"}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    target = Path(folder) / key
    if (target / "identity.json").exists():
        return LatentCache(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    wait = lambda holder: say(f"waiting for {holder}, which encodes the same images into {target}")  # noqa: E731
    lock = target.with_name(f"{key}.lock")
    with locks.lock(lock, wait):
        if (target / "identity.json").exists():  # the other process has finished
            return LatentCache(target)
        for stale in target.parent.glob(f"{key}.part-*"):  # of a run that was killed while encoding
            shutil.rmtree(stale)
        temporary = Path(tempfile.mkdtemp(prefix=f"{key}.part-", dir=target.parent))
        try:
            _encode_all(source, encode, tokenize, temporary, batch_size, say)
            (temporary / "identity.json").write_text(json.dumps(dict(identity), indent=1) + "\n")
            os.replace(temporary, target)
            lock.unlink()  # who waits for it, or comes now, finds the whole folder
        except BaseException:  # Ctrl-C as well: gigabytes that nobody would find
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return LatentCache(target)


def _encode_all(source: Sequence[Mapping], encode, tokenize, folder: Path, batch_size: int, say) -> None:
    """Write moments.npy, token_ids.npy and time_ids.npy of `cache_latents`."""
    began = said = time.monotonic()
    token_ids, time_ids = [], []
    # Written in order, not through a memory map, on which a full disk kills the process.
    with (folder / "moments.npy").open("wb") as file:
        for first in range(0, len(source), batch_size):
            records = [source[i] for i in range(first, min(first + batch_size, len(source)))]
            images = np.stack([record["image"] for record in records])
            short = batch_size - len(images)  # the last batch is filled up, so that `encode` compiles for one shape
            encoded = encode(np.concatenate([images, np.repeat(images[-1:], short, 0)]) if short else images)
            moments = np.ascontiguousarray(encoded[: len(images)], np.float16)
            if first == 0:
                header = np.lib.format.header_data_from_array_1_0(moments)
                np.lib.format.write_array_header_1_0(file, header | {"shape": (len(source), *moments.shape[1:])})
            file.write(moments.data)
            token_ids.append(tokenize([record["caption"] for record in records]))
            size = images.shape[1:3]
            time_ids += [record.get("time_ids", (*size, 0, 0, *size)) for record in records]
            now = time.monotonic()
            if now - said > 10:
                said, done = now, first + len(images)
                left = (now - began) / done * (len(source) - done)
                say(f"encoding pictures {done}/{len(source)}  {done / (now - began):.0f}/s  {left:.0f} s left")
    np.save(folder / "token_ids.npy", np.concatenate(token_ids).astype(np.int32))
    np.save(folder / "time_ids.npy", np.array(time_ids, np.float32))
    say(f"encoded {len(source)} pictures in {time.monotonic() - began:.0f} s")
