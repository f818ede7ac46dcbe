"""Who may import whom: the table of rooms in the architecture, held by reading the imports of every file."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lcm_jax"
CONFIGS = PACKAGE.parent / "configs"

NETWORKS = ("lcm_jax.models", "flax")
TEXT = ("lcm_jax.data.tokenizer", "transformers", "tokenizers")
FILES = ("os", "io", "pathlib", "shutil", "tempfile", "json", "pickle", "safetensors", "orbax", "huggingface_hub", "PIL")
TRAINING = ("lcm_jax.training", "optax", "orbax")
LOSSES = ("lcm_jax.objectives",)
DEVICES = ("jax.sharding", "jax.experimental")
FLAGS = ("absl", "ml_collections", "argparse")

# From the top row to the lowest, and what each knows nothing of. A file imports from its own row and those above.
ROWS = {
    "diffusion": NETWORKS + TEXT + FILES,
    "models": TRAINING + FILES,
    "weights": TRAINING,
    "data": NETWORKS + LOSSES,
    "objectives": DEVICES + FILES,
    "training": FLAGS,
    "evaluation": TRAINING,
    "pipeline": TRAINING,  # with __init__.py, which offers it as lcm_jax.Pipeline
    "commands": (),  # every other file at the top level
}
NOWHERE = ("torch", "tensorflow", "diffusers")
ORBAX_IS_IN = "training/checkpoint.py"


def modules() -> list[str]:
    """Every file of the package, as "room/name.py"."""
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def row_of(file: str) -> str:
    room, _, rest = file.partition("/")
    if rest:
        return room
    return "pipeline" if file in ("pipeline.py", "__init__.py") else "commands"


def imports(source: str) -> set[str]:
    """Every dotted name that is imported anywhere in the source, inside functions too; `from a import b` is a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            names.update(f"{start}.{alias.name}" for alias in node.names)
    return names


def within(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def row_of_import(name: str) -> str:
    """The row of a name that begins with lcm_jax; what is neither room nor file is an attribute of __init__.py."""
    part = (name.split(".") + [""])[1]
    if part in ROWS and (PACKAGE / part).is_dir():
        return part
    return row_of(f"{part}.py") if (PACKAGE / f"{part}.py").is_file() else "pipeline"


def violations(file: str, source: str) -> list[str]:
    """What is wrong with the imports of a file, a line each."""
    row, order, wrong = row_of(file), list(ROWS), []
    for name in sorted(imports(source)):
        if name.startswith("."):
            wrong.append(f"{file} imports {name}: write the whole name, from lcm_jax on")
        if within(name, NOWHERE):
            wrong.append(f"{file} imports {name}, which no file of lcm_jax may")
        if within(name, ("orbax",)) and file != ORBAX_IS_IN:
            wrong.append(f"{file} imports {name}, which only {ORBAX_IS_IN} may")
        if within(name, ROWS[row]):
            wrong.append(f"{file} imports {name}, of which {row} knows nothing")
        if within(name, ("lcm_jax",)) and order.index(row_of_import(name)) > order.index(row):
            wrong.append(f"{file} imports {name}, from a row below {row}")
    return wrong


def test_every_room_is_in_the_table():
    rooms = {file.split("/")[0] for file in modules() if "/" in file}
    assert rooms <= set(ROWS), f"give {sorted(rooms - set(ROWS))} a row in this table and in the architecture"
    assert rooms == set(ROWS) - {"pipeline", "commands"}


@pytest.mark.parametrize("file", modules())
def test_a_file_imports_only_from_rows_above(file):
    wrong = violations(file, (PACKAGE / file).read_text())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_a_config_knows_nothing_of_the_package(path):
    # A whole run is described by plain values, so a config reads without the code that it configures.
    assert not [name for name in imports(path.read_text()) if within(name, ("lcm_jax",) + NOWHERE)]


def test_main_stays_short():
    assert len((PACKAGE / "main.py").read_text().splitlines()) < 80


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("diffusion/schedule.py", "import flax.linen as nn", "of which diffusion knows nothing"),
        ("diffusion/schedule.py", "from lcm_jax.models import unet", "of which diffusion knows nothing"),
        ("diffusion/schedule.py", "from lcm_jax import models", "of which diffusion knows nothing"),
        ("diffusion/samplers.py", "from pathlib import Path", "of which diffusion knows nothing"),
        ("models/unet.py", "from lcm_jax.weights.naming import f", "from a row below models"),
        ("models/unet.py", "import optax", "of which models knows nothing"),
        ("models/unet.py", "def f():\n    import torch", "which no file of lcm_jax may"),
        ("data/loader.py", "from lcm_jax.models.vae import AutoencoderKL", "of which data knows nothing"),
        ("objectives/lcd.py", "from jax import sharding", "of which objectives knows nothing"),
        ("objectives/lcd.py", "from lcm_jax.training.step import f", "from a row below objectives"),
        ("training/loop.py", "from absl import flags", "of which training knows nothing"),
        ("training/loop.py", "import orbax.checkpoint as ocp", "which only training/checkpoint.py may"),
        ("training/loop.py", "from lcm_jax import Pipeline", "from a row below training"),
        ("training/loop.py", "import lcm_jax", "from a row below training"),
        ("evaluation/frechet.py", "import lcm_jax.training.loop", "of which evaluation knows nothing"),
        ("pipeline.py", "from lcm_jax.training.state import f", "of which pipeline knows nothing"),
        ("pipeline.py", "from lcm_jax import main", "from a row below pipeline"),
        ("sample.py", "from diffusers import DDIMScheduler", "which no file of lcm_jax may"),
        ("data/loader.py", "from .shapes import f", "write the whole name"),
    ],
)
def test_the_reader_of_imports_finds(file, source, complaint):
    assert complaint in "\n".join(violations(file, source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("training/checkpoint.py", "import orbax.checkpoint as ocp"),
        ("diffusion/samplers.py", "import jax\nfrom lcm_jax.diffusion.schedule import like"),
        ("objectives/lcd.py", "from lcm_jax.diffusion import solvers"),
        ("training/loop.py", "import torchless, diffusers_like"),
        ("main.py", "from absl import flags\nfrom lcm_jax.training.loop import train"),
    ],
)
def test_the_reader_of_imports_lets_pass(file, source):
    assert violations(file, source) == []
