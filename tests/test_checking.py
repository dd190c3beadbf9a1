"""``check_model`` and ``check_drafter``: right ones pass, and of each wrong one the broken clause is named."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent
from flax import struct
from jax import lax

import specjax
from specjax import Cascade, ModelDrafter, NGramDrafter, Proposal, check_drafter, check_model
from specjax.drafters.pard import PardDrafter
from specjax.testing import table_model
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import LanguageModel, Output

VOCAB, WIDTH, RING = 7, 4, 16


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def decoder(dtype):
    config = DecoderConfig(VOCAB, 8, 8, 2, 2, 1, head_dim=4, max_position_embeddings=32)
    return decoder_model(config, init_params(config, jax.random.key(0), jnp.dtype(dtype)))


def recurrent_target(kinds):
    return recurrent.recurrent_model(kinds, recurrent.init_params(kinds, VOCAB, 8))


RIGHT = {
    "decoder": functools.partial(decoder, "float32"),
    "decoder in bfloat16": functools.partial(decoder, "bfloat16"),
    "table": lambda: table_model(drawn(0, VOCAB, VOCAB, VOCAB)),
    "recurrent": lambda: recurrent_target("r"),
    "recurrent and attention": lambda: recurrent_target("ra"),
    "attention": lambda: recurrent_target("a"),
    "mean of all tokens": lambda: mean_model(),
    "mean of a window, in a ring": lambda: ring_model(),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_right_models_pass(make):
    assert check_model(make(), length=32) is None


# A model that is quickly compiled: a place reads the mean of all states up to its own, later ones weighing more.


def write(cache_bsd, new_btd, start_b):
    return jax.vmap(lambda old, new, at: lax.dynamic_update_slice(old, new, (at, 0)))(cache_bsd, new_btd, start_b)


def mean(cache_bsd, slot_bs, position_bt, window=None):
    """Returns ``[b, t, d]``, the mean over the slots that each position sees; ``slot_bs`` is what a slot holds."""
    back_bts = position_bt[:, :, None] - slot_bs[:, None]
    seen_bts = (back_bts >= 0) & (slot_bs >= 0)[:, None]
    if window is not None:
        seen_bts &= back_bts < window
    weight_bts = jnp.where(seen_bts, 1 / (1 + back_bts.astype(jnp.float32)), 0)
    return jnp.einsum("bts,bsd->btd", weight_bts, cache_bsd) / weight_bts.sum(-1, keepdims=True)


def slots_of(cache_bsd):
    rows, slots = cache_bsd.shape[:2]
    return jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], (rows, slots))


def embed(params, tokens_bt):
    return params["embedding"][tokens_bt]


def unembed(params, x_btd):
    return x_btd @ params["head"]


def init_cache(rows, slots):
    return jnp.zeros((rows, slots, WIDTH))


def output(params, x_btd, y_btd, cache, capture):
    states = (x_btd, y_btd, y_btd)
    return Output(unembed(params, y_btd), tuple(states[i] for i in capture), cache)


def mean_forward(params, feed, cache, capture=(), *, position=None, start=None, before=None, after=None):
    """The right forward pass, unless a fault is given: other positions to read at, other slots to write, or a change of
    the cache before or after."""
    x_btd = embed(params, feed.tokens_bt)
    cache = cache if before is None else before(feed, cache)
    cache = write(cache, x_btd, feed.start_b if start is None else start(feed))
    position_bt = feed.position_bt if position is None else position(feed)
    y_btd = mean(cache, slots_of(cache), position_bt)
    return output(params, x_btd, y_btd, cache if after is None else after(feed, cache), capture)


PARAMS = {"embedding": drawn(1, VOCAB, WIDTH), "head": drawn(2, WIDTH, VOCAB)}


def mean_model(forward=mean_forward, **fields):
    given = {"init_cache": init_cache, "embed": embed, "unembed": unembed, "num_layers": 1} | fields
    return LanguageModel(params=PARAMS, forward=forward, vocab_size=VOCAB, **given)


def faulty(**faults):
    return mean_model(functools.partial(mean_forward, **faults))


# The same with a window of 8 in a ring of 16 slots, each with the position that it holds.


def init_ring(rows, slots):
    return jnp.zeros((rows, RING, WIDTH)), jnp.full((rows, RING), -1, jnp.int32)


def ring_forward(params, feed, cache, capture=(), *, window=8, reads_block=True):
    x_btd, (states_bsd, slot_bs) = embed(params, feed.tokens_bt), cache
    # What an earlier pass left past the row's end is no part of the text.
    slot_bs = jnp.where(slot_bs < feed.start_b[:, None], slot_bs, -1)
    position_bt = jnp.where(feed.real_bt, feed.position_bt, -1)
    stays_bt = feed.real_bt & (position_bt >= (feed.start_b + feed.count_b)[:, None] - RING)
    at_bt = jnp.where(stays_bt, position_bt % RING, RING)
    row_b1 = jnp.arange(len(position_bt))[:, None]
    written = (
        states_bsd.at[row_b1, at_bt].set(x_btd, mode="drop"),
        slot_bs.at[row_b1, at_bt].set(position_bt, mode="drop"),
    )
    block = jnp.concatenate([states_bsd, x_btd], axis=1), jnp.concatenate([slot_bs, position_bt], axis=1)
    y_btd = mean(*(block if reads_block else written), feed.position_bt, window)
    return output(params, x_btd, y_btd, written, capture)


def ring_model(**faults):
    return mean_model(functools.partial(ring_forward, **faults), init_cache=init_ring)


def ring_model_by_shape():
    """Its window is wider in passes of several places."""

    def forward(params, feed, cache, capture=()):
        window = 11 if 1 < feed.tokens_bt.shape[1] < 10 else 12
        return ring_forward(params, feed, cache, capture, window=window)

    return mean_model(forward, init_cache=init_ring, num_layers=None, unembed=None)


def finite_ring_logits(*args):
    return jnp.nan_to_num(ring_forward(*args, reads_block=False).logits_btv)


# Recurrent in a plain sum: what a pass adds stays, for want of a ``commit``.


def init_sum(rows, slots):
    return jnp.zeros((rows, WIDTH))


def decayed_sum(heeds_count=True):
    def forward(params, feed, cache, capture=()):
        x_btd = embed(params, feed.tokens_bt)
        real_bt = feed.real_bt if heeds_count else jnp.ones_like(feed.real_bt)

        def advance(state_bd, inputs):
            x_bd, real_b = inputs
            state_bd = jnp.where(real_b[:, None], 0.8 * state_bd + x_bd, state_bd)
            return state_bd, state_bd

        last_bd, y_tbd = lax.scan(advance, cache, (x_btd.swapaxes(0, 1), real_bt.T))
        return output(params, x_btd, y_tbd.swapaxes(0, 1), last_bd, capture)

    return mean_model(forward, init_cache=init_sum)


def within_the_block(feed, cache):
    """Forgets what earlier passes wrote, in passes of several places."""
    return cache if feed.tokens_bt.shape[1] == 1 else jnp.zeros_like(cache)


def within_the_chunk(feed, cache):
    return cache if feed.tokens_bt.shape[1] < 10 else jnp.zeros_like(cache)


def forgotten_at_rest(feed, cache):
    return jnp.where((feed.count_b > 0)[:, None, None], cache, 0)


def last_position(feed):
    return jnp.broadcast_to(feed.position_bt[:, -1:], feed.tokens_bt.shape)


def recurrent_fault(commit):
    return recurrent_target("r").replace(commit=commit)


def forgets_one(cache, feed, kept_b):
    return jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), jnp.maximum(kept_b - 1, 0)], cache)


def forward_with(change):
    """Returns the right forward pass, its output changed."""

    def forward(params, feed, cache, capture=()):
        return change(mean_forward(params, feed, cache, capture), feed)

    return mean_model(forward)


def logits_with(change):
    return forward_with(lambda out, feed: out._replace(logits_btv=change(out.logits_btv)))


def closed_over():
    def forward(params, feed, cache, capture=()):
        return mean_forward(PARAMS, feed, cache, capture)

    return mean_model(forward)


def without_capture():
    def forward(params, feed, cache):
        return mean_forward(params, feed, cache)

    return mean_model(forward)


def assigns_to_its_cache(params, feed, cache, capture=()):
    out = mean_forward(params, feed, cache["states"])
    cache["states"] = out.cache
    return out._replace(cache=cache)


def assigns_to_its_params(params, feed, cache, capture=()):
    params["embedding"] = 2 * params["embedding"]
    return mean_forward(params, feed, cache, capture)


def drawn_when_traced():
    rng = np.random.default_rng(0)
    return logits_with(lambda x: x + jnp.asarray(rng.normal(size=x.shape[1:]), x.dtype)[None])


def drawn_when_run():
    rng = np.random.default_rng(0)

    def noise(x):
        return jax.pure_callback(lambda: rng.normal(size=x.shape).astype(np.float32), x)

    return logits_with(lambda x: x + noise(jax.ShapeDtypeStruct(x.shape, x.dtype)))


def one_index():
    """The cache has one write index for all rows, as most libraries' caches have."""
    return mean_model(init_cache=lambda rows, slots: (init_cache(rows, slots), jnp.zeros((), jnp.int32)))


