"""Cascades: whose drafts a row takes, that the second keeps up with what the first drafted, and no copy of a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax import lax
from jitted import jit
from stateless import Stateless
from test_compiled import arguments, copies, outer_loops
from test_compiled import decoder as tiny_decoder

import specjax
from specjax import ModelDrafter, NGramDrafter
from specjax.drafters.cascade import Cascade
from specjax.drafters.early_exit import EarlyExitDrafter
from specjax.drafters.feature import FeatureDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.drafters.shared_vocabulary import shared_vocabulary_drafter
from specjax.engine import programs
from specjax.testing import table_logits, table_model
from specjax.text.vocabulary import VocabularyMap

VOCAB, ORDER, DRAFTS, SLOTS = 7, 4, 3, 64
PROMPTS = [[3, 6], [1, 5, 2], [2, 4, 1, 0, 5, 3, 2], [6, 6, 6, 6]]


# A target that reads its last four tokens from its cache, and drafters that read them from theirs.


@functools.cache
def target():
    model = table_model(np.random.default_rng(0).normal(size=(VOCAB,) * (ORDER + 1)) * 3)

    def forward(params, feed, cache, capture=()):
        output = model.forward(params, feed, cache)
        return output._replace(features=(jax.nn.one_hot(feed.tokens_bt, VOCAB),) * len(capture))

    def early_exit(params, feed, cache, depth):
        return forward(params, feed, cache)

    return model.replace(forward=forward, early_exit=early_exit, num_layers=1)


class TableHead:
    """A feature head with the target's table. Its cache is the row's tokens, the first of which only a state tells."""

    capture = (-1,)
    vocab_size = VOCAB

    def check_fit(self, target, width):
        assert width == VOCAB

    def init_cache(self, params, rows, slots):
        return jnp.zeros((rows, slots + 1), jnp.int32)

    def fuse(self, params, features):
        return features[0]

    def at_draft(self, index):
        return self

    def run(self, params, target, feed, states_btd, cache):
        start_b = feed.start_b
        first_b = jnp.argmax(states_btd[:, 0], axis=-1).astype(jnp.int32)
        cache = cache.at[:, 0].set(jnp.where(start_b == 0, first_b, cache[:, 0]))
        cache = jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at,)))(
            cache, feed.tokens_bt, start_b + 1
        )
        return table_logits(params, cache, feed.position_bt + 1, ORDER), cache

    def logits(self, params, target, states_bd):
        return states_bd


@struct.dataclass
class Led(ModelDrafter):
    """A model that cannot be told what another drafted, and drafts along in every round."""

    @property
    def follow(self):
        raise AttributeError("follow")


@struct.dataclass
class Told(EarlyExitDrafter):
    """Early exit that runs no layer where it is told what another drafted, so that the target's pass runs them all."""

    def follow(self, state, context, tokens_bg):
        return state


@struct.dataclass
class Deaf(Led):
    """A model that feeds itself something else where the first's drafts are taken."""

    def propose(self, state, context, draw):
        def deaf(logits_bv, drafts_bg, index):
            token_b, probs_bv = draw(logits_bv, drafts_bg, index)
            return jnp.where(proposes(context.length_b), (token_b + 1) % VOCAB, token_b), probs_bv

        return super().propose(state, context, deaf)


@struct.dataclass
class Forgetful(ModelDrafter):
    """A model that does not listen where it is to follow."""

    def follow(self, state, context, tokens_bg):
        return state


def same_vocabulary():
    each = np.arange(VOCAB, dtype=np.int32)
    return shared_vocabulary_drafter(target(), VocabularyMap(each, each[:, None], np.ones_like(each)), DRAFTS)


SECONDS = {
    "model": lambda: ModelDrafter(target(), DRAFTS),
    "model that is led": lambda: Led(target(), DRAFTS),
    "early exit": lambda: EarlyExitDrafter(1, DRAFTS),
    "early exit that is told": lambda: Told(1, DRAFTS),
    "feature head": lambda: FeatureDrafter(target().params, TableHead(), DRAFTS),
    "shared vocabulary": same_vocabulary,
}
FAULTY = {"deaf": Deaf, "forgetful": Forgetful}


