"""Prompts of any length as chunks of token ids, with a weight for each token if the prompt sets any.

The rules are those of A1111's web UI. A chunk holds as many tokens as the text encoder takes, less its begin and end:
75 for CLIP. A chunk that is full in the middle of a phrase ends after its last comma, if that is among its last 20
tokens, and the phrase begins the next chunk.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAX_CHUNKS = 16  # of a prompt: 1,200 tokens of CLIP
BACKTRACK = 20  # tokens from the end of a full chunk in which a comma ends it
FACTOR = 1.1  # of a pair of brackets without a number
BREAK = re.compile(r"\s*\bBREAK\b\s*")
# An escape or a lone backslash; a weight and its closing bracket; a bracket; a colon; text.
TOKEN = re.compile(r"\\[\\()\[\]]?|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|[()\[\]:]|[^\\()\[\]:]+")


class Segment(NamedTuple):
    """Part of a prompt whose tokens have one weight."""

    text: str
    weight: float


class Tokens(NamedTuple):
    """Encoded prompts.

    ids: int32[B, C, L], or int32[B, 2, C, L] for SDXL's two tokenizers; C is the largest number of chunks of a prompt,
    and shorter ones end with empty chunks. weights: float32 of the shape of `ids`, or None. chunks: int32[B], the
    number of chunks of each prompt.
    """

    ids: np.ndarray
    weights: np.ndarray | None
    chunks: np.ndarray

    def of(self, rows: np.ndarray, chunks: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return (ids, weights) of the prompts with these numbers, int[N], in their first `chunks` chunks."""
        weights = None if self.weights is None else self.weights[rows][..., :chunks, :]
        return self.ids[rows][..., :chunks, :], weights


def parse(prompt: str) -> list[list[Segment]]:
    """Return the sections of a prompt, between the words BREAK, as segments of different weights.

    `(text)` multiplies the weight of the text by 1.1, `[text]` divides it by 1.1, and `(text:1.3)` multiplies it by
    1.3; brackets nest, and one that is not closed extends to the end. A backslash makes the bracket or backslash after
    it text, and is left out before anything else. Raises ValueError for a weight that is not a finite number.
    """
    texts: list[tuple[str, int]] = []  # with the number of the section
    weights: list[float] = []  # of the texts
    opened: dict[str, list[int]] = {"(": [], "[": []}  # numbers of the texts that follow an open bracket
    section = 0

    def multiply(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    def add(text: str) -> None:
        texts.append((text, section))
        weights.append(1.0)

    for match in TOKEN.finditer(prompt):
        token = match[0]
        if token[0] == "\\":
            add(token[1:])
        elif token in opened:
            opened[token].append(len(texts))
        elif match["weight"] is not None and opened["("]:
            multiply("(", _number(match["weight"]))
        elif token == ")" and opened["("]:
            multiply("(", FACTOR)
        elif token == "]" and opened["["]:
            multiply("[", 1 / FACTOR)
        else:
            first, *others = BREAK.split(token)
            add(first)
            for text in others:
                section += 1
                add(text)
    for bracket, factor in (("(", FACTOR), ("[", 1 / FACTOR)):
        while opened[bracket]:
            multiply(bracket, factor)
    if not all(map(math.isfinite, weights)):
        raise ValueError("the brackets of a prompt multiply to an infinite weight; use fewer, or smaller weights")
    return _sections(texts, weights, section + 1)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"the weight {text[:40]!r} in a prompt is not a number; use one such as 1.3, or \\( and \\) for brackets"
        )
    return value


def _sections(texts: Sequence[tuple[str, int]], weights: Sequence[float], count: int) -> list[list[Segment]]:
    """Return the segments of each section; adjacent ones of one weight are joined, so that their words stay whole."""
    sections: list[list[Segment]] = [[] for _ in range(count)]
    for (text, section), weight in zip(texts, weights, strict=True):
        segments = sections[section]
        if segments and segments[-1].weight == weight:
            segments[-1] = Segment(segments[-1].text + text, weight)
        else:
            segments.append(Segment(text, weight))
    return sections


