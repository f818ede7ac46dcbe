"""CLIP's byte-pair tokenizer: building one for a closed set of words, loading one strictly, captions to token ids."""

import codecs
import hashlib
import json
import os
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
FILES = ("vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
MAX_LENGTH = 4096  # transformers uses 1e30 if the folder has no model_max_length


def import_transformers():
    """Import transformers late, since it takes seconds, and without its warning that torch is missing."""
    before = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
        else:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = before
    return transformers


def byte_alphabet() -> list[str]:
    """Return GPT-2's printable character for each byte 0..255: itself if Latin-1 prints it, else 256, 257, ..."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def merge_pair(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(pieces):
        whole = tuple(pieces[i : i + 2]) == pair
        merged.append("".join(pair) if whole else pieces[i])
        i += 2 if whole else 1
    return merged


def byte_pairs(pieces: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Encode by byte pairs: merge the adjacent pair of the lowest rank until none is left."""
    while pairs := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in merges]:
        pieces = merge_pair(pieces, min(pairs, key=merges.__getitem__))
    return pieces


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return merges by which each word becomes one token.

    A word's missing merges are appended after those of the words before it. Appended ones rank lowest, so that they
    cannot divert an earlier word, which always has a merge of lower rank left until it is whole.
    """
    alphabet, merges = byte_alphabet(), {}
    for word in words:
        pieces = [alphabet[byte] for byte in word.encode()]
        pieces[-1] += END_OF_WORD
        while len(pieces := byte_pairs(pieces, merges)) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
    return list(merges)


def check_word(word: str) -> None:
    lower = unicodedata.normalize("NFC", word).lower() == word
    if not lower or not (word.isalpha() or (len(word) == 1 and not word.isspace())):
        raise ValueError(f"word {word!r} cannot be one CLIP token; use lower-case letters only, or a single character")


def build(words: Iterable[str], folder: str | Path, model_max_length: int = 24) -> None:
    """Write a CLIP tokenizer in which each of `words` is one token and any other text still encodes, by its bytes.

    Ids: 256 bytes, 256 bytes that end a word, merges, start, end of text; the end has the largest id, as in CLIP.
    Writes vocab.json, merges.txt, tokenizer.json, tokenizer_config.json, special_tokens_map.json, the same bytes for
    the same words in any order. Raises ValueError for a word that the pre-tokenizer would split or change.
    """
    words = sorted(set(words))
    for word in words:
        check_word(word)
    if not 2 < model_max_length <= MAX_LENGTH:
        raise ValueError(f"model_max_length is {model_max_length}; it must be 3..{MAX_LENGTH}")

    alphabet, merges = byte_alphabet(), learn_merges(words)
    tokens = [*alphabet, *(c + END_OF_WORD for c in alphabet), *(a + b for a, b in merges), BOS, EOS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model_max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **names,
    }

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8", newline="\n")

    write("vocab.json", json.dumps(vocab, ensure_ascii=False))
    write("merges.txt", "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]))
    write("tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write("special_tokens_map.json", json.dumps(names, indent=2) + "\n")
    # Annotated as list[str], but the tokenizer takes pairs.
    fast = import_transformers().CLIPTokenizer(vocab=vocab, merges=merges)  # pyright: ignore[reportArgumentType]
    write("tokenizer.json", fast.backend_tokenizer.to_str(pretty=True))


def read_file(path: Path) -> dict:
    """Return the JSON object in a file of a tokenizer. Raises ValueError that names the file.

    transformers reads the same files, as UTF-8 only, so that another encoding is an error here.
    """
    content = path.read_bytes()
    if content.startswith(MARKS):
        raise ValueError(f"{path} begins with a byte order mark; save it as UTF-8 without one")
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {reprlib.repr(value)}, not a JSON object; fetch it again")
    return value


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Return token -> id from vocab.json or tokenizer.json, after a look at every file that transformers reads."""
    found = {path.name: read_file(path) for path in sorted(folder.glob("*.json")) if path.name in FILES}
    if (merges := folder / "merges.txt").is_file() and merges.read_bytes().startswith(MARKS):
        raise ValueError(f"{merges} begins with a byte order mark; save it as UTF-8 without one")
    length = found.get("tokenizer_config.json", {}).get("model_max_length", MAX_LENGTH)
    if type(length) not in (int, float):  # 1e30 stands for none
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: model_max_length={reprlib.repr(length)} is not supported; it must be "
            "an integer"
        )
    if "vocab.json" in found:
        name, vocab = "vocab.json", found["vocab.json"]
    elif "tokenizer.json" in found:
        name, model = "tokenizer.json", found["tokenizer.json"].get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
    else:
        raise FileNotFoundError(f"no tokenizer in {folder}: it needs vocab.json and merges.txt, or tokenizer.json")
    if not isinstance(vocab, dict) or not all(type(id) is int and 0 <= id < 2**24 for id in vocab.values()):
        raise ValueError(f"{folder / name} has no vocabulary of tokens and their ids; fetch it again")
    return vocab


