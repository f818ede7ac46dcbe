"""The source `folder`: captions wherever people keep them, every kind of file, exact crops, and what is left out."""

import io
import os
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import image, write, write_folder
from PIL import Image
from whole_runs import load_config

from lcm_jax.data import images
from lcm_jax.data.batches import ImageRecords
from lcm_jax.data.captioned import CaptionedDataset
from lcm_jax.data.folder import FolderSource, index_folder
from lcm_jax.data.loader import batches
from lcm_jax.data.prepared import PreparedImages
from lcm_jax.recipes import make_task

SIZE = 16


def captions(folder: Path, caption: str = "", field: str = "caption") -> tuple[dict[str, str], list[str]]:
    """({image: caption}, lines of the log)"""
    lines: list[str] = []
    entries = index_folder(str(folder.resolve()), "DIR", caption, [field], lines.append)
    read = lambda entry: (folder / entry.caption_file).read_text() if entry.caption_file else entry.captions[0]  # noqa: E731
    return {entry.image: read(entry) for entry in entries}, lines


def opened(folder: Path | str, tmp_path: Path, seed: int = 0, **settings: Any) -> tuple[CaptionedDataset, list[str]]:
    lines: list[str] = []
    settings = {"size": SIZE, "held_out": 2} | settings
    source = FolderSource(folder=str(folder), **settings)
    run = tempfile.mkdtemp(prefix="run", dir=tmp_path)  # a new one each time
    return source.open(seed, Path(run) / "index", lines.append), lines


# ---- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", [5, 4, 3, 2, 1])
def test_the_first_of_an_images_captions_counts(present, tmp_path):
    """Each kind of caption in the presence of all that come after it."""
    kinds = [
        {"a/metadata.jsonl": [{"file_name": "x.jpg", "caption": "row"}]},
        {"a/x.txt": "beside"},
        {"a/x.json": '"json"'},
        {"a/caption.txt": "folder"},
        {},
    ]
    folder = write(tmp_path, {"a/x.jpg": image(0)} | {k: v for kind in kinds[5 - present :] for k, v in kind.items()})
    found, lines = captions(folder, "all")
    assert found == {"a/x.jpg": ["all", "folder", '"json"', "beside", "row"][present - 1]}
    assert lines == ["1 images with captions in DIR"]


def test_captions_are_read_as_text_and_json(tmp_path):
    files = {
        "a.png": image(0),
        "a.txt": b"\xef\xbb\xbf a red circle\n",
        "b.JPG": image(1, kind="JPEG"),
        "b.json": {"text": "another", "title": "a blue square"},
        "c.d.gif": image(2, kind="GIF"),
        "c.d.TXT": "dotted",
        "sub/one.png": image(3),
        "sub/two.png": image(4),
        "sub/caption.txt": "a photo of sks dog",
        "sub/deep/three.png": image(5),
    }
    dataset, _ = opened(write(tmp_path / "set", files), tmp_path, caption="all", caption_field="title")
    read = [part[i]["caption"] for part in (dataset.train, dataset.held_out) for i in range(len(part))]
    dog = "a photo of sks dog"
    assert sorted(read) == sorted(["a red circle", "a blue square", "dotted", dog, dog, "all"])
    assert dataset.prompts(2) == read[-2:] and dataset.compositional_prompts(2) == []


ROWS = [
    {"file_name": "a.png", "text": "root"},
    {"file_name": "sub\\b.png", "text": "windows"},
    {"file_name": "./sub/../sub/c.png", "text": 'commas, and "quotes"'},
]


def csv(rows: list[dict]) -> str:
    quoted = lambda value: '"' + value.replace('"', '""') + '"'  # noqa: E731
    return "".join(",".join(map(quoted, row)) + "\r\n" for row in [list(rows[0]), *(row.values() for row in rows)])


@pytest.mark.parametrize("metadata", [{"metadata.jsonl": ROWS}, {"metadata.csv": csv(ROWS)}], ids=["jsonl", "csv"])
def test_metadata_of_hugging_face(metadata, tmp_path):
    files = {f"{name}.png": image(0) for name in ("a", "sub/b", "sub/c", "sub/d")}
    more = {"sub/metadata.jsonl": [{"file_name": "d.png", "text": "not me", "caption": "the field comes first"}]}
    found, lines = captions(write(tmp_path, files | metadata | more))
    expected = ["root", "windows", 'commas, and "quotes"', "the field comes first"]
    assert [found[name] for name in files] == expected and len(lines) == 1


