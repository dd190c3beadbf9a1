"""Slow twins of the verification rules and of sampling, in NumPy and Python loops, to compare the library with.

They are written from the papers' pseudo-code and share nothing with the library. The rules take any numbers: floats,
or ``fractions.Fraction``, with which they are exact. p is the target, q the draft.
"""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np


def verify_token(drafts, p, q, uniforms):
    """Rejection sampling, token by token (algorithm 1 of Leviathan et al. 2023).

    Args:
      drafts: g tokens.
      p: g+1 target distributions, one behind each number of drafts.
      q: g draft distributions.
      uniforms: g numbers in [0, 1).

    Returns:
      How many drafts are kept, the weights of the token behind them, and the chance that each uniform is held to.
    """
    chances = [min(1, p[i][x] / q[i][x]) for i, x in enumerate(drafts)]
    kept = 0
    for uniform, chance in zip(uniforms, chances, strict=True):
        if uniform >= chance:
            break
        kept += 1
    if kept == len(drafts):
        return kept, list(p[kept]), chances
    return kept, _residual(1, p[kept], q[kept]), chances


def verify_block(drafts, p, q, uniforms):
    """Block verification (algorithm 2 of Sun et al. 2025). Arguments and results are those of ``verify_token``."""
    g = len(drafts)
    reach = [1]
    chances = []
    for i, x in enumerate(drafts):
        reach.append(min(1, reach[i] * (p[i][x] / q[i][x])))
        if i + 1 == g:
            chances.append(reach[g])
        else:
            left = sum(max(reach[i + 1] * a - b, 0) for a, b in zip(p[i + 1], q[i + 1], strict=True))
            over = left + 1 - reach[i + 1]
            chances.append(left / over if over > 0 else 1)
    kept = 0
    for i in range(g):
        if uniforms[i] < chances[i]:
            kept = i + 1
    if kept == g:
        return kept, list(p[g]), chances
    return kept, _residual(reach[kept], p[kept], q[kept]), chances


def _residual(scale, p, q):
    left = [max(scale * a - b, 0) for a, b in zip(p, q, strict=True)]
    return left if sum(left) > 0 else list(p)


def round_law(verify, target, draft, g, count):
    """Returns the law of the first ``count`` tokens that one round and then the target emit, and E[kept drafts].

    Every draft path, with every outcome of comparing uniforms with chances, is followed one by one.

    Args:
      verify: ``verify_token`` or ``verify_block``.
      target: ``target(tokens) -> distribution`` of the token behind them.
      draft: the same for the draft.
      g: drafts in the round.
      count: tokens in the law, at least g + 1.
    """
    law = defaultdict(int)
    mean_kept = 0

    def complete(tokens, mass):
        if len(tokens) == count:
            law[tokens] += mass
            return
        for x, chance in enumerate(target(tokens)):
            if chance:
                complete((*tokens, x), mass * chance)

    vocab = len(target(()))
    for drafts in itertools.product(range(vocab), repeat=g):
        p = [target(drafts[:i]) for i in range(g + 1)]
        q = [draft(drafts[:i]) for i in range(g)]
        path = math.prod(q[i][x] for i, x in enumerate(drafts))
        if not path:
            continue
        chances = verify(drafts, p, q, [0] * g)[2]
        for succeeds in itertools.product((True, False), repeat=g):
            mass = path * math.prod(c if yes else 1 - c for c, yes in zip(chances, succeeds, strict=True))
            if not mass:
                continue
            uniforms = [c / 2 if yes else (1 + c) / 2 for c, yes in zip(chances, succeeds, strict=True)]
            kept, weights, _ = verify(drafts, p, q, uniforms)
            mean_kept += mass * kept
            for y, weight in enumerate(weights):
                if weight:
                    complete((*drafts[:kept], y), mass * weight / sum(weights))
    return dict(law), mean_kept


def warp(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Returns the distribution that is sampled, float64 ``[v]``: temperature, top-k, top-p, min-p, in this order.

    Tokens that tie with the last one kept are kept.
    """
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        probs = np.zeros_like(logits)
        probs[next(i for i, logit in enumerate(logits) if logit == logits.max())] = 1
        return probs
    probs = np.exp((logits - logits.max()) / temperature)
    probs /= probs.sum()
    if 0 < top_k < len(probs):
        kth = np.sort(probs)[::-1][top_k - 1]
        probs = np.where(probs < kth, 0, probs)
        probs /= probs.sum()
    if top_p < 1:
        descending = np.sort(probs)[::-1]
        mass = 0.0
        for last in descending:
            mass += last
            if mass >= top_p:
                break
        probs = np.where(probs < last, 0, probs)
        probs /= probs.sum()
    probs = np.where(probs < min_p * probs.max(), 0, probs)
    return probs / probs.sum()


def penalize(logits, prompt, output, bias=None, repetition=1.0, presence=0.0, frequency=0.0):
    """Returns logits, float64 ``[v]``, with the bias added and the tokens of ``prompt`` and ``output`` penalised."""
    logits = np.array(logits, np.float64)
    if bias is not None:
        logits += bias
    for x in set(prompt) | set(output):
        logits[x] = logits[x] / repetition if logits[x] > 0 else logits[x] * repetition
    for x, times in Counter(output).items():
        logits[x] -= presence + frequency * times
    return logits
