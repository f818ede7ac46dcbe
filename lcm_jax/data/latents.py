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
    appears under its name only when it is complete.
    """
    identity = {**identity, "layout": "2"}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    target = Path(folder) / key
    if (target / "identity.json").exists():
        return LatentCache(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f"{key}.part-*"):  # of a run that was killed while encoding
        shutil.rmtree(stale)
    temporary = Path(tempfile.mkdtemp(prefix=f"{key}.part-", dir=target.parent))
    began = said = time.monotonic()
    moments = None
    token_ids, time_ids = [], []
    for first in range(0, len(source), batch_size):
        records = [source[i] for i in range(first, min(first + batch_size, len(source)))]
        images = np.stack([record["image"] for record in records])
        short = batch_size - len(images)  # the last batch is filled up, so that `encode` compiles for one shape
        encoded = np.asarray(encode(np.concatenate([images, np.repeat(images[-1:], short, 0)]) if short else images))
        if moments is None:
            moments = np.lib.format.open_memmap(
                temporary / "moments.npy", "w+", np.float16, (len(source), *encoded.shape[1:])
            )
        moments[first : first + len(images)] = encoded[: len(images)]
        token_ids.append(tokenize([record["caption"] for record in records]))
        size = images.shape[1:3]
        time_ids += [record.get("time_ids", (*size, 0, 0, *size)) for record in records]
        now = time.monotonic()
        if now - said > 10:
            said, done = now, first + len(images)
            left = (now - began) / done * (len(source) - done)
            say(f"encoding pictures {done}/{len(source)}  {done / (now - began):.0f}/s  {left:.0f} s left")
    moments.flush()
    np.save(temporary / "token_ids.npy", np.concatenate(token_ids).astype(np.int32))
    np.save(temporary / "time_ids.npy", np.array(time_ids, np.float32))
    (temporary / "identity.json").write_text(json.dumps(dict(identity), indent=1) + "\n")
    os.replace(temporary, target)
    say(f"encoded {len(source)} pictures in {time.monotonic() - began:.0f} s")
    return LatentCache(target)
