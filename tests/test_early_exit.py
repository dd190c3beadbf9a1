"""Early exit: all layers are the target itself, the cache is shared and never copied, and what cannot be is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jitted import jit
from test_compiled import arguments, compilations, copies, outer_loops
from test_conversion import GPT2, LATENT, LLAMA

import specjax
from specjax.drafters.early_exit import EarlyExitDrafter
from specjax.engine import programs
from specjax.hf import decoder_config
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

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
    return specjax.generate(
        target, prompt, length, drafter=drafter, fixed=True, sampling=sampling, max_new_tokens=new, **settings
    )


@pytest.mark.parametrize("g", [1, 2, 5])
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

    def early_exit(params, feed, cache, depth):
        asked.append((f"the first {depth}", feed.tokens_bt.shape[1]))
        return target.early_exit(params, feed, cache, depth)

    def forward(params, feed, cache, capture=()):
        asked.append(("all", feed.tokens_bt.shape[1]))
        return target.forward(params, feed, cache, capture)

    watched = target.replace(forward=forward, early_exit=early_exit)
    prompt, length = specjax.pad_prompts(PROMPTS)
    state = specjax.prefill(watched, prompt, length, drafter=drafter, fixed=True, max_new_tokens=9)
    asked.clear()
    jax.eval_shape(lambda state: specjax.step(watched, state, drafter=drafter), state)
    return asked


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_first_layers_run_for_the_drafts_and_all_layers_once(target, depth):
    assert asked_of(target, EarlyExitDrafter(depth, 3)) == [(f"the first {depth}", 1)] * 3 + [("all", 4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_write_what_a_forward_pass_does(family):
    """With learned positions, layers of two kinds, and latent caches with experts after the first layer. All layers
    have the logits of a forward pass; the others' part of the cache stays; a row that rests is not read."""
    config = decoder_config(FAMILIES[family])
    model = decoder_model(config, init_params(config, jax.random.key(1)))
    tokens_bt = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (3, 9)), jnp.int32)
    _, cache = jit(model.run)(whole_feed(tokens_bt), model.init_cache(3, 24))
    feed = specjax.Feed(tokens_bt[:, :4], jnp.asarray([5, 3, 9], jnp.int32), jnp.asarray([4, 2, 0], jnp.int32))
    for depth in range(1, model.num_layers + 1):

        @jit
        def passes(params, cache, depth=depth):
            return model.forward(params, feed, cache), model.early_exit(params, feed, cache, depth)

        wanted, found = passes(model.params, cache)
        assert found.features == ()
        chex.assert_trees_all_equal(found.cache.layers[depth:], cache.layers[depth:])
        end_b, real_bt = feed.start_b + feed.count_b, np.asarray(feed.real_bt)
        for row, end in enumerate(end_b.tolist()):
            for held, kept in zip(*(jax.tree.leaves(x.cache.layers[:depth]) for x in (found, wanted)), strict=True):
                np.testing.assert_allclose(held[row, :, :end], kept[row, :, :end], atol=1e-6)
        if depth == model.num_layers:
            np.testing.assert_allclose(found.logits_btv[real_bt], wanted.logits_btv[real_bt], atol=1e-5)


@struct.dataclass
class Likeliest(EarlyExitDrafter):
    """Drafts without ``draw``, and so feeds itself its own drafts, whoever's are taken."""

    def propose(self, state, context, draw):
        def likeliest(logits_bv, drafts_bg, index):
            return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32), logits_bv

        proposal, state = super().propose(state, context, likeliest)
        return proposal.replace(probs_bgv=None), state


def test_what_it_wrote_of_drafts_that_a_cascade_does_not_take_is_overwritten(target):
    prompts = [[1, 2, 3, 1, 2], [4, 4, 4, 4]]
    drafter = specjax.Cascade(specjax.NGramDrafter(3, 1, 2), Likeliest(2, 3))
    out = generate(target, drafter, prompts, 31)
    np.testing.assert_array_equal(out.tokens, generate(target, None, prompts, 31).tokens)


def test_another_drafter_beside_it_may_read_states_of_the_first_layers(target):
    """They are those of the target's own pass over the whole text."""
    seen = []

    @struct.dataclass
    class Reads(Curious):
        def observe(self, state, context, event):
            last_bt = jax.tree.map(lambda x: x[:, 0], event.features)
            jax.debug.callback(
                lambda drafted, start_b, *states: seen.append((bool(drafted), start_b, states)),
                event.drafted,
                event.feed.start_b,
                *last_bt,
            )

    drafter = specjax.Cascade(Reads(3, wanted=(1, 3)), EarlyExitDrafter(2, 3))
    out = generate(target, drafter, [[1, 2, 3, 1, 2]], 9)
    jax.effects_barrier()
    cache = target.init_cache(1, out.tokens.shape[1])
    wanted = jit(target.forward, static_argnums=3)(target.params, whole_feed(out.tokens), cache, (1, 3)).features
    assert sum(drafted for drafted, _, _ in seen) >= 2 and not all(drafted for drafted, _, _ in seen)
    for _, start_b, states in seen:
        for found_bd, wanted_btd in zip(states, wanted, strict=True):
            np.testing.assert_allclose(found_bd[0], wanted_btd[0, int(start_b[0])], atol=1e-5)


@pytest.mark.parametrize("depth", [1, LAYERS])
def test_a_loop_on_the_device_drafts_as_unrolled_steps_do(target, depth):
    drafter = EarlyExitDrafter(depth, 3)
    for temperature in (0.0, 1.0):
        unrolled = generate(target, drafter, PROMPTS, 31, temperature)
        looped = generate(target, drafter.replace(unrolled=False), PROMPTS, 31, temperature)
        np.testing.assert_array_equal(looped.tokens, unrolled.tokens)
        np.testing.assert_array_equal(looped.stats.accepted_at, unrolled.stats.accepted_at)


def test_there_are_no_parameters():
    assert jax.tree.leaves(EarlyExitDrafter(2)) == []


@pytest.mark.parametrize(("rows", "slots"), [(1, 128), (3, 1024)])
def test_a_round_copies_no_cache(target, rows, slots):
    args, static = arguments(rows, slots, target, EarlyExitDrafter(2, 3))
    (body,) = outer_loops(programs.generate_program.lower(*args, **static).compile().as_text())
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


def test_hidden_states_that_the_target_does_not_have_are_refused(target):
    """Whatever the drafter, and before anything is traced."""
    assert generate(target, Curious(wanted=(0, 3, -1)), PROMPTS, 4).lengths.tolist() == [5, 6, 11]
    for wanted in ((4,), (0, -2)):
        with pytest.raises(ValueError, match=rf"hidden states \({wanted[0]},.*and the target has 3 layers"):
            generate(target, Curious(wanted=wanted), PROMPTS, 4)
