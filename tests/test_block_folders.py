"""Folders of heads that draft blocks: what is read and written, and what is refused before anything compiles."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_heads import (
    CASES,
    DEEPSPEC,
    DFLASH2,
    LAYER,
    LAYERS,
    SPECFORGE,
    VOCAB,
    WIDTH,
    ZLAB,
    in_speculators,
    published,
)
from draft_heads import open_block, write_block
from test_block import TARGET, opened
from test_eagle import random_target, write_folder

import specjax
from specjax.checkpoint.block import block_head
from specjax.drafters.dflash import DFlashHead
from specjax.hf.block import block_fields
from specjax.hf.safetensors import open_tensors

# What is read.


@pytest.mark.parametrize(
    ("config", "read"),
    [
        (ZLAB, (2, 5, 7)),
        (ZLAB | {"dflash_config": {"mask_token_id": 1}}, (2, 6)),  # round(1 + 4 i) for two layers
        (ZLAB | {"num_hidden_layers": 1, "layer_types": None, "dflash_config": {"mask_token_id": 1}}, (5,)),
        (DEEPSPEC, (0, 3, 6)),
        (SPECFORGE, (1, 4)),
        (in_speculators(), (2, 4, 5)),
        (in_speculators(aux_hidden_state_layer_ids=None), (2, 4, 5)),
        (in_speculators("dspark", aux_hidden_state_layer_ids=[1, 7]), (1, 7)),
    ],
)
def test_all_conventions_become_hidden_state_indices(config, read):
    assert block_fields(config, LAYERS)["capture"] == read


def test_a_head_says_what_it_reads(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "specjax.checkpoint.block"):
        head = opened(CASES["DSpark, speculators"], tmp_path / "head").head
    assert head.describe() == (
        "DSpark head, 2 layers of width 16, rnn Markov head of rank 5, confidence head: 4 drafts in a block of 4, "
        "reads the target's hidden states 2, 4, 5 (0 the embedding output, i the output of layer i), drafts 11 of 40 "
        "tokens"
    )
    assert head.describe() in caplog.text
    assert opened(CASES["DFlash, z-lab"], tmp_path / "plain").head.describe() == (
        "DFlash head, 2 layers of width 16: 3 drafts in a block of 4, reads the target's hidden states 2, 5, 7 (0 the "
        "embedding output, i the output of layer i), drafts 40 of 40 tokens"
    )


def test_the_targets_own_tables_are_not_kept(tmp_path):
    case = CASES["DSpark, DeepSpec"]
    tensors = published(case) | {
        "embed_tokens.weight": np.asarray(TARGET.params["embed_tokens"]["weight"]),
        "lm_head.weight": np.asarray(TARGET.params["lm_head"]["kernel"]).T,
    }
    drafter = open_block(write_folder(tmp_path / "same", case.config, tensors), TARGET, 3, "float32")
    assert not drafter.head.own_embedding and not drafter.head.own_head
    assert not {"embed_tokens", "lm_head"} & drafter.params.keys()
    own = opened(case, tmp_path / "own")
    assert own.head.own_embedding and own.head.own_head


@pytest.mark.parametrize("config", [ZLAB, DFLASH2, DEEPSPEC, SPECFORGE, in_speculators(), in_speculators("dspark")])
def test_left_over_keys_are_no_surprise(config, caplog):
    block_fields(config, LAYERS)
    assert not caplog.records


def test_options_choose(tmp_path):
    folder = write_folder(tmp_path / "head", ZLAB, published(CASES["DFlash, z-lab"]))
    drafter = open_block(f"{folder}@argmax@window=stays", TARGET, 3)
    assert drafter.argmax and drafter.head.window_stays
    plain = open_block(folder, TARGET, 2)
    assert not plain.argmax and not plain.head.window_stays and plain.num_draft == 2
    with pytest.raises(ValueError, match=r"option 'window' of block:.* is 'wide'; give it once, as slides or stays"):
        open_block(f"{folder}@window=wide", TARGET, 3)


# What is written.


@pytest.mark.parametrize(
    "name",
    [
        "DFlash, z-lab",
        "DFlash, speculators, a smaller vocabulary",
        "DFlash2, z-lab",
        "DFlash2, speculators",
        "DSpark, speculators",
    ],
)
def test_a_head_comes_back_as_it_was_written(name, tmp_path):
    case = CASES[name]
    drafter = opened(case, tmp_path / "head")
    specjax.save_drafter(tmp_path / "again", drafter, TARGET, case.config, target_name="some/target")
    again = open_block(f"{tmp_path / 'again'}{case.options}", TARGET, case.drafts, "float32")
    assert again.head == drafter.head
    jax.tree.map(np.testing.assert_array_equal, again.params, drafter.params)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    if "speculators_model_type" in case.config:
        about = written["speculators_config"]
        assert about["verifier"]["name_or_path"] == "some/target"
        assert about["proposal_methods"][0]["speculative_tokens"] == case.drafts
        kind = name.split(",")[0]
        assert written["architectures"] == [f"{kind}{'DraftModel' if kind == 'DFlash2' else 'Speculator'}"]
    else:
        assert written["num_target_layers"] == LAYERS and "speculators_config" not in written
    found = open_tensors(tmp_path / "again")
    assert found.keys() == published(case).keys()
    for tensor, array in published(case).items():
        np.testing.assert_array_equal(found[tensor].read(), array)


def test_parameters_of_ones_own_are_written(tmp_path):
    config = in_speculators("dspark", markov_head_type="gated")
    params = block_head(config, TARGET).init_params(jax.random.key(0))
    write_block(tmp_path / "head", config, params, TARGET)
    drafter = open_block(tmp_path / "head", TARGET, 4, "float32")
    jax.tree.map(np.testing.assert_array_equal, drafter.params, params)
    with pytest.raises(ValueError, match=r"is \(21, 1\), and config.json asks for \(22, 1\)"):
        write_block(tmp_path / "other", config | {"markov_rank": 6}, params, TARGET)
    assert not (tmp_path / "other").exists()


# What is refused.

OTHER = random_target(24)
SHORT = random_target(layers=5)
BAD_CONFIGS = {
    "another model": (ZLAB | {"architectures": ["LlamaForCausalLM"]}, "is .*LlamaForCausalLM.*, no block draft head"),
    "no class": (ZLAB | {"architectures": None}, "architectures is None, no block draft head"),
    "another kind": (in_speculators("xpress"), "speculators_model_type is 'xpress', no block draft head"),
    "groups that do not divide": (
        in_speculators("dflash2", conv_group_size=3),
        "conv_group_size 3 does not divide the",
    ),
    "too many taps": (
        in_speculators("dflash2", conv_kernel_size=5),
        "conv_kernel_size must be an integer of at most 4",
    ),
    "too many candidates": (in_speculators("dflash2", selector_top_k=41), "selector_top_k must be .* of at most 40"),
    "a number as its kind": (in_speculators() | {"speculators_model_type": 3}, "speculators_model_type is 3"),
    "another projector": (
        SPECFORGE | {"dflash_config": SPECFORGE["dflash_config"] | {"projector_type": "domino"}},
        "projector_type is 'domino'; supported: 'dflash' and 'dspark'",
    ),
    "another Markov head": (DEEPSPEC | {"markov_head_type": "lstm"}, "the Markov head is 'lstm'; supported: vanilla"),
    "a negative rank": (DEEPSPEC | {"markov_rank": -1}, "markov_rank must be an integer of at least 0, got -1"),
    "a mask outside the embedding": (
        in_speculators(mask_token_id=VOCAB),
        f"mask_token_id must be an integer of at most {VOCAB - 1}, got {VOCAB}",
    ),
    "no mask": (ZLAB | {"dflash_config": {"target_layer_ids": [1]}}, "dflash_config lacks the key 'mask_token_id'"),
    "a block of one": (ZLAB | {"block_size": 1}, "block_size must be an integer of at least 2, got 1"),
    "a block of none": (in_speculators(block_size=0), "block_size must be an integer of at least 1, got 0"),
    "two block sizes": (
        ZLAB | {"dflash_config": ZLAB["dflash_config"] | {"block_size": 8}},
        "block_size is 4, but 8 in dflash_config; give one of them",
    ),
    "states in disorder": (in_speculators(aux_hidden_state_layer_ids=[4, 2]), r"indices are \(4, 2\); give ascending"),
    "no states": (in_speculators(aux_hidden_state_layer_ids=[]), r"indices are \(\); give ascending ones"),
    "states that are none": (in_speculators(aux_hidden_state_layer_ids="all"), "is 'all'; it must be a list of layers"),
    "the last layer": (
        in_speculators(aux_hidden_state_layer_ids=[2, LAYERS]),
        r"hidden states \(2, 8\) and the target has 8 layers, of which it may read all but the last",
    ),
    "a target of other depth": (
        ZLAB | {"num_target_layers": 36},
        "num_target_layers is 36 and the target has 8 layers",
    ),
    "another vocabulary": (
        in_speculators(layer={"vocab_size": 50}, draft_vocab_size=50),
        "the draft head is for 50 tokens and the target has 40",
    ),
    "a draft vocabulary without an output head": (
        in_speculators(draft_vocab_size=11),
        "tensor 'd2t' is missing, which says which 11 of the 40 tokens can be drafted",
    ),
    "latent attention": (
        ZLAB | {"dflash_config": ZLAB["dflash_config"] | {"attention_mode": "mla"}},
        "'attention_mode' is 'mla'",
    ),
    "several attentions": (
        ZLAB | {"dflash_config": ZLAB["dflash_config"] | {"attention_modes": ["gqa", "kda"]}},
        r"attention_modes is \['gqa', 'kda'\]",
    ),
    "scaled logits": (
        ZLAB | {"dflash_config": ZLAB["dflash_config"] | {"output_multiplier": 0.5}},
        "'output_multiplier' is 0.5; this decoder computes only 1.0",
    ),
    "an unknown option": (
        ZLAB | {"dflash_config": ZLAB["dflash_config"] | {"lora_rank": 4}},
        r"dflash_config keys \{'lora_rank': 4\} are unknown and might change the model",
    ),
    "an unknown key": (in_speculators(extra=3), r"keys \{'extra': 3\} are unknown and might change the model"),
    "options that are none": (ZLAB | {"dflash_config": 3}, "dflash_config is 3; it must be an object"),
    "a confidence head without its token": (
        in_speculators("dspark", markov_rank=0, confidence_head_with_markov=True),
        "confidence_with_markov is true; it needs a confidence head and a Markov head",
    ),
    "another width": (
        in_speculators(layer={"hidden_size": 24}),
        "the draft head reads states 24 wide and the target's are 16",
    ),
    "a width of the target's own": (in_speculators(target_hidden_size=24), "target_hidden_size is 24; speculators"),
    "experts": (in_speculators(layer={"model_type": "qwen3_moe"}), "the layers are of model_type 'qwen3_moe'"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_are_refused(name, tmp_path):
    config, message = BAD_CONFIGS[name]
    folder = write_folder(tmp_path / "head", config, published(CASES["DFlash, z-lab"]))
    with pytest.raises(ValueError, match=message) as caught:
        open_block(folder, TARGET, 2)
    assert str(folder) in str(caught.value)


def without(tensors, name):
    return {key: tensors[key] for key in tensors if key != name}


BAD_TENSORS = {
    "a layer is missing": (lambda x: without(x, "layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
    "fc is missing": (lambda x: without(x, "fc.weight"), "fc.weight"),
    "one too many": (lambda x: x | {"aux_hidden_norms.0.weight": np.ones(WIDTH, np.float32)}, "aux_hidden_norms"),
    "a layer too many": (lambda x: x | {"layers.2.input_layernorm.weight": np.ones(WIDTH, np.float32)}, "layers.2"),
    "of another number of states": (lambda x: x | {"fc.weight": np.ones((WIDTH, 2 * WIDTH), np.float32)}, "fc.weight"),
    "of another rank": (lambda x: x | {"markov_head.markov_w1.weight": np.ones((VOCAB, 3), np.float32)}, "markov_w1"),
    "twice": (lambda x: x | {"model.fc.weight": x["fc.weight"]}, "are both 'fc.weight'; remove one of them"),
    "integers": (lambda x: x | {"fc.weight": x["fc.weight"].astype(np.int32)}, "fc.weight"),
    "not finite": (lambda x: x | {"norm.weight": np.full(WIDTH, np.nan, np.float32)}, "holds NaN"),
    "d2t outside": (lambda x: x | {"d2t": x["d2t"] + VOCAB}, "of the target's 40; it must hold offsets"),
    "a smaller vocabulary without its output head": (
        lambda x: without(x, "lm_head.weight"),
        "draft_vocab_size is 11 and there is no output head for these tokens",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused(name, tmp_path):
    change, message = BAD_TENSORS[name]
    case = CASES["DSpark, speculators"]
    folder = write_folder(tmp_path / "head", case.config, change(published(case)))
    with pytest.raises(ValueError, match=message) as caught:
        open_block(folder, TARGET, 2)
    assert str(folder) in str(caught.value)


def test_a_head_of_another_target_is_refused(tmp_path):
    folder = write_folder(tmp_path / "head", in_speculators(), published(CASES["DFlash, speculators"]))
    with pytest.raises(ValueError, match="reads states 16 wide and the target's are 24"):
        open_block(folder, OTHER, 3)
    with pytest.raises(ValueError, match=r"hidden states \(2, 4, 5\) and the target has 5 layers"):
        open_block(folder, SHORT, 3)
    with pytest.raises(ValueError, match="the target has no num_layers, which the drafter needs"):
        open_block(folder, specjax.testing.table_model(jnp.zeros((VOCAB, VOCAB))), 3)
    with pytest.raises(ValueError, match="num_draft is 4 and a block has 3 drafts; draft at most that many"):
        open_block(folder, TARGET, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": (True,)}, "causal has 1 entries for 2 layers"),
        ({"capture": (3, 3)}, r"indices are \(3, 3\); give ascending"),
        ({"capture": (-1, 3)}, r"indices are \(-1, 3\); give ascending"),
        ({"target_hidden_size": 24}, "only a draft head with an embedding and an output head of its own"),
        ({"draft_vocab_size": 5}, "there is no output head for these tokens"),
        ({"markov": "lstm"}, "the Markov head is 'lstm'"),
    ],
)
def test_fields_are_checked(change, message):
    head = block_head(in_speculators(), TARGET)
    fields = {"decoder": head.decoder, "capture": (2, 4), "block_size": 4, "mask_token": 1}
    with pytest.raises(ValueError, match=message):
        DFlashHead(**fields | change)


def test_layers_of_llama_are_qwen3s(tmp_path):
    """As in speculators, which makes Qwen3's layers whatever their config's class."""
    layer = {key: LAYER[key] for key in LAYER} | {"model_type": "llama"}
    fields = block_fields(in_speculators(layer=layer), LAYERS)
    assert fields["decoder"].query_key_norm == "heads"
