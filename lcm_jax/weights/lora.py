"""LoRA files and their updates: W + weight (alpha / rank) up down, arXiv 2106.09685.

An adapter is kept as its updates by component of diffusers (unet, text_encoder, text_encoder_2) and by module, the key
of the weight that it changes without `.weight`. Two namings:

1. kohya's, as A1111 and ComfyUI read it: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight`, `.alpha`, the dots
   of the module turned to `_`. That cannot be undone without the names themselves: `base` gives them. SDXL's are often
   those of the single-file layout. Text encoders: lora_te_ and, if there are two, lora_te1_ and lora_te2_.
2. PEFT's, as diffusers writes it: `unet.<module>.lora_A.weight` (down), `.lora_B.weight` (up), alpha among the file's
   metadata. PEFT itself writes `base_model.model.<module>.lora_A.weight`, and alpha to adapter_config.json beside the
   file (lora_settings.py). OneTrainer has `unet.<module>.lora_down.weight` and `.alpha`, older files of diffusers have
   `.lora.down.weight`, `.lora_linear_layer.down.weight` or `.processor.to_q_lora.down.weight`; they are read, never
   written.

Without alpha in a file it is the rank.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lcm_jax.weights import layout, lora_settings
from lcm_jax.weights.diffusers_folder import open_file
from lcm_jax.weights.errors import ModelError, overflowing
from lcm_jax.weights.layout import LORA_FILE, read_json, shown
from lcm_jax.weights.lora_settings import METADATA
from lcm_jax.weights.preset import Preset
from lcm_jax.weights.single_file import names_in_folder, rename
from lcm_jax.weights.stored import Tensors, get_specs


class Update(NamedTuple):
    """down: [r, in] or [r, in, kh, kw]; up: [out, r] or [out, r, 1, 1]; alpha: [] or None. In the file's dtypes."""

    down: np.ndarray
    up: np.ndarray
    alpha: np.ndarray | None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else float(self.alpha) / len(self.down)


Updates = dict[str, dict[str, Update]]  # by component and module
Components = Mapping[str, Mapping[str, np.ndarray]]  # tensors by component and diffusers' key


class LoRA(NamedTuple):
    updates: Updates
    metadata: dict[str, str]  # of the file, without the keys that record alpha

    @property
    def preset(self) -> Preset | None:
        """Preset of a model with this LoRA, if the file has one, as those of an LCM-LoRA here. Raises ModelError."""
        return Preset.from_metadata(self.metadata)


PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
KOHYA = re.compile(r"(lora_(?:unet|te|te1|te2)_)([^.]+)\.(lora_down\.weight|lora_up\.weight|alpha)")
WRAPPED = "base_model.model."  # PEFT's own prefix
PEFT = re.compile(
    r"(?:base_model\.model\.)?(?:(unet|text_encoder|text_encoder_2|lora_unet|lora_te|lora_te1|lora_te2)\.)?(.+?)"
    r"\.(?:lora_(A|B)(?:\.[^.]+)?\.weight|lora(?:_linear_layer)?[._](down|up)\.weight|(alpha))"
)
OLD_ATTENTION = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
KOHYA_FILE = "kohya.safetensors"
NAMES = (LORA_FILE, "adapter_model.safetensors", "adapter_model.bin")  # of the weights in a folder
LEAVES = {"lora_down.weight": "down", "lora_up.weight": "up", "A": "down", "B": "up"}
# Marks of adapters whose update is not a product of two matrices.
OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon with a Tucker core",
    "lora_embedding": "a LoRA of an embedding table",
    ".diff": "a full difference of weights (LyCORIS)",
    ".w_norm": "a full difference of norms (LyCORIS)",
    ".b_norm": "a full difference of norms (LyCORIS)",
    ".lora_B.bias": "a LoRA with biases",
}
ALPHA_DTYPE = "alpha_dtype"  # ours: JSON has numbers of one kind only
ALPHA_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32")
ALPHA_KEYS = (METADATA, ALPHA_DTYPE, lora_settings.FILE)  # of a file's metadata, that alpha is read from


