"""Early exit: all layers are the target itself, the cache is shared and never copied, no layer runs over a token
twice, and what cannot be is refused."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from test_compiled import arguments, compilations, copies, outer_loops
from test_conversion import GPT2, LATENT, LLAMA

import specjax
from specjax.drafters.early_exit import EarlyExitDrafter
from specjax.engine import loop as engine
from specjax.hf import decoder_config
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params

VOCAB, LAYERS = 37, 3
PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2]]
GEMMA = {**LLAMA, "model_type": "gemma2", "num_hidden_layers": 3, "sliding_window": 4}
FAMILIES = {"learned positions": GPT2, "windows": GEMMA, "latents, experts": LATENT}


@struct.dataclass
class Curious(specjax.NGramDrafter):
    """Prompt lookup that asks for hidden states."""

    wanted: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def capture(self):
        return self.wanted


@pytest.fixture(scope="module")
def target():
    config = DecoderConfig(VOCAB, 16, 24, LAYERS, 2, 2, head_dim=8, max_position_embeddings=2048)
    params = init_params(config, jax.random.key(0))
    return decoder_model(config, jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params))


def generate(target, drafter, prompts, new, temperature=0.0, **settings):
    prompt, length = specjax.pad_prompts(prompts)
    sampling = specjax.Sampling(temperature=temperature, seed=list(range(len(prompts))))
    return specjax.generate(target, prompt, length, drafter=drafter, sampling=sampling, max_new_tokens=new, **settings)


@pytest.mark.parametrize("g", range(1, 6))
def test_all_layers_are_accepted_in_full(target, g):
    out = generate(target, EarlyExitDrafter(LAYERS, g), PROMPTS, 31)
    assert (np.asarray(out.stats.drafted_at) > 0).all()
    np.testing.assert_array_equal(out.stats.accepted_at, out.stats.drafted_at)
    assert out.stats.rounds.tolist() == [-(-31 // (g + 1))] * 3
    np.testing.assert_array_equal(out.tokens, generate(target, None, PROMPTS, 31).tokens)


def test_some_layers_draft_what_a_model_of_these_layers_would(target):
    """The same drafts as those of a model with its own copy of the layers, and of their cache."""
    config = DecoderConfig(VOCAB, 16, 24, 2, 2, 2, head_dim=8, max_position_embeddings=2048)
    params = target.params | {"layers": {i: target.params["layers"][i] for i in range(2)}}
    copy = specjax.ModelDrafter(decoder_model(config, params), 3)
    out, wanted = (generate(target, drafter, PROMPTS, 31, 1.0) for drafter in (EarlyExitDrafter(2, 3), copy))
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_array_equal(out.stats.accepted_at, wanted.stats.accepted_at)
    assert 0 < out.stats.accepted.sum() < out.stats.drafted.sum()


def asked_of(target, drafter):
    """Returns which layers a round asks the target to run, over how many tokens, in turn."""
    asked = []

    def early_exit(params, tokens_bt, cache, start_b, depth):
        asked.append((f"the first {depth}", tokens_bt.shape[1]))
        return target.early_exit(params, tokens_bt, cache, start_b, depth)

    def resume(params, x_btd, cache, start_b, depth, capture=()):
        asked.append((f"all but {depth}", x_btd.shape[1]))
        return target.resume(params, x_btd, cache, start_b, depth, capture)

    def forward(params, tokens_bt, cache, start_b, capture=()):
        asked.append(("all", tokens_bt.shape[1]))
        return target.forward(params, tokens_bt, cache, start_b, capture)

    watched = target.replace(forward=forward, early_exit=early_exit, resume=target.resume and resume)
    prompt, length = specjax.pad_prompts(PROMPTS)
    state = specjax.prefill(watched, prompt, length, drafter=drafter, max_new_tokens=9)
    asked.clear()
    jax.eval_shape(lambda state: specjax.step(watched, state, drafter=drafter), state)
    return asked


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_layer_runs_over_a_token_twice(target, depth):
    wanted = [(f"the first {depth}", 1)] * 4 + [(f"all but {depth}", 4)]
    assert asked_of(target, EarlyExitDrafter(depth, 3)) == wanted
    assert asked_of(target, specjax.Cascade(specjax.NGramDrafter(3), EarlyExitDrafter(depth, 3))) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_and_then_the_others_are_a_forward_pass(family):
    """With learned positions, layers of two kinds, and latent caches with experts behind the first layer."""
    config = decoder_config(FAMILIES[family])
    model = decoder_model(config, init_params(config, jax.random.key(1)))
    tokens_bt = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)), jnp.int32)
    start_b = jnp.asarray([5, 3], jnp.int32)
    cache = jax.jit(model.forward)(model.params, tokens_bt, model.init_cache(2, 24), jnp.zeros(2, jnp.int32)).cache
    block_bt = tokens_bt[:, :4]
    for depth in range(1, model.num_layers + 1):
        capture = (depth, model.num_layers, -1)

        @jax.jit
        def passes(params, cache, depth=depth, capture=capture):
            wanted = model.forward(params, block_bt, cache, start_b, capture)
            begun = model.early_exit(params, block_bt, cache, start_b, depth)
            assert len(begun.features) == 1
            found = model.resume(params, begun.features[0], begun.cache, start_b, depth, capture)
            return wanted, found, begun.cache

        wanted, found, begun = passes(model.params, cache)
        chex.assert_trees_all_equal(begun.layers[depth:], cache.layers[depth:])
        chex.assert_trees_all_close(found, wanted, atol=1e-6)


def test_a_target_that_cannot_go_on_from_states_runs_all_its_layers(target):
    """And the first ones for no more than the drafts."""
    cannot, drafter = target.replace(resume=None), EarlyExitDrafter(2, 3)
    assert asked_of(cannot, drafter) == [("the first 2", 1)] * 3 + [("all", 4)]
    found, wanted = (generate(model, drafter, PROMPTS, 31, 1.0) for model in (cannot, target))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)


@struct.dataclass
class Likeliest(EarlyExitDrafter):
    """Drafts without ``draw``, and so feeds itself its own drafts, whoever's are taken."""

    def propose(self, state, context, draw):
        def likeliest(logits_bv, prefix_bi):
            return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32), logits_bv

        proposal, state = super().propose(state, context, likeliest)
        return proposal.replace(probs_bgv=None), state


