"""Hub ids, against a small hub on this machine and caches made by hand."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file, save_file

from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.layout import needed_files

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOCATE = """
import sys
from lcm_jax.weights import layout
from lcm_jax.weights.errors import ModelError
try:
    print(layout.locate(sys.argv[1], *sys.argv[2:]))  # variant, alone
except ModelError as error:
    sys.exit(f"ModelError: {error}")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tiny_model.write(tmp_path_factory.mktemp("models") / "model")
    for part in ("unet", "vae", "text_encoder"):
        stem = layout.FILES[part]
        half = {k: v.astype(np.float16) for k, v in load_file(folder / part / f"{stem}.safetensors").items()}
        save_file(half, folder / part / f"{stem}.fp16.safetensors")
        (folder / part / f"{stem}.bin").write_bytes(b"not wanted")
    (folder / "v1.ckpt").write_bytes(b"not wanted")
    (folder / "README.md").write_text("not wanted")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"not wanted")
    return folder


@pytest.fixture
def server(model):
    """(address, paths asked for) of a hub with one public model, its UNet alone, one gated, and no other."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content: bytes, status: int = 200, **headers: str):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            asked.append(self.path.split("?")[0])
            path = asked[-1].removeprefix("/api/models").strip("/").split("/")
            root = model / "unet" if path[:2] == ["org", "unet"] else model
            names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
            if path[:2] == ["org", "gated"]:
                return self.answer(b"", 403, X_Error_Code="GatedRepo")
            if path[:2] not in (["org", "name"], ["org", "unet"]):
                return self.answer(b"", 404, X_Error_Code="RepoNotFound")
            if path[2:3] == ["revision"] and path[3] not in ("main", COMMIT):
                return self.answer(b"", 404, X_Error_Code="RevisionNotFound")
            if path[2:3] == ["tree"]:
                entries = [
                    {"type": "file", "path": n, "size": (root / n).stat().st_size, "oid": n.encode().hex()}
                    for n in names
                ]
                return self.answer(json.dumps(entries).encode(), Content_Type="application/json")
            if path[2:3] == ["resolve"]:
                name = "/".join(path[4:])
                return self.answer((root / name).read_bytes(), ETag=f'"{name.encode().hex()}"', X_Repo_Commit=COMMIT)
            about = {"id": "/".join(path[:2]), "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            return self.answer(json.dumps(about).encode(), Content_Type="application/json")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{hub.server_port}", asked
    hub.shutdown()


def locate(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", LOCATE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=home.parent, timeout=120)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


COMMON = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
}


def test_only_what_is_read_is_fetched_and_then_read_without_a_network(model, server, tmp_path):
    address, asked = server
    home = tmp_path / "home"
    done = locate(home, "org/name", HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    tokenizer = {f"tokenizer/{path.name}" for path in (model / "tokenizer").iterdir()}
    weights = {f"{part}/{layout.FILES[part]}.safetensors" for part in ("unet", "vae", "text_encoder")}
    assert files_of(folder) == COMMON | tokenizer | weights
    for name, tensor in folders.read_component(model, "unet")[1].items():
        assert folders.read_component(folder, "unet")[1][name].tobytes() == tensor.tobytes()

    asked.clear()
    offline = locate(home, "org/name", HF_HUB_OFFLINE="1", HF_ENDPOINT=address)
    assert offline.stdout == done.stdout and not asked
    unreachable = locate(home, "org/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.stdout == done.stdout, unreachable.stderr

    half = locate(home, f"org/name@{COMMIT}", "fp16", HF_ENDPOINT=address)
    assert half.returncode == 0, half.stderr
    assert {path.name for path in (Path(half.stdout.strip()) / "unet").glob("*.safetensors")} == {
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    }


def test_one_network_is_fetched_where_it_will_do(server, tmp_path):
    home = tmp_path / "home"
    done = locate(home, "org/unet", HF_ENDPOINT=server[0])
    assert done.returncode == 1 and "ModelError: org/unet is one network, and a folder" in done.stderr, done.stderr
    assert "--input=org/unet --output=DIR --format=diffusers --base=BASE" in done.stderr
    assert not list(home.rglob("*.safetensors"))
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = locate(home, "org/unet", "", "alone", HF_ENDPOINT=server[0], **environment)
        assert done.returncode == 0, done.stderr
        assert files_of(Path(done.stdout.strip())) == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_cache_that_cannot_be_written_is_not_a_hub_that_cannot_be_reached(server, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("a file")
    done = locate(tmp_path / "home", "org/name", HF_ENDPOINT=server[0])
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ModelError: org/name cannot be fetched into the cache {tmp_path / 'home' / 'hub'}: [Errno")
    assert "Traceback" not in done.stderr and "reached" not in last


@pytest.mark.parametrize(
    "name, message",
    [
        ("org/other", "there is no model 'org/other', neither a folder here nor on the hub; check the name"),
        ("org/gated", "org/gated requires accepting its terms; do so on its hub page"),
        ("org/name@v9", "org/name has no revision 'v9' on the hub; use a branch, a tag or a commit"),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, tmp_path, name, message):
    done = locate(tmp_path / "home", name, HF_ENDPOINT=server[0])
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(f"ModelError: {message}")
    assert "Traceback" not in done.stderr


def test_without_a_network_the_cache_is_read_or_the_id_is_named(model, tmp_path):
    cached = tmp_path / "home" / "hub" / "models--org--name"
    shutil.copytree(model, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    done = locate(tmp_path / "home", "org/name", HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == str(cached / "snapshots" / COMMIT), done.stderr
    done = locate(tmp_path / "home", "org/absent", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ModelError: 'org/absent' is not a folder here and not in the cache {tmp_path / 'home' / 'hub'}"
    )
    assert "the hub cannot be reached" in last and "or use a local folder" in last


def test_a_local_folder_of_this_name_wins(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert layout.locate("org/name") == Path("org/name")


def test_the_files_of_each_kind():
    common = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "README.md", "m.ckpt"]
    unet = "unet/diffusion_pytorch_model"
    for there, variant, expected in [
        ([f"{unet}.bin", f"{unet}.safetensors"], None, [f"{unet}.safetensors"]),
        ([f"{unet}.bin", f"{unet}.fp16.safetensors"], None, [f"{unet}.bin"]),
        ([f"{unet}.bin", f"{unet}.fp16.bin", f"{unet}.fp16.safetensors"], "fp16", [f"{unet}.fp16.safetensors"]),
        (["text_encoder/pytorch_model.bin"], None, ["text_encoder/pytorch_model.bin"]),
        (
            [
                f"{unet}.safetensors.index.json",
                f"{unet}-00001-of-00001.safetensors",
                f"{unet}-00001-of-00001.bin",
                f"{unet}.fp16-00001-of-00001.safetensors",
                f"{unet}.safetensors.index.fp16.json",
            ],
            "fp16",
            [f"{unet}.fp16-00001-of-00001.safetensors", f"{unet}.safetensors.index.fp16.json"],
        ),
        (
            [f"{unet}.bin.index.json", f"{unet}-00001-of-00001.bin", f"{unet}-00001-of-00001.fp16.bin"],
            None,
            [f"{unet}.bin.index.json", f"{unet}-00001-of-00001.bin"],
        ),
    ]:
        names = [*common, *there, f"{there[0].split('/')[0]}/config.json"]
        found = set(needed_files("org/name", names, variant))
        assert found == {*common[:3], *expected, names[-1]}
    with pytest.raises(
        ModelError, match="no weights of the unet in the variant fp16: there are diffusion_pytorch_model"
    ):
        needed_files("org/name", [*common, f"{unet}.safetensors"], "fp16")
    with pytest.raises(ModelError, match="org/name is not in diffusers layout"):
        needed_files("org/name", ["model.safetensors"])