BAD_ROWS = [
    {"file_name": "a.png", "text": "first"},
    "{broken",
    {"file_name": "../secret.png", "text": "above"},
    {"file_name": "/etc/passwd", "text": "absolute"},
    {"file_name": "a.png", "text": "second"},
    {"file_name": "none.png", "text": "no image"},
    {"file_name": "b.png", "text": 3},
    "[" * 100_000,
    {"text": "no name"},
    "3",
    "",
    {"file_name": "c.png", "text": "\ud800"},
    {"file_name": "a.png\0", "text": "NUL"},
]


def test_rows_that_cannot_be_used_are_counted_by_line(tmp_path):
    write(tmp_path, {"secret.png": image(9)})
    files = {f"{name}.png": image(0) for name in "abc"} | {"metadata.jsonl": BAD_ROWS}
    found, lines = captions(write(tmp_path / "set", files))
    assert found == {"a.png": "first"}
    assert lines[1:] == [
        "skipped rows of metadata with a file outside the folder: 2, first '../secret.png' in line 3 of "
        "'metadata.jsonl'",
        "skipped rows of metadata with a file_name that an earlier row has: 1, first 'a.png' in line 5 of "
        "'metadata.jsonl'",
        "skipped rows of metadata without an image: 2, first 'none.png' in line 6 of 'metadata.jsonl'",
        "skipped broken rows of metadata: 6, first line 2 of 'metadata.jsonl' (not JSON: Expecting property name "
        "enclosed in double quotes at column 2)",
        "skipped images without a caption: 2, first 'b.png'",
    ]