def is_lora(keys: Iterable[str]) -> bool:
    return any(
        KOHYA.fullmatch(key) or ".lora_A." in key or re.search(r"[._]lora[._](down|up)\.|_layer\.down\.", key)
        for key in keys
    )


def detect_naming(keys: Iterable[str]) -> str:
    """Return kohya or peft."""
    return "kohya" if any(KOHYA.fullmatch(key) for key in keys) else "peft"


# ---- reading --------------------------------------------------------------------------------------------------------


def find_file(name: str | Path) -> Path:
    """Return the file of a LoRA: `name` itself, or the one in a folder, in a run's export/, or of a bundled name.

    Raises ModelError if there is none.
    """
    bundled = str(name) in layout.SHIPPED_LORAS
    path = layout.ASSETS / str(name) if bundled else Path(name)
    if bundled and not path.exists():
        raise ModelError(f"the bundled LoRA {str(name)!r} is not at {path}; install lcm_jax again")
    if not path.exists():
        kinds = f"a file, a folder, the workdir of a run, or a bundled LoRA ({', '.join(layout.SHIPPED_LORAS)})"
        raise ModelError(f"there is no LoRA {str(name)!r}; use {kinds}")
    if not path.is_dir():
        return path
    for folder in (path, path / "export"):
        for file in NAMES:
            if (folder / file).is_file():
                return folder / file
    raise ModelError(f"{path} has none of {', '.join(NAMES)}; use a LoRA file, or a folder that has one")


def short_name(path: Path) -> str:
    """Return the display name of a LoRA: of its file, or if that has a usual name, of its run or folder."""
    path = path.resolve().with_suffix("")
    while path.name in ("export", *(Path(name).stem for name in (*NAMES, KOHYA_FILE))):
        path = path.parent
    return path.name


