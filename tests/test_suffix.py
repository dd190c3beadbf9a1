"""Drafts from remembered text: which ones, how many, what is forgotten, and that remembering compiles nothing new.

A slow twin in Python finds every match by comparing. Laws are in ``test_laws.py``, and what every drafter keeps is in
``test_conformance.py``.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compiled import compilations, decoder

import specjax
from specjax import Cascade, ModelDrafter, NGramDrafter, SuffixDrafter

VOCAB = 6


@jax.jit
def propose(drafter, tokens_bs, length_b):
    context = specjax.Context(None, None, tokens_bs, length_b, jnp.full_like(length_b, 99))
    return drafter.propose(None, context, None)[0]


def drafts(drafter, *rows):
    """Returns the drafts of each row; past the rows' ends stand tokens that must not be read."""
    tokens_bs, length_b = specjax.pad_prompts(rows)
    tokens_bs = np.pad(tokens_bs, ((0, 64 - len(rows)), (0, 8 - tokens_bs.shape[1])), constant_values=5)
    proposal = propose(drafter, tokens_bs, np.pad(length_b, (0, 64 - len(rows)), constant_values=1))
    pairs = zip(proposal.tokens_bg.tolist(), proposal.length_b.tolist(), strict=True)
    return [tokens[:length] for tokens, length in pairs][: len(rows)]


def suffix(*texts, capacity=64, num_draft=3, min_n=1, max_n=4, min_share=0.5):
    drafter = SuffixDrafter.empty(VOCAB, capacity, num_draft, min_n=min_n, max_n=max_n, min_share=min_share)
    return specjax.remember(drafter, texts) if texts else drafter