def early_exit(params, feed, cache, depth):
    return mean_forward(params, feed, cache)


def early_exit_to_zero(params, feed, cache, depth):
    """Right at the last layer, but writes into slots before the row's end."""
    out = mean_forward(params, feed, cache)
    return out._replace(cache=out.cache.at[:, 0].set(0))


WRONG = {
    "not causal": (lambda: faulty(position=last_position), "later places of the same pass"),
    "shared index": (
        lambda: faulty(start=lambda feed: jnp.broadcast_to(feed.start_b[:1], feed.start_b.shape)),
        "shared index",
    ),
    "one index in the cache": (one_index, "first axis must be the 3 rows"),
    "ring, long pass": (lambda: ring_model(reads_block=False), "ring overwritten"),
    "ring, long pass without NaN": (
        lambda: mean_model(
            lambda *args: ring_forward(*args, reads_block=False)._replace(logits_btv=finite_ring_logits(*args)),
            init_cache=init_ring,
            num_layers=None,
            unembed=None,
        ),
        "ring overwritten",
    ),
    "ring, no slot to spare": (lambda: ring_model(window=RING), "ring overwritten"),
    "window by shape": (
        lambda: ring_model_by_shape(),
        "inner ring or window",
    ),
    "prefill by shape": (lambda: faulty(before=within_the_block), "prefill by shape"),
    "prefill by shape, long passes alone": (lambda: faulty(before=within_the_chunk), "read in several passes"),
    "padding swallowed": (lambda: decayed_sum(heeds_count=False), "padding swallowed"),
    "a state without commit": (decayed_sum, "no commit"),
    "a resting row changes": (lambda: faulty(after=forgotten_at_rest), "a row that rests"),
    "commit keeps all": (lambda: recurrent_fault(recurrent.keeps_all), "commit does not forget"),
    "commit keeps what was fed": (
        lambda: recurrent_fault(lambda cache, feed, kept_b: recurrent_target("r").commit(cache, feed, feed.count_b)),
        "commit does not forget",
    ),
    "commit keeps one too few": (lambda: recurrent_fault(forgets_one), "commit forgets places"),
    "no commit at all": (lambda: recurrent_fault(None), "returned a cache"),
    "cache of another dtype": (
        lambda: forward_with(lambda out, feed: out._replace(cache=out.cache.astype(jnp.bfloat16))),
        "keep shapes and dtypes",
    ),
    "cache of another structure": (
        lambda: forward_with(lambda out, feed: out._replace(cache=(out.cache,))),
        "of the structure",
    ),
    "cache grows": (
        lambda: forward_with(lambda out, feed: out._replace(cache=jnp.concatenate([out.cache] * 2, axis=1))),
        "keep shapes and dtypes",
    ),
    "logits without vocabulary": (lambda: logits_with(lambda x: x[..., 0]), "logits_btv is"),
    "integer logits": (lambda: logits_with(lambda x: x.astype(jnp.int32)), "logits_btv is"),
    "no Output": (lambda: forward_with(lambda out, feed: tuple(out)), "forward returned a tuple"),
    "no capture": (without_capture, "cannot be called with (params, feed, cache, capture)"),
    "cache changed in place": (
        lambda: LanguageModel(PARAMS, assigns_to_its_cache, lambda *sizes: {"states": init_cache(*sizes)}, VOCAB),
        "mutates its argument cache",
    ),
    "params changed in place": (lambda: mean_model(assigns_to_its_params), "mutates its argument params"),
    "features of the last place": (
        lambda: forward_with(lambda out, feed: out._replace(features=tuple(x[:, -1] for x in out.features))),
        "features has the shapes",
    ),
    "no features": (lambda: forward_with(lambda out, feed: out._replace(features=())), "features has the shapes"),
    "NaN": (lambda: logits_with(lambda x: x * jnp.nan), "NaN"),
    "drawn when traced": (drawn_when_traced, "other logits each time"),
    "drawn when run": (drawn_when_run, "other logits each time"),
    "rows see each other": (lambda: logits_with(lambda x: x + x.mean(axis=0, keepdims=True)), "rows influence"),
    "number of rows": (lambda: logits_with(lambda x: x + x.shape[0] * drawn(3, 1, 1, VOCAB)), "a row alone"),
    "params closed over": (closed_over, "must use its argument params"),
    "embed of another width": (
        lambda: mean_model(embed=lambda params, tokens_bt: embed(params, tokens_bt)[..., :2]),
        "embed returned",
    ),
    "unembed of another head": (
        lambda: mean_model(unembed=lambda params, x_btd: 2 * unembed(params, x_btd)),
        "unembed of the states",
    ),
    "early exit of another law": (
        lambda: mean_model(early_exit=lambda *args: early_exit(*args)._replace(logits_btv=drawn(4, 3, 32, VOCAB))),
        "early_exit at the last layer",
    ),
    "early exit spoils the cache": (lambda: mean_model(early_exit=early_exit_to_zero), "what early_exit wrote"),
    "commit and early exit": (
        lambda: recurrent_target("r").replace(early_exit=early_exit),
        "both commit and early_exit",
    ),
}


