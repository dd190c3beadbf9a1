"""``specjax.adapt``: models of others have the text and the law of one pass without a cache, and compile once."""

import dataclasses
import functools

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jitted import jit
from scipy import stats
from test_compiled import compilations

import specjax
from specjax import EarlyExitDrafter, ModelDrafter, NGramDrafter, Sampling

PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 6, 5, 6, 5, 6, 5, 1, 2, 3, 4]]
GREEDY = Sampling(temperature=0.0)
WHOLE = {"call": foreign.states_of, "early_exit": foreign.early_exit}


def adapted(seed=1, way="mapped", **settings):
    return specjax.adapt(foreign.Decoder(seed), foreign.empty, way=way, **settings)


def generate(target, prompts=PROMPTS, new=24, drafter=None, **settings):
    given = {"sampling": GREEDY, "fixed": True} | settings
    return specjax.generate(target, prompts, drafter=drafter, max_new_tokens=new, **given)


def texts(out):
    return [row[:length].tolist() for row, length in zip(np.asarray(out.tokens), out.lengths, strict=True)]


def greedy_texts(model, prompts, new):
    """One token after the other, each from a pass over the whole text without a cache."""
    forward = jit(functools.partial(foreign.without_cache, model))
    found = []
    for prompt in prompts:
        tokens, end = np.zeros((1, len(prompt) + new), np.int32), len(prompt)
        tokens[0, :end] = prompt
        for place in range(end, end + new):
            tokens[0, place] = np.argmax(forward(jnp.asarray(tokens))[0, place - 1])
        found.append(tokens[0].tolist())
    return found


# Caches that hold the same arrays in other ways.


def by_row(model, tokens, positions, cache, mask):
    """Each row is written at its own index."""

    def one(*row):
        logits, cache = model(*jax.tree.map(lambda x: x[None], row))
        return logits[0], jax.tree.map(lambda x: x[0], cache)

    return jax.vmap(one)(tokens, positions, cache, mask)


def stacked_empty(rows, slots):
    """Layers first, then slots, then rows; one index per layer."""
    shape = (foreign.LAYERS, slots, rows, foreign.HEADS, foreign.WIDTH // foreign.HEADS)
    return {"kv": [jnp.zeros(shape), jnp.zeros(shape)], "cursor": jnp.zeros((foreign.LAYERS,), jnp.int32)}


def stacked(model, tokens, positions, cache, mask):
    keys, values = cache["kv"]
    layers = {
        f"layer_{i}": {
            "k": keys[i].swapaxes(0, 1),
            "v": values[i].swapaxes(0, 1),
            "end_index": cache["cursor"][i, None],
        }
        for i in range(foreign.LAYERS)
    }
    states, layers = foreign.run_layers(model, tokens, positions, layers, mask, foreign.LAYERS)
    pack = lambda name: jnp.stack([layers[f"layer_{i}"][name].swapaxes(0, 1) for i in range(foreign.LAYERS)])
    cursor = cache["cursor"] + tokens.shape[1]
    return model.head(jnp.tanh(states[-1])), {"kv": [pack("k"), pack("v")], "cursor": cursor}


def at_positions(model, tokens, positions, cache, mask):
    """The write index is no part of the cache: it is the first position, as of keras-hub."""
    layers = {name: {**layer, "end_index": positions[0, :1]} for name, layer in cache.items()}
    logits, layers = model(tokens, positions, layers, mask)
    return logits, {name: {key: layers[name][key] for key in layer} for name, layer in cache.items()}


def without_index(rows, slots):
    return {name: {key: layer[key] for key in "kv"} for name, layer in foreign.empty(rows, slots).items()}


RIGHT = {
    "mapped": lambda: adapted(**WHOLE),
    "scratch": lambda: adapted(way="scratch", **WHOLE),
    "indexed": lambda: adapted(way="indexed", call=by_row),
    "named index": lambda: adapted(index="end_index"),
    "stacked": lambda: specjax.adapt(foreign.Decoder(), stacked_empty, call=stacked, index=["cursor"]),
    "stacked, scratch": lambda: specjax.adapt(foreign.Decoder(), stacked_empty, call=stacked, way="scratch"),
    "index as an argument": lambda: specjax.adapt(foreign.Decoder(), without_index, call=at_positions),
}


@pytest.fixture(scope="module")
def wanted():
    return greedy_texts(foreign.Decoder(), PROMPTS, 24)


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_the_contract_is_kept_and_the_text_is_that_of_passes_without_a_cache(make, wanted):
    target = make()
    specjax.check_model(target, length=48)
    assert texts(generate(target, drafter=NGramDrafter(3, 1, 2))) == wanted


@pytest.mark.parametrize("way", ["mapped", "scratch"])
@pytest.mark.parametrize("draft", ["none", "model", "early exit"])
def test_every_drafter_leaves_the_text_as_it_is(way, draft, wanted):
    drafters = {"none": None, "model": ModelDrafter(adapted(2, way), 3), "early exit": EarlyExitDrafter(1, 3)}
    out = generate(adapted(way=way, **WHOLE), drafter=drafters[draft])
    assert texts(out) == wanted
    assert draft == "none" or (np.asarray(out.stats.drafted) > 0).all()


@pytest.mark.parametrize("way", ["mapped", "scratch"])
def test_long_prompts_are_read_in_pieces(way):
    prompts = [np.random.default_rng(row).integers(0, foreign.VOCAB, n).tolist() for row, n in enumerate((300, 7))]
    assert texts(generate(adapted(way=way), prompts, 6)) == greedy_texts(foreign.Decoder(), prompts, 6)


def test_a_target_is_accepted_in_full_by_itself():
    out = generate(adapted(), drafter=ModelDrafter(adapted(), 3))
    np.testing.assert_array_equal(out.stats.accepted_at, out.stats.drafted_at)


def test_the_law_is_that_of_a_pass_over_the_text():
    """Of every new token, given the text before it: by the probability integral transform, at temperature 1."""
    out = generate(adapted(), [[1, 2, 3]] * 64, 24, ModelDrafter(adapted(2), 3), sampling=Sampling(seed=5))
    tokens = np.asarray(out.tokens)[:, :27]
    law = np.asarray(jax.nn.softmax(foreign.without_cache(foreign.Decoder(), tokens), axis=-1), np.float64)[:, 2:-1]
    drawn = tokens[:, 3:, None]
    # A chi-square statistic of counts against the sum of their laws, over groups by the likeliest token.
    counts, expected = np.zeros((foreign.VOCAB,) * 2), np.zeros((foreign.VOCAB,) * 2)
    group = law.argmax(axis=-1)
    for v in range(foreign.VOCAB):
        np.add.at(counts[:, v], group, drawn[..., 0] == v)
        np.add.at(expected[:, v], group, law[..., v])
    enough = expected > 5
    spread = np.zeros_like(expected)
    for v in range(foreign.VOCAB):
        np.add.at(spread[:, v], group, law[..., v] * (1 - law[..., v]))
    score = (counts - expected)[enough] / np.sqrt(spread[enough])
    assert np.abs(score).max() < stats.norm.isf(1e-3 / enough.sum())
    assert out.stats.accepted.sum() > 100


# Weights are arguments.


def train(model, seed):
    """Changes all weights in place, as an optimiser does."""
    move = lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed), x.shape)
    nnx.update(model, jax.tree.map(move, nnx.state(model)))


