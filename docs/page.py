"""Draw docs/page.png, the page with the bundled models: start the server, draw and keep a few images in a browser.

    python docs/page.py

It needs the extra `app`, Playwright and Chromium.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

PROMPT = "a red circle above a blue square"
KEPT = ("two green squares", "a yellow triangle", "a purple circle")
DOTS = (("red", 0.32, 0.3, 36), ("blue", 0.68, 0.72, 36))  # color, x, y and brush of the drawing
OUTPUT = Path(__file__).with_name("page.png")


def draw(page: Page) -> None:
    """Keep images of other prompts, then draw two dots."""
    for prompt in KEPT:
        page.get_by_label("Prompt").fill(prompt)
        page.locator(f'#image img[alt="{prompt}"]').wait_for()
        page.locator("#image").get_by_role("button", name="Keep").click()
    page.get_by_label("Prompt").fill(PROMPT)
    box = page.locator("canvas").bounding_box()
    assert box is not None
    for color, x, y, brush in DOTS:
        page.get_by_role("button", name=color, exact=True).click()
        page.locator("[data-brush]").fill(str(brush))
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.wait_for_timeout(5000)  # for the teacher
    page.locator("#status").evaluate("element => element.scrollIntoView()")


def main() -> None:
    command = [sys.executable, "-m", "lcm_jax.app", "--port=0", f"--prompt={PROMPT}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = next(match[1] for line in server.stdout or () if (match := re.match(r"ready: (\S+)", line)))
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(address)
            page.locator("#teacher img").wait_for()
            draw(page)
            page.screenshot(path=OUTPUT, full_page=True)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