def test_rows_of_csv_that_cannot_be_used_are_counted_by_line(tmp_path):
    """A caption with a comma would be cut there, and a quote that is left open would swallow the rest."""
    table = 'file_name,text\r\na.png,good\r\n\r\nb.png,red, round\r\nc.png,"open\r\nd.png,lost\r\n'
    found, lines = captions(write(tmp_path, {f"{name}.png": image(0) for name in "abcd"} | {"metadata.csv": table}))
    assert found == {"a.png": "good"}
    assert lines[1] == (
        "skipped broken rows of metadata: 2, first line 4 of 'metadata.csv' (3 columns, but the header has 2; quote "
        "captions that contain commas)"
    )
    files = {"metadata.jsonl": [{"file_name": "a.png", "text": "json"}]}
    found, lines = captions(write(tmp_path, files))
    assert found == {"a.png": "good"} and "'a.png' in 'metadata.jsonl'" in " ".join(lines)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", "file_name;text\na.png;x\n", "all of its 1 rows are broken, first line 2 of .*no file_name"),
        ("metadata.csv", "file_name,label\na.png,x\n", "no text 'caption' or 'text', but the columns 'file_name', 'l"),
        ("metadata.csv", "file_name,text\n", "it has no row; repair the file, or move it out of data.folder$"),
        ("metadata.csv", '"file_name,text\na.png,x\n', "first line 2 of .* \\(not CSV: unexpected end of data"),
        ("metadata.csv", "file_name,text\na.png," + "x" * 200_000, r"field larger than field limit"),
        ("metadata.jsonl", "", "it has no row"),
        ("metadata.jsonl", '{"a": 1}\n', "no file_name, but the columns 'a'"),
        ("metadata.jsonl", "[1]\n", "no file_name, but a JSON list"),
        ("metadata.jsonl", "é".encode("latin-1"), "metadata file 'metadata.jsonl' is not UTF-8"),
        ("metadata.jsonl", "\0", "NUL"),
    ],
)
def test_metadata_without_a_row_is_an_error(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        captions(write(tmp_path, {"a.png": image(0), name: content}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_left_out_is_counted_in_one_line_each(tmp_path):
    files = {
        "a.png": image(0),
        "a.txt": "good",
        "b.png": image(1),
        "c.png": image(2),
        "README.txt": "about",
        "sub/caption.txt": "no image here",
        "phone.heic": b"x",
        ".hidden/d.png": image(3),
        "._a.png": b"a resource fork",
    }
    found, lines = captions(write(tmp_path, files))
    assert found == {"a.png": "good"}
    assert lines == [
        "1 images with captions in DIR",
        "skipped images without a caption: 2, first 'b.png'",
        "skipped captions without an image: 2, first 'README.txt'",
        "skipped other files: 1, first 'phone.heic'",
    ]


def test_links_that_leave_the_folder_are_not_followed(tmp_path):
    write(tmp_path, {"secret.txt": "secret", "other/x.png": image(0)})
    folder = write(tmp_path / "set", {"a.png": image(0), "a.txt": "a", "b.png": image(1)})
    for name, target in {
        "b.txt": "../secret.txt",
        "c.png": str(tmp_path / "other" / "x.png"),
        "other": "../other",
        "loop": ".",
        "none.png": "none",
        "d.png": "a.png",
        "d.txt": str(folder / "a.txt"),
    }.items():
        os.symlink(target, folder / name)
    os.mkfifo(folder / "pipe.png")
    found, lines = captions(folder)
    assert found == {"a.png": "a", "d.png": "a"}, "links within the folder are files of it"
    assert "skipped links that lead out of the folder or to no file: 5, first " in lines[1]
    os.symlink(folder, tmp_path / "link")
    assert len(opened(tmp_path / "link", tmp_path, held_out=1)[0].train) == 1, "the folder itself may be a link"


def test_names_that_no_encoding_has(tmp_path):
    folder = write(tmp_path / "set", {"a.png": image(0)})
    (folder / os.fsdecode(b"gr\xfcn.png")).write_bytes(b"broken")
    dataset, lines = opened(folder, tmp_path, held_out=1, caption="a dog")
    for part in (dataset.train, dataset.held_out):
        try:
            part[0]
        except ValueError as error:
            lines.append(str(error))
    assert all(line.encode() for line in lines) and "gr\\udcfcn.png" in lines[-1]


# ---- images ---------------------------------------------------------------------------------------------------------


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 64).save(file, "TIFF")
    return file.getvalue()


def animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (40, 24), color) for color in ("red", "blue")]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return file.getvalue()


KINDS = {
    "turned.jpg": image(0, kind="JPEG", exif=exif(6)),
    "inks.JPEG": image(1, kind="JPEG", mode="CMYK"),
    "palette.gif": image(2, kind="GIF", mode="P"),
    "clear.png": image(3, mode="RGBA"),
    "sixteen.tif": sixteen_bits(),
    "inks.tiff": image(4, kind="TIFF", mode="CMYK"),
    "animated.webp": animated(),
    "gray.bmp": image(5, kind="BMP", mode="L"),
    "really_a_png.jpg": image(6),
    "small.png": image(7, 5, 7),
}


def test_images_of_every_kind_and_size(tmp_path):
    folder = write(tmp_path / "set", KINDS)
    dataset, lines = opened(folder, tmp_path, held_out=1, caption="a dog")
    records = [part[i] for part in (dataset.train, dataset.held_out) for i in range(len(part))]
    expected = []
    for data in KINDS.values():
        rgb = images.to_rgb(images.open_upright(io.BytesIO(data)))
        expected.append(images.crop(rgb, SIZE, SIZE))
    assert len(records) == len(KINDS) and lines == [f"{len(KINDS)} images with captions in {folder}"]
    key = lambda pixels, sizes: (pixels.tobytes(), sizes.tolist())  # noqa: E731
    assert sorted(key(r["image"], r["time_ids"]) for r in records) == sorted(key(*each) for each in expected)
    sizes = {name: each[1].tolist() for name, each in zip(KINDS, expected, strict=True)}
    assert sizes["turned.jpg"] == [40, 24, 5, 0, SIZE, SIZE], "upright it is high: 40 x 24 -> 26 x 16"
    assert sizes["small.png"] == [7, 5, 3, 0, SIZE, SIZE], "what is smaller is enlarged: 7 x 5 -> 22 x 16"