@struct.dataclass
class Sometimes(Stateless):
    """Proposes at two lengths of three: some tokens as the target's table would have them, then others."""

    table: jax.Array
    num_draft: int = struct.field(pytree_node=False, default=DRAFTS)

    def propose(self, state, context, draw):
        length_b = context.length_b
        place_bt = length_b[:, None] + jnp.arange(-ORDER, 0, dtype=jnp.int32)[None]
        tokens_bt = jnp.take_along_axis(context.tokens_bs, jnp.maximum(place_bt, 0), axis=1)
        tokens_bt = jnp.where(place_bt >= 0, tokens_bt, 0)
        for i in range(self.num_draft):
            right_b = jnp.argmax(self.table[tuple(tokens_bt[:, -ORDER:].T)], axis=-1).astype(jnp.int32)
            token_b = jnp.where(i < length_b % (self.num_draft + 1), right_b, (right_b + 1) % VOCAB)
            tokens_bt = jnp.concatenate([tokens_bt, token_b[:, None]], axis=1)
        drafted_b = jnp.where(proposes(length_b), self.num_draft, 0).astype(jnp.int32)
        return specjax.Proposal(tokens_bt[:, ORDER:], None, drafted_b), state


def proposes(length):
    return length % 3 != 1


def rounds(target, drafter, prompts, number):
    """Yields, for each row and round, whether the first proposes, and how many tokens were drafted and accepted."""
    prompt, length = specjax.pad_prompts(prompts)
    sampling = specjax.Sampling(seed=list(range(len(prompts))))
    state = specjax.prefill(
        target, prompt, length, drafter=drafter, fixed=True, sampling=sampling, max_new_tokens=50, slots=SLOTS + 16
    )
    step = jit(functools.partial(specjax.step, drafter=drafter))  # shared, it might confuse classes: extending.md
    for _ in range(number):
        before, state = state, step(target, state)
        drafted, accepted = (
            np.asarray(getattr(state.stats, name) - getattr(before.stats, name)) for name in ("drafted", "accepted")
        )
        yield from zip(proposes(np.asarray(before.length_b)).tolist(), drafted.tolist(), accepted.tolist(), strict=True)


def accepted(second, prompts):
    """Returns how many drafts were accepted in the rounds of the first, and in those of the second."""
    seen = list(rounds(target(), Cascade(Sometimes(target().params), second), prompts, 12))
    assert all(drafted == DRAFTS for _, drafted, _ in seen)
    of_first, of_second = ([accepted for first, _, accepted in seen if first == which] for which in (True, False))
    assert len(of_second) >= 3 and {0, DRAFTS} & set(of_first) and len(set(of_first)) > 1
    return of_first, of_second


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["rows that differ", "one row"])
@pytest.mark.parametrize("make", SECONDS.values(), ids=SECONDS)
def test_the_second_keeps_up_with_the_firsts_drafts(make, prompts):
    """A second that is the target is accepted in full, at temperature 1, after rounds of all kinds. In one row alone
    it is passed by in the first's rounds, if it can follow."""
    assert set(accepted(make(), prompts)[1]) == {DRAFTS}


@pytest.mark.parametrize(("kind", "prompts"), [("deaf", PROMPTS), ("forgetful", PROMPTS[:1])])
def test_a_second_that_falls_behind_is_seen(kind, prompts):
    assert min(accepted(FAULTY[kind](target(), DRAFTS), prompts)[1]) < DRAFTS


