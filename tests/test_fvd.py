"""FVD: the network against one of our own in torch, the distance, and videos as folders and animations."""

import re

import jax
import numpy as np
import pytest
from PIL import Image
from random_inception import random_state_dict

from lcm_jax.evaluation.evaluate import Resources
from lcm_jax.evaluation.frechet import moments
from lcm_jax.evaluation.fvd import FVD, fvd, i3d_features, make_measure, prepare_clips, video_distance
from lcm_jax.evaluation.metrics import check_metrics
from lcm_jax.evaluation.videos import open_videos
from lcm_jax.models.i3d import I3D, INPUT_SIZE, abstract_i3d
from lcm_jax.models.layers import apply
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.published import Weights
from lcm_jax.weights.trees import to_params


def project(inputs: np.ndarray) -> np.ndarray:
    """Four features in place of I3D's: means of the quarters of a clip in time."""
    return inputs.reshape(len(inputs), 4, -1).mean(-1)


def write_video(folder, frames: np.ndarray, start: int = 0) -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames, start):
        Image.fromarray(frame).save(folder / f"{i}.png")


def numbered(count: int, value: int = 0, size: tuple[int, int] = (4, 6)) -> np.ndarray:
    """Frames whose first channel is the number of the frame, and whose second is `value`."""
    frames = np.zeros((count, *size, 3), np.uint8)
    frames[..., 0] = np.arange(count)[:, None, None]
    frames[..., 1] = value
    return frames


# ---- the network ----------------------------------------------------------------------------------------------------


def reference_logits(tensors: dict, x):
    """I3D in torch: x float32[B, 3, T, H, W] -> [B, classes]; padding as in TensorFlow, before each layer."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    tensors = {key: torch.from_numpy(value) for key, value in tensors.items()}

    def pad(x, size, stride):
        amounts = []
        for length, k, s in reversed(list(zip(x.shape[2:], size, stride, strict=True))):
            missing = max((-(-length // s) - 1) * s + k - length, 0)
            amounts += [missing // 2, missing - missing // 2]
        return functional.pad(x, amounts)

    def unit(x, name, stride=1):
        kernel = tensors[f"{name}.conv3d.weight"]
        x = functional.conv3d(pad(x, kernel.shape[2:], (stride,) * 3), kernel, stride=stride)
        mean, variance, scale, bias = (
            tensors[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.relu(functional.batch_norm(x, mean, variance, scale, bias, eps=1e-3))

    def pool(x, size, stride):
        return functional.max_pool3d(pad(x, size, stride), size, stride)

    def mixed(x, name):
        third = unit(unit(x, f"{name}.b2a"), f"{name}.b2b")
        last = unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")
        return torch.cat([unit(x, f"{name}.b0"), unit(unit(x, f"{name}.b1a"), f"{name}.b1b"), third, last], 1)

    x = pool(unit(x, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    x = pool(mixed(mixed(x, "Mixed_3b"), "Mixed_3c"), (3, 3, 3), (2, 2, 2))
    for letter in "bcdef":
        x = mixed(x, f"Mixed_4{letter}")
    x = mixed(mixed(pool(x, (2, 2, 2), (2, 2, 2)), "Mixed_5b"), "Mixed_5c")
    x = functional.avg_pool3d(x, (2, *x.shape[3:]), stride=1)
    logits = functional.conv3d(x, tensors["logits.conv3d.weight"], tensors["logits.conv3d.bias"])
    return logits[..., 0, 0].mean(2)


def test_the_network_is_torchs():
    """Of an eighth of the channels, for small frames."""
    torch = pytest.importorskip("torch")
    network = I3D(divisor=8)
    abstract = abstract_i3d(network)
    tensors = random_state_dict(abstract)
    x = np.random.default_rng(1).normal(size=(3, 16, 48, 32, 3)).astype(np.float32)
    x *= np.array([0.1, 1, 3], np.float32).reshape(3, 1, 1, 1, 1)  # so that their features differ
    with torch.no_grad():
        expected = reference_logits(tensors, torch.from_numpy(x.transpose(0, 4, 1, 2, 3))).numpy()
    params = to_params("i3d", tensors, abstract)
    program = jax.jit(lambda params, x: apply(network, params, x)).lower(params, x)
    found = np.asarray(program.compile({"xla_backend_optimization_level": "0"})(params, x))
    assert found.shape == (3, 50)
    spread = np.linalg.norm(expected - expected.mean(0))
    assert spread > 0.05 * np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) <= 1e-5 * spread


def test_the_network_has_the_parameters_of_the_published_file():
    leaves = jax.tree.leaves(abstract_i3d(I3D()))
    assert len(leaves) == 57 * 5 + 2 and sum(leaf.size for leaf in leaves) == 12_711_824


def test_frames_are_resized_as_torch_does():
    torch = pytest.importorskip("torch")
    clip = np.random.default_rng(0).integers(0, 256, (2, 33, 300, 3), dtype=np.uint8)
    x = torch.from_numpy(clip.transpose(3, 0, 1, 2)[None].astype(np.float32))
    resized = torch.nn.functional.interpolate(x, (2, INPUT_SIZE, INPUT_SIZE), mode="trilinear", align_corners=False)
    expected = resized[0].numpy().transpose(1, 2, 3, 0) / 127.5 - 1
    np.testing.assert_allclose(prepare_clips([clip])[0], expected, atol=2e-5)


def test_other_weights_are_an_error_that_names_the_keys(tmp_path):
    with pytest.raises(ModelError, match=r"i3d of i3d_pretrained_400\.pt: .*287 keys missing"):
        i3d_features({})
    with pytest.raises(ModelError, match=r"i3d_pretrained_400\.pt does not exist; get .* from https://"):
        write_video(tmp_path / "a", numbered(16))
        fvd(tmp_path, tmp_path, Weights(tmp_path))


# ---- the distance ---------------------------------------------------------------------------------------------------


def test_the_distance_has_covariances_of_the_population():
    """As StyleGAN-V's: divided by the number of clips."""
    rng = np.random.default_rng(0)
    own, other = rng.normal(0, 1, (9, 4)), rng.normal(1, 2, (7, 4))
    from scipy.linalg import sqrtm

    a, b = (np.cov(x, rowvar=False, bias=True) for x in (own, other))
    shift = np.sum((own.mean(0) - other.mean(0)) ** 2)
    expected = np.real(shift + np.trace(a + b - 2 * sqrtm(a @ b)))
    assert video_distance(moments(own), moments(other)) == pytest.approx(expected, rel=1e-6)


