"""Images from prompts, for people: `Pipeline.from_pretrained("shapes-lcm")("a red circle").images[0]`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.samplers.table import Table
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling import arguments
from lcm_jax.sampling.adapters import Adapter, KernelPath, adapt, put_updates
from lcm_jax.sampling.callbacks import PROGRESS_STEPS, StepCallback, diffusers_callback, progress_bar, shows_progress
from lcm_jax.sampling.finite import CONTROLNET, check_finite
from lcm_jax.sampling.generate import default_sampler, generate, is_classifier_free, sampler_table
from lcm_jax.sampling.inputs import Inputs, draw_noise
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import lora as loras
from lcm_jax.weights import trees
from lcm_jax.weights.controlnet import place_controlnet
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import StoredModel, check_complete, check_params, open_model, read_params

ControlNets = str | Path | StoredModel | Sequence[str | Path | StoredModel]
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Output:
    """images: a list of PIL images, float32[N, H, W, 3] in [0, 1] (`np`), or latents float32[N, h, w, c]."""

    images: Any


class Pipeline:
    """A text-to-image model on the device. Its parameters keep their stored dtypes and are cast when they are used."""

    def __init__(
        self, stored: StoredModel, dtype: str = "float32", *, mesh: Mesh | None = None, controlnet: ControlNets = ()
    ):
        """Read the parameters of `stored` onto the device, one array at a time; dtype: of the computation.

        mesh: devices that share each batch, such as jax.make_mesh((8,), ("data",)); each holds all parameters.
        controlnet: one or several, each a folder, hub id or file, or what `lcm_jax.weights.controlnet.open_controlnet`
        returns. Raises ModelError if a network or the tokenizer is missing, or they do not fit the configs.
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
        self.mesh = mesh
        put = partial(jnp.array, copy=True) if mesh is None else partial(jax.device_put, device=self._replicated)
        self.params = {name: read_params(stored, name, abstract[name], put=put) for name in self.model.networks}
        names = [controlnet] if isinstance(controlnet, str | Path | StoredModel) else controlnet
        placed = [place_controlnet(each, self.model, self.configs["unet"], put) for each in names]
        self.controlnets = tuple(name for name, _, _ in placed)
        self._controlnet_params = tuple(params for _, _, params in placed)
        self.model = replace(self.model, controlnets=tuple(network for _, network, _ in placed))
        self._compiled: dict = {}  # (sampler, options) -> jitted
        self._on_step = StepCallback()
        self._adapters: dict[str, tuple[Adapter, float]] = {}
        self._originals: dict[KernelPath, jax.Array] = {}  # by path, of every parameter that an adapter changes

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str = "float32",
        variant: str | None = None,
        *,
        base: str | Path | None = None,
        ema: bool | None = None,
        mesh: Mesh | None = None,
        controlnet: ControlNets = (),
    ) -> "Pipeline":
        """Open a model in any format: a folder in diffusers layout, a hub id, a bundled name, a file, a run.

        dtype: what the networks compute in. mesh, controlnet: see `Pipeline`. variant, base, ema: see
        `lcm_jax.weights.model.open_model`, which has more options: `Pipeline(open_model(...))` is the same. A single
        file has no tokenizer and needs `base`. Raises ModelError.
        """
        return cls(open_model(path, base=base, ema=ema, variant=variant), dtype, mesh=mesh, controlnet=controlnet)

    def save_pretrained(self, path: str | Path, overwrite: bool = False, **save_options: Any) -> None:
        """Write the model to the folder `path` in diffusers layout, whole or not at all; tensors stay bit-exact.

        If LoRAs are loaded, the written parameters include them; ControlNets are not written. save_options: dtype,
        variant, max_shard_bytes. Raises ModelError if `path` has content and overwrite is False.
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
    def _replicated(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec())

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
        self._adapt(self._adapters | {name: (put_updates(updates, self.params), weight)})
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

    def _adapter(self, name: str) -> Adapter:
        if name not in self._adapters:
            loaded = f"loaded are {', '.join(self._adapters)}" if self._adapters else "none is loaded"
            raise ModelError(f"there is no LoRA named {name!r}: {loaded}")
        return self._adapters[name][0]

    def _adapt(self, adapters: Mapping[str, tuple[Adapter, float]]) -> None:
        """Set the parameters to those that were read, plus every adapter at its weight."""
        self.params, self._originals = adapt(self.params, self._originals, adapters)
        self._adapters = dict(adapters)

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
        *,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        eta: float | None = None,
        callback_on_step_end: Callable[["Pipeline", int, float, dict[str, np.ndarray]], Any] | None = None,
        progress: bool | None = None,
        control_image: Image.Image | Sequence[Image.Image] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
    ) -> Output:
        """Generate num_images_per_prompt images of each prompt, in that order.

        Image i starts from noise that depends on (seed, first + i) alone, whatever the batch. Another number of steps
        compiles nothing. Raises ValueError with the argument, its value and the allowed ones, and ModelError for NaN.

        guidance_scale: in diffusers' convention, w + 1. latents: float32[N, h, w, c], standard normal, to start from.
        output_type: pil, np or latent. sampler: a name in SAMPLERS; by default that of the folder's scheduler.
        original_size, crops_coords_top_left, target_size: pixels, (height, width) or (top, left), inputs of SDXL; other
        models ignore them. negative_prompt: what to guide away from, one or one for each prompt; without effect it
        warns. clip_skip: last layers of the text encoder to leave out, as in diffusers. batch_size: images computed at
        once, by default all; the last batch is filled up. eta: noise that ddim (default 0) and tcd (0.3) add, 0 to 1.

        image: PIL image to change, whose size is the default of height and width, rounded down; strength is the share
        of the noise that it gets (default 0.8) and of the steps that are made. mask_image: PIL image that is white
        where image is to be repainted (default strength 1). Inpainting models require both and see them; with other
        models the rest is kept by blending latents. Both are resized to height and width, and all pixels are decoded
        anew, unless padding_mask_crop is set: then the surroundings of the mask, with this margin in pixels, are
        generated at height x width, and are pasted into image where mask_image is white.

        control_image: PIL image for the ControlNet, or a list of one for each, resized to height and width, whose
        default is its size rounded down. controlnet_conditioning_scale: factor of what it adds; 0 turns it off.
        control_guidance_start, control_guidance_end: the share of the steps from and until which it acts. The last
        three are one number, or one for each ControlNet; no change of them compiles anything.

        callback_on_step_end(pipe, i, t, {"latents": float32[B, h, w, c]}): called after each step, for each batch; it
        may return other latents in a dict. progress: show a bar of steps on stderr; by default from 10 steps on.
        """
        prompts = arguments.prompts("prompt", prompt)
        negatives = arguments.negative_prompts(negative_prompt, len(prompts))
        copies = arguments.integer("num_images_per_prompt", num_images_per_prompt, 1)
        count = len(prompts) * copies
        batch = self._round_up(count if batch_size is None else arguments.integer("batch_size", batch_size, 1))
        first = arguments.integer("first", first, 0, 2**31 - 1)
        seed = arguments.integer("seed", seed, 0, 2**31 - 1)
        scale = arguments.guidance(guidance_scale)
        arguments.choice("output_type", output_type, ("pil", "np", "latent"))
        sampler = arguments.sampler(self.model, sampler or self.sampler, tuple(SAMPLERS))
        strength = arguments.strength(strength, image, mask_image)
        steps = arguments.integer("num_inference_steps", num_inference_steps)
        table = sampler_table(self.model, sampler, steps, strength, eta)
        skip = 0 if clip_skip is None else arguments.integer("clip_skip", clip_skip, 0, self.model.max_clip_skip)
        size = arguments.size(self.model, height, width, self._default_size(image, mask_image, control_image))
        shape = (*(side // self.model.downscale for side in size), self.model.vae.config["latent_channels"])
        latents = arguments.latents(latents, (count, *shape))
        time_ids = arguments.time_ids(self.model, batch, size, original_size, crops_coords_top_left, target_size)
        images = arguments.images(
            self.model, image, mask_image, padding_mask_crop, size, strength, seed, output_type=output_type
        )
        control = arguments.controls(
            self.controlnets,
            control_image,
            controlnet_conditioning_scale,
            control_guidance_start,
            control_guidance_end,
            size,
            table.timesteps[table.timesteps >= 0],
            images,
        )
        if images.source is not None and (strength < 1 or mask_image is None):
            table = table.from_image()
        arguments.warn_of_no_effect(self.model, negative_prompt, scale)
        for name, each in (("prompt", prompts), ("negative_prompt", negatives)):
            arguments.warn_of_overlong(name, each, self.tokenizers[0])

        ids, negative_ids = (np.repeat(self.tokenize(each), copies, axis=0) for each in (prompts, negatives))
        if not is_classifier_free(self.model, scale):
            negative_ids = None
        rows_made = int(np.sum(table.timesteps >= 0))
        with self._each_step(callback_on_step_end, progress, rows_made, -(-count // batch)) as callback:
            program = self._program(
                sampler,
                clip_skip=skip,
                zero_empty=negative_prompt is None,
                decode=output_type != "latent",
                callback=callback,
            )
            parts = []
            for start in range(0, count, batch):
                rows = np.minimum(start + np.arange(batch), count - 1)
                drawn, noise = draw_noise(seed, np.uint32(first + rows), shape)
                drawn = drawn if latents is None else jnp.asarray(latents[rows])
                negative = None if negative_ids is None else negative_ids[rows]
                inputs = Inputs(
                    ids[rows],
                    negative,
                    drawn,
                    noise,
                    np.float32(scale),
                    time_ids,
                    images.inpainting,
                    images.source,
                    control,
                )
                parts.append(self._run(program, inputs, table)[: count - start])
        output = _output(np.concatenate(parts), output_type)
        return output if images.paste is None else Output(images.paste(output.images))

    def _default_size(self, image: Any, mask_image: Any, control_image: Any) -> Any:
        """Return the size in latents: of the image for image-to-image, of a control image, else the model's own."""
        if image is None or mask_image is not None or self.model.inpaints:
            image = control_image[0] if isinstance(control_image, Sequence) and control_image else control_image
        if isinstance(image, Image.Image):
            return image.height // self.model.downscale, image.width // self.model.downscale
        return self.configs["unet"].get("sample_size") or 64

    def _round_up(self, batch: int) -> int:
        """Return the batch that the devices of the mesh share equally."""
        devices = 1 if self.mesh is None else self.mesh.size
        return -(-batch // devices) * devices

    @contextmanager
    def _each_step(self, function, progress: bool | None, steps: int, batches: int) -> Iterator[StepCallback | None]:
        """Yield what a program calls after each step, or None: the callback of a call, and a progress bar."""
        if progress is None:
            progress = steps >= PROGRESS_STEPS and shows_progress()
        if function is None and not progress:
            yield None
            return
        called = (lambda i, t, z: z) if function is None else diffusers_callback(self, function)
        with progress_bar(steps * batches, progress) as advance:

            def each(i: int, t: float, z: np.ndarray) -> np.ndarray:
                z = called(i, t, z)
                advance()
                return z

            with self._on_step.calling(each):
                yield self._on_step

    def _program(self, sampler: str, **options: Any):
        """Return `generate` of this model, jitted once for each sampler and each set of options."""
        key = (sampler, *options.values())
        if key not in self._compiled:
            self._compiled[key] = jax.jit(partial(generate, self.model, sampler=sampler, **options))
        return self._compiled[key]

    def _run(self, program, inputs: Inputs, table: Table) -> np.ndarray:
        if self.mesh is not None:
            split, whole = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)), self._replicated
            batch = len(inputs.token_ids)
            place = lambda leaf: split if np.ndim(leaf) and len(leaf) == batch else whole  # noqa: E731
            inputs, table = jax.device_put((inputs, table), (jax.tree.map(place, inputs), whole))
        params = self.params | ({"controlnets": self._controlnet_params} if self.controlnets else {})
        # Waited for before the copy, which aborts the process instead of raising an error if memory has run out.
        images, finite = jax.device_get(jax.block_until_ready(program(params, inputs, table=table)))
        named = zip(self.controlnets, self._controlnet_params, strict=True)
        check_finite(
            finite,
            self.params | {f"{CONTROLNET}{name}": each for name, each in named},
            self.model.unet.dtype,
            self.name,
        )
        return images

    def __getstate__(self) -> dict:
        """Return the state without compiled programs, which cannot be pickled; a call compiles them again."""
        return self.__dict__ | {"_compiled": {}}


def _output(images: np.ndarray, output_type: str) -> Output:
    if output_type == "pil":
        return Output([Image.fromarray(each) for each in images])
    return Output(images.astype(np.float32) / 255.0 if output_type == "np" else images)