@pytest.mark.parametrize(("make", "words"), WRONG.values(), ids=WRONG)
def test_the_broken_clause_is_named(make, words):
    with pytest.raises(ValueError, match=r"breaks the contract of specjax\.LanguageModel") as caught:
        check_model(make(), length=32)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["no Output", "no capture"])
def test_generation_says_the_same(name):
    make, words = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        specjax.generate(make(), [[1, 2]], max_new_tokens=4)


def test_right_early_exit_passes():
    check_model(mean_model(early_exit=early_exit), length=32)


def test_banned_tokens_hide_no_fault():
    """Neither logits of -inf nor huge ones widen what is allowed."""
    banned = jnp.where(jnp.arange(VOCAB) < 1, -jnp.inf, 0)[None, None]
    huge = jnp.where(jnp.arange(VOCAB) < 1, -1e9, 0)[None, None]
    for bias in (banned, huge):
        check_model(dataclasses.replace(logits_with(lambda x, b=bias: x + b), unembed=None), length=32)
    wrong = logits_with(lambda x: x + 0.001 * x.mean(axis=0, keepdims=True) + huge)
    with pytest.raises(ValueError, match="rows influence"):
        check_model(wrong, length=32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rows": 1}, "rows must be"), ({"length": 8}, "length must be"), ({"tolerance": 0.0}, "tolerance must be")],
)
def test_settings_that_check_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_model(mean_model(), **settings)


