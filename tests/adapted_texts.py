"""What the texts of an adapted model must be, by one pass of the model without a cache; and blocks of the page."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import specjax

PAGE = Path(__file__).parent.parent / "docs" / "your_model.md"
PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 6, 5, 6, 5, 6, 5, 1, 2, 3, 4], [7, 8, 9, 7, 8]]


def run_section(heading):
    """Runs the blocks of one section of the page; returns their names."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n### {heading}\n")[1].split("\n### ")[0]
    names = {"__name__": heading}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def moved(x):
    """Returns a weight moved at random, since fresh models of packages repeat one token."""
    x = jnp.asarray(x)
    return x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)


def generate(target, drafter=None, prompts=PROMPTS, new=24, temperature=0.0):
    sampling = specjax.Sampling(temperature=temperature, seed=3)
    return specjax.generate(target, prompts, drafter=drafter, fixed=True, max_new_tokens=new, sampling=sampling)


def assert_greedy(out, prompts, logits_of):
    """Every new token is the likeliest one after the text before it. ``logits_of(tokens_1t)`` is a pass without a
    cache over one row."""
    for prompt, row, length in zip(prompts, np.asarray(out.tokens), out.lengths, strict=True):
        assert row[: len(prompt)].tolist() == prompt
        logits = np.asarray(logits_of(row[None, :length]))[0]
        assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == row[len(prompt) : length].tolist()


def assert_law(out, start, logits_of):
    """New tokens have the law of a pass over the text: counts against the sum of their laws, for each token and for
    each token that was the likeliest one. All rows have prompts of ``start`` tokens."""
    tokens = np.asarray(out.tokens)[:, : int(out.lengths[0])]
    law = np.asarray(jax.nn.softmax(logits_of(tokens), axis=-1), np.float64)[:, start - 1 : -1]
    law, drawn = law.reshape(-1, law.shape[-1]), tokens[:, start:].reshape(-1)
    group, size = law.argmax(axis=-1), law.shape[-1]
    counts, expected, spread = (np.zeros((size, size)) for _ in range(3))
    np.add.at(counts, (group, drawn), 1)
    np.add.at(expected, group, law)
    np.add.at(spread, group, law * (1 - law))
    enough = (expected > 5) & (spread > 1)
    # Each alone: a sum of draws of several chances has lighter tails than Poisson's law of the same mean.
    tails = stats.poisson.cdf(counts, expected), stats.poisson.sf(counts - 1, expected)
    assert np.minimum(*tails)[enough].min() > 1e-3 / enough.sum() / 2
    score = (counts - expected)[enough] / np.sqrt(spread[enough])
    # The chi-square statistic of all of them together. Scores of one group are weakly dependent.
    assert (score**2).sum() < stats.chi2.isf(1e-4, enough.sum())


def assert_texts_and_law(target, second, logits_of):
    """Greedy texts, plain and with drafts of n-grams and of a second model, and the law at temperature 1."""
    for drafter in (None, specjax.NGramDrafter(3, 1, 2), specjax.ModelDrafter(second, 3)):
        assert_greedy(generate(target, drafter), PROMPTS, logits_of)
    drafted = generate(target, drafter, [[1, 2, 3]] * 256, temperature=1.0)
    assert 0 < drafted.stats.accepted.sum() < drafted.stats.drafted.sum()
    assert_law(drafted, 3, logits_of)
    with pytest.raises(AssertionError):  # so many texts tell the law from that of a lower temperature
        assert_law(drafted, 3, lambda tokens: logits_of(tokens) / 0.8)