def test_states_of_drafts_that_a_cascade_does_not_take_are_not_gone_on_from(target):
    prompts, wanted = [[1, 2, 3, 1, 2], [4, 4, 4, 4]], [("the first 2", 1)] * 4
    alone, drafter = Likeliest(2, 3), specjax.Cascade(specjax.NGramDrafter(3, 1, 2), Likeliest(2, 3))
    assert asked_of(target, alone) == [*wanted, ("all but 2", 4)]
    assert asked_of(target, drafter) == [*wanted, ("all", 4)]
    out = generate(target, drafter, prompts, 31)
    np.testing.assert_array_equal(out.tokens, generate(target, None, prompts, 31).tokens)


def test_another_drafter_beside_it_may_read_states_of_the_first_layers(target):
    """Which the rest of a pass would not give."""
    seen = []

    @struct.dataclass
    class Reads(Curious):
        def commit(self, state, context, verdict, features):
            jax.debug.callback(lambda length_b, *states: seen.append((length_b, states)), context.length_b, *features)

    drafter = specjax.Cascade(Reads(3, wanted=(1, 3)), EarlyExitDrafter(2, 3))
    out = generate(target, drafter, [[1, 2, 3, 1, 2]], 9)
    jax.effects_barrier()
    cache, start_b = target.init_cache(1, out.tokens.shape[1]), jnp.zeros(1, jnp.int32)
    wanted = target.forward(target.params, out.tokens, cache, start_b, (1, 3)).features
    assert len(seen) >= 2
    for length_b, states in seen:
        for found_btd, wanted_btd in zip(states, wanted, strict=True):
            np.testing.assert_allclose(found_btd[0, 0], wanted_btd[0, int(length_b[0]) - 1], atol=1e-5)


def test_there_are_no_parameters():
    assert jax.tree.leaves(EarlyExitDrafter(2)) == []


@pytest.mark.parametrize(("rows", "slots"), [(1, 128), (3, 1024)])
def test_a_round_copies_no_cache(target, rows, slots):
    args, static = arguments(rows, slots, target, EarlyExitDrafter(2, 3))
    (body,) = outer_loops(engine._generate_jit.lower(*args, **static).compile().as_text())
    assert copies(body, slots) == []


# Bad input.


@pytest.mark.parametrize("depth", [0, -1, 1.0, True, None])
def test_a_depth_is_a_number_of_layers(depth):
    with pytest.raises(ValueError, match=f"depth must be an integer of at least 1, got {depth}"):
        EarlyExitDrafter(depth)


def test_a_target_that_cannot_be_left_early_compiles_no_loop(target):
    table = specjax.testing.table_model(jnp.zeros((5, 5)))
    with compilations() as names:
        with pytest.raises(ValueError, match="depth is 4 and the target has 3 layers; give 1 to 3"):
            generate(target, EarlyExitDrafter(4), PROMPTS, 4)
        with pytest.raises(ValueError, match="the target has no early_exit"):
            generate(table, EarlyExitDrafter(1), [[1]], 4)
    assert not [name for name in names if "generate" in str(name)]


@struct.dataclass
class Faulty(EarlyExitDrafter):
    """Hands something else on."""

    change: Callable = struct.field(pytree_node=False, default=None)

    def propose(self, state, context, draw):
        proposal, state = super().propose(state, context, draw)
        return self.change(proposal), state


BAD_STATES = {
    "one short": (
        lambda p: p.replace(states_btd=p.states_btd[:, :-1]),
        r"states_btd is \(3, 3, 16\) and float32; specjax.types asks for \(3, 4, 16\)",
    ),
    "depth forgotten": (lambda p: p.replace(depth=0), "states_btd behind 0 layers of 3 and a cache; give"),
    "too deep": (lambda p: p.replace(depth=4), "states_btd behind 4 layers of 3 and a cache; give"),
    "cache forgotten": (lambda p: p.replace(cache=None), "states_btd behind 2 layers of 3 and no cache; give"),
}


@pytest.mark.parametrize(("change", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_states_that_cannot_be_right_are_refused(target, change, message):
    with pytest.raises(ValueError, match=message):
        generate(target, Faulty(2, 3, change), PROMPTS, 4)


def test_a_target_that_keeps_its_states_to_itself_is_refused(target):
    def early_exit(*args):
        return target.early_exit(*args)._replace(features=())

    with pytest.raises(ValueError, match="early_exit returns 0 features; it must return one"):
        generate(target.replace(early_exit=early_exit), EarlyExitDrafter(2, 3), PROMPTS, 4)


def test_hidden_states_that_the_target_does_not_have_are_refused(target):
    """Whatever the drafter, and before anything is traced."""
    assert generate(target, Curious(wanted=(0, 3, -1)), PROMPTS, 4).length_b.tolist() == [5, 6, 11]
    for wanted in ((4,), (0, -2)):
        with pytest.raises(ValueError, match=rf"hidden states \({wanted[0]},.*and the target has 3 layers"):
            generate(target, Curious(wanted=wanted), PROMPTS, 4)