@pytest.mark.parametrize("again", ["adapted", "replaced"])
def test_new_weights_compile_nothing(again):
    """In 50 steps, each of which makes the functions of the adapter anew, as in the loop of one who trains."""

    def step(model, target=None):
        if again == "replaced" and target is not None:
            return target.replace(params=nnx.split(model)[1])

        def call(model, tokens, positions, cache, mask):
            return model(tokens, positions, cache, mask)

        return specjax.adapt(model, lambda rows, slots: foreign.empty(rows, slots), call=call)

    model = foreign.Decoder()
    target = step(model)
    first = texts(generate(target, drafter=ModelDrafter(target, 3)))
    for seed in range(50):
        train(model, seed)
        with compilations() as names:
            target = step(model, target)
            out = generate(target, drafter=ModelDrafter(target, 3))
        assert not names
        np.testing.assert_array_equal(out.stats.accepted_at, out.stats.drafted_at)
    assert texts(out) == greedy_texts(model, PROMPTS, 24) != first


def test_a_draft_that_is_a_view_of_the_policy_is_never_stale():
    """All layers of the model draft what it would say, whatever its weights are now."""
    model, drafter = foreign.Decoder(), EarlyExitDrafter(foreign.LAYERS, 3)
    for seed in range(2):
        out = generate(specjax.adapt(model, foreign.empty, **WHOLE), drafter=drafter)
        np.testing.assert_array_equal(out.stats.accepted_at, out.stats.drafted_at)
        train(model, seed)


def test_adapters_run_under_jit():
    model, drafter = foreign.Decoder(), NGramDrafter(3)
    graph, params = nnx.split(model)

    @jax.jit
    def sample(params, prompts, lengths):
        target = specjax.adapt(nnx.merge(graph, params), foreign.empty)
        settings = {"drafter": drafter, "fixed": True, "sampling": GREEDY}
        out = specjax.generate(target, prompts, lengths, max_new_tokens=24, **settings)
        return out.tokens, out.lengths

    prompt, length = specjax.pad_prompts(PROMPTS)
    tokens, lengths = sample(params, prompt, length)
    found = [row[:n].tolist() for row, n in zip(np.asarray(tokens), lengths, strict=True)]
    assert found == greedy_texts(model, PROMPTS, 24)


