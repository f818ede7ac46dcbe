"""Images from prompts, for people: `Pipeline.from_pretrained("shapes-lcm")("a red circle").images[0]`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.samplers.table import Table
from lcm_jax.models.lora import add_updates
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling import arguments
from lcm_jax.sampling.finite import check_finite
from lcm_jax.sampling.generate import default_sampler, generate, is_classifier_free, sampler_table
from lcm_jax.sampling.inputs import Inputs, draw_noise
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import lora as loras
from lcm_jax.weights import naming, trees
from lcm_jax.weights.errors import ModelError, overflowing
from lcm_jax.weights.lora_files import to_adapter
from lcm_jax.weights.model import StoredModel, check_complete, check_params, open_model, read_params

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Output:
    """images: a list of PIL images, float32[N, H, W, 3] in [0, 1] (`np`), or latents float32[N, h, w, c]."""

    images: Any


class LowRank(NamedTuple):
    """An update of a kernel on the device: down and up as in models/lora.py, and scale, alpha / rank."""

    down: jax.Array
    up: jax.Array
    scale: float


class Pipeline:
    """A text-to-image model on the device. Its parameters keep their stored dtypes and are cast when they are used."""

    def __init__(self, stored: StoredModel, dtype: str = "float32"):
        """Read the parameters of `stored` onto the device, one array at a time; dtype: of the computation.

        Raises ModelError if a network or the tokenizer is missing, or they do not fit the configs.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose {', '.join(DTYPES)}")
        self.tokenizer_folder = check_complete(stored)
        self.name, self.family = stored.name, stored.family
        self.configs, self.index = stored.configs, stored.index
        self.model = StableDiffusion.from_configs(self.configs, jnp.dtype(dtype))
        abstract = self.model.abstract_params()
        check_params(stored, abstract)
        try:
            self.tokenizers = tokenizers.open_tokenizers(self.tokenizer_folder, stored.configs)
        except ValueError as error:
            raise ModelError(f"{self.name}: {error}") from error
        # Copied, because on a CPU JAX would use the mapped file itself, which others may change.
        put = partial(jnp.array, copy=True)
        self.params = {name: read_params(stored, name, abstract[name], put=put) for name in self.model.networks}
        self._compiled: dict = {}  # (sampler, options) -> jitted
        self._adapters: dict[str, tuple[dict[tuple[str, ...], LowRank], float]] = {}
        self._originals: dict[tuple[str, ...], jax.Array] = {}  # by path, of every parameter that an adapter changes

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str = "float32",
        variant: str | None = None,
        *,
        base: str | Path | None = None,
        ema: bool | None = None,
    ) -> "Pipeline":
        """Open a model in any format: a folder in diffusers layout, a hub id, a bundled name, a file, a run.

        dtype: what the networks compute in. variant, base, ema: see `lcm_jax.weights.model.open_model`, which has more
        options: `Pipeline(open_model(...))` is the same. A single file has no tokenizer and needs `base`. Raises
        ModelError.
        """
        return cls(open_model(path, base=base, ema=ema, variant=variant), dtype)

    def save_pretrained(self, path: str | Path, overwrite: bool = False, **save_options: Any) -> None:
        """Write the model to the folder `path` in diffusers layout, whole or not at all; tensors stay bit-exact.

        If LoRAs are loaded, the written parameters include them. save_options: dtype, variant, max_shard_bytes. Raises
        ModelError if `path` has content and overwrite is False.
        """
        with folders.new_folder(Path(path), overwrite) as temporary:
            folders.write_pipeline(
                temporary,
                self.configs,
                self.params,
                self.tokenizer_folder,
                self.configs["scheduler"],
                index=self.index,
                **save_options,
            )

    @property
    def lora_weights(self) -> dict[str, float]:
        """The loaded LoRAs by name, with the weight of each."""
        return {name: weight for name, (_, weight) in self._adapters.items()}

    def load_lora(self, path: str | Path, weight: float = 1.0, name: str | None = None) -> str:
        """Add a LoRA, in kohya's naming or PEFT's, to the parameters; return its name.

        path: a file, a folder that holds pytorch_lora_weights.safetensors or what PEFT has saved, the workdir of a run
        that has trained a LoRA, or the name of a bundled one. name: by default that of the file, folder or run. Several
        add up, each at its weight. No program that generates images is compiled again. Raises ModelError for a name
        that is taken, and for a LoRA of another model; then nothing has changed.
        """
        file = loras.find_file(path)
        name = loras.short_name(file) if name is None else name
        if name in self._adapters:
            raise ModelError(
                f"a LoRA named {name!r} is loaded already; give this one another name, or use set_lora_weight"
            )
        base = {component: trees.from_params(params).specs for component, params in self.params.items()}
        updates = loras.open_lora(file, base, self.family).updates
        self._adapt(self._adapters | {name: (_put_updates(updates, self.params), weight)})
        return name

    def set_lora_weight(self, name: str, weight: float) -> None:
        """Set the weight of a loaded LoRA; 0 turns it off. Raises ModelError for a name that is not loaded."""
        self._adapt(self._adapters | {name: (self._adapter(name), weight)})

    def unload_lora(self, name: str | None = None) -> None:
        """Remove one LoRA, or all. Without any, the parameters are those that were read, bit-exact.

        Raises ModelError for a name that is not loaded.
        """
        if name is not None:
            self._adapter(name)
        self._adapt({other: each for other, each in self._adapters.items() if name not in (None, other)})

    def _adapter(self, name: str) -> dict[tuple[str, ...], LowRank]:
        if name not in self._adapters:
            loaded = f"loaded are {', '.join(self._adapters)}" if self._adapters else "none is loaded"
            raise ModelError(f"there is no LoRA named {name!r}: {loaded}")
        return self._adapters[name][0]

    def _adapt(self, adapters: dict[str, tuple[dict[tuple[str, ...], LowRank], float]]) -> None:
        """Set the parameters to those that were read, plus every adapter at its weight."""
        for name, (_, weight) in adapters.items():
            if not np.isfinite(weight):
                raise ModelError(f"the weight of LoRA {name!r} is {weight}; use a finite number")
        flat: dict[tuple[str, ...], Any] = flatten_dict(self.params) | self._originals
        originals = {path: flat[path] for each, _ in adapters.values() for path in each}
        merged, finite = {}, {}
        for path, kernel in originals.items():
            found = [(each[path], weight) for each, weight in adapters.values() if path in each]
            updates = [(low.down, low.up, np.float32(weight * low.scale)) for low, weight in found]
            merged[path], finite[path] = _merge_kernel(kernel, updates)
        _check_sums(jax.device_get(finite), originals)
        self.params, self._originals, self._adapters = unflatten_dict(flat | merged), originals, adapters

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Return token ids int32[B, L], or int32[B, 2, L] for SDXL; longer prompts are cut."""
        return tokenizers.encode_for(self.tokenizers, prompts)

    @property
    def sampler(self) -> str:
        """Name in SAMPLERS of the folder's scheduler. Raises ValueError if no sampler has its class."""
        return default_sampler(self.model)

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 4,
        guidance_scale: float = 8.0,
        seed: int = 0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        latents: np.ndarray | None = None,
        output_type: str = "pil",
        sampler: str | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        clip_skip: int | None = None,
        batch_size: int | None = None,
        first: int = 0,
    ) -> Output:
        """Generate num_images_per_prompt images of each prompt, in that order.

        Image i starts from noise that depends on (seed, first + i) alone, whatever the batch. Another number of steps
        compiles nothing. Raises ValueError with the argument, its value and the allowed ones, and ModelError for NaN.

        guidance_scale: in diffusers' convention, w + 1. latents: float32[N, h, w, c], standard normal, to start from.
        output_type: pil, np or latent. sampler: a name in SAMPLERS; by default that of the folder's scheduler.
        original_size, crops_coords_top_left, target_size: pixels, (height, width) or (top, left), inputs of SDXL; other
        models ignore them. image, mask_image: PIL images, required by inpainting models; white pixels of the mask are
        repainted. Both are resized to height and width, and all pixels are decoded anew. negative_prompt: what to guide
        away from, one or one for each prompt; without effect it warns. clip_skip: last layers of the text encoder to
        leave out, as in diffusers. batch_size: images computed at once, by default all; the last batch is filled up.
        """
        prompts = arguments.prompts("prompt", prompt)
        negatives = arguments.negative_prompts(negative_prompt, len(prompts))
        copies = arguments.integer("num_images_per_prompt", num_images_per_prompt, 1)
        count = len(prompts) * copies
        batch = count if batch_size is None else arguments.integer("batch_size", batch_size, 1)
        first = arguments.integer("first", first, 0, 2**31 - 1)
        seed = arguments.integer("seed", seed, 0, 2**31 - 1)
        scale = arguments.guidance(guidance_scale)
        arguments.choice("output_type", output_type, ("pil", "np", "latent"))
        sampler = arguments.sampler(self.model, sampler or self.sampler, tuple(SAMPLERS))
        table = sampler_table(self.model, sampler, arguments.integer("num_inference_steps", num_inference_steps))
        skip = 0 if clip_skip is None else arguments.integer("clip_skip", clip_skip, 0, self.model.max_clip_skip)
        size = arguments.size(self.model, height, width, self.configs["unet"].get("sample_size") or 64)
        shape = (*(side // self.model.downscale for side in size), self.model.vae.config["latent_channels"])
        latents = arguments.latents(latents, (count, *shape))
        time_ids = arguments.time_ids(self.model, batch, size, original_size, crops_coords_top_left, target_size)
        inpainting = arguments.inpainting(self.model, image, mask_image, size, seed)
        arguments.warn_of_no_effect(self.model, negative_prompt, scale)
        for name, each in (("prompt", prompts), ("negative_prompt", negatives)):
            arguments.warn_of_overlong(name, each, self.tokenizers[0])

        ids, negative_ids = (np.repeat(self.tokenize(each), copies, axis=0) for each in (prompts, negatives))
        if not is_classifier_free(self.model, scale):
            negative_ids = None
        program = self._program(sampler, skip, negative_prompt is None, output_type != "latent")
        parts = []
        for start in range(0, count, batch):
            rows = np.minimum(start + np.arange(batch), count - 1)
            drawn, noise = draw_noise(seed, np.uint32(first + rows), shape)
            drawn = drawn if latents is None else jnp.asarray(latents[rows])
            negative = None if negative_ids is None else negative_ids[rows]
            inputs = Inputs(ids[rows], negative, drawn, noise, np.float32(scale), time_ids, inpainting)
            parts.append(self._run(program, inputs, table)[: count - start])
        return _output(np.concatenate(parts), output_type)

    def _program(self, sampler: str, clip_skip: int, zero_empty: bool, decode: bool):
        """Return `generate` of this model, jitted once for each sampler and each set of options."""
        key = (sampler, clip_skip, zero_empty, decode)
        if key not in self._compiled:
            options = {"clip_skip": clip_skip, "zero_empty": zero_empty, "decode": decode}
            self._compiled[key] = jax.jit(partial(generate, self.model, sampler=sampler, **options))
        return self._compiled[key]

    def _run(self, program, inputs: Inputs, table: Table) -> np.ndarray:
        # Waited for before the copy, which aborts the process instead of raising an error if memory has run out.
        images, finite = jax.device_get(jax.block_until_ready(program(self.params, inputs, table=table)))
        check_finite(finite, self.params, self.model.unet.dtype, self.name)
        return images

    def __getstate__(self) -> dict:
        """Return the state without compiled programs, which cannot be pickled; a call compiles them again."""
        return self.__dict__ | {"_compiled": {}}


@jax.jit
def _merge_kernel(kernel: jax.Array, updates: list) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return the sum, and a bool[] each for kernel and sum that is True if it is finite; one program for each shape."""
    total = add_updates(kernel, updates)
    return total, (jnp.isfinite(kernel).all(), jnp.isfinite(total).all())


def _put_updates(updates: loras.Updates, params: Mapping[str, Any]) -> dict[tuple[str, ...], LowRank]:
    """Return the updates on the device, by the path of the kernel that each changes."""
    placed = {}
    for component, each in updates.items():
        for module, update in each.items():
            path, adapter = to_adapter(module, update, params[component])
            down, up = (jnp.array(adapter[name], copy=True) for name in ("down", "up"))
            placed[component, *path, "kernel"] = LowRank(down, up, update.scale)
    return placed


def _check_sums(finite: Mapping[tuple[str, ...], tuple], originals: Mapping[tuple[str, ...], jax.Array]) -> None:
    """Raise ModelError for kernels that are not finite, and for sums that overflow in a kernel's dtype."""
    key_of = lambda path: f"{path[0]}.{naming.to_key(path[1:])}"  # noqa: E731
    bad: dict[str, list[str]] = {}  # by dtype
    for path, (before, after) in finite.items():
        if not before:
            raise ModelError(f"{key_of(path)} of the model contains NaN or infinity; use another model")
        if not after:
            bad.setdefault(originals[path].dtype.name, []).append(key_of(path))
    for dtype, keys in bad.items():
        raise overflowing(keys, dtype, "use a smaller weight, or a model in bfloat16 or float32")


def _output(images: np.ndarray, output_type: str) -> Output:
    if output_type == "pil":
        return Output([Image.fromarray(each) for each in images])
    return Output(images.astype(np.float32) / 255.0 if output_type == "np" else images)
