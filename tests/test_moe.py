"""Mixtures of experts against a slow twin in NumPy, and rows that must not see each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from specjax.transformer.config import DecoderConfig, ExpertsConfig, LayerConfig, plain_rope
from specjax.transformer.decoder import decoder_model, init_params
from specjax.transformer.moe import Form, MoE, Stacks, expert_by_expert, sorted_by_expert
from specjax.types import whole_feed

D, F = 8, 5
CASES = {
    "softmax over all": ExpertsConfig(6, 2, F, renormalize=False),
    "softmax, weights that sum to 1": ExpertsConfig(6, 3, F),
    "every expert": ExpertsConfig(4, 4, F),
    "one expert": ExpertsConfig(5, 1, F, renormalize=False),
    "sigmoid with groups, a bias and a shared expert": ExpertsConfig(
        8, 3, F, score="sigmoid", scale=1.7, groups=4, best_groups=2, corrected=True, shared_size=7
    ),
    "biases, clamped": ExpertsConfig(6, 3, F, router_bias=True, bias=True, clamp=(1.702, 0.7)),
    "inputs are weighted": ExpertsConfig(
        5, 2, F, score="sigmoid", renormalize=False, weighs_inputs=True, shared_size=4
    ),
    "softmax, groups by their best": ExpertsConfig(8, 3, F, renormalize=False, groups=4, best_groups=2, group_best=1),
    "sparsemixer": ExpertsConfig(6, 2, F, score="sparsemixer", nearness=0.8, renormalize=False),
    "groups of one expert": ExpertsConfig(4, 2, F, score="sigmoid", groups=4, best_groups=3, corrected=True),
}


def config_for(experts):
    layer = LayerConfig(rope=plain_rope(4), experts=True)
    return DecoderConfig(11, D, 9, 1, 2, layers=(layer,), experts=experts)


def make(experts, seed=0):
    """A block of random weights, its parameters as NumPy, and a function that runs it."""
    graph, state = nnx.split(MoE(config_for(experts), jnp.dtype("float32"), nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32) * (0.3 if x.ndim == 1 else 1), nnx.to_pure_dict(state)
    )

    @jax.jit
    def run(params, x_btd):
        filled = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)(x_btd)

    return params, lambda x_btd: np.asarray(run(params, jnp.asarray(x_btd, jnp.float32)))


def gated(x, gate, up, down, biases=(0, 0, 0), clamp=None):
    gate, up = x @ gate + biases[0], x @ up + biases[1]
    slope = 1
    if clamp is not None:
        slope, most = clamp
        gate, up = np.minimum(gate, most), np.clip(up, -most, most) + 1
    return (gate / (1 + np.exp(-slope * gate)) * up) @ down + biases[2]


def sparsemixer(logits, count, nearness):
    """Weights of the chosen experts, in the order of the choice."""
    weights, left = {}, set(range(len(logits)))
    for _ in range(count):
        best = max(left, key=lambda e: logits[e])
        near = [e for e in left if (logits[best] - logits[e]) / max(abs(logits[e]), logits[best]) <= nearness]
        weights[best] = 1 / sum(np.exp(logits[e] - logits[best]) for e in near)
        left.remove(best)
    return weights


def twin(experts, params, x):
    """One token at a time, in float64."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    logits = x @ params["gate"]["kernel"] + (params["gate"]["bias"] if experts.router_bias else 0)
    scores = np.exp(logits - logits.max())
    scores = scores / scores.sum() if experts.score == "softmax" else 1 / (1 + np.exp(-logits))
    choice = scores + params["gate"]["e_score_correction_bias"] if experts.corrected else scores.copy()
    size = experts.num_experts // experts.groups
    groups = [sorted(choice[g * size : (g + 1) * size])[-experts.group_best :] for g in range(experts.groups)]
    best = sorted(range(experts.groups), key=lambda g: -sum(groups[g]))[: experts.best_groups]
    allowed = [e for e in range(experts.num_experts) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: experts.per_token]
    total = sum(scores[e] for e in chosen) if experts.renormalize else 1.0
    weights = {e: scores[e] / total * experts.scale for e in chosen}
    if experts.score == "sparsemixer":
        weights = sparsemixer(logits, experts.per_token, experts.nearness)
    stacks = params["experts"]
    out = np.zeros(len(x))
    for e, weight in weights.items():
        kernels = (stacks[name][e] for name in ("gate_proj", "up_proj", "down_proj"))
        biases = [stacks[name][e] for name in ("gate_bias", "up_bias", "down_bias")] if experts.bias else (0, 0, 0)
        before, after = (weight, 1) if experts.weighs_inputs else (1, weight)
        out += after * gated(before * x, *kernels, biases, experts.clamp)
    if experts.shared_size:
        shared = params["shared_experts"]
        out += gated(x, *(shared[name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj")))
    return out, list(weights)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_twin(name):
    experts = CASES[name]
    params, run = make(experts)
    x = np.random.default_rng(1).normal(size=(3, 7, D))
    expected = np.array([[twin(experts, params, token)[0] for token in row] for row in x])
    used = {e for row in x for token in row for e in twin(experts, params, token)[1]}
    assert len(used) > 1 or experts.num_experts == 1
    np.testing.assert_allclose(run(x), expected, atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "form", "biased"),
    [
        (1, Form("silu"), False),
        (5, Form("silu"), True),
        (40, Form("silu"), False),
        (5, Form("silu", clamp=(1.702, 0.5)), True),
        (5, Form("gelu", weighs_inputs=True), False),
    ],
)
def test_both_ways_through_the_experts_are_equal(tokens, form, biased):
    """A CPU takes them one by one, other devices sorted."""
    rng = np.random.default_rng(tokens)
    shapes = ((7, D, F), (7, D, F), (7, F, D), (7, F), (7, F), (7, D))
    stacks = Stacks(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes[: 6 if biased else 3]))
    x_md = jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32)
    chosen_mc = jnp.asarray([rng.permutation(7)[:3] for _ in range(tokens)], jnp.int32)
    weights_mc = jnp.asarray(rng.uniform(size=(tokens, 3)), jnp.float32)
    one_by_one, in_order = (
        jax.jit(way, static_argnums=0)(form, x_md, chosen_mc, weights_mc, stacks)
        for way in (expert_by_expert, sorted_by_expert)
    )
    np.testing.assert_allclose(one_by_one, in_order, atol=1e-4, rtol=1e-5)


