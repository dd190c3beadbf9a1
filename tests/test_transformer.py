"""The decoder against its NumPy twin: whole rows, single tokens, ragged blocks over rejected drafts, long caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from jitted import jit

from specjax.hf import decoder_config
from specjax.transformer.attend import attend, attention_windows
from specjax.transformer.config import DecoderConfig, DeltaConfig, ExpertsConfig, LatentConfig, LayerConfig, plain_rope
from specjax.transformer.decoder import abstract_params, bind, decoder_model, init_params
from specjax.types import Feed, whole_feed

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# The twin reads the same dicts, so they leave out nothing that it needs.
CASES = {
    "grouped, tied": {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "one key head, attention biases, wide heads, small theta": {
        **SIZES,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "rope_theta": 50.0,
        "rms_norm_eps": 0.1,
        "attention_bias": True,
    },
    "as many key heads, MLP biases": {**SIZES, "mlp_bias": True},
}
CONFIGS = {name: decoder_config(case) for name, case in CASES.items()}
LENGTHS = (1, 9, 14)
SLOTS = 24
CAPTURE = (0, 1, 2, -1, -2)


def random_params(config, seed, dtype=np.float32):
    """Parameters under which every part matters: norms far from 1, biases far from 0, logits of a few units."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        x = rng.normal(size=leaf.shape)
        if leaf.ndim == 1:
            x = 1 + 0.3 * x if "norm" in name else 0.5 * x
        elif "embed" not in name:
            x = x / np.sqrt(leaf.shape[1])
        return jnp.asarray(x, dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


@dataclasses.dataclass
class Case:
    """A model, ragged rows of tokens, and what the twin says about them."""

    model: object
    config: DecoderConfig
    rows: list
    logits: list
    states: list

    def forward(self, tokens_bt, cache, start_b, capture=()):
        return _forward(self.model, jnp.asarray(tokens_bt, jnp.int32), cache, jnp.asarray(start_b, jnp.int32), capture)

    def start(self):
        """Returns the output over the right-padded rows; padding is the highest id, to be noticed."""
        padded = np.full((len(self.rows), max(LENGTHS)), self.config.vocab_size - 1)
        for i, length in enumerate(LENGTHS):
            padded[i, :length] = self.rows[i][:length]
        return self.forward(padded, self.model.init_cache(len(self.rows), SLOTS), np.zeros(len(self.rows)), CAPTURE)


_forward = jit(
    lambda model, tokens_bt, cache, start_b, capture: model.forward(
        model.params, whole_feed(tokens_bt, start_b), cache, capture
    ),
    static_argnums=4,
)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    config = CONFIGS[request.param]
    params = random_params(config, 1)
    rows = np.random.default_rng(2).integers(0, config.vocab_size, (len(LENGTHS), SLOTS)).tolist()
    twin = [reference_model.llama(CASES[request.param], params, row) for row in rows]
    return Case(decoder_model(config, params), config, rows, [t[0] for t in twin], [t[1] for t in twin])


def test_logits_are_of_a_size_that_tests_something(case):
    assert 0.5 < np.std(case.logits) < 10


def test_prefill_equals_the_twin(case):
    output = case.start()
    assert output.logits_btv.dtype == jnp.float32
    for i, length in enumerate(LENGTHS):
        np.testing.assert_allclose(output.logits_btv[i, :length], case.logits[i][:length], atol=1e-4, rtol=0)


def test_captured_states_are_counted_from_the_embedding(case):
    features = case.start().features
    assert len(features) == len(CAPTURE)
    # The twin's states: embedding, layer 1, layer 2, after the norm; -2 is the last layer's output.
    for feature_btd, index in zip(features, CAPTURE, strict=True):
        for i, length in enumerate(LENGTHS):
            np.testing.assert_allclose(feature_btd[i, :length], case.states[i][index][:length], atol=1e-4, rtol=0)
    assert case.forward([[1], [1], [1]], case.model.init_cache(3, SLOTS), [0, 0, 0]).features == ()


def test_token_by_token_equals_the_twin(case):
    cache = case.start().cache
    for step in range(4):
        start = np.asarray(LENGTHS) + step
        tokens = [[row[at]] for row, at in zip(case.rows, start, strict=True)]
        logits, _, cache = case.forward(tokens, cache, start)
        for i, at in enumerate(start):
            np.testing.assert_allclose(logits[i, 0], case.logits[i][at], atol=1e-4, rtol=0)


def test_blocks_over_rejected_drafts_equal_the_twin(case):
    """Each round feeds four tokens a row; the rows keep different numbers of them, and the rest were wrong."""
    cache = case.start().cache
    start = np.asarray(LENGTHS)
    for kept in ([1, 4, 2], [3, 1, 1], [4, 2, 3]):
        tokens = [row[at : at + 4] for row, at in zip(case.rows, start, strict=True)]
        for i, keep in enumerate(kept):
            tokens[i][keep:] = [(token + 1) % case.config.vocab_size for token in tokens[i][keep:]]
        logits, _, cache = case.forward(tokens, cache, start)
        for i, keep in enumerate(kept):
            wanted = case.logits[i][start[i] : start[i] + keep]
            np.testing.assert_allclose(logits[i, :keep], wanted, atol=1e-4, rtol=0)
        start = start + kept


def test_feeding_a_token_again_changes_nothing(case):
    """Only a model with ``commit`` may not be fed the same slots twice."""
    output = case.start()
    start = np.asarray(LENGTHS) - 1
    logits = case.forward([[row[at]] for row, at in zip(case.rows, start, strict=True)], output.cache, start).logits_btv
    for i, at in enumerate(start):
        np.testing.assert_allclose(logits[i, 0], output.logits_btv[i, at], atol=1e-5, rtol=0)


def test_without_a_cache_a_block_attends_to_itself(case):
    run = jit(lambda params, tokens_bt: bind(case.config, params)(whole_feed(tokens_bt), None)[0])
    np.testing.assert_allclose(run(case.model.params, jnp.asarray(case.rows)), case.logits, atol=1e-4, rtol=0)


def test_bfloat16_stays_near_the_twin():
    """The logits are float32 throughout; with 8 bits of mantissa, a few roundings in a row cost some 1e-2."""
    config = CONFIGS["grouped, tied"]
    params = random_params(config, 1, jnp.bfloat16)
    model = decoder_model(config, params)
    row = list(range(12))
    cache = model.init_cache(1, SLOTS)
    assert cache.layers[0][0].dtype == cache.layers[0][1].dtype == jnp.bfloat16
    output = _forward(model, jnp.asarray([row]), cache, jnp.zeros(1, jnp.int32), (-1,))
    assert (output.logits_btv.dtype, output.features[0].dtype) == (jnp.float32, jnp.bfloat16)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    logits, _ = reference_model.llama(CASES["grouped, tied"], params, row)
    np.testing.assert_allclose(output.logits_btv[0], logits, atol=8 * 2**-8 * np.abs(logits).max(), rtol=0)


# Attention over windows of the cache.


def test_windows_double_up_to_the_allocated_slots():
    assert attention_windows(1) == (1,)
    assert attention_windows(2) == (1, 2)
    assert attention_windows(255) == (127, 254, 255)
    assert attention_windows(256) == (128, 256)
    assert attention_windows(257) == (128, 256, 257)
    assert attention_windows(511) == (255, 510, 511)
    assert attention_windows(512) == (256, 512)
    assert attention_windows(600) == (256, 512, 600)
    assert attention_windows(4096) == (256, 512, 1024, 2048, 4096)


_attend = jax.jit(attend, static_argnames=("scale", "window", "cap", "value_width"))


def feed(start, count, width):
    """Returns a feed of rows that start at these slots; attention reads no token of it."""
    start, count = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (len(start),)) for x in (start, count))
    return Feed(jnp.zeros((len(start), width), jnp.int32), start, count)


