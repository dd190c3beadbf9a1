"""Draft heads and the fields of their decoders: each field is computed, is refused, or is said to be ignored."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from specjax.drafters.assistant import AssistantHead
from specjax.drafters.eagle import EagleHead
from specjax.drafters.mtp import MTPConfig, MTPHead, abstract_mtp_params
from specjax.transformer.config import (
    EXTERNAL,
    DecoderConfig,
    DeltaConfig,
    ExpertsConfig,
    LatentConfig,
    PerLayerConfig,
    plain_rope,
)
from specjax.transformer.decoder import abstract_params, decoder_model, empty_cache
from specjax.types import Feed

DECODER = DecoderConfig(13, 16, 12, 1, 4, 2)
LAYER = DECODER.each_layer[0]
EXPERTS = ExpertsConfig(4, 2, 6)
LATENT = LatentConfig(None, 4, 4, 4, 4)
IN_LAYERS = {  # fields of a layer, and what the decoder needs with them
    "rope": (plain_rope(4, 50.0), {}),
    "window": (3, {}),
    "chunk": (3, {}),
    "growth": ((0.5, 4), {}),
    "unit_heads": (True, {}),
    "experts": (True, {"experts": EXPERTS}),
    "recurrent": (True, {"recurrence": DeltaConfig(2, 4, 4, 4)}),
    "head_dim": (8, {}),
    "kv_heads": (4, {}),
    "intermediate_size": (20, {}),
    "keys_as_values": (True, {}),
}
CHANGES = {
    **{"vocab_size": 14, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 4, "head_dim": 8},
    **{"norm": "rms_one_plus", "norm_eps": 0.5, "norm_places": "around", "parallel": True, "residual_scale": 0.5},
    **{"value_norm": True, "activation": "gelu", "gated_mlp": False, "attention_bias": True, "output_bias": True},
    **{"attention_sinks": True, "output_gate": True, "mlp_bias": True, "tie_word_embeddings": True, "head_bias": True},
    **{"embedding_scale": 3.0, "attention_scale": 0.3, "attention_softcap": 5.0, "logit_scale": 2.0},
    **{"logit_softcap": 9.0, "layer_scale": True, "learned_positions": True, "max_position_embeddings": 99},
    **{"query_key_norm": "heads", "latent": LATENT, "per_layer": PerLayerConfig(13, 4)},
}
OTHERS = {"hidden_size", "num_hidden_layers", "layers", "experts", "recurrence"}
UNUSED = {"max_position_embeddings", "tie_word_embeddings"}
OF_TARGET = {"embedding_scale", "logit_scale", "logit_softcap", "head_bias"}  # what the target does where it is shared
OF_KEYS = {"num_key_value_heads", "kv_heads", "value_norm", "keys_as_values"}  # an assistant reads the target's


def changes(layer):
    """Yields each field's name with the arguments of a decoder in which it is changed; layers start as ``layer``."""
    for name, value in CHANGES.items():
        fits = name in ("num_attention_heads", "head_dim") and layer is LAYER  # its positions turn the whole width
        yield name, {"layers": None if fits else (layer,), name: value}
    for name, (value, needed) in IN_LAYERS.items():
        rope = None if name == "recurrent" else layer.rope  # recurrent layers have no positions
        yield name, {"layers": (dataclasses.replace(layer, **{"rope": rope, name: value}),), **needed}


def params_of(head):
    return abstract_mtp_params(head.config) if isinstance(head, MTPHead) else head.abstract_params()


def program(head, decoder):
    """Returns the text of what a draft head computes."""
    params = params_of(head)
    of_target = dataclasses.replace(DECODER, vocab_size=decoder.vocab_size)
    target = decoder_model(of_target, abstract_params(of_target))
    feed = Feed(jnp.ones((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32))
    states_btd = jnp.ones((1, 1, DECODER.hidden_size))

    def run(params, target, feed, states_btd):
        if isinstance(head, AssistantHead):
            return head.step(
                params, target, feed, states_btd[:, 0], [empty_cache(DECODER, 1, 4, jnp.float32).layers[0]]
            )
        states_btd, cache = head.run(params, target, feed, states_btd, head.init_cache(params, 1, 4))
        return head.logits(params, target, states_btd[:, 0]), cache

    closed = jax.make_jaxpr(run)(params, target, feed, states_btd)
    return re.sub(r"0x[0-9a-f]+", "", str(closed)), [str(const) for const in closed.consts]


HEADS = {  # how to make the draft head, the layers to start with, and the fields that are ignored
    "eagle-1": (lambda decoder: EagleHead(decoder, (-1,), 1), LAYER, UNUSED | OF_TARGET),
    "eagle-3": (lambda decoder: EagleHead(decoder, (0, 1), own_embedding=True), LAYER, UNUSED),
    "mtp": (lambda decoder: MTPHead(MTPConfig(decoder, own_embedding=True, own_head=True)), LAYER, UNUSED),
    "assistant": (
        lambda decoder: AssistantHead(decoder, 16),
        dataclasses.replace(LAYER, shares=EXTERNAL),
        UNUSED | (OF_TARGET - {"head_bias"}) | OF_KEYS,
    ),
}

ALL_REFUSE = {"learned_positions", "per_layer", "recurrent"}
REFUSED = {
    "eagle-1": ALL_REFUSE,
    "eagle-3": ALL_REFUSE | OF_TARGET | {"parallel", "latent"},
    "mtp": ALL_REFUSE | {"head_bias"},
    "assistant": ALL_REFUSE | {"head_bias", "latent"},
}


def test_every_field_is_listed():
    fields = {field.name for field in dataclasses.fields(DecoderConfig)}
    assert fields == set(CHANGES) | OTHERS
    assert {field.name for field in dataclasses.fields(LAYER)} == {*IN_LAYERS, "shares"}


@pytest.mark.parametrize("name", HEADS)
def test_a_field_is_computed_or_refused(name):
    make, layer, ignored = HEADS[name]
    decoder = dataclasses.replace(DECODER, layers=(layer,))
    usual, silent, refused = make(decoder), set(), set()
    text = program(usual, decoder)
    for field, changed in changes(layer):
        try:
            decoder = dataclasses.replace(DECODER, **changed)
            head = make(decoder)
        except ValueError as error:
            assert re.search(f"{field}|recurren|latent|norms|plain attention", str(error)), field
            refused.add(field)
            continue
        if params_of(head) == params_of(usual) and program(head, decoder) == text:
            silent.add(field)
    assert silent == ignored and refused == REFUSED[name]