def read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return (tensors, metadata) of a LoRA: a .safetensors file, a pickle, or any other name of `find_file`.

    The metadata include adapter_config.json beside `adapter_model.*`. Raises ModelError that names the file, and the
    key, for NaN, an alpha that is not a scalar, and settings that are not supported.
    """
    path = find_file(path)
    tensors, metadata = open_file(path)
    metadata = {key: value for key, value in metadata.items() if key != "format"}
    for key, tensor in tensors.items():
        if key.endswith(".alpha") and tensor.size != 1:
            raise ModelError(f"{path}: {key} has the shape {list(tensor.shape)}, not one number; copy the file again")
        if not np.issubdtype(tensor.dtype, np.integer) and not np.isfinite(tensor.astype(np.float32)).all():
            kind = "NaN" if np.isnan(tensor.astype(np.float32)).any() else "infinity"
            raise ModelError(f"{path}: {key} contains {kind}; use another file, its training has diverged")
    config = path.with_name(lora_settings.FILE)
    if path.stem == "adapter_model" and config.is_file():
        metadata[lora_settings.FILE] = json.dumps(read_json(config))
    lora_settings.read_settings(metadata, str(path))
    return dict(tensors), metadata


def open_lora(path: Path, base: "Components | None" = None, family: str = "sd1") -> "LoRA":
    """Return the LoRA of a file or folder; base and family as in `read_lora`. Raises ModelError that names `path`."""
    tensors, metadata = read_file(path)
    try:
        return read_lora(tensors, metadata, base, family)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def file_and_weight(text: str) -> tuple[Path, float]:
    """Parse LORA or LORA:WEIGHT; the weight is 1 by default. Raises ModelError if it is not a number."""
    file, _, weight = text.rpartition(":") if ":" in text else (text, "", "1")
    try:
        value = float(weight)
    except ValueError:
        raise ModelError(f"{text}: {weight!r} is not a number; write LORA or LORA:WEIGHT") from None
    if not np.isfinite(value):
        raise ModelError(f"{text}: the weight is {weight}; use a finite number")
    return Path(file), value


def files_and_weights(texts: Iterable[str]) -> list[tuple[Path, float]]:
    """Parse texts that each have one or more of `file_and_weight`, separated by commas. Raises ModelError."""
    return [file_and_weight(each) for text in texts for each in text.split(",")]


def read_lora(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    base: Components | None = None,
    family: str = "sd1",
) -> LoRA:
    """Return the adapter of a file's tensors and metadata.

    base: the tensors (or anything with a shape) of the model that it belongs to, by component and diffusers' key, and
    its family as `single_file` names it; needed for kohya's naming, and every module is then checked against it.
    Raises ModelError for another kind of adapter, a half of an update, or modules that the base does not have.
    """
    metadata = dict(metadata or {})
    for mark, kind in OTHERS.items():
        if found := next((key for key in tensors if mark in key), None):
            raise ModelError(f"{found} belongs to {kind}, which is not supported: merge it with the tool that made it")
    if not is_lora(tensors):
        raise ModelError("this file has no LoRA in it: looked for lora_down / lora_up, lora_A / lora_B")
    kohya = detect_naming(tensors) == "kohya"
    if kohya and base is None:
        raise ModelError("kohya keys do not record module boundaries; pass the base model as base (--base)")
    names = {component: module_names(component, base[component], family) for component in base} if base else {}
    parts: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    unknown = []
    for key, tensor in tensors.items():
        place = place_of_kohya(key, names) if kohya else place_of_peft(key, base)
        if place is None:
            unknown.append(key)
        elif parts.setdefault(place[:2], {}).setdefault(place[2], tensor) is not tensor:
            raise ModelError(f"{key}: {place[1]} of the {place[0]} is there twice under two names; copy the file again")
    if unknown:
        raise ModelError(
            f"{len(unknown)} of {len(tensors)} keys of this LoRA belong to no module of the model: "
            f"{some(unknown)}; {describe_mismatch(tensors, base)}"
        )
    alphas = read_alphas(metadata, parts)
    if not alphas and any(key.startswith(WRAPPED) for key in tensors) and not any("alpha" in p for p in parts.values()):
        raise ModelError(f"alpha is unknown: PEFT keeps it in {lora_settings.FILE}, which must be beside the file")
    updates: Updates = {}
    for (component, module), part in parts.items():
        if "down" not in part or "up" not in part:
            raise ModelError(f"{component}.{module} has only {' and '.join(part)}; copy the file again")
        alpha = part.get("alpha", alphas.get((component, module)))
        if alpha is not None and np.size(alpha) != 1:
            raise ModelError(f"{component}.{module}: alpha has the shape {list(np.shape(alpha))}, not one number")
        update = Update(part["down"], part["up"], None if alpha is None else np.asarray(alpha).reshape(()))
        if update.down.ndim not in (2, 4) or update.up.shape[1:2] != update.down.shape[:1] or 0 in update.down.shape:
            raise ModelError(
                f"{component}.{module}: down {list(update.down.shape)} and up {list(update.up.shape)} have no rank "
                "in common; copy the file again"
            )
        updates.setdefault(component, {})[module] = update
    lora = LoRA(updates, {key: value for key, value in metadata.items() if key not in ALPHA_KEYS})
    if base is not None:
        check(lora, base)
    _ = lora.preset  # read once, so that one that is not supported is an error here
    return lora


def module_names(component: str, tensors: Mapping[str, np.ndarray], family: str) -> dict[str, str]:
    """kohya's names, after their prefix, of every module of a component: from diffusers' and the single file's."""
    layout = names_in_folder(component, family, tensors.keys()) if component == "unet" else {}
    names = {}
    for key in tensors:
        if key.endswith(".weight") and len(tensors[key].shape) > 1:
            module = key.removesuffix(".weight")
            for name in (module, rename(module, layout)):
                if name is not None:
                    names[name.replace(".", "_")] = module
    return names


def place_of_kohya(key: str, names: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str] | None:
    match = KOHYA.fullmatch(key)
    if match is None:
        return None
    component = PREFIXES[match[1]]
    module = names.get(component, {}).get(match[2])
    return (component, module, LEAVES.get(match[3], match[3])) if module else None


