"""The notebooks: each runs from a clean kernel, in small, and keeps outputs that show no machine."""

import builtins
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import runnable
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from whole_runs import QUICK

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 1_500_000
# Paths of machines, tracebacks and warnings.
NOISE = re.compile(r"/(?:home|root|tmp|usr|var|opt|content|work)/|site-packages|Traceback|[Ww]arning|\x1b\[")

TINY = QUICK | {"mesh.data": 1, "train.batch_size": 4, "optimizer.warmup_steps": 0, "sample.scored_prompts": 6}
TINY |= {"sample.batch_size": 6, "report.batch_size": 6, "report.prompts": 6, "report.reference": 8}
LCD = TINY | {"data.length": 16, "data.held_out": 8, "sample.teacher_steps": 1, "report.teacher.ddim": (1,)}
LCD |= {"report.teacher.euler": (), "sample.student_steps": (1, 2, 4, 8), "objective.backward_simulation": 0.5}
LCF = TINY | {"data.held_out": 8, "checkpoint.best": "frechet@4"}
# The values of the cell `parameters` that make a notebook small, as papermill would inject them.
PARAMETERS = {
    "convert": {},
    "distil": {"STEPS": 1, "OPTIONS": runnable.options(LCD)},
    "finetune": {"STEPS": 1, "OPTIONS": runnable.options(LCF)},
    "sample": {},
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook) -> list[int]:
    """Return the places of the cells with the tag `parameters`."""
    return [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]


@pytest.mark.long
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_a_clean_kernel(name, tmp_path, monkeypatch):
    notebook = read(name)
    (place,) = tagged(notebook)
    values = "\n".join(f"{key} = {value!r}" for key, value in PARAMETERS[name].items())
    assert not set(PARAMETERS[name]) - set(re.findall(r"^(\w+) =", notebook.cells[place].source, re.MULTILINE))
    notebook.cells.insert(place + 1, new_code_cell(values))
    for key, value in runnable.environment().items():
        monkeypatch.setenv(key, value)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


def texts(output) -> str:
    """Return all of an output that is read as text."""
    return "\n".join(
        [output.get("text", ""), *(str(value) for key, value in output.get("data", {}).items() if "text" in key)]
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_keeps_its_outputs(name):
    path, notebook = ROOT / "notebooks" / f"{name}.ipynb", read(name)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.kernelspec.display_name == "Python 3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run all cells, in their order"
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr"
        assert not NOISE.search(texts(output)), texts(output)


def test_notebooks_share_their_first_cell_and_the_address_of_the_repository():
    firsts = {code_cells(read(name))[0].source for name in NOTEBOOKS}
    assert len(firsts) == 1
    (repository,) = re.findall(r'^REPOSITORY = "https://github.com/([\w.-]+/[\w.-]+)"', *firsts, re.MULTILINE)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"git clone https://github.com/{repository} &&" in readme
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    for name in NOTEBOOKS:
        link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb"
        assert f"({link})" in read(name).cells[0].source and f"({link})" in page


@pytest.mark.parametrize(
    "gpu, environ, extra",
    [(True, {}, "[gpu]"), (False, {"TPU_NAME": "local"}, "[tpu]"), (False, {}, "")],
    ids=["gpu", "tpu", "cpu"],
)
def test_the_first_cell_installs_what_fits_the_runtime(gpu, environ, extra, monkeypatch):
    inputtransformer2 = pytest.importorskip("IPython.core.inputtransformer2")
    code = inputtransformer2.TransformerManager().transform_cell(code_cells(read("convert"))[0].source)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lcm_jax" else find_spec(name))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0 if gpu else 1))
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    monkeypatch.setattr("os.environ", environ)
    installed, names = [], {}
    shell = SimpleNamespace(run_line_magic=lambda *magic: installed.append(magic))
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    exec(code, names)
    ((magic, line),) = installed
    assert magic == "pip"
    assert line.format(**names) == f'-q "lcm_jax{extra} @ git+{names["REPOSITORY"]}"'.replace("-q", "install -q", 1)