def test_random_crops_and_flips_depend_on_seed_entry_and_repeat_alone(tmp_path):
    folder = write_folder(tmp_path / "set", 6)
    settings = {"crop": "random", "flip": True, "repeats": 20}
    dataset, _ = opened(folder, tmp_path, **settings)
    train, again = dataset.train, opened(folder, tmp_path, **settings)[0].train
    assert len(train) == 4 * 20 and len(dataset.held_out) == 2
    with pytest.raises(IndexError):
        train[80]
    entries = index_folder(folder, "DIR", "", ["caption"], lambda line: None)
    lefts, flips = set(), 0
    for i in reversed(range(80)):
        record = train[i]
        for name, value in again[i].items():
            np.testing.assert_array_equal(value, record[name])
        whole = Image.open(Path(folder) / entries[i % 4].image).resize((26, 16), Image.Resampling.BILINEAR)
        _, _, top, left, *_ = record["time_ids"].astype(int).tolist()
        straight = np.asarray(whole)[:, left : left + 16]
        mirrored = np.asarray(whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[:, left : left + 16]
        assert top == 0 and any((record["image"] == pixels).all() for pixels in (straight, mirrored))
        flips += int((record["image"] == mirrored).all())
        lefts.add(left)
    assert lefts == set(range(11)) and 25 < flips < 55
    other = opened(folder, tmp_path, seed=1, **settings)[0].train
    assert any((other[i]["image"] != train[i]["image"]).any() for i in range(4))
    for i in range(2):
        np.testing.assert_array_equal(dataset.held_out[i]["time_ids"], [24, 40, 0, 5, SIZE, SIZE])


@pytest.mark.parametrize("first", [1, 7])
def test_a_resumed_reader_continues_exactly_with_a_broken_image(first, tmp_path):
    folder = write_folder(tmp_path / "set", 9)
    write(tmp_path / "set", {"03.png": b"broken"})
    tokenize = lambda captions: np.array([[len(caption)] for caption in captions])  # noqa: E731

    def read_from(step: int):
        train = opened(folder, tmp_path, crop="random", flip=True, repeats=3)[0].train
        return batches(ImageRecords(train, tokenize), 4, seed=1, first=step, threads=3)

    whole = list(islice(read_from(0), first + 4))
    for expected, found in zip(whole[first:], read_from(first), strict=False):
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


# ---- the parts ------------------------------------------------------------------------------------------------------


def parts(folder: Path, tmp_path: Path, held_out: int) -> tuple[set[str], set[str]]:
    """Captions of the training part and of the held-out part."""
    dataset, _ = opened(folder, tmp_path, held_out=held_out)
    assert isinstance(dataset.train, PreparedImages)
    assert isinstance(dataset.held_out, PreparedImages)
    train, held = dataset.train, dataset.held_out
    return {train.caption(i) for i in range(len(train))}, {held.caption(i) for i in range(len(held))}


def test_the_held_out_part_resembles_a_sorted_set_and_stays_when_files_are_added(tmp_path):
    folder = tmp_path / "set"
    for kind in "abc":
        for i in range(30):
            write(folder, {f"{kind}/{i}.png": b"never opened", f"{kind}/{i}.txt": f"{kind}{i}"})
    train, held_out = parts(folder, tmp_path, held_out=18)
    assert len(train) == 72 and not train & held_out
    assert all(3 <= sum(caption.startswith(kind) for caption in held_out) <= 9 for kind in "abc")
    (tmp_path / "moved").mkdir()
    for path in sorted(folder.rglob("*.*"), reverse=True):  # elsewhere, and created in another order
        write(tmp_path / "moved", {str(path.relative_to(folder)): path.read_bytes()})
    assert parts(tmp_path / "moved", tmp_path, held_out=18) == (train, held_out)
    for i in range(5):
        write(folder, {f"new{i}.png": b"never opened", f"new{i}.txt": f"new{i}"})
    assert len(parts(folder, tmp_path, held_out=18)[1] & held_out) >= 18 - 5


def test_the_fingerprint_changes_with_the_training_part(tmp_path):
    folder = Path(write_folder(tmp_path / "set", 8))
    settings: dict = {"caption": "a dog"}
    fingerprint = lambda **more: opened(folder, tmp_path, **settings | more)[0].fingerprint  # noqa: E731
    first = fingerprint()
    assert fingerprint() == first
    entries = index_folder(str(folder), "DIR", "", ["caption"], lambda line: None)
    trained, held_out = entries[0], entries[-1]
    found = {first}
    for settings_ in [{"size": 8}, {"repeats": 2}, {"crop": "random"}, {"flip": True}, {"seed": 1}, {"held_out": 3}]:
        found.add(fingerprint(**settings_))
    write(folder, {held_out.image: image(50)})
    assert fingerprint() == first, "what is held out is not part of it"
    write(folder, {trained.image: image(50)})
    found.add(fingerprint())
    os.utime(folder / trained.image, ns=(1, 1))  # of the same length
    found.add(fingerprint())
    write(folder, {trained.caption_file: "another caption"})
    found.add(fingerprint())
    (folder / trained.caption_file).unlink()
    found.add(fingerprint())
    settings = {"caption": "a cat"}
    found.add(fingerprint())
    write(folder, {"metadata.jsonl": [{"file_name": trained.image, "text": "of metadata"}]})
    found.add(fingerprint())
    assert len(found) == 13


# ---- what cannot be read --------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_once_and_replaced(tmp_path):
    folder = Path(write_folder(tmp_path / "set", 12))
    broken: Mapping = {
        "01.png": b"broken",
        "02.png": image(2)[:60],
        "04.json": {"title": "x"},
        "05.txt": "é".encode("latin-1"),
        "06.json": "{",
    }
    dataset, lines = opened(write(folder, broken), tmp_path, held_out=1, repeats=2)
    train, again = dataset.train, opened(folder, tmp_path, held_out=1, repeats=2)[0].train
    for _ in range(2):
        for i in range(len(train)):
            np.testing.assert_array_equal(train[i]["image"], again[i]["image"])
    named = sorted(line for line in lines[1:])
    assert [line.split(" ")[1] for line in named] == ["'01.png'", "'02.png'", "'04.png'", "'05.png'", "'06.png'"]
    for line, reason in zip(named, ["format is unknown", "ImageError", "caption_field", "UTF-8", "JSON"], strict=True):
        assert reason in line and " of 11 so far (" in line
    gone = next(name for name in ("07.png", "08.png", "09.png") if (folder / name).exists())
    for name in ("07.png", "08.png", "09.png"):
        (folder / name).unlink()  # while the run reads
    assert len([train[i] for i in range(len(train))]) == 22 and any(gone in line for line in lines)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(
        ValueError, match=r"^data.folder: none of 11 records can be read; image .*; repair the files, or"
    ):
        train[0]


@pytest.mark.parametrize(
    "files, settings, message",
    [
        ({}, {"folder": ""}, "^data.folder is empty; set --config.data.folder to a folder of images$"),
        ({}, {"folder": "nowhere"}, "^data.folder 'nowhere' does not exist; set --config.data.folder to"),
        ({"x": "y"}, {"folder": "x"}, "^data.folder '.*x' is not a folder; set --config.data.folder to"),
        ({}, {}, "^data.folder '.*' has no image .*.tiff.; set --config.data.folder to a folder of images$"),
        ({"a.txt": "a"}, {}, "^data.folder '.*' has no image "),
        (
            {"a.png": b"", "b.png": b"", "caption.txt": "a"},
            {},
            "leaves none of the 2 records of data.folder to train on; ",
        ),
        (
            {"a.png": b""},
            {},
            "has no image with a caption .*; put a name.txt beside each name.jpg, or set --config.data.c",
        ),
        (
            {f"{i}.png": b"" for i in range(5)} | {"caption.txt": "a"},
            {},
            "^data.folder '.*' has 3 images to train on, each data.repeats 1 times, fewer than train.batch_size 4; low",
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_is_compiled(files, settings, message, tmp_path):
    folder = write(tmp_path, files)
    name = settings.get("folder", str(folder))
    source = FolderSource(folder=str(folder / name) if name == "x" else name, size=SIZE, held_out=2)
    with pytest.raises(ValueError, match=message) as caught:
        source.check(batch_size=4)
    assert "\n" not in str(caught.value)


def test_a_set_without_a_caption_is_an_error_that_counts(tmp_path):
    folder = write(tmp_path / "set", {"a.png": image(0), "b.png": image(1), "c.txt": "c"})
    with pytest.raises(
        ValueError,
        match=r"has no image with a caption \(skipped images without a caption: 2, first 'a.png'; captions without an "
        r"image: 1, first 'c.txt'\); put a name.txt beside each name.jpg, or set --config.data.caption to one for all$",
    ):
        opened(folder, tmp_path)


def test_a_folder_of_links_says_so(tmp_path):
    write(tmp_path, {"a.png": image(0), "set/x": ""})
    os.symlink(tmp_path / "a.png", tmp_path / "set" / "a.png")
    with pytest.raises(ValueError, match="has no image .*links that lead out of the folder or to no file: 1, first 'a"):
        FolderSource(folder=str(tmp_path / "set"), size=SIZE, held_out=1).check(1)


def test_a_workdir_within_the_folder_is_refused(tmp_path):
    folder = write_folder(tmp_path / "set", 4)
    with pytest.raises(ValueError, match="contains the workdir, whose previews are images; use another --workdir"):
        FolderSource(folder=folder, size=SIZE, held_out=1).open(0, tmp_path / "set" / "run" / "index", print)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("crop", "top", "^data.crop 'top' is not supported; use center or random$"),
        ("repeats", 0, "^data.repeats 0 is not supported; use a whole number of at least 1$"),
        ("flip", 1, "^data.flip 1 is not supported; use False or True$"),
    ],
)
def test_settings_have_ranges(name, value, message, tmp_path):
    config = load_config("shapes_vae")
    with config.ignore_type():
        config.data[name] = value
    with pytest.raises(ValueError, match=message):
        make_task(config, tmp_path / "run")


def test_an_autoencoder_trains_on_a_folder_without_captions(tmp_path):
    folder = write(tmp_path / "set", {f"{i}.png": image(i) for i in range(12)})
    config = load_config("shapes_vae")
    flags = {"source": "folder", "folder": str(folder), "size": SIZE, "held_out": 4}
    config.update_from_flattened_dict({f"data.{name}": value for name, value in flags.items()})
    config.update_from_flattened_dict({"train.batch_size": 8, "sample.images": 4})
    task = make_task(config, tmp_path / "run")
    batch = next(task.make_batches(0))
    assert batch.keys() == {"image"} and batch["image"].shape == (8, SIZE, SIZE, 3)


def test_a_run_does_not_resume_with_other_images(tmp_path):
    """Batches are chosen by the order of the images, which others would change."""
    source = FolderSource(folder=write_folder(tmp_path / "images"), size=16, held_out=4)
    open_it = lambda: source.open(0, tmp_path / "run" / "index", lambda line: None)  # noqa: E731
    first = open_it()
    assert open_it().fingerprint == first.fingerprint
    write(tmp_path / "images", {"more.png": image(99), "more.txt": "a circle"})
    with pytest.raises(ValueError, match="has other images than when this run began, 25 now; restore .*folder.sha256"):
        open_it()
    (tmp_path / "run" / "index" / "folder.sha256").unlink()
    assert len(open_it().train) == len(first.train) + 1


def test_empty_captions_are_none(tmp_path):
    """Taggers leave empty files; an image is not trained with the empty prompt because of one."""
    folder = write(tmp_path / "images", {"a.png": image(1), "a.txt": "", "b.png": image(2)})
    rows = [{"file_name": "d.png", "text": " "}, {"file_name": "e.png", "text": "a star"}]
    write(folder, {"c/metadata.jsonl": rows, "c/d.png": image(3), "c/e.png": image(4)})
    lines = []
    dataset = FolderSource(folder=str(folder), size=16, held_out=1, caption="a dog").open(
        0, tmp_path / "index", lines.append
    )
    captions = [dataset.train[i]["caption"] for i in range(len(dataset.train))] + dataset.prompts(1)
    assert sorted(captions) == ["a dog", "a dog", "a dog", "a star"]
    assert any("the caption is empty" in line for line in lines)
