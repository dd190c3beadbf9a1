"""Sizes of drafts that follow from a target's config."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import specjax
from specjax import training
from specjax.checkpoint.eagle import eagle_head
from specjax.hf.config import decoder_config
from specjax.hf.mtp import mtp_layout
from specjax.training import sizes
from specjax.transformer.decoder import abstract_params, decoder_model

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "eos_token_id": [128001, 128009],
}
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
TARGETS = {"Llama 3.1 8B": LLAMA_8B, "SmolLM2 135M": SMOLLM2, "Qwen3 30B-A3B": QWEN3_MOE, "tiny": tiny.CONFIG}


def opened_as(raw):
    """Returns a target without parameters."""
    config = decoder_config(raw)
    return specjax.Opened(Path("target"), decoder_model(config, abstract_params(config)), None, (0,), None, raw)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("raw", TARGETS.values(), ids=TARGETS)
def test_every_kind_fits_every_target(raw):
    """Each draft is of the kind that the folder's reader makes of it, and small beside its target."""
    opened = opened_as(raw)
    whole = count(opened.model.params)
    vocab = min(8192, raw["vocab_size"])
    head = eagle_head(sizes.architecture("eagle", opened, vocab), opened.model)
    assert head.decoder.hidden_size == raw["hidden_size"] and not head.own_embedding and head.own_head
    assert len(head.capture) == 3 and head.decoder.num_hidden_layers == 1
    layout = mtp_layout(sizes.architecture("mtp", opened, vocab))
    assert layout.decoder.num_hidden_layers == 1 and layout.num_hidden_layers == raw["num_hidden_layers"]
    assert sizes.architecture("medusa", opened, vocab) == {"medusa_num_heads": 4, "medusa_num_layers": 1}
    draft = decoder_config(sizes.architecture("model", opened, vocab), strict=True)
    assert draft.vocab_size == raw["vocab_size"]
    params = abstract_params(draft)
    if raw is not tiny.CONFIG:
        assert count(head.abstract_params()) < whole / 8
        assert count(params["layers"]) < count(opened.model.params["layers"]) / 12


def test_sizes_of_real_targets_are_those_that_people_train():
    """SafeAILab's heads read states 2, 16 and 29 of 32 layers. The shipped draft has 160 of 384 and 2 of 8 layers."""
    eagle = sizes.architecture("eagle", opened_as(LLAMA_8B), 32_000)
    assert eagle["eagle_aux_hidden_state_layer_ids"] == [2, 16, 29] and eagle["draft_vocab_size"] == 32_000
    layer = eagle["transformer_layer_config"]
    assert (layer["intermediate_size"], layer["num_key_value_heads"], layer["head_dim"]) == (14336, 8, 128)
    assert layer["rope_theta"] == 500_000.0
    model = sizes.architecture("model", opened_as(SMOLLM2), 0)
    assert (model["hidden_size"], model["num_hidden_layers"], model["eos_token_id"]) == (256, 4, [0])
    for layers in range(1, 100):
        found = sizes.layers_to_read(layers)
        assert found == sorted(set(found)) and found[0] >= 0 and found[-1] <= layers
        assert len(found) == (3 if layers > 1 else 2)


def test_a_draft_vocabulary_covers_the_text():
    tokens = np.repeat(np.arange(1000), np.arange(1000, 0, -1))
    size = sizes.draft_vocab_size(tokens, 50_000)
    assert size % 256 == 0 and (tokens < size).mean() >= 0.995 > (tokens < size - 256).mean()
    assert sizes.draft_vocab_size(np.arange(200_000), 200_000) == 32_768
    assert (
        sizes.draft_vocab_size(np.zeros(1, np.int32), 30) == 30 and sizes.draft_vocab_size(np.zeros(9, int), 900) == 256
    )


def test_a_recipe_has_a_last_stage_if_it_is_long():
    options = {"name": "draft", "target_name": "target", "rows": 4, "sequence": 64, "seed": 0}
    for steps, losses in ((1, ["kl"]), (399, ["kl"]), (400, ["kl", "total_variation"])):
        recipe = training.draft_recipe("eagle", opened_as(SMOLLM2), np.zeros(9, int), steps=steps, **options)
        assert [stage.loss for stage in recipe.stages] == losses and sum(
            stage.steps for stage in recipe.stages
        ) == steps
    rates = [
        training.draft_recipe(kind, opened_as(raw), np.zeros(9, int), steps=1, **options).stages[0].peak_learning_rate
        for kind, raw in (("model", tiny.CONFIG), ("eagle", SMOLLM2), ("medusa", SMOLLM2), ("eagle", LLAMA_8B))
    ]
    assert rates == [4e-3, 0.77 / 576, 0.77 / 576 / 2, 0.77 / 4096]
