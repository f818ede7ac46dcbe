"""The page in a real browser, Chromium without a window, as a visitor uses it; the model is tiny and random."""

import base64
import io
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tiny_model
from page_process import serve
from PIL import Image

from lcm_jax.sampling import png

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if BROWSER is None:
    with playwright.sync_playwright() as found:
        BROWSER = path if Path(path := found.chromium.executable_path).exists() else None
if BROWSER is None:
    pytest.skip("there is no Chromium", allow_module_level=True)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    unet = tiny_model.SHALLOW | {"time_cond_proj_dim": 256}
    student = tiny_model.write(folder / "student", unet=unet, scheduler="LCMScheduler")
    teacher = tiny_model.write(folder / "teacher", unet=tiny_model.SHALLOW)
    flags = (f"--model={student}", f"--teacher={teacher}", "--teacher_steps=5", "--max_batch=2", f"--prompt={PROMPT}")
    with serve(*flags, optimized=False) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def visit(server, chromium):
    """visit(**context options) -> a page that has drawn everything once; errors and foreign requests fail the test."""
    problems, contexts = [], []

    def check(request):
        if urlsplit(request.url).scheme in ("http", "https") and urlsplit(request.url).hostname != "127.0.0.1":
            problems.append(f"a request to {request.url}")

    def make(**options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", check)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.address)
        for name in ("image", "teacher", "strip"):
            page.locator(f"#{name} img").first.wait_for()
        return page

    yield make
    for context in contexts:
        context.close()
    assert problems == [], server.log()


def read(page, place="#image img"):
    """(settings, pixels) of an image of the page."""
    url = page.locator(place).first.get_attribute("src")
    data = base64.b64decode(url.partition(",")[2])
    return png.read(io.BytesIO(data)), Image.open(io.BytesIO(data)).tobytes()


def wait(page, place="#image img", **settings):
    """Wait for an image with these settings, and return its pixels."""
    for _ in range(300):
        found, pixels = read(page, place)
        if all(getattr(found, name) == value for name, value in settings.items()):
            return pixels
        page.wait_for_timeout(50)
    raise AssertionError(f"there is no image with {settings}; the last has {found}")


def slide(page, label, value):
    """Set a slider by the number beside it, as a keyboard does."""
    number = page.get_by_role("spinbutton", name=label)
    number.fill(str(value))
    number.press("Tab")


def test_the_image_follows_the_prompt_while_it_is_typed(visit):
    page = visit()
    before = read(page)
    assert before[0].prompt == PROMPT
    prompt = page.get_by_label("Prompt")
    prompt.fill("pasted")  # without a key
    wait(page, prompt="pasted")
    prompt.fill("")
    prompt.press_sequentially("two green squares", delay=5)
    after = wait(page, prompt="two green squares")
    assert after != before[1]
    wait(page, "#teacher img", prompt="two green squares", num_inference_steps=5)
    assert re.fullmatch(r"5 steps · [\d.]+ m?s", page.locator("#teacher figcaption").inner_text())
    # The newest request has won: nothing older comes later.
    page.wait_for_timeout(300)
    assert read(page)[0].prompt == "two green squares"
    assert page.locator("#status").inner_text().startswith("1 image at 4 steps in")


def test_sliders_and_the_strip_of_steps(visit):
    page = visit()
    pixels = [read(page)[1]]
    for label, value, name in (
        ("Steps", 2, "num_inference_steps"),
        ("Guidance", 3, "guidance_scale"),
        ("Seed", 77, "seed"),
    ):
        slide(page, label, value)
        pixels.append(wait(page, **{name: value}))
    assert len(set(pixels)) == 4
    wait(page, "#strip figure:nth-child(4) img", seed=77, guidance_scale=3)
    strip = [read(page, f"#strip figure:nth-child({i}) img") for i in (1, 2, 3, 4)]
    assert [settings.num_inference_steps for settings, _ in strip] == [1, 2, 4, 8]
    assert len({each for _, each in strip}) == 4 and strip[1][1] == pixels[-1]
    page.get_by_label("Sampler").click()
    page.get_by_role("option", name="tcd").click()
    assert wait(page, sampler="tcd") not in pixels
    slide(page, "Images", 2)
    page.locator("#image figure:nth-child(2) img").wait_for()
    assert read(page, "#image figure:nth-child(2) img")[0].number == 1
    page.get_by_label("Steps strip").uncheck()
    page.locator("#strip").wait_for(state="hidden")
    page.get_by_label("Teacher").uncheck()
    page.locator("#teacher").wait_for(state="hidden")
    page.get_by_role("button", name="New seed").click()
    seed = page.get_by_role("spinbutton", name="Seed")
    playwright.expect(seed).not_to_have_value("77")
    wait(page, seed=int(seed.input_value()))


def test_a_stroke_on_the_canvas_changes_the_image(visit, tmp_path):
    page = visit()
    plain = read(page)[1]
    box = page.locator("canvas").bounding_box()
    x, y = box["x"] + box["width"] / 3, box["y"] + box["height"] / 3
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 60, steps=4)
    page.mouse.up()
    drawn = wait(page, strength=0.6)
    assert drawn != plain
    page.get_by_role("button", name="green").click()
    page.locator("canvas").focus()
    for key in ("ArrowRight", "ArrowDown", "Space"):
        page.keyboard.press(key)
    page.wait_for_timeout(500)
    assert wait(page, strength=0.6) != drawn
    page.get_by_role("button", name="Clear").click()
    assert wait(page, strength=None) == plain
    Image.new("RGB", (300, 200), "blue").save(tmp_path / "photo.jpg")
    page.get_by_label("Photo to draw on").set_input_files(tmp_path / "photo.jpg")
    photo = wait(page, strength=0.6)
    assert photo not in (plain, drawn)
    (tmp_path / "text.png").write_text("no image")
    page.get_by_label("Photo to draw on").set_input_files(tmp_path / "text.png")
    playwright.expect(page.locator("#status")).to_contain_text("text.png is not an image")
    page.get_by_role("button", name="Undo").click()
    assert wait(page, strength=None) == plain


