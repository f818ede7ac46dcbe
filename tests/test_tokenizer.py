"""The tokenizer that is built for a closed set of words, read back by transformers and by older readers' rules."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lcm_jax.data import tokenizer

WORDS = """a red green blue yellow circle square triangle star three two one four the above below left right of to and
there are is re redo ed , . 7 é""".split()
FILES = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.build(WORDS, folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def loaded(folder):
    return tokenizer.load(folder)


def test_every_word_is_one_token(loaded):
    for word in WORDS:
        ids = loaded(word)["input_ids"]
        assert len(ids) == 3, word
        assert loaded.decode(ids[1:2]) == word


def test_golden_encoding(folder, loaded):
    vocab = json.loads((folder / "vocab.json").read_text())
    bos, eos = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    assert (bos, eos) == (len(vocab) - 2, len(vocab) - 1)  # the end is the largest id: pooling by argmax finds it
    ids = tokenizer.encode(loaded, ["A red circle above  three squares", ""])
    assert ids.dtype == np.int32 and ids.shape == (2, 24)
    words = [vocab[f"{word}</w>"] for word in "a red circle above three".split()]
    squares = [vocab[piece] for piece in ("square", "s</w>") if piece in vocab]
    assert ids[0, :6].tolist() == [bos, *words]
    assert squares or loaded.decode(ids[0], skip_special_tokens=True) == "a red circle above three squares"
    assert ids[1].tolist() == [bos] + [eos] * 23


@pytest.mark.parametrize("text", ["zebra", "ünï 😀 漢字", "it's 12:34!", "red-green_blue", "\x00\x7f"])
def test_any_other_text_encodes_and_comes_back(loaded, text):
    ids = loaded(text)["input_ids"]
    assert loaded.eos_token_id not in ids[1:-1]
    assert loaded.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")


def test_long_captions_are_cut_and_end_with_the_end(loaded):
    captions = ["red " * 22, "red " * 23, "a", "red " * 40]
    ids = tokenizer.encode(loaded, captions)
    assert ids.shape == (4, 24)
    assert (ids[:, -1] == loaded.eos_token_id).all()
    assert (ids[[0, 1, 3], -2] != loaded.eos_token_id).all()
    assert tokenizer.encode(loaded, []).shape == (0, 24)


def test_older_readers_files_say_the_same(folder, loaded):
    """The rule of CLIP's own reader, from vocab.json and merges.txt alone: merge by rank, look up."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").strip().split("\n")
    assert lines[0].startswith("#version")
    ranks = {tuple(line.split()): i for i, line in enumerate(lines[1:])}
    assert len(ranks) == len(lines) - 1
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(len(vocab)))
    for word in [*WORDS, "squares", "greedy", "threefold"]:
        pieces = [tokenizer.byte_alphabet()[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        ids = [vocab[piece] for piece in tokenizer.byte_pairs(pieces, ranks)]
        assert ids == loaded(word)["input_ids"][1:-1]


def test_the_byte_alphabet_is_clips():
    characters = tokenizer.byte_alphabet()
    assert len(set(characters)) == 256
    assert (characters[ord("!")], characters[ord(" ")], characters[0], characters[0xAD]) == ("!", "Ġ", "Ā", "Ń")


def test_loads_without_tokenizer_json_and_without_vocab_json(copy, loaded):
    captions = ["a red zebra 😀 above the blue star's"]
    expected = tokenizer.encode(loaded, captions)
    (copy / "tokenizer.json").rename(copy / "aside")
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.load(copy), captions), expected)
    (copy / "aside").rename(copy / "tokenizer.json")
    (copy / "vocab.json").unlink()
    (copy / "merges.txt").unlink()
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.load(copy), captions), expected)


def test_output_is_deterministic(folder, tmp_path):
    tokenizer.build(reversed([*WORDS, "red"]), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("word", ["Red", "two words", "", "red2", "'s", "e\u0301"])
def test_a_word_that_cannot_be_one_token_is_refused(word, tmp_path):
    with pytest.raises(ValueError, match="cannot be one CLIP token"):
        tokenizer.build(["red", word], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_or_damaged_folder_is_an_error(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in .*nowhere"):
        tokenizer.load(tmp_path / "nowhere")

    vocab = json.loads((copy / "vocab.json").read_text())
    (copy / "vocab.json").write_text(json.dumps(vocab | {"more": len(vocab)}))
    with pytest.raises(ValueError, match="its vocabulary file has"):
        tokenizer.load(copy)

    (copy / "tokenizer.json").unlink()
    two = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (copy / "vocab.json").write_text(json.dumps(two))
    with pytest.raises(ValueError, match="cannot be read .*out of vocabulary"):
        tokenizer.load(copy)
    (copy / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="loads with 2 tokens"):
        tokenizer.load(copy)
    (copy / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="vocab.json is not valid JSON"):
        tokenizer.load(copy)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"])
def test_a_byte_order_mark_is_named(copy, name, encoding):
    (copy / name).write_text((copy / name).read_text(encoding="utf-8"), encoding=encoding)
    with pytest.raises(ValueError, match=f"{name} begins with a byte order mark; save it as UTF-8 without one"):
        tokenizer.load(copy)


@pytest.mark.parametrize("length", ["77", None, True, 2, 7.5, [77]])
def test_the_length_is_an_integer(copy, length):
    config = json.loads((copy / "tokenizer_config.json").read_text()) | {"model_max_length": length}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model_max_length") as caught:
        tokenizer.load(copy)
    assert len(str(caught.value).splitlines()) == 1


def test_a_vocabulary_without_its_ends_is_an_error(copy):
    (copy / "tokenizer.json").unlink()
    vocab = json.loads((copy / "vocab.json").read_text())
    del vocab["<|startoftext|>"]
    (copy / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match="bos_token .* is not in its vocabulary"):
        tokenizer.load(copy)


def test_the_length_must_be_known(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no model_max_length"):
        tokenizer.load(copy)


def test_import_is_light_and_use_is_quiet_without_torch(folder):
    """In a process where torch cannot be found, as after a run-time install."""
    script = """
import sys, importlib.util, importlib.metadata
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "torch" else find(name, *a)
sys.modules["torch"] = None
from lcm_jax.data import tokenizer
assert "transformers" not in sys.modules
ids = tokenizer.encode(tokenizer.load(sys.argv[1]), ["a red circle", "red " * 2000])
print(ids.shape)
"""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    environment.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS", None)
    command = [sys.executable, "-c", script, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(2, 24)\n", "")
