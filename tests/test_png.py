"""Settings in PNG files: JSON and A1111's text, written, read back by us and by Pillow, and damaged in every way."""

import dataclasses
import io
import json
import random
import re
import struct
import time
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.sampling import infotext, png
from lcm_jax.sampling.infotext import from_text, to_text
from lcm_jax.sampling.settings import Control, File, Lora, Settings, SettingsError, differences, from_json

IMAGE = Image.new("RGB", (4, 3), "red")
FULL = Settings(
    "a (red:1.2) circle, square",
    "blurry: yes",
    num_inference_steps=4,
    guidance_scale=7.5,
    sampler="euler_ancestral",
    seed=2**31 - 1,
    width=512,
    height=768,
    prompt_weights=True,
    clip_skip=1,
    eta=0.3,
    strength=0.75,
    padding_mask_crop=32,
    image=File("photo.png", "0" * 64),
    mask_image=File("mask, 1.png"),
    controls=(Control("canny", File("edges.png", "1" * 64), 0.5), Control("depth", File("depth.png"))),
    loras=(Lora(File("loras/style.safetensors", "ab" * 32), 0.8), Lora(File("x-lora"), -1.0)),
    number=11,
    row=3,
    batch_size=8,
    model="models/dream, shaper.safetensors",
    base="org/base",
    variant="fp16",
    vae="tiny.safetensors",
    dtype="bfloat16",
    fingerprint="2" * 64,
    device="cpu",
    jax="0.10.2",
    version="0.1.0",
)


