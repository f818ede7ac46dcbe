"""Long prompts in chunks and weights, by A1111's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcm_jax
from lcm_jax.data import prompts, tokenizer
from lcm_jax.data.prompts import encode_prompts, parse
from lcm_jax.models.stable_diffusion import emphasize

WORDS = ["a", "red", "blue", "circle", ","]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tokenizer of 75 words a chunk, each word a token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.build(WORDS, folder, model_max_length=77)
    return tokenizer.load(folder)


@pytest.fixture(scope="module")
def pipe():
    return lcm_jax.Pipeline.from_pretrained("shapes-lcm")


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [  # the examples that A1111 publishes with its parser
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55)]
            + [(", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1)],
        ),
        # Rules that its documentation names.
        ("", []),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:-.5)", [("a", -0.5)]),
        (r"a\\b \c", [("a\\b c", 1.0)]),
        ("a) b] c:1.2)", [("a) b] c:1.2)", 1.0)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("[a:1.2]", [("a:1.2", 1 / 1.1)]),
        ("[a (b:2]", [("a ", 1 / 1.1), ("b:2", 1.0)]),
    ],
)
def test_weights_of_a_prompt(prompt, segments):
    (section,) = parse(prompt)
    assert [text for text, _ in section] == [text for text, _ in segments]
    np.testing.assert_allclose([weight for _, weight in section], [weight for _, weight in segments], rtol=1e-15)


def test_break_separates_sections():
    texts = lambda prompt: [[text for text, _ in section] for section in parse(prompt)]  # noqa: E731
    assert texts("a BREAK  b\nBREAKFAST") == [["a"], ["b\nBREAKFAST"]]
    assert texts("BREAK a BREAK BREAK b BREAK") == [[""], ["a"], [""], ["b"], [""]]
    assert parse("(a BREAK b:2)") == [[("a", 2.0)], [("b", 2.0)]]


@pytest.mark.parametrize("number", ["1.2.3", ".", "9" * 400])
def test_a_weight_that_is_not_a_number_is_named(number):
    with pytest.raises(ValueError, match=r"in a prompt is not a number; use one such as 1.3"):
        parse(f"a (red:{number}) circle")


def test_an_infinite_weight_is_an_error():
    with pytest.raises(ValueError, match="multiply to an infinite weight; use fewer"):
        parse("(" * 8000 + "a")


def test_a_short_prompt_has_the_ids_of_the_tokenizer(clip):
    captions = ["a red circle", "", "red " * 75, "zebra's"]
    encoded = encode_prompts([clip], captions)
    assert encoded.weights is None and encoded.chunks.tolist() == [1, 1, 1, 1]
    np.testing.assert_array_equal(encoded.ids[:, 0], tokenizer.encode(clip, captions))


def test_a_long_prompt_is_chunks_of_75_tokens(clip):
    encoded = encode_prompts([clip], ["red " * 75 + "blue " * 76, "a circle"])
    red, blue = (clip(word)["input_ids"][1] for word in ("red", "blue"))
    assert encoded.ids.shape == (2, 3, 77) and encoded.chunks.tolist() == [3, 1]
    begin, end = clip.bos_token_id, clip.eos_token_id
    assert encoded.ids[0, 0].tolist() == [begin, *[red] * 75, end]
    assert encoded.ids[0, 1].tolist() == [begin, *[blue] * 75, end]
    assert encoded.ids[0, 2].tolist() == [begin, blue, *[end] * 75]
    np.testing.assert_array_equal(encoded.ids[1, 1:], np.repeat(tokenizer.encode(clip, [""]), 2, axis=0))


@pytest.mark.parametrize(
    ("before", "after", "first"),
    [
        (55, 20, 56),  # the comma is the last but 19: the 19 words after it move
        (54, 21, 75),  # the comma is the last but 20
        (74, 3, 75),  # the comma is the last
        (75, 3, 75),  # the comma does not fit
    ],
)
def test_a_full_chunk_ends_after_a_near_comma(clip, before, after, first):
    (ids,) = encode_prompts([clip], ["red " * before + ", " + "blue " * after]).ids
    comma = clip(",")["input_ids"][1]
    words = [[token for token in chunk[1:] if token != clip.eos_token_id] for chunk in ids.tolist()]
    assert [len(each) for each in words] == [first, before + 1 + after - first]
    assert sum(words, []).index(comma) == before  # nothing is lost or moved past another word


def test_break_ends_a_chunk_when_weights_are_read(clip):
    captions = ["a BREAK (red:1.5) circle BREAK", "(red)"]
    plain, weighted = encode_prompts([clip], captions), encode_prompts([clip], captions, weighted=True)
    assert plain.chunks.tolist() == [1, 1] and weighted.chunks.tolist() == [2, 1]
    np.testing.assert_array_equal(plain.ids[:, 0], tokenizer.encode(clip, captions))
    np.testing.assert_array_equal(weighted.ids[0], tokenizer.encode(clip, ["a", "red circle"]))
    expected = np.ones((2, 2, 77), np.float32)
    expected[0, 1, 1], expected[1, 0, 1] = 1.5, 1.1
    np.testing.assert_array_equal(weighted.weights, expected)


def test_too_many_chunks_are_an_error(clip):
    limit = 75 * prompts.MAX_CHUNKS
    assert encode_prompts([clip], ["red " * limit]).ids.shape == (1, prompts.MAX_CHUNKS, 77)
    with pytest.raises(ValueError, match=r"'red red .*has 17 chunks of 75 tokens; use at most 16 \(1200 tokens\)"):
        encode_prompts([clip], ["a", "red " * (limit + 1)])


def test_two_tokenizers_are_beside_each_other(clip, tmp_path):
    tokenizer.build(WORDS, tmp_path, model_max_length=12)
    other = tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"differ in model_max_length \(77, 12\); use those of one model"):
        encode_prompts([clip, other], ["a"])
    encoded = encode_prompts([clip, clip], ["(a:2)"] * 3, weighted=True)
    assert encoded.ids.shape == encoded.weights.shape == (3, 2, 1, 77)


def test_batches_have_one_number_of_chunks_and_keep_every_place():
    chunks, places = np.array([1, 3, 1, 1, 2, 2, 3]), {}
    for rows, used, count in prompts.split_batches(chunks, 3):
        assert rows.shape == (3,) and (chunks[rows] == count).all()
        places |= {int(rows[i]): int(i) for i in used}
    assert places == {i: i % 3 for i in range(7)}


def test_chunks_are_encoded_one_by_one(pipe):
    words = "a red circle above a blue square , three green stars".split()
    tokens = encode_prompts(pipe.tokenizers, [" ".join(words * 4), "a star"])
    context = pipe.model.encode_prompt(pipe.params, tokens.ids).context
    count, length = tokens.ids.shape[1:]
    assert count > 2
    for i in range(count):
        alone = pipe.model.encode_prompt(pipe.params, tokens.ids[:, i]).context
        np.testing.assert_allclose(context[:, i * length : (i + 1) * length], alone, atol=1e-5)


def test_emphasis_restores_the_mean_of_each_chunk():
    states = jax.random.normal(jax.random.key(0), (3, 5, 8)) + jnp.array([1.0, 1.0, 0.0])[:, None, None]
    states = states.at[2].add(-states[2].mean())
    weights = np.ones((3, 5), np.float32)
    weights[0, 1:3] = 1.5, 0.5
    weights[2, 1] = 1.5
    found = emphasize(states, weights)
    scaled = states[0] * weights[0][:, None]
    np.testing.assert_allclose(found[0], scaled * (states[0].mean() / scaled.mean()), rtol=1e-5)
    np.testing.assert_array_equal(found[1], states[1])
    # The mean of centered states is rounding error, and a factor of it would be anything.
    np.testing.assert_array_equal(found[2], states[2] * weights[2][:, None])
    # No image depends on its batch.
    np.testing.assert_allclose(emphasize(states[:1], weights[:1]), found[:1], rtol=1e-6)
