"""Results of a run's previews: the curve of their figures, and its best checkpoint beside the last."""

from pathlib import Path
from typing import Any

from lcm_jax.evaluation import report
from lcm_jax.evaluation.curve import draw_curve, group_figures
from lcm_jax.training.logging import BEST, PREVIEW, read_previews
from lcm_jax.weights.orbax_folder import checkpoint_root

EXPORT = "python -m lcm_jax.convert --input={folder} --output={folder}-export --format=diffusers"
EXPORT_LORA = "python -m lcm_jax.convert --input={folder} --output={folder}.safetensors --format=lora-peft"


def finish_previews(config, workdir: Path) -> dict[str, Any] | None:
    """Draw `workdir`/curve.png if previews had figures; return and print the best and the last checkpoint.

    Return {"figure", "folder", "best": {"step", "value"}, "last": {"step", "value"}} by `config.checkpoint.best`, or
    None without it. The last is that of the last preview.
    """
    records = read_previews(workdir)
    figures = [{name: value for name, value in each.items() if name not in (PREVIEW, BEST)} for each in records]
    figure, compared = config.checkpoint.best, _compare(config.checkpoint, workdir, records)
    if group_figures(figures):
        best = None if compared is None else (compared["figure"], compared["best"]["step"])
        draw_curve(figures, workdir / "curve.png", workdir.absolute().name, best)
        print(f"figures of the previews in {workdir / 'curve.png'}")
    if figure and compared is None:
        print(f"there is no best checkpoint by {figure}; set checkpoint.best before the previews of a run are made")
    elif compared is not None:
        folder = compared["folder"]
        print(report.checkpoints({"checkpoints": compared}))
        command = EXPORT_LORA if "lora" in config else EXPORT
        print(f"export/ has the last; for the best: {command.format(folder=folder)}")
    return compared


def _compare(group, workdir: Path, records: list[dict[str, float]]) -> dict[str, Any] | None:
    """Return what `finish_previews` does; group: `config.checkpoint`."""
    figure, folder = group.best, checkpoint_root(workdir, group.folder) if group.folder else workdir
    values = {record["step"]: record[figure] for record in records if figure and figure in record}
    if not values or (step := records[-1].get(BEST)) not in values:
        return None
    last = max(values)
    return {
        "figure": figure,
        "folder": str(folder / "best"),
        "best": {"step": int(step), "value": values[step]},
        "last": {"step": last, "value": values[last]},
    }
