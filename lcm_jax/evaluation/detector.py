"""Objects in images, by Mask2Former with Swin-S on COCO: the detector that GenEval uses, with the weights on the hub.

Images are prepared and predictions turned into objects as by mmdet's configuration of this network, which GenEval runs.
transformers' own post-processing differs: it resizes masks to 384 x 384 whatever the image, and has no boxes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.compiler import compiler_options
from lcm_jax.models.layers import apply
from lcm_jax.models.mask2former import STRIDE, Mask2Former, Predictions, read_config
from lcm_jax.models.pixel_decoder import resize
from lcm_jax.weights.diffusers_folder import open_file
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.layout import read_json
from lcm_jax.weights.mask2former import mask2former_params
from lcm_jax.weights.published import Published, Weights

SOURCE = "facebook/mask2former-swin-small-coco-instance"
FOLDER = SOURCE.partition("/")[2]  # of these files in --weights_dir, since their names are those of many models
FILES = ("model.safetensors", "pytorch_model.bin")
# The classes of COCO in the order of the detector's outputs, by GenEval's names, which differ from COCO's in three.
NAMES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)
SHORT, LONG = 800, 1333  # pixels of the shorter side, unless the longer one would exceed its limit
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's pixels
PADDING = 128  # the value of pixels that fill an image up to a multiple of STRIDE, at the right and the bottom
MAX_OBJECTS = 100  # of an image
MIN_SCORE = 0.3  # objects below it satisfy no rule of GenEval, and are left out


class Objects(NamedTuple):
    """Detected objects of one image, in any order."""

    boxes: np.ndarray  # float32[N, 4]: left, top, right, bottom in pixels, the last two exclusive
    scores: np.ndarray  # float32[N], in [0, 1]
    names: tuple[str, ...]  # of NAMES
    masks: np.ndarray | None = None  # bool[N, H, W], True inside the object
    colors: tuple[str | None, ...] | None = None  # None for colors that are not known


Detect = Callable[[np.ndarray], Objects]  # of uint8[H, W, 3]


def fitted_size(height: int, width: int) -> tuple[int, int]:
    """Return the size to which an image is resized: SHORT pixels for the shorter side, at most LONG for the longer."""
    scale = min(SHORT / min(height, width), LONG / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepare(image: jax.Array) -> jax.Array:
    """image: uint8[H, W, 3]. Return float32[1, h, w, 3], resized bilinearly, padded to multiples of STRIDE, normalized.

    The resized pixels are whole numbers, and small images are enlarged: a 512 x 512 image has 800 x 800 pixels.
    """
    height, width = fitted_size(*image.shape[:2])
    x = jnp.round(resize(image[None].astype(jnp.float32), (height, width)))
    x = jnp.pad(x, ((0, 0), (0, -height % STRIDE), (0, -width % STRIDE), (0, 0)), constant_values=PADDING)
    mean, std = (jnp.array(each, jnp.float32).reshape(1, 1, 1, 3) for each in (MEAN, STD))
    return (x - mean) / std


def find_instances(
    predictions: Predictions, size: tuple[int, int], fitted: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (float32[N], int32[N], bool[N, H, W]): the scores, labels and masks of the best pairs of query and label.

    predictions: of one image. size: (H, W) of the image; fitted: of it in the padded input of the network, which has
    four times the size of the predicted masks. A query may have several labels. The score is the probability of the
    label times the mean probability of the pixels inside the mask.
    """
    height, width = (4 * side for side in predictions.masks.shape[2:])
    masks = resize(predictions.masks[0].transpose(1, 2, 0)[None], (height, width))
    logits = resize(masks[:, : fitted[0], : fitted[1]], size)[0].transpose(2, 0, 1)
    inside = logits > 0
    area = inside.sum((1, 2))
    confidence = (jax.nn.sigmoid(logits) * inside).sum((1, 2)) / (area + 1e-6)
    probabilities = jax.nn.softmax(predictions.classes[0])[:, :-1]
    labels = probabilities.shape[1]
    best, flat = jax.lax.top_k(probabilities.reshape(-1), min(MAX_OBJECTS, probabilities.size))
    query = flat // labels
    return best * confidence[query], flat % labels, inside[query]


def mask_boxes(masks: np.ndarray) -> np.ndarray:
    """masks: bool[N, H, W]. Return float32[N, 4], the smallest boxes around them; 0 for an empty mask."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def keep_objects(scores: np.ndarray, labels: np.ndarray, masks: np.ndarray, names: tuple[str, ...]) -> Objects:
    """Return the instances of `find_instances` with a score above MIN_SCORE. Raises ValueError for NaN."""
    if not np.isfinite(scores).all():
        raise ValueError(f"the detector's scores are not finite; check the weights of {SOURCE}")
    kept = np.flatnonzero(scores > MIN_SCORE)
    return Objects(mask_boxes(masks[kept]), scores[kept], tuple(names[i] for i in labels[kept]), masks[kept])


def make_detector(network: Mask2Former, params: dict, names: tuple[str, ...] = NAMES) -> Detect:
    """Return a function uint8[H, W, 3] -> Objects; each size of image compiles one program.

    names: of the labels, in their order. It raises ValueError as `keep_objects` does.
    """
    params = jax.device_put(params)

    @partial(jax.jit, static_argnames="size", compiler_options=compiler_options())
    def run(params, image, size):
        with jax.default_matmul_precision("highest"):  # the masks decide by a threshold where queries attend
            predictions = apply(network, params, prepare(image))
        return find_instances(predictions, size, fitted_size(*size))

    def detect(image: np.ndarray) -> Objects:
        scores, labels, masks = run(params, image, image.shape[:2])
        return keep_objects(np.asarray(scores), np.asarray(labels), np.asarray(masks), names)

    return detect


def open_detector(weights: Weights) -> Detect:
    """Return the detector with its published config and weights: --weights_dir has them in a folder FOLDER.

    Raises ModelError for files that are neither there nor can be fetched, that are damaged, or are another network's.
    """
    path = weights.find(Published("config.json", SOURCE, folder=FOLDER))
    try:
        config = read_config(read_json(path, {}))
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
    if config.num_labels != len(NAMES):
        raise ModelError(f"{path} has {config.num_labels} classes; use {SOURCE}, which has the {len(NAMES)} of COCO")
    there = (file for file in FILES if weights.folder and (weights.folder / FOLDER / file).is_file())
    path = weights.find(Published(next(there, FILES[0]), SOURCE, folder=FOLDER))
    return make_detector(Mask2Former(config), mask2former_params(open_file(path)[0], config, str(path)))
