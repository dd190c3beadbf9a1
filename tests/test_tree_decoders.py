"""Trees that a decoder is fed: masks, positions and caches of every kind of attention.

The drafts on one path are the text of plain decoding, so rounds keep paths of all depths; other drafts lie beside them
in the cache until the path is gathered.
"""

import dataclasses
import functools

import hybrid
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from trees import BUSHY, Oracle

import specjax
from specjax import Sampling, verify
from specjax.transformer.config import DecoderConfig, LatentConfig, LayerConfig, plain_rope
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import Feed, whole_feed

VOCAB, NEW = 11, 30
PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2], [7, 7, 8, 7, 7, 8, 7, 7]]
ROPE = plain_rope(8)


def decoder(layers=None, seed=0, **options):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = DecoderConfig(VOCAB, 16, 24, layers=layers, max_position_embeddings=128, **(sizes | options))
    params = init_params(config, jax.random.key(seed))
    return decoder_model(config, jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, params))


KINDS = {
    "groups of heads": decoder(),
    "a window": decoder((LayerConfig(ROPE, window=3), LayerConfig(ROPE))),
    "chunks": decoder((LayerConfig(ROPE, chunk=4), LayerConfig(None, growth=(0.1, 4)))),
    "a shared layer": decoder((LayerConfig(ROPE), LayerConfig(ROPE, shares=0))),
    "learned positions": decoder((LayerConfig(None), LayerConfig(None)), learned_positions=True),
    "latents": decoder((LayerConfig(plain_rope(4)),) * 2, latent=LatentConfig(None, 6, 4, 4, 4), head_dim=None),
}
every_kind = pytest.mark.parametrize("target", KINDS.values(), ids=KINDS)
SAMPLING = Sampling(temperature=np.float32([0, 1, 0.7, 0]), top_k=np.int32([0, 0, 5, 0]), seed=3)


def generate(target, drafter, **settings):
    settings = {
        "verify": verify.walk,
        "fixed": True,
        "sampling": SAMPLING,
        "max_new_tokens": NEW,
        "logprobs": True,
    } | settings
    return jax.device_get(specjax.generate(target, PROMPTS, drafter=drafter, **settings))


@every_kind
def test_text_and_log_probabilities_are_those_of_plain_decoding(target):
    plain = generate(target, None)
    out = generate(target, Oracle(jnp.asarray(plain.tokens), VOCAB))
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_allclose(out.logprobs, plain.logprobs, atol=1e-4)
    # All drafts on the way to a draft are right, whichever it is.
    assert (out.stats.emitted == NEW).all() and (out.stats.rounds <= NEW / 2).all()
    assert (out.stats.accepted_at > 0).all()


@every_kind
def test_a_path_leaves_the_cache_of_a_chain(target):
    """Keys, values and states of a tree's path, and of the same tokens fed as a chain."""
    tokens_bs = np.random.default_rng(0).integers(0, VOCAB, (3, 20)).astype(np.int32)
    start_b, kept_b = jnp.int32([5, 9, 1]), jnp.int32([4, 3, 1])
    capture = (0, 2, -1)

    @jax.jit
    def cache_of(params):
        feed = Feed(jnp.asarray(tokens_bs[:, :9]), jnp.zeros((3,), jnp.int32), start_b)
        return target.forward(params, feed, target.init_cache(3, 24)).cache

    cache = cache_of(target.params)
    tree = Feed(
        jnp.asarray(tokens_bs[:, -8:]),
        start_b,
        jnp.full((3,), 8, jnp.int32),
        jnp.broadcast_to(jnp.asarray((-1, *(parent + 1 for parent in BUSHY)), jnp.int32), (3, 8)),
    )
    # The last token and drafts 0, 3 and 5; then draft 1 and its child; then nothing.
    path_bt = jnp.int32([[0, 1, 4, 6], [0, 2, 7, 0], [0, 0, 0, 0]])
    out = jax.jit(target.forward, static_argnums=3)(target.params, tree, cache, capture)
    gathered = target.gather(out.cache, tree, path_bt)
    chain = Feed(jnp.take_along_axis(tree.tokens_bt, path_bt, axis=1), start_b, kept_b)
    want = jax.jit(target.forward, static_argnums=3)(target.params, chain, cache, capture)
    for row in range(3):
        kept, end = int(kept_b[row]), int(start_b[row] + kept_b[row])
        for x, y in zip(jax.tree.leaves(gathered), jax.tree.leaves(want.cache), strict=True):
            np.testing.assert_allclose(x[row, :, :end], y[row, :, :end], atol=1e-5)
        for x, y in zip((out.logits_btv, *out.features), (want.logits_btv, *want.features), strict=True):
            np.testing.assert_allclose(x[row, path_bt[row, :kept]], y[row, :kept], atol=1e-4)


def test_siblings_share_a_position():
    feed = whole_feed(jnp.zeros((2, 8), jnp.int32), jnp.int32([3, 0]))
    parents = jnp.asarray((-1, *(parent + 1 for parent in BUSHY)), jnp.int32)
    tree = dataclasses.replace(feed, parents_bt=jnp.broadcast_to(parents, (2, 8)))
    deep = np.asarray([0, 1, 1, 2, 2, 2, 3, 2])
    np.testing.assert_array_equal(tree.position_bt, np.stack([3 + deep, deep]))
    np.testing.assert_array_equal(feed.position_bt, np.stack([3 + np.arange(8), np.arange(8)]))


@every_kind
def test_right_models_pass_the_check(target):
    assert specjax.check_model(target, length=32) is None


# Faults.


def read_as_a_chain(params, feed, cache, capture=()):
    return KINDS["groups of heads"].forward(params, dataclasses.replace(feed, parents_bt=None), cache, capture)


def without_own_positions(params, feed, cache, capture=()):
    """Siblings at positions of their own, as their slots are: only the mask is a tree's."""
    target = KINDS["learned positions"]

    @struct.dataclass
    class Slots(Feed):
        @property
        def position_bt(self):
            return self.start_b[:, None] + jnp.arange(self.tokens_bt.shape[1], dtype=jnp.int32)[None]

    return target.forward(params, Slots(feed.tokens_bt, feed.start_b, feed.count_b, feed.parents_bt), cache, capture)


FAULTS = {
    "no mask": ("groups of heads", {"forward": read_as_a_chain}),
    "positions by slot": ("learned positions", {"forward": without_own_positions}),
    "a path that is not gathered": ("groups of heads", {"gather": lambda cache, feed, path_bt: cache}),
}


@pytest.mark.parametrize(("kind", "faulty"), FAULTS.values(), ids=FAULTS)
def test_fault_is_seen(kind, faulty):
    plain = generate(KINDS[kind], None)
    wrong = dataclasses.replace(KINDS[kind], **faulty)
    assert (generate(wrong, Oracle(jnp.asarray(plain.tokens), VOCAB)).tokens != plain.tokens).any()
    with pytest.raises(ValueError, match="tree"):
        specjax.check_model(wrong, length=32)


def test_recurrent_layers_refuse_trees_before_anything_compiles():
    target = hybrid.model("mamba")
    assert target.gather is None
    drafter = Oracle(jnp.zeros((4, 8), jnp.int32), VOCAB)
    walking = [functools.partial(call, verify=verify.walk) for call in (specjax.generate, specjax.stream)]
    for call in (*walking, specjax.prefill):
        with pytest.raises(ValueError, match="the target has no gather, as models with recurrent layers have none"):
            call(target, PROMPTS, drafter=drafter, max_new_tokens=4)
