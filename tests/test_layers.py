"""The rooms of the package, read from its imports: files import only from rooms above their own, or from their own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lcm_jax"

# From the mathematics down to the commands; any other file at the top of the package is a command.
ROOMS = (
    "errors",
    "locks",
    "files",
    "ranges",
    "output",
    "progress",
    "cost",
    "compiler",
    "peaks",
    "profiling",
    "config_files",
    "config_groups",
    "diffusion",
    "models",
    "weights",
    "data",
    "objectives",
    "training",
    "sampling",
    "evaluation",
    "pipeline",
    "recipes",
    "scaling",
    "dry_run",
    "conversion",
    "page",
    "command",
    "benchmarks",
    "studies",
    "commands",
)
FILES = {
    "os",
    "io",
    "pathlib",
    "json",
    "shutil",
    "tempfile",
    "tarfile",
    "PIL",
    "safetensors",
    "huggingface_hub",
    "lcm_jax.files",
}
DEVICES = {"jax.sharding", "jax.experimental"}
NETWORKS = {"flax.linen", "flax.nnx", "lcm_jax.models"}
TEXT = {"transformers", "lcm_jax.data.tokenizer"}
TRAINING = {"optax", "orbax", "lcm_jax.training"}
FLAGS = {"absl", "ml_collections"}

# What a room knows nothing of, over and above the rooms below it.
UNKNOWN = {
    "diffusion": NETWORKS | TEXT | FILES | TRAINING,
    "models": FILES | TRAINING,
    "weights": {"optax", "lcm_jax.training"},
    "data": NETWORKS | TRAINING | {"lcm_jax.objectives", "lcm_jax.diffusion", "lcm_jax.weights"},
    "objectives": DEVICES | FILES | NETWORKS | TRAINING | {"lcm_jax.data", "lcm_jax.weights"},
    "training": FLAGS,
    "evaluation": TRAINING,
    "sampling": FLAGS | TRAINING,
    "pipeline": TRAINING,
    "page": FLAGS | TRAINING | {"lcm_jax.recipes", "lcm_jax.evaluation"},
}
# What a room knows all the same: objectives build what networks are told, and know no network.
KNOWN = {"objectives": ("lcm_jax.models.conditioning",)}
ONLY_IN = {
    "orbax": {"training/checkpoint.py", "training/distributed.py", "weights/orbax_tree.py"},
    "torch": {"benchmarks/diffusers_peer.py", "benchmarks/diffusers_start.py", "benchmarks/diffusers_train.py"},
    "diffusers": {"benchmarks/diffusers_peer.py", "benchmarks/diffusers_start.py", "benchmarks/diffusers_train.py"},
    "qwix": {"models/quantized.py"},
    "gradio": {"page/layout.py", "page/server.py"},
    "fastapi": {"page/server.py"},
    "uvicorn": {"page/server.py"},
    "prometheus_client": {"page/metrics.py"},
    "tensorflow": set(),
    "tensorflow_datasets": {"data/tfds.py"},
    "pyarrow": {"data/parquet.py"},
    "array_record": {"data/array_record.py", "data/encoding.py", "data/latents.py"},
    "fsspec": {"data/shard_files.py"},
    "clu": set(),
}


def files() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in the file: `from a import b` is a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def room(name: str) -> str | None:
    """The room of a file ("training/step.py") or of a module ("lcm_jax.training.step"); None is the package itself."""
    head = name.removesuffix(".py").removeprefix("lcm_jax.").replace("/", ".").split(".")[0]
    if head == "__init__" or not ((PACKAGE / head).is_dir() or (PACKAGE / f"{head}.py").exists()):
        return None
    return head if head in ROOMS else "commands"


def test_every_room_is_there():
    found = {room(name) for name in files()}
    assert found == {None, *ROOMS}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(ROOMS), "a folder without a row in the table"
    assert not [name for name in files() if "util" in name or "registry" in name]


@pytest.mark.parametrize("name", files())
def test_a_file_imports_from_above(name):
    own, names = room(name), imports(PACKAGE / name)
    ours = {n for n in names if within(n, "lcm_jax")}
    if own is None:  # the public face
        assert ours <= {"lcm_jax.pipeline.Pipeline"}
        return
    for imported in ours:
        other = room(imported)
        if own == other == "commands":
            assert within(imported, "lcm_jax." + name.removesuffix(".py")), f"one command imports another: {imported}"
        elif other is not None:
            assert ROOMS.index(other) <= ROOMS.index(own), f"lcm_jax/{name} imports {imported}, a row below its own"
    names = {n for n in names if not any(within(n, module) for module in KNOWN.get(own, ()))}
    unknown = {n for n in names if any(within(n, module) for module in UNKNOWN.get(own, ()))}
    assert not unknown, f"lcm_jax/{name}: {own} knows nothing of {sorted(unknown)}"


@pytest.mark.parametrize("module", sorted(ONLY_IN))
def test_a_library_is_confined(module):
    found = {name for name in files() if any(within(n, module) for n in imports(PACKAGE / name))}
    assert found == ONLY_IN[module]


def test_flags_live_in_commands():
    found = {name for name in files() if any(within(n, "absl") for n in imports(PACKAGE / name))}
    assert {room(name) for name in found} == {"command", "commands"}
    assert len((PACKAGE / "main.py").read_text().splitlines()) < 90


def test_configs_are_data():
    for path in (ROOT / "configs").rglob("*.py"):
        # A config may begin from another one, and has the groups that all of them share.
        data = ("ml_collections", "lcm_jax.config_files", "lcm_jax.config_groups")
        assert all(any(within(name, each) for each in data) for name in imports(path)), path.name


def test_no_test_imports_from_another_test():
    """What several tests share is in files that are not tests."""
    for path in (ROOT / "tests").glob("test_*.py"):
        assert not [name for name in imports(path) if name.startswith("test_")], path.name