# Drafters.

DRAFTS = 3
TARGET = mean_model(num_layers=1)
MODEL = ModelDrafter(mean_model().replace(params=jax.tree.map(lambda x: x + 0.2 * jnp.sin(9 * x), PARAMS)), DRAFTS)
DRAFTERS = {
    "n-gram": NGramDrafter(DRAFTS, 1, 2),
    "model": MODEL,
    "model, in a loop": dataclasses.replace(MODEL, unrolled=False),
    "recurrent model": ModelDrafter(recurrent_target("r"), DRAFTS),
    "cascade": Cascade(NGramDrafter(DRAFTS, 1, 2), MODEL),
    "model over masks": PardDrafter(MODEL.model, DRAFTS, mask_token=1),
}


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_right_drafters_pass(drafter):
    assert check_drafter(drafter, TARGET) is None


@struct.dataclass
class OwnProbabilities(ModelDrafter):
    def propose(self, state, context, draw):
        def scored(logits_bv, drafts_bg, index):
            return draw(logits_bv, drafts_bg, index)[0], jax.nn.softmax(logits_bv)

        return super().propose(state, context, scored)


@struct.dataclass
class OwnTokens(ModelDrafter):
    def propose(self, state, context, draw):
        def likeliest(logits_bv, drafts_bg, index):
            return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32), draw(logits_bv, drafts_bg, index)[1]

        return super().propose(state, context, likeliest)


@struct.dataclass
class WithoutDrafts(ModelDrafter):
    """Draws as if each draft were the first."""

    def propose(self, state, context, draw):
        return super().propose(state, context, lambda logits_bv, drafts_bg, index: draw(logits_bv, drafts_bg, 0))


@struct.dataclass
class TooLong(ModelDrafter):
    def propose(self, state, context, draw):
        proposal, state = super().propose(state, context, draw)
        return proposal.replace(length_b=proposal.length_b + 1), state


@struct.dataclass
class WideLength(ModelDrafter):
    def propose(self, state, context, draw):
        proposal, state = super().propose(state, context, draw)
        return proposal.replace(length_b=proposal.length_b.astype(jnp.float32)), state


@struct.dataclass
class NeverForgets(ModelDrafter):
    """Takes all drafts that were fed for true."""

    def observe(self, state, context, event):
        return state if event.drafted else super().observe(state, context, event)