def load(folder: str | Path):
    """Load the CLIP tokenizer of a folder as a transformers.CLIPTokenizer. Offline.

    transformers returns an empty tokenizer for files that it does not find: the result is compared with the vocabulary
    on disk. Raises FileNotFoundError or ValueError.
    """
    folder = Path(folder)
    transformers = import_transformers()
    vocab = read_vocabulary(folder)
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        empty, names = tokenizer("")["input_ids"], {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    except Exception as error:  # the tokenizers library raises nothing more specific
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"tokenizer in {folder} cannot be read ({reason}); fetch its files again") from error

    if tokenizer.vocab_size != len(vocab) or len(vocab) < 256:
        raise ValueError(
            f"tokenizer in {folder} loads with {tokenizer.vocab_size} tokens, its vocabulary file has {len(vocab)}; "
            "its files are damaged or of another tokenizer: fetch them again"
        )
    for name, token in names.items():
        if token not in vocab:
            shown = reprlib.repr(token)
            raise ValueError(f"tokenizer in {folder}: {name} {shown} is not in its vocabulary; fetch its files again")
    ends = [vocab[token] for token in names.values()]
    if empty != ends:
        raise ValueError(
            f"tokenizer in {folder} encodes '' as {reprlib.repr(empty)}, not {ends}; it must be a CLIP tokenizer"
        )
    if tokenizer.model_max_length > MAX_LENGTH:
        raise ValueError(f"tokenizer in {folder} has no model_max_length; add it to tokenizer_config.json")
    if type(tokenizer.model_max_length) is not int or tokenizer.model_max_length < 3:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: model_max_length={tokenizer.model_max_length} is not supported; it "
            f"must be an integer in 3..{MAX_LENGTH}"
        )
    return tokenizer


def token_lists(tokenizer, captions: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(captions), verbose=False)["input_ids"] if captions else []


def encode(tokenizer, captions: Sequence[str]) -> np.ndarray:
    """captions -> int32[B, model_max_length]: start, tokens, end of text, padding; longer ones are cut, and end."""
    length = tokenizer.model_max_length
    ids = np.full((len(captions), length), tokenizer.pad_token_id, np.int32)
    for row, tokens in zip(ids, token_lists(tokenizer, captions), strict=True):
        if len(tokens) > length:
            tokens = [*tokens[: length - 1], tokenizer.eos_token_id]
        row[: len(tokens)] = tokens
    return ids


def encode_for(tokenizers: Sequence, captions: Sequence[str]) -> np.ndarray:
    """captions -> int32[B, L] for one tokenizer, int32[B, n, L] for the n tokenizers of SDXL's text encoders."""
    ids = [encode(tokenizer, captions) for tokenizer in tokenizers]
    if len({each.shape for each in ids}) != 1:
        lengths = ", ".join(str(tokenizer.model_max_length) for tokenizer in tokenizers)
        raise ValueError(f"the tokenizers differ in model_max_length ({lengths}); use those of one model")
    return ids[0] if len(ids) == 1 else np.stack(ids, axis=1)


def digest(tokenizers: Sequence) -> str:
    """Return a sha256, in hexadecimal, that differs between tokenizers: of vocabularies, lengths and the empty text."""
    contents = [[sorted(each.get_vocab().items()), encode(each, [""]).tolist()] for each in tokenizers]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def open_tokenizers(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> list:
    """Load the tokenizer in `folder`, and for SDXL the one in `tokenizer_2` beside it.

    configs: of the text encoders, by component. Raises ValueError for a tokenizer that its text encoder does not fit.
    """
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in configs]
    tokenizers = [load(folder.with_name(f"tokenizer{name.removeprefix('text_encoder')}")) for name in encoders]
    for tokenizer, name in zip(tokenizers, encoders, strict=True):
        for what, value, option in (
            ("model_max_length", tokenizer.model_max_length, "max_position_embeddings"),
            ("vocabulary", len(tokenizer), "vocab_size"),
        ):
            if value > (limit := configs[name].get(option, value)):
                raise ValueError(
                    f"{folder}: the tokenizer's {what} is {value}, above the text encoder's {option} {limit}; use the "
                    "tokenizer that the model was trained with"
                )
    return tokenizers