def encode_prompts(tokenizers: Sequence, prompts: Sequence[str], weighted: bool = False) -> Tokens:
    """Encode prompts with the tokenizer of each text encoder.

    weighted: read weights and BREAK as `parse` does; otherwise a prompt is plain text, brackets included. Raises
    ValueError for a prompt of more than MAX_CHUNKS chunks, and as `parse` does.
    """
    parsed = [parse(prompt) if weighted else [[Segment(prompt, 1.0)]] for prompt in prompts]
    encoded = [[_chunks(tokenizer, sections) for sections in parsed] for tokenizer in tokenizers]
    counts = np.array([[len(chunks) for chunks in each] for each in encoded], np.int32).max(axis=0, initial=1)
    for prompt, count in zip(prompts, counts, strict=True):
        if count > MAX_CHUNKS:
            size = tokenizers[0].model_max_length - 2
            raise ValueError(
                f"the prompt {prompt[:40]!r}... has {count} chunks of {size} tokens; use at most {MAX_CHUNKS} "
                f"({MAX_CHUNKS * size} tokens)"
            )
    filled = [
        _fill(tokenizer, each, int(counts.max(initial=1))) for tokenizer, each in zip(tokenizers, encoded, strict=True)
    ]
    if len({ids.shape for ids, _ in filled}) != 1:
        lengths = ", ".join(str(tokenizer.model_max_length) for tokenizer in tokenizers)
        raise ValueError(f"the tokenizers differ in model_max_length ({lengths}); use those of one model")
    ids, weights = (each[0] if len(each) == 1 else np.stack(each, axis=1) for each in zip(*filled, strict=True))
    return Tokens(ids, weights if weighted else None, counts)


def split_batches(chunks: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield batches of prompts with one number of chunks, so that no image depends on a longer prompt beside it.

    chunks: int[N], of each prompt. Yields (rows int[size], the numbers of the prompts; places, the indices in the batch
    that are in use; number of chunks). A prompt has the place of its number, modulo size, whatever is beside it.
    """
    for start in range(0, len(chunks), size):
        rows = np.minimum(start + np.arange(size), len(chunks) - 1)
        for count in np.unique(chunks[rows]):
            alike = np.flatnonzero(chunks[rows] == count)
            filled = np.full(size, rows[alike[0]])
            filled[alike] = rows[alike]
            yield filled, alike[alike < len(chunks) - start], int(count)


Chunk = list[tuple[int, float]]  # tokens and their weights


def _chunks(tokenizer, sections: Sequence[Sequence[Segment]]) -> list[Chunk]:
    """Return the chunks of a prompt, without begin and end: one or more for each section."""
    size = tokenizer.model_max_length - 2
    comma = tokenizer(",")["input_ids"][1:-1]
    chunks: list[Chunk] = []
    for section in sections:
        chunks.append([])
        pieces = tokenizer([text for text, _ in section], verbose=False)["input_ids"] if section else []
        for piece, (_, weight) in zip(pieces, section, strict=True):
            for token in piece[1:-1]:
                if len(chunks[-1]) == size:
                    kept = size if [token] == comma else _end_of_phrase(chunks[-1], comma)
                    chunks[-1:] = chunks[-1][:kept], chunks[-1][kept:]
                chunks[-1].append((token, weight))
    if len(chunks) > 1 and not chunks[-1]:  # BREAK at the end of a prompt
        chunks.pop()
    return chunks


def _end_of_phrase(chunk: Chunk, comma: list[int]) -> int:
    """Return the number of tokens up to the last comma among the last `BACKTRACK`, or all."""
    for i in range(len(chunk) - 1, max(len(chunk) - BACKTRACK, 0) - 1, -1):
        if [chunk[i][0]] == comma:
            return i + 1
    return len(chunk)


def _fill(tokenizer, prompts: Sequence[Sequence[Chunk]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids int32[B, count, L], weights float32[B, count, L]); begin, end and padding have weight 1."""
    shape = (len(prompts), count, tokenizer.model_max_length)
    ids, weights = np.full(shape, tokenizer.pad_token_id, np.int32), np.ones(shape, np.float32)
    ids[..., :2] = tokenizer.bos_token_id, tokenizer.eos_token_id
    for i, chunks in enumerate(prompts):
        for j, chunk in enumerate(chunks):
            tokens = [token for token, _ in chunk]
            ids[i, j, 1 : len(chunk) + 2] = [*tokens, tokenizer.eos_token_id]
            weights[i, j, 1 : len(chunk) + 1] = [weight for _, weight in chunk]
    return ids, weights
