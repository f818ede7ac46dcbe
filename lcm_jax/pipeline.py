"""Images from prompts, for people: `Pipeline.from_pretrained("shapes-lcm")("a red circle").images[0]`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from PIL import Image

from lcm_jax.compiler import enable_cache
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.data.prompts import encode_prompts, split_batches
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.samplers.table import Table
from lcm_jax.models.quantized import QUANTIZED_DTYPES, compute_dtype
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling import arguments
from lcm_jax.sampling.adapters import Adapter, KernelPath, adapt, put_updates, sums
from lcm_jax.sampling.callbacks import StepCallback, diffusers_callback
from lcm_jax.sampling.export import write_export
from lcm_jax.sampling.finite import CONTROLNET, check_finite
from lcm_jax.sampling.generate import default_sampler, is_classifier_free, sampler_table
from lcm_jax.sampling.inputs import Inputs, draw_noise
from lcm_jax.sampling.output import Output, make_output
from lcm_jax.sampling.parameters import Originals, put_on, read_cast, read_quantized
from lcm_jax.sampling.programs import Programs, latent_shape
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import lora as loras
from lcm_jax.weights import trees
from lcm_jax.weights.controlnet import place_controlnet
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import StoredModel, check_complete, check_params, open_model, replace_vae
from lcm_jax.weights.preset import Preset, default_preset

ControlNets = str | Path | StoredModel | Sequence[str | Path | StoredModel]
DTYPES = ("float32", "bfloat16", "float16")


class Pipeline:
    """A text-to-image model on the device.

    params: by network, in the dtypes that the networks compute in, with the loaded LoRAs.
    """

    def __init__(
        self,
        stored: StoredModel,
        dtype: str = "float32",
        *,
        mesh: Mesh | None = None,
        vae: StoredModel | str | Path | None = None,
        controlnet: ControlNets = (),
    ):
        """Read the parameters of `stored` onto the device, one array at a time.

        dtype: float32, bfloat16, float16, or int8 or fp8 for quantized kernels and products, which need the extra
        `quantized`; the rest is then computed in float32 on a CPU and in bfloat16 elsewhere, ControlNets and the
        autoencoder included, see `lcm_jax.models.quantized`.
        vae: another autoencoder than the model's own, see `from_pretrained`. mesh: devices that share each batch, such
        as jax.make_mesh((8,), ("data",)); each holds all parameters. controlnet: one or several, each a folder, hub id
        or file, or what `lcm_jax.weights.controlnet.open_controlnet` returns. Raises ModelError if a network or the
        tokenizer is missing, or they do not fit the configs.
        """
        enable_cache()
        if dtype not in (*DTYPES, *QUANTIZED_DTYPES):
            raise ValueError(f"dtype is {dtype!r}; choose {', '.join((*DTYPES, *QUANTIZED_DTYPES))}")
        if vae is not None:
            stored = replace_vae(stored, vae if isinstance(vae, StoredModel) else open_model(vae))
        self.tokenizer_folder = check_complete(stored)
        self.name, self.family = stored.name, stored.family
        self.configs, self.index, self._model_preset = stored.configs, stored.index, stored.preset
        self.dtype = dtype
        self.model = StableDiffusion.from_configs(self.configs, compute_dtype(dtype))
        check_params(stored, self.model.abstract_params())
        try:
            self.tokenizers = tokenizers.open_tokenizers(self.tokenizer_folder, stored.configs)
        except ValueError as error:
            raise ModelError(f"{self.name}: {error}") from error
        # jax.make_mesh makes explicit axes by default, under which operations ask for the sharding of their results.
        self.mesh = mesh and Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        put = put_on(self.mesh and NamedSharding(self.mesh, PartitionSpec()))
        read = partial(read_quantized, dtype=dtype) if dtype in QUANTIZED_DTYPES else read_cast
        self.params = read(stored, self.model, put)
        self._originals = Originals(stored, self.params)
        names = [controlnet] if isinstance(controlnet, str | Path | StoredModel) else controlnet
        placed = [place_controlnet(each, self.model, self.configs["unet"], put) for each in names]
        self.controlnets = tuple(name for name, _, _ in placed)
        self._controlnet_params = tuple(params for _, _, params in placed)
        self.model = replace(self.model, controlnets=tuple(network for _, network, _ in placed))
        self._programs = Programs(self.model, self.mesh)
        self._on_step = StepCallback()
        self._adapters: dict[str, tuple[Adapter, float]] = {}
        self._bases: dict[KernelPath, jax.Array] = {}  # of every parameter that an adapter changes
        self._adapter_presets: dict[str, Preset] = {}  # of those loaded LoRAs that have one
        self._tile: int | None = None  # side of the autoencoder's tiles in pixels

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
        vae: StoredModel | str | Path | None = None,
        controlnet: ControlNets = (),
    ) -> "Pipeline":
        """Open a model in any format: a folder in diffusers layout, a hub id, a bundled name, a file, a run.

        dtype: what the networks compute in, see `Pipeline`. mesh, controlnet: see `Pipeline`. variant, base, ema: see
        `lcm_jax.weights.model.open_model`, which has more options: `Pipeline(open_model(...))` is the same. A single
        file has no tokenizer and needs `base`. vae: an autoencoder in place of the model's own, in any of these
        formats, such as the tiny TAESD or the SDXL one for float16; or a model that has one. Raises ModelError.
        """
        stored = open_model(path, base=base, ema=ema, variant=variant)
        return cls(stored, dtype, mesh=mesh, vae=vae, controlnet=controlnet)

    def save_pretrained(self, path: str | Path, overwrite: bool = False, **save_options: Any) -> None:
        """Write the model to the folder `path` in diffusers layout, whole or not at all; tensors stay bit-exact.

        If LoRAs are loaded, the written parameters and the preset include them; ControlNets are not written, and
        parameters are never written quantized.
        save_options: dtype, variant, max_shard_bytes. Raises ModelError if `path` has content and overwrite is False.
        """
        with folders.new_folder(Path(path), overwrite) as temporary:
            folders.write_pipeline(
                temporary,
                self.configs,
                self._exact_params(),
                self.tokenizer_folder,
                self.configs["scheduler"],
                index=self.index,
                preset=self._stored_preset,
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
        add up, each at its weight. If it has a preset, as an LCM-LoRA has, that is the pipeline's while the LoRA is
        loaded at another weight than 0. No program that generates images is compiled again. Raises ModelError for a
        name that is taken, and for a LoRA of another model; then nothing has changed.
        """
        file = loras.find_file(path)
        name = loras.short_name(file) if name is None else name
        if name in self._adapters:
            raise ModelError(
                f"a LoRA named {name!r} is loaded already; give this one another name, or use set_lora_weight"
            )
        base = {component: trees.from_params(params).specs for component, params in self.params.items()}
        lora = loras.open_lora(file, base, self.family)
        self._adapt(self._adapters | {name: (put_updates(lora.updates, self.params), weight)})
        if lora.preset is not None:
            self._adapter_presets[name] = lora.preset
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
        self.params, self._bases = adapt(self.params, self._bases, adapters, self._originals)
        self._adapters = dict(adapters)
        self._adapter_presets = {name: each for name, each in self._adapter_presets.items() if name in adapters}

    def _exact_params(self) -> dict[str, Any]:
        """Return the parameters with their LoRAs in the stored dtypes, each made when it is used."""
        return self._originals.exact(self.params, sums(self._bases, self._adapters, self._originals))

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Return token ids int32[B, L], or int32[B, 2, L] for SDXL, as in training: longer prompts are cut."""
        return tokenizers.encode_for(self.tokenizers, prompts)

    @property
    def _stored_preset(self) -> Preset | None:
        """The preset of the LoRA that was loaded last, of those that have one and act, else the model's own."""
        active = (self._adapter_presets.get(name) for name, weight in self.lora_weights.items() if weight)
        return next(reversed([preset for preset in active if preset is not None]), self._model_preset)

    @property
    def preset(self) -> Preset:
        """The defaults of a call: sampler, steps, guidance scale, and the range of guidance scales of the distillation.

        Those of the LoRA that was loaded last, of those that have some, else those stored with the model, else those
        of its kind.
        """
        return self._stored_preset or default_preset(self.configs)

    @property
    def sampler(self) -> str:
        """Name in SAMPLERS of the default sampler. Raises ValueError if no sampler is of the scheduler's class."""
        return self.preset.sampler or default_sampler(self.model)

    def enable_vae_tiling(self, tile_sample_min_size: int | None = None) -> None:
        """Decode and encode images that are larger than a tile in tiles, so that memory does not grow with the image.

        tile_sample_min_size: side of a tile in pixels, by default the autoencoder's sample_size. Tiles are those of
        diffusers; the image differs a little. Raises ValueError for a size or an autoencoder that has no tiles.
        """
        self._tile = self.model.tile_size(tile_sample_min_size)

    def disable_vae_tiling(self) -> None:
        """Decode and encode images in one piece again."""
        self._tile = None

    def export(
        self,
        path: str | Path,
        batch_size: int = 1,
        size: int | tuple[int, int] | None = None,
        steps: int | None = None,
        *,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        platforms: Sequence[str] | None = None,
    ) -> None:
        """Write text-to-image as StableHLO to the folder `path`, which runs without this package: python path/run.py.

        The folder also has the parameters, with loaded LoRAs, as safetensors, the tokenizers, and export.json, which
        describes the programs' inputs. On the same device it gives the images that a call gives for the same seed.

        size: a side or (height, width) in pixels, by default the model's. steps, sampler, guidance_scale: by default
        those of `preset`; run.py takes another guidance scale too, but no negative prompts if it is 1 here.
        platforms: cpu, cuda, rocm, tpu; by default the one that this process runs on. Raises ValueError for an argument
        that is not supported, and ModelError if `path` exists, the model inpaints or is quantized, or there are
        ControlNets.
        """
        self._check_text_to_image("export")
        if self.dtype in QUANTIZED_DTYPES:
            raise ModelError(f"export does not support dtype {self.dtype}; open the model in {' or '.join(DTYPES[:2])}")
        preset = self.preset
        scale = arguments.guidance(preset.guidance_scale if guidance_scale is None else guidance_scale)
        sampler = arguments.sampler(self.model, sampler or self.sampler, tuple(SAMPLERS))
        steps = arguments.integer("steps", preset.num_inference_steps if steps is None else steps)
        height, width = (size, size) if size is None or isinstance(size, int) else arguments.pair("size", size)
        write_export(
            Path(path),
            self.model,
            self._exact_params(),
            self.tokenizers,
            sampler_table(self.model, sampler, steps),
            sampler,
            batch_size=arguments.integer("batch_size", batch_size, 1),
            size=arguments.size(self.model, height, width, arguments.default_size(self.model)),
            guidance_scale=scale,
            guided=is_classifier_free(self.model, scale),
            tile=self._tile,
            platforms=(jax.default_backend(),) if platforms is None else platforms,
        )

    def compile(
        self,
        batch_sizes: Sequence[int] = (1,),
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        negative_prompt: bool = False,
    ) -> None:
        """Compile text-to-image ahead of time, so that the first call with such arguments compiles nothing.

        batch_sizes: numbers of images computed at once. sizes: (height, width) in pixels, by default the model's. The
        programs serve any number of steps, and all guidance scales above 1, or 1 if `guidance_scale` is 1. sampler,
        guidance_scale: by default those of `preset`. negative_prompt: True for calls that set it. Prints a line for
        each program. Raises ValueError for an argument that is not supported, and ModelError as `export` does.
        """
        self._check_text_to_image("compile")
        scale = arguments.guidance(self.preset.guidance_scale if guidance_scale is None else guidance_scale)
        sampler = arguments.sampler(self.model, sampler or self.sampler, tuple(SAMPLERS))
        own, ids = arguments.default_size(self.model), lambda batch: encode_prompts(self.tokenizers, [""] * batch).ids
        pairs = [(None, None)] if sizes is None else [arguments.pair("size", each) for each in sizes]
        pixels = [arguments.size(self.model, *each, own) for each in pairs]
        batches = [arguments.integer("batch_size", each, 1) for each in batch_sizes]
        program = self._programs.of(sampler, zero_empty=not negative_prompt, tile=self._tile)
        table = sampler_table(self.model, sampler, 1)
        self._programs.compile(program, self.params, ids, table, batches, pixels, scale)

    def _check_text_to_image(self, method: str) -> None:
        if self.model.inpaints:
            raise ModelError(f"{self.name} is an inpainting model, which {method} does not support; use its base model")
        if self.controlnets:
            raise ModelError(f"{method} does not support ControlNets ({', '.join(self.controlnets)}); omit controlnet")

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
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
        prompt_weights: bool = False,
        callback_on_step_end: Callable[["Pipeline", int, float, dict[str, np.ndarray]], Any] | None = None,
        progress: bool | None = None,
        control_image: Image.Image | Sequence[Image.Image] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
    ) -> Output:
        """Generate num_images_per_prompt images of each prompt, in that order.

        Image i starts from noise that depends on (seed, first + i) alone, whatever the batch. Another number of steps
        compiles nothing. A prompt longer than the text encoder takes is encoded in chunks, at most 16, and compiles a
        program for each number of chunks. prompt_weights: read weights and BREAK in prompts as A1111 does, `(word:1.3)`
        (see `lcm_jax.data.prompts.parse`); by default brackets are text. Raises ValueError with the argument, its
        value and the allowed ones, and ModelError for NaN.

        num_inference_steps, guidance_scale, sampler: by default those of `preset`. guidance_scale: in diffusers'
        convention, w + 1; it warns outside the range that the model was distilled for. sampler: a name in SAMPLERS.
        latents: float32[N, h, w, c], standard normal, to start from. output_type: pil, np or latent.
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
        batch = self._programs.round_up(count if batch_size is None else arguments.integer("batch_size", batch_size, 1))
        first = arguments.integer("first", first, 0, 2**31 - 1)
        seed = arguments.integer("seed", seed, 0, 2**31 - 1)
        preset = self.preset
        scale = arguments.guidance(preset.guidance_scale if guidance_scale is None else guidance_scale)
        arguments.choice("output_type", output_type, ("pil", "np", "latent"))
        sampler = arguments.sampler(self.model, sampler or self.sampler, tuple(SAMPLERS))
        strength = arguments.strength(strength, image, mask_image)
        steps = preset.num_inference_steps if num_inference_steps is None else num_inference_steps
        steps = arguments.integer("num_inference_steps", steps)
        table = sampler_table(self.model, sampler, steps, strength, eta)
        skip = 0 if clip_skip is None else arguments.integer("clip_skip", clip_skip, 0, self.model.max_clip_skip)
        size = arguments.size(
            self.model, height, width, arguments.default_size(self.model, image, mask_image, control_image)
        )
        shape = latent_shape(self.model, size)
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
            np.asarray(table.timesteps[table.timesteps >= 0]),
            images,
        )
        if images.source is not None and (strength < 1 or mask_image is None):
            table = table.from_image()
        arguments.warn_of_no_effect(self.model, negative_prompt, scale)
        arguments.warn_of_guidance(scale, preset.guidance_range)

        guided = is_classifier_free(self.model, scale)
        texts = [np.repeat(each, copies) for each in ([prompts, negatives] if guided else [prompts])]
        tokens = encode_prompts(self.tokenizers, np.concatenate(texts).tolist(), prompt_weights)
        batches = list(split_batches(tokens.chunks.reshape(len(texts), count).max(axis=0), batch))
        rows_made = int(np.sum(table.timesteps >= 0))
        function = callback_on_step_end and diffusers_callback(self, callback_on_step_end)
        with self._on_step.each_step(function, progress, rows_made, len(batches)) as callback:
            program = self._programs.of(
                sampler,
                clip_skip=skip,
                zero_empty=negative_prompt is None,
                decode=output_type != "latent",
                callback=callback,
                tile=self._tile,
            )
            made: dict[int, np.ndarray] = {}
            for rows, places, chunks in batches:
                ids, weights = tokens.of(rows, chunks)
                negative_ids, negative_weights = tokens.of(rows + count, chunks) if guided else (None, None)
                drawn, noise = draw_noise(seed, np.uint32(first + rows), shape)
                inputs = Inputs(
                    ids,
                    negative_ids,
                    drawn if latents is None else jnp.asarray(latents[rows]),
                    noise,
                    np.float32(scale),
                    time_ids,
                    images.inpainting,
                    images.source,
                    control,
                    token_weights=weights,
                    negative_weights=negative_weights,
                )
                made |= zip(rows[places].tolist(), self._run(program, inputs, table)[places], strict=True)
        output = make_output(np.stack([made[i] for i in range(count)]), output_type)
        return output if images.paste is None else Output(images.paste(output.images))

    def _run(self, program, inputs: Inputs, table: Table) -> np.ndarray:
        params = self.params | ({"controlnets": self._controlnet_params} if self.controlnets else {})
        images, finite = self._programs.run(program, params, inputs, table)
        nets = {f"{CONTROLNET}{name}": params["controlnets"][i] for i, name in enumerate(self.controlnets)}
        check_finite(finite, self.params | nets, self.model.unet.dtype, self.name)
        return images
