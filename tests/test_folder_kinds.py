"""Folders that are given as something else than they are: each refusal names the right way to open the folder."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import specjax
from specjax.checkpoint.folder_kinds import kinds_of
from specjax.testing import table_model

LAYER = {
    **{"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1},
    **{"num_hidden_layers": 1, "max_position_embeddings": 8},
}
MODEL = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
FUSED = ["fc.weight", "midlayer.self_attn.q_proj.weight", "norm.weight", "lm_head.weight"]

# Kinds, config.json, and names of some tensors. Any other file is a name with a slash in front.
FOLDERS = {
    "a model": (["model"], {"model_type": "llama", **LAYER}, MODEL),
    "GPT-2": (["model"], {"model_type": "gpt2"}, ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"]),
    "a model with MTP": (["mtp", "model"], {"model_type": "llama", **LAYER}, [*MODEL, "model.layers.1.eh_proj.weight"]),
    "a model with Medusa": (
        ["medusa", "model"],
        {"model_type": "llama", **LAYER},
        [*MODEL, "medusa_head.0.0.linear.weight"],
    ),
    "our own checkpoint": (["model"], {"model_type": "llama", **LAYER}, ["/params/_METADATA"]),
    "EAGLE-1": (
        ["eagle"],
        {"architectures": ["LlamaForCausalLM"], **LAYER},
        ["fc.weight", "layers.0.mlp.up_proj.weight", "embed_tokens.weight"],
    ),
    "EAGLE-1, pickled": (["eagle"], {"architectures": ["EagleLlamaForCausalLM"]}, ["/pytorch_model.bin"]),
    "EAGLE-3": (["eagle"], {"architectures": ["LlamaForCausalLMEagle3"], **LAYER}, FUSED),
    "speculators' EAGLE-1": (
        ["eagle"],
        {"speculators_model_type": "eagle", "transformer_layer_config": LAYER},
        ["fusion_fc.weight", "transformer.self_attn.q_proj.weight"],
    ),
    "speculators' MTP": (
        ["mtp"],
        {"speculators_model_type": "mtp", "transformer_layer_config": LAYER},
        ["mtp_layers.0.input_proj.weight", "mtp_layers.0.self_attn.q_proj.weight"],
    ),
    "another head of speculators": (["xpress"], {"speculators_model_type": "xpress"}, ["layer.weight"]),
    "DFlash": (
        ["block"],
        {"architectures": ["DFlashDraftModel"], "model_type": "qwen3", **LAYER, "dflash_config": {}},
        ["fc.weight", "hidden_norm.weight", "layers.0.self_attn.q_proj.weight", "norm.weight"],
    ),
    "speculators' DSpark": (
        ["block"],
        {"speculators_model_type": "dspark"},
        ["hidden_norm.weight", "markov_head.markov_w1.weight"],
    ),
    "speculators' DFlash2, pickled": (["block"], {"speculators_model_type": "dflash2"}, ["/pytorch_model.bin"]),
    "DFlash, pickled": (["block"], {"architectures": ["DFlashDraftModel"]}, ["/pytorch_model.bin"]),
    "MTP": (
        ["mtp"],
        {"model_type": "llama", **LAYER, "num_nextn_predict_layers": 1},
        ["model.layers.1.eh_proj.weight", "model.layers.1.mlp.up_proj.weight"],
    ),
    "Qwen3-Next's MTP": (["mtp"], {"model_type": "qwen3_next"}, ["mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"]),
    "Medusa": (["medusa"], {"medusa_num_heads": 1, "medusa_num_layers": 1}, ["0.0.linear.weight", "0.1.weight"]),
    "vLLM's Medusa": (
        ["medusa"],
        {"model_type": "medusa", "num_heads": 1},
        ["blocks.0.layers.0.weight", "lm_heads.0.weight"],
    ),
    "Medusa, pickled": (["medusa"], {"medusa_num_heads": 1}, ["/medusa_lm_head.pt"]),
    "an adapter": (["adapter"], None, ["/adapter_config.json", "/adapter_model.safetensors"]),
    "nothing": ([], None, []),
}
CURES = {
    **{kind: f"give the drafter {kind}:" for kind in ("eagle", "block", "mtp", "medusa")},
    "model": "give it as the target, or as the drafter model:",
    "adapter": "open the folder of its base model, with adapter=",
    "xpress": "a draft head of kind 'xpress'",
}


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path):
    _, config, names = FOLDERS[request.param]
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {name: np.zeros((2, 2), np.float32) for name in names if name[0] != "/"}
    if tensors:
        save_file(tensors, tmp_path / "model.safetensors")
    for name in names:
        if name[0] == "/":
            (tmp_path / name[1:]).parent.mkdir(exist_ok=True)
            (tmp_path / name[1:]).write_text("{}")
    return tmp_path, FOLDERS[request.param][0]


def test_a_folder_of_another_kind_is_named_with_the_way_to_open_it(folder):
    path, kinds = folder
    assert kinds_of(path) == kinds
    target = table_model(jnp.zeros((8, 8)))
    for kind in ("eagle", "block", "mtp", "medusa"):
        with pytest.raises(ValueError) as error:
            specjax.load_drafter(f"{kind}:{path}", target, 1)
        named = (
            " holds " in str(error.value)
            and " not " in str(error.value)
            and ". It was refused because " in str(error.value)
        )
        assert named == (bool(kinds) and kind not in kinds), error.value
        assert not named or CURES[kinds[-1]] in str(error.value)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["eagle", "block", "mtp", "medusa", "assistant"])
def test_a_draft_head_in_no_folder(kind, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("missing", "file"):
        spec = f"{kind}:{tmp_path / name}"
        with pytest.raises(ValueError, match=f"{spec} names {tmp_path / name}, which is not a folder; give one with"):
            specjax.load_drafter(spec, table_model(jnp.zeros((8, 8))), 1)


@pytest.mark.parametrize(
    "name", [name for name in FOLDERS if FOLDERS[name][0][:1] in (["eagle"], ["block"], ["mtp"], ["medusa"])]
)
def test_a_draft_head_is_no_target(name, tmp_path):
    kinds, config, names = FOLDERS[name]
    if "model" in kinds or names[0][0] == "/":
        pytest.skip("a model, or pickled")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, tmp_path / "model.safetensors")
    for opens in (specjax.open, specjax.load, lambda path: specjax.load_drafter(f"model:{path}", None, 1)):
        with pytest.raises(ValueError, match=f"holds a draft head, no model; load_drafter opens it as {kinds[0]}:"):
            opens(tmp_path)
