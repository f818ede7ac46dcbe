"""From text to pictures, for people: `Pipeline.from_pretrained("shapes-lcm")("a red circle").images[0]`."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.diffusion.guidance import classifier_free
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.samplers.table import Table
from lcm_jax.models.conditioning import concatenate
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling import arguments
from lcm_jax.sampling.finite import Finite, all_finite, check_finite
from lcm_jax.sampling.inputs import Inpainting, draw_image_noise, draw_noise, make_time_ids, to_pixels
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout, naming, trees
from lcm_jax.weights import lora as loras
from lcm_jax.weights.errors import ModelError

DTYPES = ("float32", "bfloat16", "float16")


def sampler_table(model: StableDiffusion, sampler: str, steps: int) -> Table:
    """The steps of the sampler of that name for this model, by its scheduler_config.json.

    Raises ValueError for a number of steps that the sampler does not have, and for options that it does not support.
    """
    config = model.scheduler
    if model.text_encoder_2 is None and sampler != "lcm":
        # diffusers' StableDiffusionPipeline sets these two whatever the file contains: old files have the class's own.
        config = dict(config) | {"steps_offset": 1, "clip_sample": False}
    return SAMPLERS[sampler].make_table(model.schedule, config, steps)


def masked_channels(model: StableDiffusion, params, inpainting: Inpainting) -> jax.Array:
    """What an inpainting UNet takes behind the latents, float32[N, h, w, 1 + c]: the mask at the first pixel
    of each, and the scaled latents of the picture with grey where it is to paint."""
    kept = inpainting.image * (1.0 - inpainting.mask)
    encoded = model.to_latents(model.encode(params["vae"], kept), inpainting.noise)
    return jnp.concatenate([inpainting.mask[:, :: model.downscale, :: model.downscale], encoded], axis=-1)


def sample_latents(
    model: StableDiffusion,
    params,
    context,
    negative,
    masked,
    latents,
    noise,
    guidance_scale,
    *,
    sampler: str,
    table: Table,
) -> jax.Array:
    """Noise to scaled latents float32[B, h, w, c]: pure, and one `lax.scan`.

    params: "unet"; context: of `encode_prompt`; negative: that of what to guide away from, None for a UNet that takes
    the guidance weight as an embedding; masked: of `masked_channels`, None for a UNet that does not inpaint. The rest
    as in `generate`.
    """

    weight = guidance_scale - 1.0
    if masked is not None:  # one for all images is repeated
        masked = jnp.tile(masked, (latents.shape[0] // len(masked), 1, 1, 1))
    context = context._replace(masked=masked)
    if negative is None:
        guided = context._replace(guidance=jnp.full(latents.shape[0], weight))
        network = lambda z, t: model.denoise(params["unet"], z, t, guided)  # noqa: E731
    else:
        both = concatenate(context, negative._replace(masked=masked))

        def network(z, t):
            output = model.denoise(params["unet"], jnp.concatenate([z, z]), jnp.concatenate([t, t]), both)
            cond, uncond = jnp.split(output, 2)
            return classifier_free(uncond, cond, weight)

    chosen = SAMPLERS[sampler]
    return chosen.sample(network, latents, table, model.schedule, noise if chosen.adds_noise else None)


def to_uint8(images: jax.Array) -> jax.Array:
    """float32[..., 3] in -1..1 -> uint8."""
    return jnp.round(jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def generate(
    model: StableDiffusion,
    params,
    token_ids,
    negative_ids,
    latents,
    noise,
    guidance_scale,
    time_ids=None,
    inpainting: Inpainting | None = None,
    *,
    sampler: str,
    table: Table,
    clip_skip: int = 0,
    zero_empty: bool = True,
    decode: bool = True,
) -> tuple[jax.Array, Finite]:
    """Token ids to images uint8[B, H, W, 3], or to scaled latents float32[B, h, w, c] without `decode`: pure.

    params: by network; token_ids: int32[B, L]; negative_ids: int32[L] or int32[B, L], what to guide away from, as a
    rule the empty prompt (SDXL: a row for each encoder, [B, 2, L] and [2, L], and time_ids float32[B, 6]); latents:
    float32[B, h, w, c], standard normal; noise: float32[n - 1 or more, B, h, w, c], for a sampler that adds
    noise; guidance_scale: float32[] in diffusers' convention, w + 1, which goes in as an embedding where the UNet has
    that input, and else as guidance without a classifier, its two passes as one batch of 2B. inpainting: for a UNet
    that takes it. sampler: one of SAMPLERS. table: its steps, see `sampler_table`. clip_skip: see `encode_prompt`;
    the prompt's alone. zero_empty: whether an empty negative prompt may be zeros.
    """
    context = model.encode_prompt(params, token_ids, time_ids, clip_skip=clip_skip, zero_empty=False)
    negative = masked = None
    if model.guidance_embedding_dim is None:
        negative_ids = jnp.broadcast_to(negative_ids, token_ids.shape)
        negative = model.encode_prompt(params, negative_ids, time_ids, zero_empty=zero_empty)
    if inpainting is not None:
        masked = masked_channels(model, params, inpainting)
    z = sample_latents(
        model, params, context, negative, masked, latents, noise, guidance_scale, sampler=sampler, table=table
    )
    images = model.decode(params["vae"], z) if decode else None
    stages = Finite((context, negative), masked, z, images)
    finite = Finite(*(None if output is None else all_finite(output) for output in stages))
    return (to_uint8(images) if decode else z), finite


@dataclass
class Output:
    """images: a list of PIL pictures, float32[N, H, W, 3] in 0..1 (`np`), or latents float32[N, h, w, c]."""

    images: Any


class Pipeline:
    """A text-to-image model of a diffusers folder. Its parameters stay as stored and are cast where they are used."""

    def __init__(self, folder: Path, configs: dict, params: dict, index: dict, dtype: str = "float32"):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose {', '.join(DTYPES)}")
        self.folder, self.configs, self.index = folder, configs, index
        self.params = jax.device_put(params)  # once, not at every call
        self.model = StableDiffusion.from_configs(configs, jnp.dtype(dtype))
        encoders = [encoder for encoder in (self.model.text_encoder, self.model.text_encoder_2) if encoder]
        self.tokenizers = [tokenizers.load(folder / f"tokenizer{'_2' * i}") for i in range(len(encoders))]
        for tokenizer, encoder in zip(self.tokenizers, encoders, strict=True):
            text = encoder.config
            for what, value, option, limit in [
                (
                    "model_max_length",
                    tokenizer.model_max_length,
                    "max_position_embeddings",
                    text.max_position_embeddings,
                ),
                ("vocabulary", len(tokenizer), "vocab_size", text.vocab_size),
            ]:
                if value > limit:
                    raise ModelError(
                        f"{folder}: the tokenizer's {what} is {value}, above the text encoder's {option} {limit}; "
                        "give it the tokenizer that it was trained with"
                    )
        self._compiled: dict = {}  # (sampler, steps, options) -> jitted
        self._adapters: dict[str, tuple[loras.LoRA, float]] = {}
        self._originals: dict[tuple[str, ...], jax.Array] = {}  # by path, of every parameter that an adapter changes

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: str = "float32", variant: str | None = None) -> "Pipeline":
        """path: a folder in diffusers layout, a hub id (`org/name`), or a shipped name (`shapes`, `shapes-lcm`).

        dtype: what the networks compute in. variant: the file variant, such as `fp16`. Raises ModelError.
        """
        folder = layout.locate(path, variant)
        index = layout.read_index(folder)
        configs, tensors = {"model_index": index}, {}
        for name in layout.networks_of(index):
            configs[name], tensors[name] = folders.read_component(folder, name, variant)
        configs["scheduler"] = layout.read_json(folder / "scheduler" / "scheduler_config.json")
        abstract = StableDiffusion.from_configs(configs).abstract_params()
        return cls(folder, configs, trees.all_params(tensors, abstract, str(folder)), index, dtype)

    def save_pretrained(self, path: str | Path, overwrite: bool = False, **how: Any) -> None:
        """Writes the model to the folder `path`, all or nothing; tensors come out as they went in, bit for bit.

        With a LoRA loaded it is the changed model that is written, the one that makes the pictures.
        how: dtype, variant, max_shard_bytes. Raises ModelError where `path` has content and overwrite is False.
        """
        with folders.new_folder(Path(path), overwrite) as temporary:
            folders.write_pipeline(
                temporary,
                self.configs,
                self.params,
                self.folder / "tokenizer",
                self.configs["scheduler"],
                index=self.index,
                **how,
            )

    @property
    def lora_weights(self) -> dict[str, float]:
        """The LoRAs that are loaded, by name, and the weight of each."""
        return {name: weight for name, (_, weight) in self._adapters.items()}

    def load_lora(self, path: str | Path, weight: float = 1.0, name: str | None = None) -> str:
        """Adds the LoRA of a file, in kohya's naming or PEFT's, to the parameters; returns its name.

        name: by default the file's, without its ending. Several add up, each at its weight. Nothing is compiled again.
        Raises ModelError for a name that is taken, and for a LoRA of another model; then nothing has changed.
        """
        name = Path(path).stem if name is None else name
        if name in self._adapters:
            raise ModelError(
                f"a LoRA named {name!r} is loaded already; give this one another name, or use set_lora_weight"
            )
        base = {
            component: {
                naming.to_key(leaf): jax.ShapeDtypeStruct(naming.tensor_shape(leaf, array.shape), array.dtype)
                for leaf, array in flatten_dict(params).items()
            }
            for component, params in self.params.items()
        }
        tensors, metadata = loras.read_file(Path(path))
        family = "sd1" if self.model.text_encoder_2 is None else "sdxl"
        self._adapt(self._adapters | {name: (loras.read_lora(tensors, metadata, base, family), weight)})
        return name

    def set_lora_weight(self, name: str, weight: float) -> None:
        """Another weight for a LoRA that is loaded; 0 turns it off. Raises ModelError for a name that is not there."""
        self._adapt(self._adapters | {name: (self._adapter(name), weight)})

    def unload_lora(self, name: str | None = None) -> None:
        """Takes away one LoRA, or all. Without any the parameters are those that were read, exact to the bit.

        Raises ModelError for a name that is not there.
        """
        if name is not None:
            self._adapter(name)
        self._adapt({other: each for other, each in self._adapters.items() if name not in (None, other)})

    def _adapter(self, name: str) -> loras.LoRA:
        if name not in self._adapters:
            there = f"loaded are {', '.join(self._adapters)}" if self._adapters else "none is loaded"
            raise ModelError(f"there is no LoRA named {name!r}: {there}")
        return self._adapters[name][0]

    def _adapt(self, adapters: dict[str, tuple[loras.LoRA, float]]) -> None:
        """Parameters = those that were read, plus every adapter at its weight."""
        for name, (_, weight) in adapters.items():
            if not np.isfinite(weight):
                raise ModelError(f"the weight of LoRA {name!r} is {weight}; give a finite number")
        flat = flatten_dict(self.params) | self._originals
        keys = {
            (component, f"{module}.weight")
            for adapter, _ in adapters.values()
            for component, updates in adapter.updates.items()
            for module in updates
        }
        touched = {path: (path[0], naming.to_key(path[1:])) for path in flat}
        touched = {path: key for path, key in touched.items() if key in keys}
        tensors: dict = {}
        for path, (component, key) in touched.items():
            tensors.setdefault(component, {})[key] = naming.to_tensor(path[1:], np.asarray(flat[path]))
        merged = loras.merge(tensors, adapters.values())
        originals = {path: flat[path] for path in touched}
        for path, (component, key) in touched.items():  # put as at first: an array bound to a device compiles again
            flat[path] = jax.device_put(naming.to_array(path[1:], merged[component][key]))
        self.params, self._originals, self._adapters = unflatten_dict(flat), originals, adapters

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """prompts -> int32[B, L], or int32[B, 2, L] for SDXL; longer ones are cut."""
        return tokenizers.encode_for(self.tokenizers, prompts)

    @property
    def sampler(self) -> str:
        """The sampler that the folder's scheduler asks for, one of SAMPLERS."""
        scheduler = self.configs["scheduler"]["_class_name"]
        names = [name for name, sampler in SAMPLERS.items() if sampler.scheduler == scheduler]
        if not names:
            raise ValueError(f"scheduler {scheduler} is not supported; choose the sampler: {', '.join(SAMPLERS)}")
        return names[0]

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
        """Images for one prompt or several, num_images_per_prompt of each, in that order.

        guidance_scale: in diffusers' convention, w + 1. latents: float32[N, h, w, c], standard normal, to begin from.
        output_type: pil, np or latent. sampler: one of SAMPLERS; by default that of the folder's scheduler. The next
        three are what SDXL is told of the image, (height, width) or (top, left) in pixels; other models ignore them.
        image, mask_image: PIL images, which an inpainting model needs and no other takes: what is there, and white
        where to paint. They are resized to height and width. All is decoded anew, what is kept too.
        negative_prompt: what to guide away from, one for all prompts or one for each; it warns where it cannot act.
        clip_skip: the text encoder's last layers to leave out. Both are diffusers'. batch_size: images computed at
        once, by default all; a last batch with fewer is filled up, so that one program makes all. first: the number of
        the first image. Image i begins from noise that (seed, first + i) alone decide, whatever the batch.
        Raises ValueError that names the argument, its value and what is allowed, and ModelError for NaN.
        """
        prompts = arguments.prompts("prompt", prompt)
        copies = arguments.integer("num_images_per_prompt", num_images_per_prompt, 1)
        count = len(prompts) * copies
        batch = count if batch_size is None else arguments.integer("batch_size", batch_size, 1)
        first = arguments.integer("first", first, 0, 2**31 - 1)
        seed = arguments.integer("seed", seed, 0, 2**31 - 1)
        scale = arguments.guidance(guidance_scale)
        arguments.choice("output_type", output_type, ("pil", "np", "latent"))
        sampler = self._check_sampler(sampler)
        steps = arguments.integer("num_inference_steps", num_inference_steps)
        sampler_table(self.model, sampler, steps)  # raises on a number that the grid does not hold
        skip = 0 if clip_skip is None else arguments.integer("clip_skip", clip_skip, 0, self.model.max_clip_skip)
        height, width = self._check_size(height, width)
        shape = self._latent_shape(height, width)
        if latents is not None and np.shape(latents) != (count, *shape):
            raise ValueError(f"latents have shape {np.shape(latents)}; use {(count, *shape)} (NHWC)")
        if latents is not None and not np.isfinite(np.asarray(latents, np.float32)).all():
            raise ValueError("latents have NaN or infinity; use standard normal numbers")

        self._warn_of_overlong("prompt", prompts)
        negatives = self._check_negative(negative_prompt, len(prompts), scale)
        token_ids, negative_ids = (np.repeat(self.tokenize(each), copies, axis=0) for each in (prompts, negatives))
        time_ids = None
        if self.model.text_encoder_2 is not None:
            target = (height, width) if target_size is None else arguments.pair("target_size", target_size)
            original = (height, width) if original_size is None else arguments.pair("original_size", original_size)
            corner = arguments.pair("crops_coords_top_left", crops_coords_top_left)
            time_ids = make_time_ids(batch, target, original, corner)
        inpainting = self._check_inpainting(image, mask_image, height, width, seed)

        run = self._jitted(
            sampler, steps, clip_skip=skip, zero_empty=negative_prompt is None, decode=output_type != "latent"
        )
        draws = steps if SAMPLERS[sampler].adds_noise else 1
        parts = []
        for start in range(0, count, batch):
            chosen = np.minimum(start + np.arange(batch), count - 1)
            drawn, noise = draw_noise(seed, batch, draws, shape, first + start)
            drawn = drawn if latents is None else jnp.asarray(latents, jnp.float32)[chosen]
            outputs = run(
                self.params,
                token_ids[chosen],
                negative_ids[chosen],
                drawn,
                noise,
                jnp.float32(scale),
                time_ids,
                inpainting,
            )
            # Waited for first: where memory ran out, a copy aborts the process instead of raising an error.
            images, finite = jax.device_get(jax.block_until_ready(outputs))
            check_finite(finite, self.params, self.model.unet.dtype, str(self.folder))
            parts.append(images[: count - start])
        result = np.concatenate(parts)
        if output_type == "latent":
            return Output(result)
        if output_type == "np":
            return Output(result.astype(np.float32) / 255.0)
        return Output([Image.fromarray(each) for each in result])

    def _check_sampler(self, sampler: str | None) -> str:
        sampler = arguments.choice("sampler", sampler or self.sampler, tuple(SAMPLERS))
        if sampler != "lcm" and self.model.guidance_embedding_dim is not None:
            raise ValueError(f"sampler is {sampler!r}, but this model is an LCM; use sampler='lcm' or its teacher")
        return sampler

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        scale, size = self.model.downscale, self.configs["unet"].get("sample_size") or 64
        rows, columns = size if isinstance(size, list | tuple) else (size, size)
        height = rows * scale if height is None else arguments.integer("height", height)
        width = columns * scale if width is None else arguments.integer("width", width)
        if height % scale or width % scale or min(height, width) < scale:
            raise ValueError(f"height and width are {height} and {width}; use multiples of {scale}")
        return height, width

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        scale = self.model.downscale
        return height // scale, width // scale, self.model.vae.config["latent_channels"]

    def _check_negative(self, negative_prompt: str | Sequence[str] | None, count: int, scale: float) -> list[str]:
        """Return a negative prompt for each of `count` prompts, the empty one by default."""
        if negative_prompt is None:
            return [""] * count
        negatives = arguments.prompts("negative_prompt", negative_prompt)
        if isinstance(negative_prompt, str):
            negatives = negatives * count
        if len(negatives) != count:
            raise ValueError(f"negative_prompt has {len(negatives)} texts and prompt {count}; use one, or one for each")
        if self.model.guidance_embedding_dim is not None:
            reason = "this model is an LCM, which takes guidance_scale as an input and no other prompt; use its teacher"
            warnings.warn(f"negative_prompt has no effect: {reason}", stacklevel=3)
        elif scale == 1:
            warnings.warn("negative_prompt has no effect without guidance: raise guidance_scale above 1", stacklevel=3)
        else:
            self._warn_of_overlong("negative_prompt", negatives)
        return negatives

    def _check_inpainting(self, image, mask_image, height: int, width: int, seed: int) -> Inpainting | None:
        for name, given in (("image", image), ("mask_image", mask_image)):
            if self.model.inpaints and not isinstance(given, Image.Image):
                raise ValueError(f"{name} is {type(given).__name__}; this model inpaints: use a PIL image")
            if not self.model.inpaints and given is not None:
                raise ValueError(f"{name} is given, but this model does not inpaint: leave it out")
        if not self.model.inpaints:
            return None
        pixels = to_pixels(image, height, width, "RGB") * 2 - 1
        mask = np.float32(to_pixels(mask_image, height, width, "L") >= 0.5)
        return Inpainting(pixels, mask, draw_image_noise(seed, self._latent_shape(height, width)))

    def _warn_of_overlong(self, name: str, prompts: Sequence[str]) -> None:
        tokenizer = self.tokenizers[0]
        limit = tokenizer.model_max_length
        for i in tokenizers.overlong(tokenizer, prompts):
            lost = tokenizer.decode(tokenizer(prompts[i], verbose=False)["input_ids"][limit - 1 : -1])
            start = prompts[i] if len(prompts[i]) <= 40 else prompts[i][:40] + "..."
            message = f"{name} {start!r} is longer than {limit} tokens and was cut; lost: {lost!r}"
            warnings.warn(message, stacklevel=4 if name == "negative_prompt" else 3)

    def _jitted(self, sampler: str, steps: int, **options):
        """`generate` of this model under one jit for each sampler, number of steps and options."""
        key = (sampler, steps, *options.values())
        if key not in self._compiled:
            table = sampler_table(self.model, sampler, steps)
            self._compiled[key] = jax.jit(partial(generate, self.model, sampler=sampler, table=table, **options))
        return self._compiled[key]

    def __getstate__(self) -> dict:
        """Without what is compiled, which cannot be pickled; a call compiles it again."""
        return self.__dict__ | {"_compiled": {}}
