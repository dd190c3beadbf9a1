"""Trees in the loop: the text, statistics, log-probabilities and caches of rounds that keep one path of several.

``walk`` emits the target's own sample at each place, with the noise of its position. So with any tree a seed gives the
text of plain decoding, at every temperature, and most tests compare whole texts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_rule import EveryRule
from flax import struct
from forced_width import force
from jitted import jit
from trees import BUSHY, SHAPES, TreeDrafter, depths, path_to, ranks_along

import specjax
from specjax import Sampling, verify
from specjax.testing import table_model
from specjax.verify.walks import WalkRule

VOCAB, NEW = 5, 12
PROMPTS = ([3], [2, 3, 2, 3], [4, 0], [0, 1, 2, 0, 1, 2, 0])
PROMPT, LENGTH = specjax.pad_prompts(PROMPTS)
ROWS = len(PROMPTS)


def random_table(seed):
    return np.random.default_rng(seed).normal(scale=2, size=(VOCAB,) * 3).astype(np.float32)


TABLE = random_table(0)
TARGET = table_model(TABLE)
NEAR = jnp.asarray(TABLE + 0.5 * random_table(1))
DRAFTERS = {
    "drawn": TreeDrafter(NEAR),
    "drawn, ragged": TreeDrafter(NEAR, ragged=True),
    "chosen": TreeDrafter(NEAR, ranks=ranks_along(BUSHY, 5)),
    "chosen, a chain": TreeDrafter(NEAR, SHAPES["chain"], (0, 0, 0)),
    "chosen, a star": TreeDrafter(NEAR, SHAPES["star"], (2, 0, 1)),
}
every_drafter = pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
GREEDY = Sampling(temperature=0)
MIXED = Sampling(
    temperature=np.array([1, 0.7, 0, 1.5]),
    top_k=np.array([0, 3, 0, 0]),
    top_p=np.array([1, 1, 1, 0.9]),
    repetition_penalty=np.array([1, 1.3, 1.2, 1]),
    presence_penalty=np.array([0, 0, 0.5, 0.4]),
    frequency_penalty=np.array([0, 0.3, 0.2, -0.2]),
    seed=np.array([7, 0, 2, 1]),
)
every_sampling = pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=5), MIXED], ids=["T=0", "T=1", "mixed"])


def run(drafter=None, sampling=GREEDY, prompt=PROMPT, length=LENGTH, target=TARGET, **settings):
    """Returns the generation as NumPy arrays."""
    settings = {"max_new_tokens": NEW, "verify": verify.walk, "fixed": True} | settings
    return jax.device_get(specjax.generate(target, prompt, length, drafter=drafter, sampling=sampling, **settings))


def texts(out):
    return [out.tokens[i, :n].tolist() for i, n in enumerate(out.lengths)]


@every_sampling
@every_drafter
def test_the_text_and_its_log_probabilities_are_those_of_plain_decoding(drafter, sampling):
    plain = run(sampling=sampling, logprobs=True, top_logprobs=2)
    out = run(drafter, sampling, logprobs=True, top_logprobs=2)
    assert texts(out) == texts(plain)
    assert out.stats.accepted.sum() > 0
    for name in ("logprobs", "warped_logprobs", "top_tokens", "top_logprobs"):
        np.testing.assert_allclose(getattr(out, name), getattr(plain, name), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("leaf", range(len(BUSHY)))
def test_drafts_of_the_target_are_kept_along_every_path(leaf):
    """The target's own tokens on the path to a draft, other tokens beside it."""
    drafter = TreeDrafter(TARGET.params, ranks=ranks_along(BUSHY, leaf))
    deepest = [other for other in range(len(BUSHY)) if leaf in path_to(BUSHY, other) and drafter.ranks[other] == 0]
    out = run(drafter, max_new_tokens=36)
    kept = max(len(path_to(BUSHY, other)) for other in [leaf, *deepest])
    assert texts(out) == texts(run(max_new_tokens=36))
    np.testing.assert_array_equal(out.stats.rounds, -(-36 // (kept + 1)))
    np.testing.assert_array_equal(out.stats.accepted, out.stats.rounds * kept)
    reached = np.arange(drafter.tree_depth) < kept
    np.testing.assert_array_equal(out.stats.accepted_at, out.stats.rounds[:, None] * reached[None])
    np.testing.assert_array_equal(out.stats.drafted, out.stats.rounds * len(BUSHY))
    np.testing.assert_array_equal(out.stats.drafted_at, np.broadcast_to(out.stats.rounds[:, None], (ROWS, 3)))


def test_statistics_are_by_depth():
    """A row that proposes the first n drafts of the tree has the depth of the deepest of them."""
    drafter = TreeDrafter(NEAR, ranks=ranks_along(BUSHY, 5), ragged=True)
    prompts = [[3], [2, 1], [4, 0], [4]]
    state = specjax.prefill(TARGET, prompts, drafter=drafter, sampling=GREEDY, max_new_tokens=NEW, fixed=True)
    after = jit(functools.partial(specjax.step, verify=verify.walk))(TARGET, state, drafter=drafter)
    proposed_b = [prompt[-1] for prompt in prompts]
    deep_b = [max(depths(BUSHY)[:n], default=0) for n in proposed_b]
    assert deep_b == [2, 1, 0, 2]
    np.testing.assert_array_equal(after.stats.drafted, proposed_b)
    np.testing.assert_array_equal(after.stats.drafted_at, np.arange(3) < np.asarray(deep_b)[:, None])
    np.testing.assert_array_equal(after.stats.accepted_at.sum(1), after.stats.accepted)


@pytest.mark.parametrize("new", range(1, 8))
def test_rows_end_exactly_at_their_limits(new):
    """A path past the limit is cut."""
    limits = np.array([new, 1, 9 - new, 3])
    drafter = TreeDrafter(TARGET.params, ranks=ranks_along(BUSHY, 5))
    out = run(drafter, max_new_tokens=limits)
    np.testing.assert_array_equal(out.lengths, LENGTH + limits)
    assert texts(out) == texts(run(max_new_tokens=limits))


@every_sampling
def test_stop_tokens_end_rows_inside_a_path(sampling):
    drafter = TreeDrafter(TARGET.params, ranks=ranks_along(BUSHY, 5))
    for stop in range(VOCAB):
        out, plain = (run(each, sampling, stop_tokens=(stop,), max_new_tokens=30) for each in (drafter, None))
        assert texts(out) == texts(plain)
    cut_b = out.stats.accepted + out.stats.rounds > out.stats.emitted
    assert cut_b.any()


@every_drafter
def test_a_row_does_not_depend_on_its_neighbours(drafter):
    sampling = Sampling(seed=np.array([7, 0, 2, 1]))
    whole = texts(run(drafter, sampling))
    for i in range(ROWS):
        alone = Sampling(seed=sampling.seed[i : i + 1])
        assert texts(run(drafter, alone, PROMPT[i : i + 1], LENGTH[i : i + 1])) == whole[i : i + 1]


@every_sampling
def test_streams_and_steps_give_the_same_text(sampling):
    drafter, wanted = DRAFTERS["chosen"], texts(run(DRAFTERS["chosen"], sampling))
    options = {"drafter": drafter, "sampling": sampling, "max_new_tokens": NEW, "fixed": True}
    *_, last = specjax.stream(TARGET, PROMPT, LENGTH, verify=verify.walk, rounds=2, **options)
    assert texts(last) == wanted
    state = specjax.prefill(TARGET, PROMPT, LENGTH, **options)
    one = jit(functools.partial(specjax.step, verify=verify.walk))
    while not state.done_b.all():
        state = one(TARGET, state, drafter=drafter)
    assert texts(jax.device_get(state.generation)) == wanted


@every_sampling
def test_rows_that_are_extended_go_on_as_without_drafts(sampling):
    def talk(drafter):
        options = {"drafter": drafter, "sampling": sampling, "fixed": True}
        state = specjax.prefill(TARGET, PROMPT, LENGTH, max_new_tokens=[5, 6, 7, 8], slots=64, **options)
        state = specjax.run(TARGET, state, drafter=drafter, verify=verify.walk)
        turn = [[1, 2], [], [4], [0, 0, 3]]
        state = specjax.extend(TARGET, state, turn, drafter=drafter, max_new_tokens=9)
        state = specjax.run(TARGET, state, drafter=drafter, verify=verify.walk)
        return texts(jax.device_get(state.generation))

    assert talk(DRAFTERS["chosen"]) == talk(None)


def test_rows_that_are_inserted_give_their_own_text():
    drafter = DRAFTERS["chosen"]
    options = {"drafter": drafter, "fixed": True, "slots": 64}
    state = specjax.prefill(TARGET, PROMPT, LENGTH, sampling=Sampling(seed=5), max_new_tokens=[3, 20, 3, 20], **options)
    one = jit(functools.partial(specjax.step, verify=verify.walk))
    while not (state.done_b[0] and state.done_b[2]):
        state = one(TARGET, state, drafter=drafter)
    other = specjax.prefill(TARGET, [[1, 1], [2]], sampling=Sampling(seed=70), max_new_tokens=10, **options)
    state = specjax.run(TARGET, specjax.insert(state, [2, 0], other), drafter=drafter, verify=verify.walk)
    out = texts(jax.device_get(state.generation))
    news = texts(run(None, Sampling(seed=70), *specjax.pad_prompts([[1, 1], [2]]), max_new_tokens=10))
    olds = texts(run(None, Sampling(seed=5), max_new_tokens=20))
    assert out == [news[1], olds[1], news[0], olds[3]]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_rounds_that_adapt_draft_one_of_two_trees_or_nothing(number):
    """Whichever is chosen, the text is that of plain decoding; then the drafts are counted by depth."""
    drafter, sampling = DRAFTERS["chosen"], Sampling(seed=5)
    costs = [1.0 if each == number else 100.0 for each in range(3)] if number < 2 else [1.0, 1.0, 1.0]
    out = run(drafter, sampling, fixed=False, costs=costs, max_new_tokens=40)
    assert texts(out) == texts(run(None, sampling, max_new_tokens=40))
    assert (out.stats.drafted > 0).all() == bool(number)
    assert out.stats.drafted_at.shape == (ROWS, 3)
    state = specjax.prefill(
        TARGET, PROMPT, LENGTH, drafter=drafter, sampling=sampling, max_new_tokens=40, costs=[1.0, 1.5, 1.8]
    )
    state = specjax.run(TARGET, force(state, number), drafter=drafter, verify=verify.walk, rounds=3)
    np.testing.assert_array_equal(state.stats.drafted, 3 * [0, 3, len(BUSHY)][number])
    assert state.adapt.widths == (0, 3, 3)
    first, second = np.asarray(state.adapt.tried_be).reshape(ROWS, 2, 3)[:, :, 0].T
    assert (first > 2.8).all() if number == 1 else not first.any()
    assert (second > 2.8).all() if number == 2 else not second.any()
    if number == 1:  # the small tree has paths of two drafts at most, so a third one was never kept
        tried_b, kept_b = (np.asarray(x)[:, 2] for x in (state.adapt.tried_be, state.adapt.kept_be))
        np.testing.assert_array_equal(tried_b > 0, np.asarray(state.stats.accepted_at)[:, 1] > 0)
        assert tried_b.any() and not kept_b.any()


# Faults.


def without_mask(params, feed, cache, capture=()):
    return TARGET.forward(params, dataclasses.replace(feed, parents_bt=None), cache, capture)


FAULTS = {
    "a tree is read as a chain": TARGET.replace(forward=without_mask),
    "the path stays where it was written": TARGET.replace(gather=lambda cache, feed, path_bt: cache),
}


@pytest.mark.parametrize("target", FAULTS.values(), ids=FAULTS)
def test_fault_changes_the_text(target):
    drafter = TreeDrafter(TARGET.params, ranks=ranks_along(BUSHY, 5))
    assert texts(run(drafter, target=target)) != texts(run())


# Bad input: an error before anything compiles.


@dataclasses.dataclass(frozen=True)
class NoPath(WalkRule):
    def __call__(self, proposal, target_btv, draws):
        return super().__call__(proposal, target_btv, draws).replace(path_bd=None)


@struct.dataclass
class WrongDepth(TreeDrafter):
    tree_depth = 8


@struct.dataclass
class NoDepth(TreeDrafter):
    tree_depth = None


def test_bad_input_names_the_cure():
    drafter = DRAFTERS["chosen"]
    for wrong, settings, message in [
        (drafter, {"target": TARGET.replace(gather=None)}, "has no gather"),
        (drafter, {"verify": verify.block}, "a rule for chains; give a rule for trees"),
        (drafter, {"verify": EveryRule()}, "a rule for chains"),
        (drafter, {"verify": NoPath(False)}, "path_bd is None after a tree"),
        (WrongDepth(NEAR), {}, "tree_depth is 8; give an integer from 1 to num_draft, 7"),
        (NoDepth(NEAR), {}, "tree_depth is None and its proposal has parents_bg"),
        (drafter, {"slots": 20}, "slots is 20; the prompt"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(wrong, **settings)
