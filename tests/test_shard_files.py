"""Shards behind URLs: the records of local files, read in ranges, and errors that name the package or the file."""

import http.server
import re
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from record_files import make_rows, write_parquet
from shards import write_shards

from lcm_jax.data import shard_files
from lcm_jax.data.captioned import CaptionedDataset, SourceError
from lcm_jax.data.parquet import ParquetSource
from lcm_jax.data.shard_files import expand
from lcm_jax.data.tar_shards import TarSource

MEMORY = fsspec.filesystem("memory")


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves files as object stores do, in the ranges that are asked for, and counts the requests."""

    requests: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range")
        if body:
            self.requests.append(f"{self.path} {wanted}")
        total, span = len(data), re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if span:
            data = data[int(span[1]) : int(span[2] or total) + 1]
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(data) - 1}/{total}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(pattern of local shards, URL of their folder by HTTP)"""
    folder = tmp_path_factory.mktemp("served")
    pattern = write_shards(folder / "shards")
    handler = lambda *arguments: Ranges(*arguments, directory=str(folder / "shards"))  # noqa: E731
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield pattern, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def opened(shards: Any, tmp_path: Path, **settings: Any) -> tuple[CaptionedDataset, list[str]]:
    lines: list[str] = []
    source = TarSource(shards=shards, size=16, held_out=4, **settings)
    source.check(4)
    return source.open(0, tmp_path / "index", lines.append), lines


@pytest.mark.parametrize("scheme", ["memory", "http"])
def test_shards_behind_a_url_are_those_of_files(scheme, served, tmp_path):
    pattern, url = served
    local, _ = opened(pattern, tmp_path)
    folder = Path(pattern).parent
    if scheme == "memory":
        for path in folder.glob("*.tar"):
            MEMORY.pipe(f"/data/{path.name}", path.read_bytes())
        remote = ["memory://data/*.tar", "memory://data/{00..01}.tar", ("memory://data/00.tar", "memory://data/01.tar")]
    else:
        pytest.importorskip("aiohttp")
        remote = [f"{url}/{{00..01}}.tar"]
    Ranges.requests.clear()
    for shards in remote:
        found, lines = opened(shards, tmp_path)
    if scheme == "http":
        assert len(Ranges.requests) == 2, "the headers of each small shard are one request"
        assert len(lines) >= 2 and lines[0].startswith("reading the headers of 2 shards, 0.0 GB")
    assert len(found.train) == len(local.train) == 20
    for i in range(20):
        for name in ("image", "time_ids"):
            np.testing.assert_array_equal(found.train[i][name], local.train[i][name])
        assert found.train[i]["caption"] == local.train[i]["caption"]
    _, lines = opened(remote[-1], tmp_path)
    assert not [line for line in lines if "records in" in line], "the index is kept"


def test_large_blocks_and_reads_across_them(served, monkeypatch):
    """Whatever the size of a block is, the same records."""
    pattern, _ = served
    data = Path(pattern.replace("{00..01}", "00")).read_bytes()
    MEMORY.pipe("/blocks/0.tar", data)
    file = shard_files.ShardFile("memory://blocks/0.tar", "data.shards")
    rng = np.random.default_rng(0)
    for block in (1, 700, 5000, 2**23):
        monkeypatch.setattr(shard_files, "BLOCK", block)
        with shard_files.open_reader(file) as read:
            for start, size in rng.integers(0, len(data) // 2, (50, 2)).tolist():
                assert read(start, size) == data[start : start + size]
            assert read(len(data) - 10, 100) == data[-10:] and read(len(data), 5) == b""


def test_parquet_behind_a_url(tmp_path):
    rows = [{"image": row["image"], "caption": row["caption"]} for row in make_rows(6)]
    path = write_parquet(tmp_path / "0.parquet", [*rows, {"image": {"bytes": None, "path": "a.png"}, "caption": "x"}])
    MEMORY.pipe("/rows/0.parquet", Path(path).read_bytes())
    MEMORY.pipe("/rows/a.png", rows[0]["image"])
    make = lambda shards: ParquetSource(shards=shards, size=16, held_out=1)  # noqa: E731
    found = make("memory://rows/*.parquet").open(0, tmp_path / "index", lambda line: None)
    local = make(path).open(0, tmp_path / "index", lambda line: None)
    for i in range(6):
        np.testing.assert_array_equal(found.train[i]["image"], local.train[i]["image"])
    assert found.held_out[0]["caption"] == "x", "of which the image is a file beside it"


def test_a_shard_that_goes_away_is_an_error_and_no_other_record(served, tmp_path):
    pattern, _ = served
    for path in Path(pattern).parent.glob("*.tar"):
        MEMORY.pipe(f"/gone/{path.name}", path.read_bytes())
    dataset, _ = opened("memory://gone/*.tar", tmp_path)
    MEMORY.rm("/gone", recursive=True)
    with pytest.raises(
        SourceError, match="^shard memory:///?gone/00.tar cannot be read .FileNotFoundError: .*to resume$"
    ):
        dataset.train[0]


@pytest.mark.parametrize(
    "shards, message",
    [
        (
            "memory://none/{00..03}.tar",
            "'memory://none/{00..03}.tar': 4 of 4 files are missing, first 'memory://none/00",
        ),
        ("memory://none/*.tar", "^data.shards 'memory://none/.*' matches no file; set it$"),
        ("ftps3://bucket/0.tar", "^data.shards: ftps3:// is not supported; use gs, s3, hf, https or a path$"),
        (
            "http://127.0.0.1:9/*.tar",
            "^data.shards 'http://127.0.0.1:9/.*' cannot be looked up .*; set it, or check the n",
        ),
    ],
)
def test_a_url_that_names_nothing_is_one_line(shards, message):
    if shards.startswith("http"):
        pytest.importorskip("aiohttp")
    with pytest.raises(ValueError, match=message) as caught:
        expand(shards, "data.shards", "set it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme, package, extra", [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_missing_package_is_named_with_its_extra(scheme, package, extra, monkeypatch):
    def missing(scheme: str) -> None:
        raise ImportError("Please install it")

    monkeypatch.setattr(shard_files.fsspec, "filesystem", missing)
    shard_files._file_system.cache_clear()
    match = rf"^data.shards: {scheme}:// requires the package {package}; run pip install 'lcm_jax\[{extra}\]'$"
    with pytest.raises(ValueError, match=match):
        expand(f"{scheme}://bucket/0.tar", "data.shards", "set it")


def test_schemes_that_need_no_extra():
    assert type(fsspec.get_filesystem_class("hf")).__name__ and not shard_files.is_url("/data/0.tar")
    assert shard_files.is_url("hf://datasets/me/set/0.tar")