def stored(*chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """A PNG with these chunks after its header."""
    data = io.BytesIO()
    IMAGE.save(data, format="png")
    content = data.getvalue()
    made = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return io.BytesIO(content[:33] + made + content[33:])  # signature and IHDR


def test_a_file_has_its_settings_to_the_last_field(tmp_path):
    png.write(IMAGE, tmp_path / "image.png", FULL)
    assert png.read(tmp_path / "image.png") == FULL
    with open(tmp_path / "image.png", "rb") as stream:
        assert png.read(stream) == FULL
    with Image.open(tmp_path / "image.png") as opened:  # as the usual tools do
        assert opened.convert("RGB").tobytes() == IMAGE.tobytes()
        assert opened.info["parameters"] == to_text(FULL)
        assert json.loads(opened.info["lcm_jax"])["seed"] == FULL.seed


def test_the_text_is_a1111s():
    assert to_text(FULL) == (
        "a (red:1.2) circle, square <lora:style:0.8> <lora:x-lora:-1>\n"
        "Negative prompt: blurry: yes\n"
        "Steps: 4, Sampler: Euler a, CFG scale: 7.5, Seed: 2147483647, Size: 512x768, "
        'Model: "dream, shaper", VAE: tiny, Denoising strength: 0.75, Clip skip: 2, Eta: 0.3, '
        'Lora hashes: "style: ababababab", Version: lcm_jax 0.1.0'
    )
    found = from_text(to_text(FULL))
    in_text = dataclasses.replace(FULL, padding_mask_crop=None, image=None, mask_image=None, controls=(), base=None)
    in_text = dataclasses.replace(in_text, number=0, row=0, batch_size=1, variant=None, dtype=None, fingerprint=None)
    in_text = dataclasses.replace(in_text, device=None, jax=None, model="dream, shaper", vae="tiny")
    loras = (Lora(File("style", "ababababab"), 0.8), Lora(File("x-lora"), -1.0))
    assert found == dataclasses.replace(in_text, loras=loras)


PARTS = [
    "a red circle",
    "\n",
    ", ",
    "Steps: ",
    "Steps: 20, Sampler: LCM, Seed: 1",
    ": ",
    '"',
    "\\",
    "é",
    "漢字",
    "😀",
    " ",
]
PARTS += ["Model: x, ", "(", ")", "[1]", "<lora", ">", "'", "\t", "{}", "\u2028", "\x85", "\x1f", "BREAK"]


def test_nasty_prompts_survive_in_json_and_in_text(tmp_path):
    rng = random.Random(0)
    for _ in range(300):
        prompt, negative, model = ("".join(rng.choices(PARTS, k=rng.randint(0, 8))) for _ in range(3))
        settings = Settings(prompt, negative or None, 4, 8.0, "lcm", 0, 64, 64, bool(rng.getrandbits(1)), model=model)
        file = io.BytesIO()
        info = PngInfo()
        info.add_text("parameters", to_text(settings))
        info.add_text("lcm_jax", settings.to_json())
        IMAGE.save(file, format="png", pnginfo=info)
        file.seek(0)
        assert png.read(file) == settings
        found = from_text(to_text(settings))
        stripped = (prompt.strip(), negative.strip() or None)
        assert (found.prompt, found.negative_prompt) == stripped
        assert (found.num_inference_steps, found.sampler, found.seed) == (4, "lcm", 0)
        has_markup = infotext.MARKUP.search(f"{prompt} {negative}") is not None
        assert found.prompt_weights == (settings.prompt_weights and has_markup)


def test_nul_is_left_out_of_the_text_alone(tmp_path):
    png.write(IMAGE, tmp_path / "image.png", Settings("a\0b"))
    assert png.read(tmp_path / "image.png").prompt == "a\0b"
    with Image.open(tmp_path / "image.png") as opened:
        assert opened.info["parameters"].startswith("ab\n")


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_a1111s_names(name):
    text = to_text(Settings("a", num_inference_steps=4, sampler=name))
    assert f"Sampler: {infotext.SAMPLERS[name]}, " in text + ", " and from_text(text).sampler == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a lighthouse, ((storm)), (coquettish), detailed\nNegative prompt: ugly, fat, (((deformed))), [blurry]\n"
            "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x704, Model hash: 45dee52b",
            Settings("a lighthouse, ((storm)), (coquettish), detailed", "ugly, fat, (((deformed))), [blurry]",
                     20, 7.0, "euler_ancestral", 965400086, 512, 704, True),
        ),
        (
            "one\ntwo <lora:add_detail:0.6>, three\nSteps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: "
            "6.5, Seed: 12345, Size: 832x1216, Model hash: abc123, Model: dream_8, Denoising strength: 0.4, "
            'Clip skip: 2, Hires upscale: 2, Lora hashes: "add_detail: 1a2b3c4d5e6f, other: 00", Version: v1.10.0\n'
            "Template: a {b|c}, Steps",
            Settings("one\ntwo, three", None, 28, 6.5, "dpmsolver++_karras", 12345, 832, 1216, clip_skip=1,
                     loras=(Lora(File("add_detail", "1a2b3c4d5e6f"), 0.6),), model="dream_8"),
        ),
        (
            "Negative prompt: x\r\nSteps: 9, Sampler: DPM++ SDE Karras, CFG scale: 1.0, Civitai resources: "
            '[{"type":"checkpoint","modelVersionId":290640}], Emphasis: No norm, Clip skip: 1, VAE: Automatic',
            Settings("", "x", 9, 1.0, "DPM++ SDE Karras"),
        ),
        ("Steps: 4", Settings("", num_inference_steps=4)),
        ("a <lora:x:1:0.5>\nSteps: 4", Settings("a <lora:x:1:0.5>", num_inference_steps=4)),
    ],
    ids=["first version", "extensions", "another site", "nothing else", "a tag of two weights"],
)  # fmt: skip
def test_texts_of_other_programs(text, expected):
    assert from_text(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red circle", "has no line that begins with 'Steps: '"),
        ("a\nSteps: 4x, Seed: 1", "Steps is '4x', not an integer"),
        ("a\nSteps: 4, CFG scale: nan", "Cfg scale is 'nan', not a number"),
        ("a\nSteps: 4, Size: 1x1x1", "Size is '1x1x1', not width x height"),
        ("a\nSteps: 4, Seed: " + "9" * 5000, "Seed is '9999"),
    ],
)
def test_wrong_text_is_named(text, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        from_text(text)


@pytest.mark.parametrize(
    "text", ["a" * 2**20, ': "' * 2**18, "<lora:" * 2**17, "<lora:a:" + "9" * 2**20, 'a: "\\' * 2**18, "\n" * 2**20]
)
def test_hostile_text_takes_no_longer_than_its_length(text):
    began = time.monotonic()
    from_text(f"{text}\nSteps: 4, {text.strip()}, Lora hashes: {text.strip()}")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "settings is [], not an object"),
        ("{}", "settings has no prompt"),
        ('{"prompt": 1}', "settings.prompt is 1, not a string"),
        ('{"prompt": "a", "seed": true}', "settings.seed is True, not an integer"),
        ('{"prompt": "a", "seed": 1.5}', "settings.seed is 1.5, not an integer"),
        ('{"prompt": "a", "guidance_scale": NaN}', "NaN is not a number"),
        ('{"prompt": "a", "guidance_scale": 1e999}', "settings.guidance_scale is inf, not a finite number"),
        ('{"prompt": "a", "prompt_weights": 1}', "settings.prompt_weights is 1, not true or false"),
        ('{"prompt": "a", "loras": {}}', "settings.loras is {}, not a list"),
        ('{"prompt": "a", "loras": [{"file": {}}]}', "settings.loras[0].file has no path"),
        ('{"prompt": "a", "controls": [[]]}', "settings.controls[0] is [], not an object"),
        ('{"prompt": "a", "row": 1}', "number, row and batch_size are 0, 1 and 1, which is not possible"),
        ('{"prompt": "a", "batch_size": 1000000000}', "and 1000000000, which is not possible"),
        ('{"prompt": "a", "number": 1, "row": 2, "batch_size": 4}', "number, row and batch_size are 1, 2 and 4"),
        ('{"prompt": "a", "more": 1}', "settings has the unknown field 'more'; use the version of lcm_jax that"),
    ],
)
def test_wrong_json_is_named(text, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        from_json(text)


def test_settings_at_their_defaults_are_left_out():
    assert Settings("a").to_json() == '{"prompt": "a"}'
    assert from_json('{"prompt": "a", "guidance_scale": 8, "seed": null}') == Settings("a", guidance_scale=8.0)


def test_differences_name_the_fields():
    other = dataclasses.replace(FULL, seed=5, loras=())
    assert differences(FULL, FULL) == []
    assert differences(FULL, other) == [
        "seed is 5, was 2147483647",
        "loras is [], was ['loras/style.safetensors' 'abababababab...babababababab' 0.8, 'x-lora' None -1.0]",
    ]


def test_an_image_is_compared_with_the_png_that_it_repeats(tmp_path):
    file, other = tmp_path / "image.png", Image.new("RGB", (4, 3), "blue")
    png.write(IMAGE, file, FULL)
    assert png.compare(file, FULL, IMAGE) == (True, f"identical to {file}")
    for settings, image, message in [
        (FULL, other, f"the image differs from {file}, whose settings are the same; its pixels were changed"),
        (dataclasses.replace(FULL, seed=5), IMAGE, f"may differ from {file}: seed is 5, was 2147483647"),
    ]:
        same, text = png.compare(file, settings, image)
        assert not same and message in text
    png.write(IMAGE, file, Settings("a"))
    assert png.compare(file, FULL, IMAGE) == (False, f"{file} was made by another program; the image will differ")


TEXT = b"parameters\0"


@pytest.mark.parametrize(
    "chunk",
    [
        (b"tEXt", TEXT + b"a \xe9\nSteps: 4"),
        (b"zTXt", TEXT + b"\0" + zlib.compress(b"a \xe9\nSteps: 4")),
        (b"iTXt", TEXT + b"\0\0en\0x\0" + "a é\nSteps: 4".encode()),
        (b"iTXt", TEXT + b"\1\0\0\0" + zlib.compress("a é\nSteps: 4".encode())),
    ],
)
def test_every_kind_of_text_chunk(chunk):
    assert png.read(stored((b"tEXt", b"Software\0x"), chunk, chunk)) == Settings("a é", num_inference_steps=4)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ((b"tEXt", b"Comment\0a"), "the file has no settings"),
        ((b"tEXt", TEXT + b"a" * 2**20), "has 1048587 bytes, more than 1048576"),
        ((b"zTXt", TEXT + b"\0" + zlib.compress(bytes(2**21))), "unpacks to more than 1048576 bytes"),
        ((b"iTXt", TEXT + b"\1\0\0\0" + zlib.compress(bytes(2**21))), "unpacks to more than 1048576 bytes"),
        ((b"zTXt", TEXT + b"\0" + zlib.compress(b"abc")[:-2]), "is truncated"),
        ((b"zTXt", TEXT + b"\0abc"), "cannot be unpacked"),
        ((b"iTXt", TEXT + b"\0\0\0\0\xff"), "is not UTF-8"),
    ],
)
def test_damaged_and_oversized_chunks(chunk, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        png.read(stored(chunk))
    (tmp_path / "image.png").write_bytes(stored(chunk).getvalue())
    with pytest.raises(SettingsError, match=rf"image.png: .*{message}"):
        png.read(tmp_path / "image.png")


def test_a_decompression_bomb_is_not_unpacked_again():
    """Only the first chunk of a keyword is read: the others cost nothing."""
    bomb = (b"zTXt", b"lcm_jax\0\0" + zlib.compress(bytes(2**20 - 1)))
    began = time.monotonic()
    with pytest.raises(SettingsError, match="not valid JSON"):
        png.read(stored(*[bomb] * 5000))
    assert time.monotonic() - began < 2


def test_files_that_are_no_png(tmp_path):
    data = io.BytesIO()
    IMAGE.save(data, format="jpeg")
    for content, message in [
        (data.getvalue(), "the file is not a PNG"),
        (b"", "the file is not a PNG"),
        (png.SIGNATURE, "the PNG is truncated"),
        (stored((b"tEXt", TEXT + b"Steps: 4")).getvalue()[:-20], "the PNG is truncated"),
        (stored((b"tEXt", TEXT + b"Steps: 4")).getvalue().replace(b"Steps: 4", b"Steps: 5"), "is damaged"),
        (png.SIGNATURE + b"\xff" * 100, "the PNG is truncated"),
    ]:
        with pytest.raises(SettingsError, match=message):
            png.read(io.BytesIO(content))
    with pytest.raises(FileNotFoundError):
        png.read(tmp_path / "nowhere.png")