OPTIONS = {
    "plain": {},
    "another scale": {"scale": 1.7},
    "soft cap": {"cap": 0.8},
    "window of one": {"window": 1},
    "window of seven": {"window": 7},
    "window of 256": {"window": 256},
    "window wider than the cache": {"window": 10_000},
    "window and soft cap": {"window": 3, "cap": 0.5, "scale": 2.0},
}


@pytest.mark.parametrize("latent", [False, True], ids=["values", "values in the keys"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("last", [0, 254, 255, 256, 257, 510, 511, 512, 513, 599])
def test_attention_at_the_edges_of_windows(last, options, latent):
    """Position ``last`` is the highest of the batch; the other row is far shorter, and the blocks straddle the edge."""
    n, k, t, h, slots = 4, 2, 3, 6, 600
    rng = np.random.default_rng(last)
    query, keys, values = (
        rng.normal(size=(2, *s)).astype(np.float32) for s in ((n, t, h), (k, slots, h), (k, slots, h))
    )
    start = np.maximum(np.array([last, last // 3]) + 1 - t, 0)
    position = start[:, None] + np.arange(t)
    places = feed(start, np.array([last, last // 3]) + 1 - start, t)
    options = {"scale": h**-0.5, **options}
    if latent:
        out, values = _attend(query, keys, None, places, **options, value_width=4), keys[..., :4]
    else:
        out = _attend(query, keys, values, places, **options)
    assert out.shape == (2, n, t, values.shape[-1])
    for row in range(2):
        count = places.count_b[row]
        wanted = reference_model.attend(query[row], keys[row], values[row], position[row], **options)
        np.testing.assert_allclose(out[row, :, :count], wanted[:, :count], atol=1e-5, rtol=0)


def test_values_may_be_of_another_width_than_keys():
    rng = np.random.default_rng(0)
    query, keys, values = (rng.normal(size=s).astype(np.float32) for s in ((1, 4, 3, 6), (1, 2, 20, 6), (1, 2, 20, 9)))
    out = _attend(query, keys, values, feed([5], 3, 3), scale=0.5)
    wanted = reference_model.attend(query[0], keys[0], values[0], np.array([5, 6, 7]), 0.5)
    np.testing.assert_allclose(out[0], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("last", "window"), [(0, 256), (255, 256), (256, 512), (511, 512), (512, 600)])
def test_attention_reads_no_further_than_its_window(last, window):
    """NaN past the window would reach the output if it were read: its weight is 0, and 0 * NaN is NaN."""
    rng = np.random.default_rng(0)
    query, keys, values = (
        rng.normal(size=s).astype(np.float32) for s in ((1, 4, 1, 6), (1, 2, 600, 6), (1, 2, 600, 6))
    )
    keys[:, :, window:] = values[:, :, window:] = np.nan
    out = _attend(query, keys, values, feed([last], 1, 1), scale=0.4)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("rest", [256, 400, 599])
def test_a_row_that_rests_does_not_widen_the_window(rest):
    """NaN past the running row's window would reach its output if the long row's length counted. A row with one real
    place of three does not widen the window either: its other places lie past the edge."""
    rng = np.random.default_rng(0)
    query, keys, values = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 4, 3, 6), (2, 2, 600, 6), (2, 2, 600, 6))
    )
    short = _attend(query, keys, values, feed([255, 3], [1, 0], 3), scale=0.4)
    keys[:, :, 256:] = values[:, :, 256:] = np.nan
    resting = _attend(query, keys, values, feed([255, rest], [1, 0], 3), scale=0.4)
    np.testing.assert_array_equal(resting[0, :, 0], short[0, :, 0])
    assert np.isfinite(resting).all()
    running = _attend(query, keys, values, feed([255, rest], 1, 3), scale=0.4)
    assert np.isnan(running[0, :, 0]).all(), "a running row of that length reads past the window"


def test_a_row_that_rests_leaves_nothing_in_the_cache_that_is_not_finite():
    """Row 1 rests at slot 15, and then goes on as if it had not been fed.

    The pass is computed over 12 slots, which hold row 0. Of these a query at slot 15 with a window of 3 sees none, and
    a query that sees no slot is NaN.
    """
    config = dataclasses.replace(CONFIGS["grouped, tied"], layers=(LayerConfig(plain_rope(4), window=3),) * 2)
    model = decoder_model(config, random_params(config, 5))
    tokens = jnp.asarray(np.random.default_rng(6).integers(0, config.vocab_size, (2, 19)), jnp.int32)
    at = lambda start: jnp.stack([row[i : i + 4] for row, i in zip(tokens, start, strict=True)])
    run = jit(lambda tokens_bt, start, count, cache: model.forward(
        model.params, Feed(tokens_bt, jnp.asarray(start, jnp.int32), jnp.asarray(count, jnp.int32)), cache
    ))  # fmt: skip
    before = run(tokens[:, :15], [0, 0], [5, 15], model.init_cache(2, SLOTS))
    rested = run(at([5, 15]), [5, 15], [4, 0], before.cache)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(rested))
    after = run(at([9, 15]), [9, 15], [4, 4], rested.cache).logits_btv
    wanted = run(tokens, [0, 0], [13, 19], model.init_cache(2, SLOTS)).logits_btv
    np.testing.assert_allclose(after[0], wanted[0, 9:13], atol=1e-4, rtol=0)
    np.testing.assert_allclose(after[1], wanted[1, 15:19], atol=1e-4, rtol=0)


def test_a_decoder_crosses_windows():
    """Rows of 254 and 3 tokens grow four at a time, the first across slot 256."""
    config = CONFIGS["grouped, tied"]
    params = random_params(config, 3)
    model = decoder_model(config, params)
    rows = np.random.default_rng(4).integers(0, config.vocab_size, (2, 270)).tolist()
    start = np.array([254, 3])
    wanted = [reference_model.llama(CASES["grouped, tied"], params, row[:266])[0] for row in rows]
    tokens = np.asarray([row[:254] for row in rows], np.int32)
    _, _, cache = _forward(model, tokens, model.init_cache(2, 300), jnp.zeros(2, jnp.int32), ())
    for _ in range(3):
        tokens = jnp.asarray([row[at : at + 4] for row, at in zip(rows, start, strict=True)], jnp.int32)
        logits, _, cache = _forward(model, tokens, cache, jnp.asarray(start, jnp.int32), ())
        for i, at in enumerate(start):
            np.testing.assert_allclose(logits[i], wanted[i][at : at + 4], atol=1e-4, rtol=0)
        start = start + 4


# Parameters and static functions.


def test_parameters_carry_hugging_face_names_and_kernels_are_in_out():
    shapes = {
        ".".join(str(key.key) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            abstract_params(CONFIGS["one key head, attention biases, wide heads, small theta"])
        )
        if "layers.1" not in ".".join(str(key.key) for key in path)
    }
    assert shapes == {
        "embed_tokens.weight": (29, 16),
        "layers.0.input_layernorm.weight": (16,),
        "layers.0.self_attn.q_proj.kernel": (16, 30),
        "layers.0.self_attn.q_proj.bias": (30,),
        "layers.0.self_attn.k_proj.kernel": (16, 10),
        "layers.0.self_attn.k_proj.bias": (10,),
        "layers.0.self_attn.v_proj.kernel": (16, 10),
        "layers.0.self_attn.v_proj.bias": (10,),
        "layers.0.self_attn.o_proj.kernel": (30, 16),
        "layers.0.self_attn.o_proj.bias": (16,),
        "layers.0.post_attention_layernorm.weight": (16,),
        "layers.0.mlp.gate_proj.kernel": (16, 24),
        "layers.0.mlp.up_proj.kernel": (16, 24),
        "layers.0.mlp.down_proj.kernel": (24, 16),
        "norm.weight": (16,),
        "lm_head.kernel": (16, 29),
    }
    assert "lm_head" not in abstract_params(CONFIGS["grouped, tied"])


def test_fresh_parameters_are_a_function_of_the_key():
    config = CONFIGS["grouped, tied"]
    first, again, other = (init_params(config, jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(first["embed_tokens"]["weight"], other["embed_tokens"]["weight"])
    weights = [x for x in jax.tree.leaves(first) if x.ndim == 2]
    assert all(0.01 < np.std(x) < 0.03 for x in weights)
    assert len({x.tobytes() for x in map(np.asarray, weights)}) == len(weights), "two matrices share their draws"


def test_models_of_one_architecture_share_their_functions():
    """They are static arguments of the loop: others would compile it anew."""
    config = CONFIGS["grouped, tied"]
    first, second = (decoder_model(config, random_params(config, seed)) for seed in (0, 1))
    assert first.forward is second.forward
    assert first.init_cache is second.init_cache
    assert (first.vocab_size, first.max_positions) == (29, 2048)
    other = decoder_model(config, random_params(config, 0, jnp.bfloat16))
    assert other.init_cache is not first.init_cache


# The config.

PLAIN = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = ExpertsConfig(num_experts=8, per_token=2, intermediate_size=4)
LATENT = LatentConfig(query_rank=None, key_value_rank=8, plain_width=6, rotary_width=4, value_width=6)
NO_ROPE = LayerConfig(rope=None)
DELTA = DeltaConfig(2, 4, 4, 4)
BAD = {
    "no layers": ({"num_hidden_layers": 0}, ["num_hidden_layers", "0", "at least 1"]),
    "layers without end": ({"num_hidden_layers": 10**9}, ["num_hidden_layers", str(10**9), "at most 1000"]),
    "heads without end": ({"head_dim": 10**9}, ["head_dim", str(10**9), "at most"]),
    "positions past int32": ({"max_position_embeddings": 2**31}, ["max_position_embeddings", str(2**31), "at most"]),
    "heads that do not divide": ({"num_attention_heads": 3}, ["hidden_size 16", "num_attention_heads 3", "head_dim"]),
    "key heads that do not divide": ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
    "odd heads": ({"head_dim": 5}, ["head_dim 5", "even"]),
    "another norm": ({"norm": "batch"}, ["norm", "'batch'", "'layer'"]),
    "another activation": ({"activation": "relu"}, ["activation", "'relu'", "'silu'"]),
    "a flag of another type": ({"gated_mlp": 1}, ["gated_mlp", "1"]),
    "no epsilon": ({"norm_eps": None}, ["norm_eps", "None"]),
    "a cap of zero": ({"attention_softcap": 0.0}, ["attention_softcap", "0.0"]),
    "a scale beyond float32": ({"embedding_scale": 1e39}, ["embedding_scale", "1e+39"]),
    "one layer described of two": ({"layers": (NO_ROPE,)}, ["layers", "1", "num_hidden_layers 2"]),
    "experts that are not described": ({"layers": (LayerConfig(None, experts=True),) * 2}, ["experts is None"]),
    "a rope wider than heads": ({"layers": (LayerConfig(plain_rope(6)),) * 2}, ["3 pairs", "4 entries"]),
    "a rope wider than the latent's": (
        {"layers": (LayerConfig(plain_rope(6)),) * 2, "latent": LATENT, "head_dim": 10},
        ["3 pairs", "4 entries"],
    ),
}
BAD_PARTS = {
    "a window of zero": (NO_ROPE, {"window": 0}, ["sliding window", "0"]),
    "groups of two sizes": (EXPERTS, {"groups": 3}, ["8 experts", "3 groups"]),
    "more groups than there are": (EXPERTS, {"groups": 4, "best_groups": 5}, ["4 groups", "5 of them"]),
    "half a group": (EXPERTS, {"best_groups": 0.5}, ["best_groups", "0.5"]),
    "more experts per token than in the groups": (EXPERTS, {"groups": 8}, ["2 experts per token", "1 to choose"]),
    "experts' scale": (EXPERTS, {"scale": -1.0}, ["scale", "-1.0"]),
    "another score": (EXPERTS, {"score": "softmin"}, ["score", "'softmin'", "'sigmoid'"]),
    "a shared expert of a negative width": (EXPERTS, {"shared_size": -3}, ["shared_size", "-3"]),
    "a gate of no shared expert": (EXPERTS, {"shared_gate": True}, ["shared_gate", "shared_size 0"]),
    "a shared expert beside an MLP": (EXPERTS, {"beside": True, "shared_size": 8}, ["shared_size is 8", "beside"]),
    "value heads that do not divide": (DeltaConfig(2, 4, 4, 4), {"heads": 3}, ["3 value heads", "2"]),
}


@pytest.mark.parametrize(
    "field", [{"head_dim": 8}, {"kv_heads": 2}, {"keys_as_values": True}, {"growth": (0.1, 4)}, {"unit_heads": True}]
)
def test_layers_without_plain_attention_have_no_fields_of_it(field):
    layers = (NO_ROPE, dataclasses.replace(NO_ROPE, **field))
    recurrent = dataclasses.replace(layers[1], recurrent=True)
    for changed in ({"latent": LATENT, "layers": layers}, {"layers": (NO_ROPE, recurrent), "recurrence": DELTA}):
        with pytest.raises(
            ValueError, match=rf"layer 1 has \{{'{next(iter(field))}': .*, but not plain attention; leave"
        ):
            DecoderConfig(**PLAIN, **changed)


@pytest.mark.parametrize("field", [{"rope": plain_rope(4)}, {"window": 3}, {"chunk": 3}])
def test_recurrent_layers_see_no_positions(field):
    recurrent = dataclasses.replace(NO_ROPE, recurrent=True, **field)
    with pytest.raises(ValueError, match=rf"layer 0 has \{{'{next(iter(field))}'"):
        DecoderConfig(**PLAIN, layers=(recurrent, NO_ROPE), recurrence=DELTA)


@pytest.mark.parametrize(("changed", "words"), BAD.values(), ids=BAD)
def test_bad_configs_are_refused(changed, words):
    DecoderConfig(**PLAIN)
    with pytest.raises(ValueError) as caught:
        DecoderConfig(**{**PLAIN, **changed})
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize(("part", "changed", "words"), BAD_PARTS.values(), ids=BAD_PARTS)
def test_bad_parts_are_refused(part, changed, words):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(part, **changed)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("attention_sinks", True), ("output_gate", True), ("query_key_norm", "each_head"), ("value_norm", True)],
)
def test_what_latent_attention_lacks_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but latent attention has none"):
        DecoderConfig(**PLAIN, latent=LATENT, head_dim=10, **{name: value})