def test_no_token_is_dropped_where_all_want_one_expert():
    """A capacity would leave some of these 64 equal tokens without."""
    experts = CASES["one expert"]
    params, run = make(experts)
    token = np.random.default_rng(2).normal(size=D)
    out = run(np.broadcast_to(token, (4, 16, D)))
    np.testing.assert_allclose(out, np.broadcast_to(twin(experts, params, token)[0], out.shape), atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_see_its_neighbours(name):
    """To the bit, whatever experts the others choose."""
    _, run = make(CASES[name])
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3, 5, D))
    before = run(x)
    x[1:] = 10 * rng.normal(size=(2, 5, D))
    np.testing.assert_array_equal(run(x)[0], before[0])


def test_latest_tokens_of_a_decoder_do_not_change_the_earlier_ones():
    """Experts over a block: what was rejected behind a token leaves no trace in it."""
    config = config_for(CASES["softmax, weights that sum to 1"])
    model = decoder_model(config, init_params(config, jax.random.key(0)))
    tokens = np.random.default_rng(4).integers(0, 11, (2, 9)).astype(np.int32)
    forward = jax.jit(lambda tokens, cache: model.forward(model.params, whole_feed(tokens), cache).logits_btv)
    first = forward(tokens, model.init_cache(2, 16))
    tokens[:, 6:] = 10 - tokens[:, 6:]
    np.testing.assert_array_equal(forward(tokens, model.init_cache(2, 16))[:, :6], first[:, :6])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"groups": 4}, "6 experts in 4 groups"),
        ({"groups": 3, "best_groups": 4}, "4 of them chosen"),
        ({"per_token": 7}, "7 experts per token.* only 6"),
        ({"groups": 3, "best_groups": 1, "per_token": 3}, "3 experts per token.* only 2"),
        ({"num_experts": 0}, "num_experts must be an integer of at least 1"),
    ],
)
def test_mixtures_that_cannot_be(changed, words):
    with pytest.raises(ValueError, match=words):
        config_for(ExpertsConfig(**{"num_experts": 6, "per_token": 2, "intermediate_size": F, **changed}))