def place_of_peft(key: str, base: Components | None) -> tuple[str, str, str] | None:
    if old := OLD_ATTENTION.fullmatch(key):  # before PEFT
        module = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
        key = f"{module}.lora.{old[3]}.weight"
    match = PEFT.fullmatch(key)
    if match is None:
        return None
    component, module = PREFIXES.get(f"{match[1]}_", match[1] or "unet"), match[2]
    if match[1] is None and module.startswith("text_model."):
        component = "text_encoder"
    if component.startswith("text_encoder") and not module.startswith(("text_model.", "text_projection")):
        module = f"text_model.{module}"
    if base is not None and f"{module}.weight" not in base.get(component, {}):
        return None
    leaf = match[3] or match[4] or match[5]
    return component, module, LEAVES.get(leaf, leaf)


def read_alphas(
    metadata: Mapping[str, str], parts: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
) -> dict[tuple[str, str], np.ndarray]:
    """Return the alpha of each (component, module) by PEFT's settings."""
    if (dtype := metadata.get(ALPHA_DTYPE, "float32")) not in ALPHA_DTYPES:
        raise ModelError(f"metadata: {ALPHA_DTYPE}={shown(dtype)} is not supported; use {', '.join(ALPHA_DTYPES)}")
    settings = lora_settings.read_settings(metadata, "metadata")
    strengths = {name: lora_settings.Strengths(each, name or lora_settings.FILE) for name, each in settings.items()}
    found = {}
    for (component, module), part in parts.items():
        own = strengths.get(component, strengths.get(""))
        if own is not None and "down" in part:
            found[component, module] = np.asarray(own.alpha(module, len(part["down"])), dtype)
    return found


def check(lora: LoRA, base: Components) -> None:
    """Raise ModelError that names the modules whose shape differs from the base's."""
    wrong, total = [], 0
    for component, updates in lora.updates.items():
        for module, update in updates.items():
            total += 1
            weight = base.get(component, {}).get(f"{module}.weight")
            wanted = None if weight is None else tuple(weight.shape)
            if wanted is None or (len(update.up), np.prod(update.down.shape[1:])) != (wanted[0], np.prod(wanted[1:])):
                wrong.append(f"{component}.{module}")
    if wrong:
        tensors = {f"{c}.{m}.lora_A.weight": u.down for c, updates in lora.updates.items() for m, u in updates.items()}
        raise ModelError(
            f"{len(wrong)} of {total} modules of this LoRA have another shape in the model: "
            f"{some(wrong)}; {describe_mismatch(tensors, base)}"
        )


def describe_mismatch(tensors: Mapping[str, np.ndarray], base: Components | None) -> str:
    """Return the model that a LoRA is for, by the width of its prompts, beside the model it was used with."""
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
    own = next(
        (t.shape[1] for k, t in tensors.items() if re.search(r"attn2[._]to_[kv]\b.*(down|lora_A)", k) and t.ndim > 1),
        None,
    )
    theirs = next(
        (t.shape[1] for k, t in (base or {}).get("unet", {}).items() if k.endswith("attn2.to_k.weight")), None
    )
    if own is None or theirs is None or own == theirs:
        return "use the base it was trained on"
    name = lambda width: f"{width}" + (f" ({families[width]})" if width in families else "")  # noqa: E731
    return f"it attends to prompts of width {name(own)}, the model to {name(theirs)}; use the base it was trained on"


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---- writing --------------------------------------------------------------------------------------------------------


