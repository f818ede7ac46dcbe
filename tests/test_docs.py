"""The documentation: files that it names exist, and links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/performance.md"]
PAGES += [f"lcm_jax/assets/{model}/README.md" for model in ("shapes", "shapes-lcm")]


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
