"""What is peculiar to Gemma 4: how its config is read, and layers that share keys and values."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from parity_cases import GEMMA4, SHARING, SMALL

from specjax.hf import decoder_config
from specjax.hf.families import sources
from specjax.hf.names import why_left_out
from specjax.planning import Mesh, Model, token_bytes, weights
from specjax.training.chains import ChainCache
from specjax.transformer import DecoderConfig, LayerConfig, decoder_model
from specjax.transformer.attend import attend_to_shared
from specjax.transformer.decoder import Decoder, abstract_params, empty_cache
from specjax.types import whole_feed

KEYS = {"model_type": "gemma4_text", **SMALL, **GEMMA4, **SHARING}
F32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def config():
    return decoder_config(KEYS)


def test_layers_share_the_last_layer_of_their_type_that_has_keys_and_values(config):
    assert [layer.shares for layer in config.each_layer] == [None, None, None, 2, 0]
    assert [layer.window for layer in config.each_layer] == [None, 7, 7, 7, None]
    assert [config.mlp_width_of(layer) for layer in config.each_layer] == [40, 40, 40, 80, 80]


def test_layers_that_share_other_layers_have_one_trace():
    layers = [LayerConfig(None), LayerConfig(None), LayerConfig(None, shares=0), LayerConfig(None, shares=1)]
    config = DecoderConfig(9, 8, 8, 4, 2, layers=tuple(layers))
    decoder = nnx.eval_shape(lambda: Decoder(config, jnp.dtype("float32"), nnx.Rngs(params=jax.random.key(0))))
    graphs = [nnx.split(layer)[0] for layer in decoder.layers]
    assert graphs[2] == graphs[3] != graphs[0] == graphs[1]


def test_the_cache_has_no_arrays_for_layers_that_share(config):
    layers = empty_cache(config, 3, 8, F32).layers
    assert [[x.shape for x in layer] for layer in layers] == [[(3, 2, 8, h)] * 2 for h in (14, 10, 10)] + [[], []]
    assert token_bytes(Model(config, cache="float32")) == sum(x.nbytes for x in jax.tree.leaves(layers)) / 24


def test_the_plan_counts_the_table_of_all_layers_as_looked_up(config):
    params = abstract_params(config)
    counted = weights(Model(config, weights="float32"))
    assert counted.held == sum(x.size * 4 for x in jax.tree.leaves(params))
    assert counted.looked_up == 4 * 55 * 5 * 6, "tokens, layers, entries"
    split = weights(Model(config, weights="float32"), Mesh(tensor=5))
    assert split.looked_up == counted.looked_up / 5


def test_every_parameter_has_its_axes(config):
    params = abstract_params(config)
    axes = decoder_model(config, params).axes()
    flat, tree = jax.tree.flatten(params)
    for leaf, of_leaf in zip(flat, tree.flatten_up_to(axes), strict=True):
        assert len(of_leaf) == leaf.ndim
    assert axes["per_layer"]["embed_tokens"]["weight"][0] == "vocab"


def test_transformers_own_spelling_of_heads_is_read(config):
    """It writes an object for each layer in place of ``global_head_dim``; layers may be named by their type, too."""
    raw = {key: value for key, value in KEYS.items() if key != "global_head_dim"}
    for spelling in ({"0": {"head_dim": 14}, "4": {"head_dim": 14}}, {"full_attention": {"head_dim": 14}}):
        assert decoder_config({**raw, "per_layer_config": spelling}) == config


def test_defaults_are_those_of_transformers():
    config = decoder_config({"model_type": "gemma4_text"})
    assert [layer.window for layer in config.each_layer] == ([512] * 5 + [None]) * 5
    sliding, full = config.each_layer[0], config.each_layer[5]
    assert (config.head_width_of(sliding), config.head_width_of(full)) == (256, 512)
    assert sliding.rope.frequencies[64] == pytest.approx(0.01)
    # A quarter of 256 pairs turns, with the frequencies of the whole head.
    assert full.rope.frequencies[63] == pytest.approx(1e6 ** (-63 / 256)) and len(full.rope.frequencies) == 256
    assert full.rope.frequencies[64:] == (0.0,) * 192
    assert config.per_layer.width == 256 and config.experts is None


def test_the_last_layer_sees_everything_whatever_the_config_says():
    raw = {**KEYS, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] + ["sliding_attention"] * 4}
    assert [layer.window for layer in decoder_config(raw).each_layer] == [None, 7, 7, 7, None]


REFUSED = {
    "num_kv_shared_layers .* 'full_attention' of layer 4": {"layer_types": ["sliding_attention"] * 5},
    "num_kv_shared_layers leaves 0": {"num_kv_shared_layers": 5},
    "num_kv_shared_layers": {"num_kv_shared_layers": 6},
    "use_bidirectional_attention": {"use_bidirectional_attention": "all"},
    "per_layer's vocab_size": {"vocab_size_per_layer_input": 52},
    "head_dim of layer 0 in per_layer_config": {"per_layer_config": {"0": {"head_dim": 0}}},
    "for two layers of type 'full_attention'": {"per_layer_config": {"0": {"head_dim": 14}}},
    r"per_layer_config has \['7'\]": {"per_layer_config": {"7": {"head_dim": 14}}},
    "per_layer_config has .*sliding_window": {"per_layer_config": {"1": {"sliding_window": 4}}},
    "per_layer_config is 3": {"per_layer_config": 3},
    "rope_parameters .* must name layer types": {"rope_parameters": {"rope_theta": 5.0}},
    "partial_rotary_factor": {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
    "num_experts": {"enable_moe_block": True, "top_k_experts": 2, "moe_intermediate_size": 4},
}


@pytest.mark.parametrize("message", REFUSED)
def test_configs_that_say_what_is_not_computed_are_refused(message):
    with pytest.raises(ValueError, match=message):
        decoder_config(KEYS | REFUSED[message])


def test_tensors_of_shared_keys_and_values_are_left_out(config):
    """Published folders have them, and transformers drops them."""
    for part in ("k_proj", "v_proj", "k_norm"):
        name = "model.layers.{}.self_attn." + part + ".weight"
        assert name.format(2) in sources("gemma4_text", config) and why_left_out(name.format(2), config, 0) is None
        assert name.format(3) not in sources("gemma4_text", config)
        assert "shares an earlier layer's" in why_left_out(name.format(3), config, 0)
    assert why_left_out("model.layers.5.self_attn.k_proj.weight", config, 0) is None


def test_keys_of_chains_in_training_cannot_be_shared():
    feed = whole_feed(jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="ChainCache; only a cache of plain keys and values"):
        attend_to_shared(jnp.zeros((1, 1, 2, 4)), feed, ChainCache(), scale=1.0)


ROPE = DecoderConfig(9, 8, 8, 1, 2).each_layer[0].rope


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((LayerConfig(ROPE, shares=0),), "layer 0's shares"),
        ((LayerConfig(ROPE), LayerConfig(ROPE, shares=0), LayerConfig(ROPE, shares=1)), "must have its own"),
        ((LayerConfig(ROPE), LayerConfig(ROPE, shares=0, head_dim=6)), "of 2 heads of 6 entries"),
        ((LayerConfig(ROPE, kv_heads=3),), "not a multiple of the 3 key/value heads of layer 0"),
        ((LayerConfig(ROPE, intermediate_size=0),), "layer 0's intermediate_size"),
        ((LayerConfig(ROPE, recurrent=True, head_dim=4),), "layer 0"),
    ],
)
def test_layers_that_contradict_each_other_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(9, 8, 8, len(layers), 2, layers=layers)
