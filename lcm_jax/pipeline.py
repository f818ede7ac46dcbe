"""From text to pictures, for people: `Pipeline.from_pretrained("shapes-lcm")("a red circle").images[0]`."""

import warnings
from collections.abc import Sequence
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
from lcm_jax.diffusion import samplers
from lcm_jax.diffusion.consistency import guidance_embedding
from lcm_jax.diffusion.guidance import classifier_free
from lcm_jax.diffusion.schedule import alpha_sigma, lcm_timesteps, solver_timesteps
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout, naming, trees
from lcm_jax.weights import lora as loras
from lcm_jax.weights.errors import ModelError

SAMPLERS = {
    "LCMScheduler": "lcm", "DDIMScheduler": "ddim", "PNDMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmsolver++", "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}  # fmt: skip
RANDOM_SAMPLERS = ("lcm", "euler_ancestral")  # which add noise at each step but the last
DTYPES = ("float32", "bfloat16", "float16")


def timesteps(model: StableDiffusion, sampler: str, steps: int) -> np.ndarray:
    """The sampler's timesteps, descending int32[steps]. DDIM and Euler have the spacing of the scheduler's config, and
    DPM-Solver++ the trailing one. Raises ValueError for a number of steps that the grid does not hold."""
    config, total = model.scheduler, len(model.schedule.alphas_cumprod)
    if sampler == "lcm":
        return lcm_timesteps(steps, 1.0, config.get("original_inference_steps", 50), total)
    if sampler in ("ddim", "euler", "euler_ancestral"):
        return solver_timesteps(steps, config.get("timestep_spacing", "leading"), config.get("steps_offset", 0), total)
    return solver_timesteps(steps, "trailing", 0, total)


def sampler_table(model: StableDiffusion, sampler: str, steps: int) -> samplers.Table:
    """The sampler's steps for this model. Raises ValueError as `timesteps` does."""
    grid = timesteps(model, sampler, steps)
    if sampler == "lcm":
        return samplers.consistency_table(grid, model.schedule)
    if sampler == "ddim":
        # Where a scheduler's config is silent this is diffusers' default for its class.
        to_one = model.scheduler.get("set_alpha_to_one", model.scheduler.get("_class_name") != "PNDMScheduler")
        return samplers.ddim_table(grid, model.schedule, to_one)
    if sampler in ("euler", "euler_ancestral"):
        return samplers.euler_table(grid, model.schedule, sampler == "euler_ancestral")
    return samplers.dpm_solver_pp_table(grid, model.schedule)


class Inpainting(NamedTuple):
    """What an inpainting model begins from; one for all pictures, or one for each: N is 1 or B."""

    image: jax.Array  # float32[N, H, W, 3] in -1..1
    mask: jax.Array  # float32[N, H, W, 1], 1 where to paint and 0 where to keep
    noise: jax.Array  # float32[N, h, w, c], for the autoencoder's draw


def masked_channels(model: StableDiffusion, params, inpainting: Inpainting) -> jax.Array:
    """What an inpainting UNet takes behind the latents, float32[N, h, w, 1 + c]: the mask at the first pixel
    of each, and the scaled latents of the picture with grey where it is to paint."""
    kept = inpainting.image * (1.0 - inpainting.mask)
    encoded = model.to_latents(model.encode(params["vae"], kept), inpainting.noise)
    return jnp.concatenate([inpainting.mask[:, :: model.downscale, :: model.downscale], encoded], axis=-1)


def sample_latents(
    model: StableDiffusion, params, token_ids, empty_ids, latents, noise, guidance_scale, time_ids=None,
    inpainting: Inpainting | None = None, *, sampler: str, table: samplers.Table,
) -> jax.Array:  # fmt: skip
    """Token ids to scaled latents: pure, and one `lax.scan`.

    params: "unet" and the text encoders; token_ids: int32[B, L]; empty_ids: int32[L], the empty prompt (SDXL: a row for
    each encoder, [B, 2, L] and [2, L], and time_ids float32[B, 6]); latents: float32[B, h, w, c], standard normal;
    noise: float32[n - 1 or more, B, h, w, c], which `lcm` and `euler_ancestral` use; guidance_scale: float32[] in
    diffusers' convention, w + 1, which goes in as an embedding where the UNet has that input, and else as guidance
    without a classifier, its two passes as one batch of 2B. inpainting: for a UNet that takes it, and params then has
    "vae" too. sampler: one of SAMPLERS. table: its steps, see `sampler_table`.
    """
    masked = None if inpainting is None else masked_channels(model, params, inpainting)

    def denoise(z, *rest):
        if masked is not None:
            # Twice as many where guidance makes pairs; one for all is repeated.
            z = jnp.concatenate([z, jnp.tile(masked, (len(z) // len(masked), 1, 1, 1))], axis=-1)
        return model.denoise(params["unet"], z, *rest)

    context = model.encode_prompt(params, token_ids, time_ids)
    weight = guidance_scale - 1.0
    if model.guidance_embedding_dim is not None:
        embedding = guidance_embedding(jnp.full(latents.shape[0], weight), model.guidance_embedding_dim)
        network = lambda z, t: denoise(z, t, context, embedding)  # noqa: E731
    else:
        empty = model.encode_prompt(params, jnp.broadcast_to(empty_ids, token_ids.shape), time_ids)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), context, empty)

        def network(z, t):
            output = denoise(jnp.concatenate([z, z]), jnp.concatenate([t, t]), both)
            cond, uncond = jnp.split(output, 2)
            return classifier_free(uncond, cond, weight)

    if sampler == "lcm":
        return samplers.sample_consistency(network, latents, table, noise, model.schedule)
    if sampler == "ddim":
        return samplers.sample_ddim(network, latents, table, model.schedule)
    if sampler in ("euler", "euler_ancestral"):
        if model.scheduler.get("timestep_spacing") == "trailing":  # diffusers then begins with sigma noise, and no x0
            latents = latents * alpha_sigma(model.schedule, table.timesteps[0])[1]
        noise = noise if sampler == "euler_ancestral" else None
        return samplers.sample_euler(network, latents, table, noise, model.schedule)
    return samplers.sample_dpm_solver_pp(network, latents, table, model.schedule)


def to_uint8(images: jax.Array) -> jax.Array:
    """float32[..., 3] in -1..1 -> uint8."""
    return jnp.round(jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def generate(
    model: StableDiffusion, params, token_ids, empty_ids, latents, noise, guidance_scale, time_ids=None,
    inpainting: Inpainting | None = None, *, sampler: str, table: samplers.Table,
) -> jax.Array:  # fmt: skip
    """As `sample_latents`, decoded: uint8[B, H, W, 3]. params has "vae" too."""
    z = sample_latents(
        model, params, token_ids, empty_ids, latents, noise, guidance_scale, time_ids, inpainting,
        sampler=sampler, table=table,
    )  # fmt: skip
    return to_uint8(model.decode(params["vae"], z))


def make_time_ids(
    count: int, size: tuple[int, int], original: tuple[int, int] | None = None, corner: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """SDXL's sizes, float32[count, 6]: original (height, width), the crop's (top, left), size (height, width)."""
    return np.tile(np.array([*(original or size), *corner, *size], np.float32), (count, 1))


def draw_noise(
    seed: int, count: int, steps: int, shape: tuple[int, int, int], first: int = 0
) -> tuple[jax.Array, jax.Array]:
    """(latents float32[count, h, w, c], noise float32[steps - 1, count, h, w, c]).

    Picture i's numbers depend on (seed, first + i) alone, so that it is the same in any batch.
    """

    def one(i):
        key = jax.random.fold_in(jax.random.key(seed), i)
        draws = jnp.stack([jax.random.normal(jax.random.fold_in(key, s), shape) for s in range(steps)])
        return draws[0], draws[1:]

    latents, noise = jax.vmap(one)(first + jnp.arange(count))
    return latents, jnp.moveaxis(noise, 1, 0)


def draw_image_noise(seed: int, shape: tuple[int, int, int]) -> jax.Array:
    """float32[1, h, w, c] for the autoencoder's draw of the picture to inpaint, by the seed alone."""
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)  # which no picture's number reaches in draw_noise
    return jax.random.normal(key, (1, *shape))


def to_pixels(picture: Image.Image, height: int, width: int, mode: str) -> np.ndarray:
    """A picture -> float32[1, height, width, bands of the mode] in 0..1, resized first, as diffusers does."""
    resized = picture.resize((width, height), Image.Resampling.LANCZOS).convert(mode)
    return np.asarray(resized, np.float32).reshape(1, height, width, len(resized.getbands())) / np.float32(255)


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
        self._empty = self.tokenize([""])[0]
        self._compiled: dict = {}  # (function, sampler, steps) -> jitted
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
                temporary, self.configs, self.params, self.folder / "tokenizer", self.configs["scheduler"],
                index=self.index, **how,
            )  # fmt: skip

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
        name = self.configs["scheduler"]["_class_name"]
        if name not in SAMPLERS:
            names = ", ".join(dict.fromkeys(SAMPLERS.values()))
            raise ValueError(f"scheduler {name} is not supported; choose the sampler: {names}")
        return SAMPLERS[name]

    def __call__(
        self, prompt: str | Sequence[str], num_inference_steps: int = 4, guidance_scale: float = 8.0, seed: int = 0,
        num_images_per_prompt: int = 1, height: int | None = None, width: int | None = None,
        latents: np.ndarray | None = None, output_type: str = "pil", sampler: str | None = None,
        original_size: tuple[int, int] | None = None, crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None, image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
    ) -> Output:  # fmt: skip
        """Pictures for one prompt or several, num_images_per_prompt of each, in that order.

        guidance_scale: in diffusers' convention, w + 1. latents: float32[N, h, w, c], standard normal, to begin from.
        output_type: pil, np or latent. sampler: one of SAMPLERS; by default that of the folder's scheduler. The next
        three are what SDXL is told of the picture, (height, width) or (top, left) in pixels; other models ignore them.
        image, mask_image: PIL pictures, which an inpainting model needs and no other takes: what is there, and white
        where to paint. They are resized to height and width. All is decoded anew, what is kept too.
        Raises ValueError that names the argument, its value and what is allowed.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        sampler = sampler or self.sampler
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompt is {prompt!r}; give a text or a list of at least one text")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; give 1 or more")
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type is {output_type!r}; choose pil, np or latent")
        if sampler not in SAMPLERS.values():
            raise ValueError(f"sampler is {sampler!r}; choose {', '.join(dict.fromkeys(SAMPLERS.values()))}")
        for name, picture in (("image", image), ("mask_image", mask_image)):
            if self.model.inpaints and not isinstance(picture, Image.Image):
                raise ValueError(f"{name} is {type(picture).__name__}; this model inpaints: give it a PIL picture")
            if not self.model.inpaints and picture is not None:
                raise ValueError(f"{name} is given, but this model does not inpaint: leave it out")
        if sampler != "lcm" and self.model.guidance_embedding_dim is not None:
            raise ValueError(f"sampler is {sampler!r}, but this model is an LCM; use sampler='lcm' or its teacher")
        timesteps(self.model, sampler, num_inference_steps)  # raises on a number that the grid does not hold
        if not 1 <= guidance_scale < np.inf:
            raise ValueError(f"guidance_scale is {guidance_scale}; give 1 (no guidance) or more, such as 8")
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed is {seed}; give a number from 0 to {2**31 - 1}")

        scale = self.model.downscale
        size = self.configs["unet"].get("sample_size") or 64
        rows, columns = size if isinstance(size, list | tuple) else (size, size)
        height = rows * scale if height is None else height
        width = columns * scale if width is None else width
        if height % scale or width % scale or min(height, width) < scale:
            raise ValueError(f"height and width are {height} and {width}; give multiples of {scale}")
        count = len(prompts) * num_images_per_prompt
        shape = (height // scale, width // scale, self.configs["vae"].get("latent_channels", 4))
        random = sampler in RANDOM_SAMPLERS
        drawn, noise = draw_noise(seed, count, num_inference_steps if random else 1, shape)
        if latents is not None and np.shape(latents) != drawn.shape:
            raise ValueError(f"latents have shape {np.shape(latents)}; give {drawn.shape} (NHWC)")
        drawn = drawn if latents is None else jnp.asarray(latents, jnp.float32)

        tokenizer = self.tokenizers[0]
        for i in tokenizers.overlong(tokenizer, prompts):
            limit = tokenizer.model_max_length
            lost = tokenizer.decode(tokenizer(prompts[i], verbose=False)["input_ids"][limit - 1 : -1])
            warnings.warn(f"prompt {i} is longer than {limit} tokens and was cut; lost: {lost!r}", stacklevel=2)
        token_ids = np.repeat(self.tokenize(prompts), num_images_per_prompt, axis=0)
        time_ids = None
        if self.model.text_encoder_2 is not None:
            size = target_size or (height, width)
            time_ids = make_time_ids(count, size, original_size or (height, width), crops_coords_top_left)
        inpainting = None
        if self.model.inpaints:
            pixels = to_pixels(image.convert("RGB"), height, width, "RGB")
            mask = to_pixels(mask_image, height, width, "L")
            inpainting = Inpainting(pixels * 2 - 1, np.float32(mask >= 0.5), draw_image_noise(seed, shape))
        run = self._jitted(sample_latents if output_type == "latent" else generate, sampler, num_inference_steps)
        result = np.asarray(
            run(self.params, token_ids, self._empty, drawn, noise, jnp.float32(guidance_scale), time_ids, inpainting)
        )
        if output_type == "latent":
            return Output(result)
        if output_type == "np":
            return Output(result.astype(np.float32) / 255.0)
        return Output([Image.fromarray(picture) for picture in result])

    def _jitted(self, function, sampler: str, steps: int):
        """`function` of this model under one jit for each sampler and number of steps."""
        key = (function, sampler, steps)
        if key not in self._compiled:
            table = sampler_table(self.model, sampler, steps)
            self._compiled[key] = jax.jit(partial(function, self.model, sampler=sampler, table=table))
        return self._compiled[key]