def test_settings_are_copied_kept_and_restored_from_a_dropped_png(visit, tmp_path):
    page = visit(permissions=["clipboard-read", "clipboard-write"], accept_downloads=True)
    slide(page, "Seed", 4321)
    original = wait(page, seed=4321)
    page.locator("#image").get_by_role("button", name="Copy settings").click()
    playwright.expect(page.locator("#status")).to_have_text("Settings copied.")
    text = page.evaluate("navigator.clipboard.readText()")
    assert text.startswith(PROMPT) and "Seed: 4321" in text and "Steps: 4" in text
    page.locator("#image").get_by_role("button", name="Keep").click()
    with page.expect_download() as download:
        page.locator("#gallery").get_by_role("link", name="Download").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert png.read(file).seed == 4321 and file.name == "seed4321-0-4steps.png"

    page.get_by_label("Prompt").fill("something else")
    slide(page, "Seed", 1)
    slide(page, "Steps", 1)
    wait(page, prompt="something else", seed=1, num_inference_steps=1)
    page.get_by_label("PNG whose settings are restored").set_input_files(file)
    assert wait(page, prompt=PROMPT, seed=4321, num_inference_steps=4) == original
    assert page.get_by_label("Prompt").input_value() == PROMPT

    slide(page, "Seed", 2)
    wait(page, seed=2)
    page.locator("#gallery").get_by_role("button", name="Use settings").click()
    assert wait(page, seed=4321) == original
    page.locator("#gallery").get_by_role("button", name="Remove").click()
    playwright.expect(page.locator("#gallery img")).to_have_count(0)

    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.png")
    page.get_by_label("PNG whose settings are restored").set_input_files(tmp_path / "foreign.png")
    playwright.expect(page.locator("#status .wrong")).to_contain_text("The settings cannot be restored")
    page.wait_for_timeout(700)  # in which another image would be drawn, whose status replaces the message
    playwright.expect(page.locator("#status .wrong")).to_contain_text("The settings cannot be restored")


def test_a_phone_needs_no_horizontal_scrolling(visit):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.locator("#image").get_by_role("button", name="Keep").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    right = "[...document.querySelectorAll('button, input, canvas, img, a')].map(e => e.getBoundingClientRect().right)"
    assert max(page.evaluate(right)) <= 390
    first = page.locator("#image img").bounding_box()
    assert first["y"] < 400, "the image is in sight while one types"


def test_keyboard_and_labels(visit):
    page = visit()
    nameless = """[...document.querySelectorAll('input, textarea, select, button, canvas, a[href]')]
        .filter(e => e.offsetParent && !(e.ariaLabel || e.getAttribute('aria-labelledby') || e.title
            || e.labels?.length || e.innerText?.trim())).map(e => e.outerHTML.slice(0, 200))"""
    assert page.evaluate(nameless) == []
    page.get_by_label("Prompt").focus()
    order, outlined = [], True
    for _ in range(60):
        page.keyboard.press("Tab")
        active = "document.activeElement"
        order.append(
            page.evaluate(f"{active}.ariaLabel || {active}.innerText || {active}.labels?.[0]?.innerText || ''").strip()
        )
        outlined &= page.evaluate(
            f"!{active}.matches(':focus-visible') || getComputedStyle({active}).outlineStyle != 'none'"
        )
    places = [
        next(i for i, name in enumerate(order) if part in name)
        for part in ("Keep", "Canvas", "Steps", "Seed", "New seed")
    ]
    assert places == sorted(places) and outlined, order
    assert page.locator("#status [role=status]").get_attribute("aria-live") == "polite"
    assert page.evaluate("document.documentElement.lang") and page.title() == "lcm_jax"
    assert page.locator("#image img").get_attribute("alt") == PROMPT