def to_kohya(lora: LoRA) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return (tensors, metadata) of a file with diffusers' modules in kohya's naming."""
    two = "text_encoder_2" in lora.updates or any(
        u.down.shape[1] == 2048 for u in lora.updates.get("unet", {}).values()
    )
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_", "text_encoder_2": "lora_te2_"}
    tensors = {}
    for component, updates in lora.updates.items():
        for module, update in updates.items():
            name = prefixes[component] + module.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": update.down, f"{name}.lora_up.weight": update.up}
            if update.alpha is not None:
                tensors[f"{name}.alpha"] = update.alpha
    return tensors, dict(lora.metadata)


def to_peft(lora: LoRA) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return (tensors, metadata) of a file for diffusers' load_lora_weights, with alpha in PEFT's settings."""
    tensors, settings, dtypes = {}, {}, set()
    for component, updates in lora.updates.items():
        for module, update in updates.items():
            tensors |= {
                f"{component}.{module}.lora_A.weight": update.down,
                f"{component}.{module}.lora_B.weight": update.up,
            }
        if all(update.alpha is None for update in updates.values()):
            continue
        dtypes |= {update.alpha.dtype.name for update in updates.values() if update.alpha is not None}
        # transformers' present text encoders have no `text_model.` in their modules' names, those before them had.
        short = {module: module.removeprefix("text_model.") for module in updates}
        ranks = {short[module]: len(update.down) for module, update in updates.items()}
        alphas = {short[m]: float(u.scale * len(u.down)) for m, u in updates.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        own = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(ranks),
            "rank_pattern": {escaped(m): r for m, r in ranks.items() if r != rank},
            "alpha_pattern": {escaped(m): a for m, a in alphas.items() if a != alpha},
        }
        settings |= {f"{component}.{key}": value for key, value in own.items()}
    metadata = dict(lora.metadata)
    if settings:
        if len(dtypes) > 1:
            raise ModelError(f"alpha is in {' and '.join(sorted(dtypes))}: PEFT's naming has room for one dtype")
        metadata |= {METADATA: json.dumps(settings, indent=2, sort_keys=True), ALPHA_DTYPE: dtypes.pop()}
    return tensors, metadata


def escaped(module: str) -> str:
    return module.replace(".", r"\.")


# ---- merging --------------------------------------------------------------------------------------------------------


def delta(update: Update, shape: tuple[int, ...], weight: float = 1.0) -> np.ndarray:
    """Return weight (alpha / rank) up down, float32 of `shape`."""
    rank = len(update.down)
    up, down = (
        part.astype(np.float32).reshape(size) for part, size in ((update.up, (-1, rank)), (update.down, (rank, -1)))
    )
    return (np.float32(weight * update.scale) * (up @ down)).reshape(shape)


def merge(components: Components, loras: Iterable[tuple[LoRA, float]]) -> dict[str, Tensors]:
    """Return tensors with every adapter at its weight added, in float32, rounded to the tensor's dtype once.

    Changed tensors are in memory, others are still those of `components`, which stays as it is: to unmerge is to use
    it again, bit-exact, which a subtraction from rounded sums would not be.
    Raises ModelError if a module is missing or of another shape, and one that names every sum that overflows.
    """
    loras = list(loras)
    for lora, _ in loras:
        check(lora, {component: get_specs(tensors) for component, tensors in components.items()})
    changed: dict[str, dict[str, np.ndarray]] = {component: {} for component in components}
    bad: dict[str, list[str]] = {}  # by dtype
    for component in components:
        for module in dict.fromkeys(m for lora, _ in loras for m in lora.updates.get(component, {})):
            key = f"{module}.weight"
            tensor = components[component][key]
            total = tensor.astype(np.float32)
            if not np.isfinite(total).all():
                raise ModelError(f"{component}.{key} of the model contains NaN or infinity; use another model")
            for lora, weight in loras:
                if update := lora.updates.get(component, {}).get(module):
                    total = total + delta(update, tensor.shape, weight)
            with np.errstate(over="ignore"):
                changed[component][key] = total.astype(tensor.dtype)
            if not np.isfinite(changed[component][key].astype(np.float32)).all():
                bad.setdefault(tensor.dtype.name, []).append(f"{component}.{key}")
    for dtype, keys in bad.items():
        raise overflowing(keys, dtype, "use a smaller weight, or a model in bfloat16 or float32")

    def read(component: str, key: str) -> np.ndarray:
        return changed[component][key] if key in changed[component] else components[component][key]

    return {name: Tensors(get_specs(tensors), partial(read, name)) for name, tensors in components.items()}