def test_perfect_medusa_heads_keep_up():
    """The target's state is its last token; the token i + 2 steps on is a function of it."""
    following = (3 * np.arange(VOCAB) + 5) % VOCAB
    table = np.broadcast_to(20 * np.eye(VOCAB)[following], (VOCAB,) * (ORDER + 1))
    model = target().replace(params=jnp.asarray(table, jnp.float32))
    heads, ahead = {}, following
    for i in range(DRAFTS):
        ahead = following[ahead]
        block = {"kernel": jnp.zeros((VOCAB, VOCAB)), "bias": jnp.zeros((VOCAB,))}
        heads[i] = {"blocks": {0: block}, "lm_head": {"kernel": jnp.asarray(20 * np.eye(VOCAB)[ahead], jnp.float32)}}
    first = Sometimes(model.params)
    prompts = [[4, int(following[4])], [1, int(following[1]), int(following[following[1]])]]
    for rows in (prompts, prompts[:1]):
        seen = list(rounds(model, Cascade(first, MedusaDrafter(heads, DRAFTS)), rows, 12))
        assert {accepted for first, _, accepted in seen if not first} == {DRAFTS}
        assert len({accepted for first, _, accepted in seen if first}) > 1


# Whose drafts.


@pytest.mark.parametrize("second", [ModelDrafter, Led])
def test_each_row_takes_the_firsts_drafts_or_the_seconds(second):
    """And each draft's q is the law it came from: one-hot of the first's, what was drawn from of the second's."""
    drafter = Cascade(NGramDrafter(DRAFTS), second(target(), DRAFTS))
    prompt, length = specjax.pad_prompts([[5, 6, 1, 2, 5, 6], [1, 2, 3], [0, 4, 0, 4]])
    state = specjax.prefill(target(), prompt, length, drafter=drafter, fixed=True, max_new_tokens=20)
    context = specjax.Context(target(), state.cache, state.tokens_bs, state.length_b, jnp.full((3,), 19, jnp.int32))

    def draw(logits_bv, drafts_bg, index):
        return jnp.full((3,), 6 - index, jnp.int32), jax.nn.softmax(logits_bv)

    proposal, _ = drafter.propose(state.draft, context, draw)
    assert proposal.length_b.tolist() == [DRAFTS] * 3
    assert proposal.tokens_bg.tolist() == [[1, 2, 5], [6, 5, 4], [0, 4, 0]]
    for row in (0, 2):
        np.testing.assert_array_equal(proposal.probs_bgv[row], np.eye(VOCAB)[proposal.tokens_bg[row]])
    text = [0, 1, 2, 3, 6, 5]
    for i in range(DRAFTS):
        wanted = jax.nn.softmax(target().params[tuple(text[i : i + ORDER])])
        np.testing.assert_allclose(proposal.probs_bgv[1, i], wanted, rtol=1e-6)


def test_two_deterministic_drafters_have_no_probabilities():
    drafter = Cascade(NGramDrafter(DRAFTS, 3, 4), NGramDrafter(DRAFTS, 1, 2))
    tokens_bs = jnp.asarray([[1, 2, 3, 9, 1, 2, 3], [4, 5, 4, 6, 7, 8, 4]])
    context = specjax.Context(None, None, tokens_bs, jnp.full(2, 7), jnp.full(2, 9))
    context = jax.tree.map(lambda x: x.astype(jnp.int32), context)
    state = drafter.init(None, 2, 7)
    proposal, _ = drafter.propose(state, context, None)
    assert proposal.probs_bgv is None
    assert proposal.tokens_bg.tolist() == [[9, 1, 2], [6, 7, 8]]


def test_three_nest_on_the_left():
    inner = Cascade(NGramDrafter(DRAFTS, 2, 4), EarlyExitDrafter(1, DRAFTS))
    drafter = Cascade(inner, ModelDrafter(target(), DRAFTS))
    out = generate(target(), drafter, PROMPTS, 30)
    np.testing.assert_array_equal(out.tokens, generate(target(), None, PROMPTS, 30).tokens)


def test_both_get_the_hidden_states_that_they_ask_for():
    @struct.dataclass
    class Asks(NGramDrafter):
        wanted: tuple[int, ...] = struct.field(pytree_node=False, default=())
        capture = property(lambda self: self.wanted)

        def observe(self, state, context, event):
            assert event.features == tuple(f"state {index}" for index in self.wanted)
            told.append(self.wanted)

    told = []
    drafter = Cascade(Asks(wanted=(2, -1)), Asks(wanted=(0, 2)))
    assert drafter.capture == (2, -1, 0)
    features = tuple(f"state {index}" for index in drafter.capture)
    drafter.observe(drafter.init(None, 1, 1), None, specjax.Event(None, features, None))
    assert told == [(2, -1), (0, 2)]


