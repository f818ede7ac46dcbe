"""The models of a run: those that it begins from, in their files, and its student; frozen weights and their shapes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.compiler import compiler_options
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.models.stable_diffusion import ENCODERS, StableDiffusion, frozen_dtype
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import StoredModel, check_complete, check_params, open_model, read_params


class OpenModel(Protocol):
    """`open_complete`, or for a dry run another opener that needs no weights."""

    def __call__(self, name: str, /, *, base: str | None = None) -> StoredModel: ...


def open_complete(name: str, *, base: str | None = None) -> StoredModel:
    """Open a model to train from, and check that it is complete before any work.

    base: a model that supplies what a single file lacks. Raises ModelError.
    """
    stored = open_model(name, base=base)
    try:
        check_complete(stored)
    except ModelError as error:
        raise ModelError(
            f"{error}: set --config.base to it, or convert {name} to a folder by lcm_jax.convert and train from that"
        ) from None
    check_params(stored, StableDiffusion.from_configs(stored.configs).abstract_params())
    return stored


@dataclass(frozen=True)
class Models:
    """The models of a run.

    role: what the run calls the model it begins from: "teacher", or "init" if it is fine-tuned itself. stored: that
    model in its files. base: its networks. configs: the student's, as they are exported. student: its networks.
    """

    role: str
    stored: StoredModel
    base: StableDiffusion
    configs: Mapping[str, Mapping[str, Any]]
    student: StableDiffusion

    @cached_property
    def tokenizers(self) -> list:
        """The tokenizers, opened at the first use. Raises ModelError if there is none."""
        return tokenizers.open_tokenizers(check_complete(self.stored), self.stored.configs)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Return token ids, int32[B, L], or int32[B, 2, L] for SDXL."""
        return tokenizers.encode_for(self.tokenizers, prompts)


def open_models(config, role: str, make_configs: Callable[[StoredModel], Mapping], open_model: OpenModel) -> Models:
    """Open the model that `config[role]` names, and build its networks and the student's; no tensor is read.

    make_configs(stored) returns the student's configs. `config.base`, if there is one, supplies what a single file
    lacks. Raises ModelError, and ValueError for configs that are not supported.
    """
    stored, dtype = open_model(config[role], base=config.get("base") or None), jnp.dtype(config.train.dtype)
    configs = make_configs(stored)
    # A model before its fine-tuning is sampled as it is afterwards.
    base = StableDiffusion.from_configs(stored.configs if role == "teacher" else configs, dtype)
    return Models(role, stored, base, configs, StableDiffusion.from_configs(configs, dtype, remat=config.train.remat))


# ---- frozen weights -------------------------------------------------------------------------------------------------


def encode_prompts(model: StableDiffusion, params: Any, token_ids: Any) -> dict[str, jax.Array]:
    """Return "context": [B, L, D] of token_ids, and for SDXL "pooled": [B, P]. params: of the text encoders."""
    prompt = model.encode_prompt(params, token_ids)
    return {"context": prompt.context} | ({} if prompt.pooled is None else {"pooled": prompt.pooled})


def abstract_prompts(model: StableDiffusion, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of `encode_prompts` for `count` prompts."""
    token_ids = jax.ShapeDtypeStruct((count, *token_shape(model)), jnp.int32)
    return jax.eval_shape(partial(encode_prompts, model), model.abstract_params(), token_ids)


def frozen_networks(model: StableDiffusion, unet: bool, prompts: bool) -> list[str]:
    """Return the names of the networks that `abstract_frozen` has."""
    return [name for name in model.networks if (unet or name != "unet") and (prompts or name not in ENCODERS)]


def abstract_frozen(model: StableDiffusion, unet: bool = True, prompts: bool = True) -> dict[str, Any]:
    """Return the shapes and dtypes of a model's frozen parameters by network, and of the empty prompt.

    unet: False to leave out the UNet, if all of it is trained. prompts: True for the text encoders, if steps encode
    prompts. "empty_prompt" is that of `encode_prompts`, of no batch.
    """
    first = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)  # noqa: E731
    trees: dict[str, Any] = {"empty_prompt": jax.tree.map(first, abstract_prompts(model, 1))}
    abstract = model.abstract_params()
    for name in frozen_networks(model, unet, prompts):
        cast = frozen_dtype(model.dtype_of(name))
        trees[name] = jax.tree.map(lambda x, cast=cast: jax.ShapeDtypeStruct(x.shape, cast(x)), abstract[name])
    return trees


def load_frozen(models: Models, unet: bool = True, prompts: bool = True) -> dict[str, Any]:
    """Read what `abstract_frozen` describes, each tensor cast as it is read, so that no second copy exists.

    Each is copied out of its file: on a CPU the device may use these very arrays, and files may change.
    """
    encoders, empty_ids = load_encoders(models), np.asarray(models.tokenize([""]), np.int32)
    encode = jax.jit(partial(encode_prompts, models.base), compiler_options=compiler_options())
    encoded = encode(encoders, empty_ids)
    trees = {"empty_prompt": jax.tree.map(lambda x: np.array(x[0]), encoded)} | (encoders if prompts else {})
    return trees | {name: load_network(models, name) for name in frozen_networks(models.base, unet, False)}


def load_encoders(models: Models) -> dict[str, Any]:
    """Read the text encoders."""
    return {name: load_network(models, name) for name in models.base.networks if name in ENCODERS}


def load_network(models: Models, name: str) -> Any:
    """Read one network of `load_frozen`."""
    cast = frozen_dtype(models.base.dtype_of(name))
    return read_params(models.stored, name, models.base.abstract_params()[name], cast, put=np.array)


def token_shape(model: StableDiffusion) -> tuple[int, ...]:
    """Return the shape of a prompt's tokens: (L,), or (2, L) for the two encoders of SDXL."""
    length = model.text_encoder.config.max_position_embeddings
    return (length,) if model.text_encoder_2 is None else (2, length)


def latent_shape(model: StableDiffusion, batch: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of the scaled latents of a batch, see `distillation.batch_shapes`.

    batch: arrays or their shapes.
    """
    if "moments" in batch:
        leading = batch["moments"].shape[:3]
    else:
        count, height, width, _ = batch["image"].shape
        leading = (count, height // model.downscale, width // model.downscale)
    return jax.ShapeDtypeStruct((*leading, model.vae.config["latent_channels"]), jnp.float32)