def test_from_folders_to_the_number(tmp_path):
    for i in range(5):
        write_video(tmp_path / "real" / f"{i}", numbered(20, value=10 * i))
        write_video(tmp_path / "own" / f"{i}", numbered(16, value=10 * i + 50))

    def batches(folder: str, random: bool) -> list:
        return [(clips, paths) for clips, paths in open_videos(tmp_path / folder, "--images", random).batches(2)]

    def resources(folder: str) -> Resources:
        made = Resources(lambda: batches(folder, True), reference=folder)
        made.once("i3d", lambda: make_measure(project))
        return made

    metric = FVD.create(resources("real"))
    assert "random clips of real" in metric.note
    rows = np.concatenate([metric.measure(*batch) for batch in batches("own", False)])
    assert rows.shape == (5, 4) and metric.result(rows)["fvd"] > 0.01 and metric.scores(rows) is None
    assert FVD.create(resources("own")).result(rows)["fvd"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="needs 2 or more images, got 1"):
        metric.result(rows[:1])


def test_images_are_an_error():
    with pytest.raises(ValueError, match=r"a clip is uint8\[8, 8, 3\], not uint8\[16, H, W, 3\]; FVD compares videos"):
        make_measure(project)(np.zeros((2, 8, 8, 3), np.uint8), ["", ""])


@pytest.mark.parametrize(("names", "source"), [(["fvd"], "shapes"), (["fid", "fvd"], None)])
def test_it_is_measured_alone_and_on_videos_that_are_there(names, source):
    check_metrics(["fvd"], None)
    with pytest.raises(ValueError, match="metrics 'fvd' measures videos, not images; use it alone"):
        check_metrics(names, source)


# ---- videos ---------------------------------------------------------------------------------------------------------


def test_clips_of_folders_and_animations(tmp_path):
    """Frames are ordered by number: 2 before 10."""
    write_video(tmp_path / "folder", numbered(30), start=5)
    frames = [Image.fromarray(frame) for frame in numbered(18) * 10]
    frames[0].save(tmp_path / "animation.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "dataset.json").write_text("{}")

    def read(random: bool) -> dict[str, list[int]]:
        ((clips, paths),) = open_videos(tmp_path, "--images", random).batches(3)
        return {path.name: clip[:, 0, 0, 0].tolist() for clip, path in zip(clips, paths, strict=True)}

    assert read(random=False) == {"animation.webp": list(range(0, 160, 10)), "folder": list(range(16))}
    drawn = read(random=True)
    assert drawn == read(random=True) != read(random=False)
    assert drawn["folder"] == list(range(drawn["folder"][0], drawn["folder"][0] + 16))


def test_short_videos_are_an_error_or_left_out(tmp_path):
    write_video(tmp_path / "long", numbered(16))
    write_video(tmp_path / "short", numbered(3))
    with pytest.raises(ValueError, match="short has 3 frames, and a clip has 16; remove it, or use --skip_bad"):
        open_videos(tmp_path, "--images", random=False)
    lines = []
    found = open_videos(tmp_path, "--images", random=False, skip_bad=True, log=lines.append)
    assert [path.name for path in found.paths] == ["long"] and len(lines) == 1 and "3 frames" in lines[0]
    (tmp_path / "long" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"--images=.* has no video of 16 frames or more"):
        open_videos(tmp_path, "--images", random=False, skip_bad=True, log=lines.append)


def _bad(name: str, folder) -> None:
    if name == "file":
        (folder.parent / folder.name).write_text("")
        return
    folder.mkdir()
    if name == "mp4":
        (folder / "a.mp4").write_bytes(b"ftyp")
    elif name == "sizes":
        write_video(folder / "a", numbered(16))
        Image.fromarray(numbered(1, size=(5, 5))[0]).save(folder / "a" / "3.png")
    elif name == "broken":
        write_video(folder / "a", numbered(16))
        (folder / "a" / "3.png").write_bytes((folder / "a" / "3.png").read_bytes()[:40])
    elif name == "text":
        (folder / "a.gif").write_text("not an animation")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "videos is not a folder"),
        ("file", "videos is not a folder"),
        ("empty", "has no videos; use a folder whose subfolders"),
        ("mp4", r"a\.mp4 is a video that cannot be decoded here; extract its frames .* a/%05d\.png"),
        ("sizes", r"a: 3\.png is 5 x 5, and its first frame 6 x 4"),
        ("broken", r"3\.png cannot be (decoded|opened) \("),
        ("text", r"a\.gif cannot be opened \("),
    ],
)
def test_folders_that_cannot_be_read_are_an_error(name, message, tmp_path):
    folder = tmp_path / "videos"
    if name != "missing":
        _bad(name, folder)
    with pytest.raises(ValueError, match=re.compile(message)) as caught:
        list(open_videos(folder, "--images", random=False).batches(1))
    assert "\n" not in str(caught.value)
