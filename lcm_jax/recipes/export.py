"""The results of a complete run: its model in diffusers layout, and the report of its candidates."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lcm_jax.errors import RunError
from lcm_jax.evaluation import report, verifier
from lcm_jax.evaluation.evaluate import evaluate
from lcm_jax.recipes.curve import finish_previews
from lcm_jax.recipes.previews import Previews, inpainting_inputs
from lcm_jax.sampling.preview import PreviewSampler
from lcm_jax.training.state import Params
from lcm_jax.training.workdir import config_digest, differences, read_object
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights.model import StoredModel
from lcm_jax.weights.preset import Preset

REPORT_SEED = 2  # of the noise that a report's images begin from
Plan = Mapping[str, Sequence[int]]


def write_model(
    folder: Path, stored: StoredModel, configs: Mapping[str, Mapping[str, Any]], trained: Params, preset: Preset | None
) -> None:
    """Write a model in diffusers layout to `folder`, all or nothing: `trained` networks, the others as stored.

    preset: of the trained model, or None for that of its kind. Raises RunError if the tokenizer that it has a copy of
    is gone.
    """
    if stored.tokenizer is None or not stored.tokenizer.is_dir():
        raise RunError(
            f"{stored.tokenizer} is gone, of which the export has a copy; put it back, and run the same command: the "
            "checkpoints are kept"
        )
    # A folder that is there was left by a run that was stopped between its export and its report.
    with folders.new_folder(folder, overwrite=True) as temporary:
        for name, tensors in stored.tensors.items():
            if name in trained:
                folders.write_component(temporary, name, configs[name], trained[name])
            else:
                folders.write_tensors(temporary, name, configs[name], tensors)
        xl = "text_encoder_2" in stored.tensors
        folders.write_surroundings(temporary, configs, stored.tokenizer, configs["scheduler"], None, preset, xl)


def complete(
    config,
    workdir: Path,
    export: Callable[[Path], None],
    previews: Previews,
    ema: Params,
    frozen: Params,
    seconds: float,
) -> None:
    """Write curve.png, export/, samples/final.png and the report of a complete run, the latter unless they are there.

    export(folder): writes the model. ema, frozen: on the devices. seconds: the time that training took. A report that
    was made with other settings is made anew.
    """
    compared = finish_previews(config, workdir)
    path, exported = workdir / "report.json", (workdir / "export").exists()
    before = read_object(path, "delete it, and the same command makes it again") if path.exists() else None
    settings = {"metrics": config.metrics} | config.report.to_dict()
    changed = differences(before["settings"], json.loads(json.dumps(settings))) if before and exported else []
    if before and exported and not changed:
        print(f"this run is complete: {workdir / 'export'}, {path}")
        report.show(before)
        return
    if changed:
        key, value, now = changed[0]
        name = key if key in config else f"report.{key}"
        print(f"{name} is {value} in {path} and {now} in the config: a new report is made")
    else:
        export(workdir / "export")
    (workdir / "samples").mkdir(exist_ok=True)
    previews.save(ema, frozen, workdir / "samples" / "final.png")

    began = time.monotonic()
    figures = measure(config, previews, ema, frozen)
    result = (
        figures
        | ({} if compared is None else {"checkpoints": compared})
        | {
            **report.environment(),
            "guidance_scale": config.report.guidance_scale,
            "settings": settings,
            "config_digest": config_digest(config.to_dict()),
            "seconds": {"training": round(seconds, 1), "report": round(time.monotonic() - began, 1)},
        }
    )
    report.write(result, workdir)
    report.show(result)
    print(f"student in {workdir / 'export'}; images in {workdir / 'samples' / 'final.png'}; figures in {path}")


def measure(config, previews: Previews, ema: Params, frozen: Params) -> dict[str, Any]:
    """Return the figures of every candidate by the config's metrics, over its plan of samplers and steps."""
    dataset, settings, size = previews.dataset, config.report, config.report.batch_size
    prompts = dataset.prompts(settings.prompts)
    # Fewer: they stand beside the others, and many steps take most of a report's time.
    unseen = dataset.compositional_prompts(max(settings.prompts // 4, 1)) if "verifier" in config.metrics else []
    metrics = previews.metrics(frozen)
    told = report.describe(metrics)
    columns = report.columns_of(told)
    rows, composition = [], {}
    for candidate in previews.candidates:
        who, model, params = candidate.name, candidate.model, candidate.params(ema, frozen)
        plan, scale = settings[who].to_dict(), candidate.guidance_scale(settings.guidance_scale)
        print(f"{who}, {len(prompts)} captions:")
        sampler = PreviewSampler(
            model,
            previews.tokenize,
            prompts,
            config.data.size,
            size,
            seed=REPORT_SEED,
            inpainting=inpainting_inputs(model, dataset.held_out, len(prompts)),
        )
        draw = partial(sampler.batches, params, guidance_scale=scale)
        if unseen:
            of_unseen = sampler.with_prompts(unseen, inpainting_inputs(model, dataset.held_out, len(unseen)))
            name, numbers = next((name, numbers) for name, numbers in plan.items() if numbers)
            scores = {}
            for n in numbers if name == "lcm" else numbers[-1:]:
                images, _ = of_unseen(params, name, n, scale)
                scores[str(n)] = round(verifier.score(images, unseen)["overall"], 4)
            composition[who] = {name: scores}
        for row in evaluate(draw, plan, prompts, metrics):
            print(f"  {report.line(row, columns)}")
            rows.append({"model": who} | row)
    counted = {"composition": {"captions": len(unseen)} | composition} if unseen else {}
    scales = {each.name: each.guidance_scale(settings.guidance_scale) for each in previews.candidates}
    own = {"guidance_scales": scales} if set(scales.values()) != {settings.guidance_scale} else {}
    return report.nest(rows) | told | counted | {"captions": len(prompts)} | own