def twin(drafter, row):
    """Returns the drafts from the memory by comparing the row's end with every place, or None where nothing matches."""
    text = np.asarray(drafter.text_m).tolist()
    for n in range(min(drafter.max_n, len(row)), 0, -1):
        depth = drafter.max_n + drafter.num_draft
        after = sorted((text[i : i + depth], i) for i in range(len(text)) if text[i : i + n] == row[-n:])
        if after:
            middle = after[len(after) // 2][0]
            found = []
            for j in range(min(n, drafter.num_draft)):
                sharing = sum(tokens[: n + j + 1] == middle[: n + j + 1] for tokens, _ in after)
                if n + j >= len(middle) or middle[n + j] < 0 or sharing < drafter.min_share * len(after):
                    break
                found.append(middle[n + j])
            return found if n >= drafter.min_n else []
    return None


@pytest.mark.parametrize("min_share", [0.0, 0.5, 0.75])
def test_drafts_are_those_of_the_twin(min_share):
    """For rows that never match their own text, over a memory that is full and has many equal suffixes."""
    random = np.random.default_rng(0)
    # Mostly 0, 1, 2, 0, ..
    texts = [(np.cumsum(random.random(size) < 0.85) % 3).tolist() for size in (30, 1, 45, 17)]
    drafter = suffix(*texts, capacity=80, min_share=min_share)
    rows = [random.permutation(4)[: random.integers(1, 5)].tolist() for _ in range(60)]
    wanted = [twin(drafter, row) or [] for row in rows]
    assert drafts(drafter, *rows) == wanted
    assert len({len(found) for found in wanted}) >= 2
    # The order of the suffixes is that of their tokens.
    depth, text = drafter.max_n + drafter.num_draft, np.asarray(drafter.text_m).tolist()
    ordered = [text[i : i + depth] for i in drafter.order_m.tolist()]
    assert ordered == sorted(ordered) and sorted(drafter.order_m.tolist()) == list(range(80))


def test_how_many_drafts():
    """As many as the match has tokens, and as the matches share; the longest match decides."""
    drafter = suffix([0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 3])
    assert drafts(drafter, [5, 1], [0, 1], [1, 2], [5, 5], [5]) == [[2], [2, 3], [3], [5], []]
    sure = dataclasses.replace(drafter, min_share=0.7)
    assert drafts(sure, [0, 1], [0, 1, 2]) == [[2], []]
    assert drafts(dataclasses.replace(drafter, min_n=2), [5, 1], [0, 1]) == [[], [2, 3]]


def test_the_rows_own_text_counts_too():
    """It wins over a match in the memory that is as long, not over a longer one, and where the memory has no draft."""
    drafter = suffix([1, 2, 3, 4])
    assert drafts(drafter, [2, 5, 1, 2], [1, 2, 5, 1, 2], [0, 3, 0, 3]) == [[3, 4], [5, 1], [0, 3]]
    assert drafts(suffix([1, 2]), [2, 5, 1, 2]) == [[5]]
    assert drafts(suffix(), [1, 2, 5, 1, 2], [3, 4]) == [[5, 1], []]


def test_no_match_passes_from_one_text_to_the_next():
    drafter = suffix([0, 1], [2, 3])
    assert drafts(drafter, [0, 1], [5, 1, 2], [1, 2]) == [[], [3], [3]]


def test_the_oldest_is_forgotten():
    """A text that is longer than the memory leaves its end."""
    drafter = suffix([0, 1, 2], capacity=8)
    assert drafter.text_m.tolist() == [-1, -1, -1, -1, -1, 0, 1, 2]
    drafter = specjax.remember(drafter, [[3, 4], [5, 5]])
    assert drafter.text_m.tolist() == [1, 2, -1, 3, 4, -1, 5, 5]
    assert drafts(drafter, [0], [3], [1]) == [[], [4], [2]]
    assert specjax.remember(drafter, [[0, 1] * 7]).text_m.tolist() == [0, 1] * 4


def test_nothing_to_remember_changes_nothing():
    drafter = suffix([0, 1, 2])
    for texts in ([[]], [[], []]):
        np.testing.assert_array_equal(specjax.remember(drafter, texts).text_m, drafter.text_m)


def test_padded_texts_and_generations():
    """Are remembered to their ends. Under ``jit`` a token outside of the vocabulary ends a text."""
    wanted = suffix([0, 1], [2, 3, 4]).text_m.tolist()
    texts, lengths = np.asarray([[0, 1, 9], [2, 3, 4]]), np.asarray([2, 3])
    assert specjax.remember(suffix(), texts, lengths).text_m.tolist() == wanted
    out = specjax.Generation(jnp.asarray(texts), jnp.asarray(lengths), None, None)
    assert specjax.remember(suffix(), out).text_m.tolist() == wanted
    inside = jax.jit(specjax.remember)(suffix(), jnp.asarray([[0, 1, 9, 2, 3, -7]]), jnp.asarray([6]))
    assert inside.text_m.tolist()[-7:] == [-1, 0, 1, -1, 2, 3, -1]


TARGET = decoder(2, 1, 0, scale=8)
PROMPTS = [[3, 6], [1, 5, 2], [2, 4, 1, 0, 5, 3, 2]]


def generate(drafter, **options):
    return specjax.generate(TARGET, PROMPTS, drafter=drafter, max_new_tokens=30, **options)


@pytest.mark.parametrize("cascade", [False, True])
def test_remembering_compiles_nothing_and_pays(cascade):
    """The second time, all drafts are accepted; also as the first of a cascade."""
    drafter = SuffixDrafter.empty(TARGET.vocab_size, 256, 4, max_n=4)
    if cascade:
        drafter = Cascade(drafter, ModelDrafter(decoder(1, 1, 1, scale=8), 4))
    greedy = {"sampling": specjax.Sampling(0.0), "fixed": True}
    first = generate(drafter, **greedy)
    drafter = specjax.remember(drafter, first)
    with compilations() as names:
        second = generate(drafter, **greedy)
        later = specjax.remember(specjax.remember(drafter, second), [[1, 2], [3] * 90, []])
        third = generate(later, **greedy)
    assert names == []
    for out in (second, third):
        np.testing.assert_array_equal(out.tokens, first.tokens)
    np.testing.assert_array_equal(second.stats.accepted, second.stats.drafted)
    assert (np.asarray(second.stats.rounds) < np.asarray(first.stats.rounds)).all()
    adaptive = generate(drafter, sampling=specjax.Sampling(0.0), costs=(1.0, 1.2) if not cascade else (1.0, 1.1, 1.2))
    np.testing.assert_array_equal(adaptive.tokens, first.tokens)


def test_the_contract_holds():
    assert specjax.check_drafter(suffix([0, 1, 2, 3]), specjax.testing.table_model(np.zeros((VOCAB,) * 2))) is None


# Bad input.

BAD = {
    "an id past the vocabulary": (
        lambda: specjax.remember(suffix(), [[1], [2, 6]]),
        ValueError,
        "text 1 holds token 6",
    ),
    "a negative id": (lambda: specjax.remember(suffix(), [[-1]]), ValueError, "text 0 holds token -1"),
    "floats": (lambda: specjax.remember(suffix(), np.ones((1, 2))), TypeError, "dtype float64; give integers"),
    "a flat text": (lambda: specjax.remember(suffix(), np.ones(2, np.int32)), ValueError, r"shape \(2,\)"),
    "wrong lengths": (lambda: specjax.remember(suffix(), np.ones((1, 2), np.int32), [3]), ValueError, "length 3"),
    "a drafter without memory": (
        lambda: specjax.remember(NGramDrafter(), [[1]]),
        TypeError,
        "NGramDrafter, which remembers nothing",
    ),
    "a cascade without memory": (
        lambda: specjax.remember(Cascade(NGramDrafter(), NGramDrafter()), [[1]]),
        TypeError,
        "no drafter of the cascade has a memory",
    ),
    "a share": (lambda: suffix(min_share=1.5), ValueError, "min_share is 1.5; give a number from 0 to 1"),
    "no room": (lambda: suffix(capacity=0), ValueError, "capacity must be an integer of at least 1, got 0"),
    "sizes": (lambda: suffix(min_n=3, max_n=2), ValueError, "max_n must be an integer of at least 3, got 2"),
    "another vocabulary": (lambda: generate(suffix()), ValueError, "vocabulary has 6 tokens and the target's 37"),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