def test_limits_are_the_tighter_ones():
    short = ModelDrafter(target().replace(max_positions=40), DRAFTS)
    assert Cascade(NGramDrafter(DRAFTS), short).max_positions == 40
    assert Cascade(short, EarlyExitDrafter(1, DRAFTS)).vocab_size == VOCAB
    assert Cascade(NGramDrafter(), EarlyExitDrafter(1)).max_positions is None
    with pytest.raises(ValueError, match="the drafter has 40"):
        generate(target(), Cascade(NGramDrafter(DRAFTS), short), PROMPTS, 40)


# The loop around it.


def generate(target, drafter, prompts, new, temperature=0.0, **settings):
    prompt, length = specjax.pad_prompts(prompts)
    sampling = specjax.Sampling(temperature=temperature, seed=list(range(len(prompts))))
    return specjax.generate(
        target, prompt, length, drafter=drafter, fixed=True, sampling=sampling, max_new_tokens=new, **settings
    )


@pytest.fixture(scope="module", params=["early exit", "model"])
def pair(request):
    """A decoder, and prompt lookup before a worse drafter than the target itself."""
    model = tiny_decoder(3, 2, 0, scale=8)
    seconds = {"early exit": EarlyExitDrafter(2, 2), "model": ModelDrafter(tiny_decoder(2, 1, 1, scale=8), 2)}
    return model, Cascade(NGramDrafter(2, 1, 3), seconds[request.param])


def test_a_row_does_not_depend_on_its_neighbours(pair):
    """Alone, a row spares the second its passes; among others it does not."""
    target, drafter = pair
    one = generate(target, drafter, PROMPTS[3:], 30, 1.0)
    prompt, length = specjax.pad_prompts([PROMPTS[3], *PROMPTS[:2]])
    sampling = specjax.Sampling(temperature=[1.0, 0.0, 1.5], seed=[0, 8, 9])
    many = specjax.generate(target, prompt, length, drafter=drafter, fixed=True, sampling=sampling, max_new_tokens=30)
    assert many.tokens[0].tolist() == one.tokens[0].tolist()
    assert many.stats.accepted_at[0].tolist() == one.stats.accepted_at[0].tolist()


@pytest.mark.parametrize(("rows", "slots"), [(1, 128), (3, 1024)])
def test_a_round_copies_no_cache(pair, rows, slots):
    """Neither the second's own nor the target's, though a round may pass the second by."""
    args, static = arguments(rows, slots, *pair)
    (body,) = outer_loops(programs.generate_program.lower(*args, **static).compile().as_text())
    assert copies(body, slots) == []


# Bad input.

BAD = {
    "a class": (lambda: Cascade(NGramDrafter, NGramDrafter()), TypeError, "first drafter is <class"),
    "no drafter": (lambda: Cascade(NGramDrafter(), None), TypeError, "second drafter is None"),
    "numbers of drafts": (lambda: Cascade(NGramDrafter(2), NGramDrafter(3)), ValueError, "first .* 2 .*second 3"),
    "nested on the right": (
        lambda: Cascade(NGramDrafter(), Cascade(NGramDrafter(), NGramDrafter())),
        ValueError,
        "nest on the left",
    ),
    "two vocabularies": (
        lambda: Cascade(ModelDrafter(table_model(np.zeros((5, 5)))), ModelDrafter(target())),
        ValueError,
        r"vocabularies of \[5, 7\] tokens",
    ),
    "another vocabulary": (
        lambda: Cascade(NGramDrafter(), ModelDrafter(table_model(np.zeros((5, 5))))),
        ValueError,
        "the drafter's vocabulary has 5 tokens and the target's 7",
    ),
    "a part that does not fit": (
        lambda: Cascade(NGramDrafter(), EarlyExitDrafter(2)),
        ValueError,
        "depth is 2 and the target has 1 layers",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_cascades_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        generate(target(), make(), PROMPTS, 4)