@struct.dataclass
class RestsNot(ModelDrafter):
    """Notes a round of every row, of those that rest as well."""

    def observe(self, state, context, event):
        after = super().observe(state, context, event)
        if not event.drafted:
            return after
        return after.replace(fed_b=jnp.where(event.kept_b > 0, after.fed_b, 0 * after.fed_b))


@struct.dataclass
class FollowsNot(ModelDrafter):
    def follow(self, state, context, tokens_bg):
        state = super().follow(state, context, tokens_bg)
        return state.replace(cache=jnp.zeros_like(state.cache))


@struct.dataclass
class ReadsOneChunk(ModelDrafter):
    """Starts anew with each chunk of a prompt."""

    def observe(self, state, context, event):
        if not event.drafted:
            state = state.replace(cache=jnp.zeros_like(state.cache))
        return super().observe(state, context, event)


@struct.dataclass
class MixesRows(ModelDrafter):
    def propose(self, state, context, draw):
        def mixed(logits_bv, drafts_bg, index):
            return draw(logits_bv + logits_bv.mean(axis=0, keepdims=True), drafts_bg, index)

        return super().propose(state, context, mixed)


@struct.dataclass
class GrowingState(ModelDrafter):
    def observe(self, state, context, event):
        after = super().observe(state, context, event)
        return after.replace(fed_b=after.fed_b.astype(jnp.float32))


@struct.dataclass
class StateNotByRow(ModelDrafter):
    def init(self, target, rows, slots):
        return super().init(target, rows, slots).replace(fed_b=jnp.zeros((), jnp.int32))


@struct.dataclass
class Fixed:
    """Proposes one token again and again, for faults of sizes."""

    token: int = struct.field(pytree_node=False, default=0)
    num_draft: int = struct.field(pytree_node=False, default=DRAFTS)
    capture: tuple = struct.field(pytree_node=False, default=())
    vocab_size: int | None = struct.field(pytree_node=False, default=None)
    max_positions: int | None = struct.field(pytree_node=False, default=None)

    def init(self, target, rows, slots):
        return None

    def observe(self, state, context, event):
        return state

    def propose(self, state, context, draw):
        rows = context.length_b.shape[0]
        tokens_bg = jnp.full((rows, self.num_draft), self.token, jnp.int32)
        return Proposal(tokens_bg, None, jnp.full((rows,), self.num_draft, jnp.int32)), state


class Unregistered(Fixed):
    """A subclass without the decorator is no pytree."""


@struct.dataclass
class FloatLeaf(Fixed):
    rate: float = 0.5


def as_kind(kind):
    return kind(MODEL.model, DRAFTS)


WRONG_DRAFTERS = {
    "own probabilities": (as_kind(OwnProbabilities), "not what draw returned"),
    "own tokens": (as_kind(OwnTokens), "draw returned"),
    "each draft the first": (as_kind(WithoutDrafts), "not what draw returned"),
    "too long": (as_kind(TooLong), "from 0 to num_draft"),
    "float lengths": (as_kind(WideLength), "length_b is"),
    "never forgets": (as_kind(NeverForgets), "rejected drafts"),
    "resting rows change": (as_kind(RestsNot), "a row that rests"),
    "follow is wrong": (as_kind(FollowsNot), "follow leaves another state"),
    "one chunk alone": (as_kind(ReadsOneChunk), "read in several chunks"),
    "rows mixed": (as_kind(MixesRows), "rows influence one another"),
    "state of another dtype": (as_kind(GrowingState), "keep shapes and dtypes"),
    "state not by row": (as_kind(StateNotByRow), "first axis must be the 3 rows"),
    "tokens out of range": (Fixed(VOCAB), "the target's ids"),
    "no draft": (Fixed(num_draft=0), "num_draft"),
    "capture a list": (Fixed(capture=(1.5,)), "tuple of integers"),
    "another vocabulary": (Fixed(vocab_size=VOCAB + 1), "draft its tokens"),
    "no positions": (Fixed(max_positions=0), "max_positions"),
    "no pytree": (Unregistered(), "no registered pytree"),
    "a leaf that is no array": (FloatLeaf(), "no registered pytree"),
    "a class": (NGramDrafter, "is no drafter"),
    "no drafter": ("n-gram", "is no drafter"),
}


@pytest.mark.parametrize(("drafter", "words"), WRONG_DRAFTERS.values(), ids=WRONG_DRAFTERS)
def test_what_is_wrong_with_a_drafter_is_named(drafter, words):
    with pytest.raises(ValueError) as caught:
        check_drafter(drafter, TARGET)
    assert words in str(caught.value)
