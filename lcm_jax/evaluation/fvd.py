"""The Frechet video distance (arXiv 1812.01717), as StyleGAN-V defines its clips (arXiv 2112.14683, FVD2048 16f).

A clip is 16 consecutive frames: of a real video from a random one on, of a generated video the first ones. Frames are
resized to 224 x 224 by PyTorch's bilinear filter, whatever their shape. Features are I3D's 400 logits, and covariances
are divided by the number of clips, not by one less.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import jax
import numpy as np

from lcm_jax.compiler import compiler_options
from lcm_jax.evaluation.batches import in_batches
from lcm_jax.evaluation.evaluate import Column, Images, Measure, Resources, concatenate, seven_digits
from lcm_jax.evaluation.frechet import Moments, check_features, gaussian_distance, moments
from lcm_jax.evaluation.inception_inputs import pytorch_bilinear
from lcm_jax.evaluation.videos import CLIP_FRAMES, open_videos
from lcm_jax.models.i3d import I3D, INPUT_SIZE, abstract_i3d
from lcm_jax.models.layers import apply
from lcm_jax.weights.published import Published, Weights
from lcm_jax.weights.trees import to_params

CLIPS_AT_ONCE = 4  # of 16 frames, which take 0.2 GiB in the first layer
FILE = "i3d_pretrained_400.pt"
# A state dict under pytorch-i3d's keys of the network that TensorFlow Hub published (deepmind/i3d-kinetics-400), by
# which FVD is defined, as VideoGPT converted it. StyleGAN-V's i3d_torchscript.pt is a program, which needs torch.
PUBLISHED = Published(
    FILE,
    "https://huggingface.co/spaces/LanguageBind/Open-Sora-Plan-v1.0.0/resolve/"
    f"810fa8c4bdb3a4c8eec9bd57375c29bde6fb46de/opensora/eval/fvd/videogpt/{FILE}",
)

Rows = np.ndarray  # float32[N, 400]


def prepare_clips(clips: Sequence[np.ndarray]) -> np.ndarray:
    """clips: uint8[T, H, W, 3] each. Return float32[B, T, 224, 224, 3], in [-1, 1].

    Raises ValueError for another shape or dtype.
    """
    for clip in clips:
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not clip.size:
            raise ValueError(
                f"a clip is {clip.dtype.name}{list(clip.shape)}, not uint8[{CLIP_FRAMES}, H, W, 3]; FVD compares "
                "videos, so use a folder of videos"
            )

    def prepare(clip: np.ndarray) -> np.ndarray:
        return np.stack([pytorch_bilinear(frame.astype(np.float32), INPUT_SIZE) for frame in clip]) * (2 / 255) - 1

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(prepare, clips)))


def i3d_features(tensors: Mapping[str, np.ndarray], where: str = FILE) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function float32[N, T, 224, 224, 3], in [-1, 1] -> float32[N, 400], the logits.

    tensors: of the published file, by its keys. Raises ModelError for keys that are missing, extra or misshapen.
    """
    network = I3D()
    used = {key: tensors[key] for key in tensors if not key.endswith("num_batches_tracked")}
    params = jax.device_put(to_params("i3d", used, abstract_i3d(network), where))

    @partial(jax.jit, compiler_options=compiler_options())
    def encode(params, inputs):
        with jax.default_matmul_precision("highest"):
            return apply(network, params, inputs)

    return lambda inputs: in_batches(lambda part: encode(params, part), inputs, CLIPS_AT_ONCE)


def make_measure(features: Callable[[np.ndarray], np.ndarray]) -> Measure:
    """Return a metric's `measure`, of clips in place of images. It raises ValueError as `prepare_clips` does, and for
    features that are not finite."""

    def measure(clips: Images, prompts: Sequence[str]) -> Rows:
        rows = features(prepare_clips(list(clips)))
        check_features(rows)
        return rows

    return measure


def video_distance(own: Moments, reference: Moments) -> float:
    """Return FVD by the moments of logits. Raises ValueError for fewer than two clips."""
    scaled = [each.covariance * ((each.count - 1) / each.count) for each in (own, reference)]
    return gaussian_distance(own.mean, scaled[0], reference.mean, scaled[1])


@dataclass(frozen=True, eq=False)
class FVD:
    """Metric of clips: `measure` takes uint8[16, H, W, 3] each, as `videos.open_videos` reads them."""

    columns: ClassVar[Mapping[str, Column]] = {"fvd": Column("FVD", ".1f")}
    lower_is_better: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 50
    reads_prompts: ClassVar[bool] = False

    measure: Measure
    reference: Moments
    note: str

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ModelError if there are no weights, and ValueError for a reference without videos."""
        measure = resources.once("i3d", lambda: make_measure(i3d_features(resources.weights.open(PUBLISHED))))
        reference = moments(resources.reference_rows(measure))
        note = (
            f"FVD is the Frechet distance of I3D's logits of the first {CLIP_FRAMES} frames of videos to those of "
            f"random clips of {resources.reference}; published figures have 2,048 clips on both sides."
        )
        return cls(measure, reference, note)

    def result(self, rows: Rows) -> dict[str, float]:
        """Raise ValueError for fewer than two clips."""
        return {"fvd": seven_digits(video_distance(moments(rows), self.reference))}

    def scores(self, rows: Rows) -> None:
        return None


def fvd(images: Path, reference: Path, weights: Weights, skip_bad: bool = False) -> float:
    """Return the FVD of a folder of generated videos to a folder of real ones.

    skip_bad: leave out videos that cannot be read or are short, as StyleGAN-V does. Raises ValueError for folders that
    cannot be read, ModelError for weights.
    """
    real = open_videos(reference, "reference", random=True, skip_bad=skip_bad)
    made = open_videos(images, "images", random=False, skip_bad=skip_bad)
    batches = lambda: ((clips, [""] * len(clips)) for clips, _ in real.batches(CLIPS_AT_ONCE))  # noqa: E731
    metric = FVD.create(Resources(batches, f"{len(real.paths)} videos of {reference}", weights=weights))
    parts = [metric.measure(clips, [""] * len(clips)) for clips, _ in made.batches(CLIPS_AT_ONCE)]
    return metric.result(concatenate(parts))["fvd"]
