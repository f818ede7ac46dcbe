"""The documentation: files that it names exist, links lead somewhere, marked blocks run, and messages are real."""

import ast
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import runnable

from lcm_jax.errors import RunError
from lcm_jax.training import loop

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS]
PAGES += [f"lcm_jax/assets/{model}/README.md" for model in ("shapes", "shapes-lcm", "shapes-lcm-lora")]
RUNNABLE = [page for page in PAGES if runnable.blocks((ROOT / page).read_text(encoding="utf-8"))]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = re.findall(r"(?<![\w/])(?:lcm_jax|tests|configs|docs|launch)/[\w./-]+\w(?![\w*])", text)
    missing = [name for name in names if "NAME" not in name and not (ROOT / name).exists()]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            missing.append(target)
    assert not missing


@pytest.mark.long
@pytest.mark.parametrize("page", RUNNABLE)
def test_runnable_blocks_run(page, tmp_path):
    for block in runnable.blocks((ROOT / page).read_text(encoding="utf-8")):
        command = ["bash", "-euo", "pipefail", "-c", block.command]
        ran = subprocess.run(command, cwd=tmp_path, env=runnable.environment(), capture_output=True, text=True)
        assert ran.returncode == 0, f"block {block.place} of {page}: {block.command}\n{ran.stdout}\n{ran.stderr}"


def test_every_mark_is_before_a_block():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        marks = re.findall(r"^<!-- runnable", text, re.MULTILINE)
        assert len(marks) == len(runnable.blocks(text)), page


def nan_loss() -> str:
    """Return the message of a step whose loss is NaN."""
    with pytest.raises(RunError) as raised:
        loop._read([(12, {"loss": jnp.float32(jnp.nan)})], SimpleNamespace(summary=lambda resume: "none"))
    return str(raised.value)


def literals() -> str:
    """Return every string of the package, a line each; values that are filled in are `\0`."""
    found = []
    for path in (ROOT / "lcm_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (each.value if isinstance(each, ast.Constant) else "\0" for each in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(each.replace("\n", " ") for each in found)


def test_quoted_messages_are_real():
    strings = literals() + "\n" + nan_loss()
    for page in ("README.md", "docs/troubleshooting.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        tables = re.findall(r"^\| message \|.*?(?=^$|\Z)", text, re.MULTILINE | re.DOTALL)
        messages = [message for table in tables for message in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)]
        assert messages
        for message in messages:
            parts = (re.escape(part) for part in message.split("..."))
            assert re.search(".*".join(parts), strings), f"{page} quotes {message!r}, which nothing prints"


def test_the_site_is_built_and_loads_nothing_from_other_hosts(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = runnable.environment() | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in tmp_path.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text(encoding="utf-8"))
        assert not [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)], page.name
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "lcm_jax.conversion.convert" in api and "num_inference_steps" in api
