"""The latent cache of a run: the networks that make it, what its values depend on, and its folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm_jax.compiler import compiler_options
from lcm_jax.data import loader
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.data.captioned import CaptionedDataset
from lcm_jax.data.encoding import SHARD_SIZE, Encoder, Plan, write_cache
from lcm_jax.data.latents import FORMAT, LatentCache, open_cache
from lcm_jax.data.prepared import PreparedImages
from lcm_jax.diffusion.pixels import to_float
from lcm_jax.errors import phase
from lcm_jax.models.stable_diffusion import ENCODERS, StableDiffusion
from lcm_jax.recipes.models import encode_prompts
from lcm_jax.training import distributed
from lcm_jax.training.state import Params

STORED = jnp.bfloat16  # of moments and encoded prompts on disk


@dataclass(frozen=True)
class RunCache:
    """The latent cache of a run, in `folder`.

    model: with the encoders. load(name): the parameters of one of its networks, on the host. digests(): of its weights,
    by network. dataset: opens the data at the first call. tokenizers(): of the text encoders. prompts: True to encode
    prompts as well, for text encoders that are frozen; their tokens are in any cache. batch_size: of the run, which
    needs as many records.
    """

    folder: Path
    model: StableDiffusion
    load: Callable[[str], Params]
    digests: Callable[[], Mapping[str, str]]
    dataset: Callable[[], CaptionedDataset]
    tokenizers: Callable[[], list]
    prompts: bool
    batch_size: int

    @property
    def networks(self) -> list[str]:
        """Names of the networks that encode."""
        return ["vae", *(name for name in self.model.networks if self.prompts and name in ENCODERS)]

    @cached_property
    def fields(self) -> dict[str, str]:
        """Everything that the values depend on, by name: a cache with another field is refused."""
        digests = self.digests()
        return {
            **{f"data.{name}": value for name, value in self.dataset().manifest.items()},
            **{name: digests[name] for name in self.networks},
            "tokenizer": tokenizers.digest(self.tokenizers()),
            "dtype": jnp.dtype(STORED).name,
            "format": FORMAT,
        }

    def write(self, shard_size: int = SHARD_SIZE) -> None:
        """Complete the cache; every process calls it, and encodes its part.

        Raises ValueError as `encoding.write_cache` does, and for fewer records than a batch has; RunError for too
        little memory and a full disk.
        """
        memory = "use a device with more memory, or set --config.data.encode=step, so that each step encodes its images"
        with phase("encoding images", memory=memory, kept="complete shards are kept; run the same command to resume"):
            with distributed.main_first("index"):
                dataset = self.dataset()
            records = dataset.strict
            named = {"name": dataset.train.name} if isinstance(dataset.train, PreparedImages) else {}
            loader.check_length(len(records), self.batch_size)
            devices = np.array(jax.local_devices())
            if devices[0].platform == "cpu":  # several of them share its cores
                devices = devices[:1]
            plan = Plan(
                records,
                lambda: self._make_encoder(devices),
                partial(tokenizers.encode_for, self.tokenizers()),
                self.fields,
                jnp.dtype(self.model.dtype_of("vae")).name,
                len(devices),
                **named,
            )
            number, count = jax.process_index(), jax.process_count()
            write_cache(
                self.folder, plan, shard_size=shard_size, process=number, processes=count, wait=distributed.wait_for_all
            )

    def open(self) -> LatentCache:
        """Open the complete cache. Raises ValueError as `open_cache` does."""
        return open_cache(self.folder, self.fields)

    def image_sizes(self, cache: LatentCache) -> list[tuple[int, int]]:
        """Return (height, width) in pixels of each bucket of a cache."""
        return [(height * self.model.downscale, width * self.model.downscale) for height, width in cache.shapes]

    def _make_encoder(self, devices: np.ndarray) -> Encoder:
        mesh = Mesh(devices, ("data",))
        whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        params = jax.device_put({name: self.load(name) for name in self.networks}, whole)

        def encode(params: Params, images: jax.Array, token_ids: jax.Array) -> dict[str, jax.Array]:
            arrays = {"moments": self.model.encode(params["vae"], to_float(images))}
            if self.prompts:
                arrays |= encode_prompts(self.model, params, token_ids)
            return {name: array.astype(STORED) for name, array in arrays.items()}

        program = jax.jit(
            encode, in_shardings=(whole, split, split), out_shardings=split, compiler_options=compiler_options()
        )
        return partial(program, params)