def test_other_code_and_other_closures_are_other_functions():
    def scaled(scale):
        return lambda model, *args: (scale * model(*args)[0], model(*args)[1])

    same, other = (adapted(call=scaled(scale)) for scale in (2.0, 3.0))
    assert same.forward is adapted(2, call=scaled(2.0)).forward
    assert same.forward is not other.forward is not adapted().forward
    partly = [adapted(call=functools.partial(scaled_by, scale)) for scale in (2.0, 2.0, 3.0)]
    assert partly[0].forward is partly[1].forward is not partly[2].forward


def test_globals_that_are_read_count():
    """As in a notebook, whose cell is run again after another one has changed a global."""
    cell = {"scaled_by": scaled_by}
    source = "def call(model, *args): return (lambda: scaled_by(scale, model, *args))()"

    def run(scale):
        exec(source, cell)
        cell["scale"] = scale
        target = adapted(call=cell["call"])
        return target.forward, texts(generate(target))

    (first, text), (other, its_text), (again, _) = run(2.0), run(-2.0), run(2.0)
    assert first is again is not other
    assert text == texts(generate(adapted())) != its_text


@dataclasses.dataclass
class Config:
    """Can be changed and so has no hash, as of tunix."""

    scale: float = 2.0


class Configured(foreign.Decoder):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def __call__(self, *args):
        return scaled_by(self.config.scale, super().__call__, *args)


def test_a_configuration_without_a_hash_counts_by_its_content():
    first, again, other = (specjax.adapt(Configured(Config(x)), foreign.empty) for x in (2.0, 2.0, 3.0))
    assert first.forward is again.forward is not other.forward
    model = Configured(Config())
    assert specjax.adapt(model, foreign.empty).forward is first.forward
    model.config.scale = 3.0
    assert specjax.adapt(model, foreign.empty).forward is other.forward


def scaled_by(scale, model, *args):
    logits, cache = model(*args)
    return scale * logits, cache


def test_parameters_may_be_any_pytree():
    graph, state = nnx.split(foreign.Decoder())
    params = nnx.to_pure_dict(state)

    def call(params, *args):
        state = nnx.split(foreign.Decoder())[1]
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(*args)

    target = specjax.adapt(params, foreign.empty, call=call)
    assert target.params is params
    assert texts(generate(target)) == greedy_texts(foreign.Decoder(), PROMPTS, 24)


# Hidden states.


@pytest.mark.parametrize("way", ["mapped", "scratch"])
def test_captured_states_are_those_of_the_layers(way):
    target = adapted(way=way, **WHOLE)
    assert target.num_layers == foreign.LAYERS
    feed = specjax.types.whole_feed(jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32))
    output = target.forward(target.params, feed, target.init_cache(2, 8), (2, 0, -1))
    model = foreign.Decoder()
    np.testing.assert_allclose(output.features[1], model.embedder(feed.tokens_bt), atol=1e-5)
    np.testing.assert_allclose(jnp.tanh(output.features[0]), output.features[2], atol=1e-5)
    np.testing.assert_allclose(model.head(output.features[2]), output.logits_btv, atol=1e-4)


def test_states_that_the_model_does_not_return_are_named():
    target = adapted()
    feed = specjax.types.whole_feed(jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"wants the hidden states \(1,\), and the model returns \(\)"):
        target.forward(target.params, feed, target.init_cache(1, 4), (1,))


def test_embedding_and_output_head_may_be_shared():
    target = adapted(
        embed=lambda model, tokens: model.embedder(tokens), unembed=lambda model, x: model.head(x), **WHOLE
    )
    specjax.check_model(target, length=32)
    assert target.embedding_spec.shape == (1, 1, foreign.WIDTH)


# Left-padded prompts.


def test_left_padded_prompts_are_moved_to_the_left():
    tokens = [[0, 0, 7, 8], [1, 2, 3, 4], [9, 9, 9, 5]]
    mask = [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    for function in (specjax.from_left_padded, jax.jit(specjax.from_left_padded)):
        prompt, length = function(np.asarray(tokens), np.asarray(mask))
        assert prompt.tolist() == [[7, 8, 0, 0], [1, 2, 3, 4], [5, 0, 0, 0]]
        assert length.tolist() == [2, 4, 1] and prompt.dtype == length.dtype == jnp.int32


@pytest.mark.parametrize(
    ("tokens", "mask", "words"),
    [
        ([[1, 2]], [[1, 0]], r"row 0 of mask is \[1, 0\]; give zeros for the padding on the left"),
        ([[1, 2], [1, 2]], [[1, 1], [0, 0]], r"row 1 of mask is \[0, 0\]"),
        ([[1, 2]], [1, 1], r"tokens is \(1, 2\) and mask is \(2,\)"),
        ([[1.0, 2.0]], [[1, 1]], "tokens is float32; give integers"),
    ],
)
def test_a_mask_that_is_none_of_left_padding_is_refused(tokens, mask, words):
    with pytest.raises(ValueError, match=words):
        specjax.from_left_padded(tokens, mask)
