"""Early exit: all layers are the target itself, the cache is shared and never copied, and what cannot be is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from test_compiled import arguments, compilations, copies, outer_loops

import specjax
from specjax import engine
from specjax.drafters.early_exit import EarlyExitDrafter
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params

VOCAB, LAYERS = 37, 3
PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2]]


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
    assert (np.asarray(out.stats.drafted_at_bg) > 0).all()
    np.testing.assert_array_equal(out.stats.accepted_at_bg, out.stats.drafted_at_bg)
    assert out.stats.rounds_b.tolist() == [-(-31 // (g + 1))] * 3
    np.testing.assert_array_equal(out.tokens_bs, generate(target, None, PROMPTS, 31).tokens_bs)


def test_some_layers_draft_what_a_model_of_these_layers_would(target):
    """The same drafts as those of a model with its own copy of the layers, and of their cache."""
    config = DecoderConfig(VOCAB, 16, 24, 2, 2, 2, head_dim=8, max_position_embeddings=2048)
    params = target.params | {"layers": {i: target.params["layers"][i] for i in range(2)}}
    copy = specjax.ModelDrafter(decoder_model(config, params), 3)
    out, wanted = (generate(target, drafter, PROMPTS, 31, 1.0) for drafter in (EarlyExitDrafter(2, 3), copy))
    np.testing.assert_array_equal(out.tokens_bs, wanted.tokens_bs)
    np.testing.assert_array_equal(out.stats.accepted_at_bg, wanted.stats.accepted_at_bg)
    assert 0 < out.stats.accepted_b.sum() < out.stats.drafted_b.sum()


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
class Curious(specjax.NGramDrafter):
    """Prompt lookup that asks for hidden states."""

    wanted: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def capture(self):
        return self.wanted


def test_hidden_states_that_the_target_does_not_have_are_refused(target):
    """Whatever the drafter, and before anything is traced."""
    assert generate(target, Curious(wanted=(0, 3, -1)), PROMPTS, 4).length_b.tolist() == [5, 6, 11]
    for wanted in ((4,), (0, -2)):
        with pytest.raises(ValueError, match=rf"hidden states \({wanted[0]},.*and the target has 3 layers"):
            generate(target, Curious(wanted=wanted), PROMPTS, 4)
