"""Keys of ``config.json`` that are not understood: the tables against transformers, warnings, refusals, the switch."""

import ast
import copy
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from class_keys import FILE, class_keys

import specjax
from specjax.hf import decoder_config
from specjax.hf.class_keys import CLASS_KEYS, NO_EFFECT, UNDECLARED
from specjax.hf.config import read_config, read_keys
from specjax.hf.eagle import eagle_fields, speculators_config
from specjax.hf.families import FAMILIES
from specjax.hf.keys import without_keys
from specjax.hf.medusa import medusa_config
from specjax.hf.mtp import mtp_layout
from specjax.hf.multimodal import MULTIMODAL

ROOT = Path(__file__).parent.parent
SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
LATENTS = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
SMALL = {kind: {"model_type": kind, **SIZES} for kind in FAMILIES}
SMALL["gpt2"] = {"model_type": "gpt2", "vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 4}
SMALL["phi3"] |= {"pad_token_id": 0}
SMALL["mixtral"] |= {"num_local_experts": 4}
SMALL["qwen3_moe"] |= {"num_experts": 4, **EXPERTS}
SMALL["deepseek_v3"] |= {"num_key_value_heads": 4, **EXPERTS, **LATENTS, **GROUPS}
SMALL["qwen2_moe"] |= {"num_experts": 4, "shared_expert_intermediate_size": 8, **EXPERTS}
SMALL["deepseek_v2"] |= {"num_key_value_heads": 4, **EXPERTS, **LATENTS, **GROUPS}
SMALL["phimoe"] |= {"num_local_experts": 4}
SMALL["llama4_text"] |= {"num_local_experts": 4, "head_dim": 4, "intermediate_size_mlp": 8}
SMALL["gpt_oss"] |= {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL["glm4_moe"] |= {**EXPERTS, **GROUPS}
SMALL["gemma4_text"] |= {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 29}
SMALL["gemma4_text"] |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
SMALL["smollm3"] |= {"pad_token_id": 0}
SMALL["ministral"] |= {"head_dim": 4}
SMALL["ministral3"] |= {
    "head_dim": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 50.0,
        "factor": 2.0,
        "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.1,
    },
}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
for _kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"):
    SMALL[_kind] |= {**DELTA, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
for _kind in ("qwen3_next", "qwen3_5_moe_text"):
    SMALL[_kind] |= {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8}
for _kind in ("granitemoe", "granitemoeshared", "granitemoehybrid"):
    SMALL[_kind] |= {"num_local_experts": 4, "num_experts_per_tok": 2}
for _kind in ("granitemoeshared", "granitemoehybrid"):
    SMALL[_kind] |= {"shared_intermediate_size": 8}
SMALL["granitemoehybrid"] |= {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_state": 4}
families = pytest.mark.parametrize("kind", FAMILIES)


def class_of(kind):
    pytest.importorskip("transformers", minversion="5.24")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("specjax")]


# The tables, and what transformers holds.


@pytest.mark.parametrize("kind", CLASS_KEYS)
def test_the_tables_hold_the_keys_and_defaults_of_the_classes(kind):
    class_of(kind)
    assert CLASS_KEYS[kind] == (wanted := class_keys(kind))
    assert {key: type(CLASS_KEYS[kind][key]) for key in wanted} == {key: type(wanted[key]) for key in wanted}


def test_every_family_has_a_table():
    assert CLASS_KEYS.keys() >= FAMILIES.keys() | MULTIMODAL.keys()
    json.loads(FILE.read_text(), parse_constant=lambda word: pytest.fail(f"{FILE} holds {word}, which is no JSON"))


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_text_parts_have_the_defaults_of_their_own_classes(kind):
    """Those of the family, but for those that the table names. A reader has no default for the sizes."""
    for own, text in MULTIMODAL[kind].texts.items():
        theirs, family = (
            {field.name: field.default for field in dataclasses.fields(one)} | {"rope_theta": one.default_theta}
            for one in (class_of(own), class_of(text.family))
        )
        other = {key: theirs[key] for key in theirs.keys() & family.keys() if theirs[key] != family[key]}
        assert {key: other[key] for key in other.keys() - NO_EFFECT - {*SIZES} | text.defaults.keys()} == text.defaults


def test_keys_of_every_model_have_no_effect_or_are_checked():
    transformers = pytest.importorskip("transformers", minversion="5.24")
    common = {field.name for field in dataclasses.fields(transformers.PretrainedConfig)}
    common |= transformers.PretrainedConfig().to_dict().keys()
    common |= transformers.GenerationConfig._get_default_generation_params().keys()
    assert common <= NO_EFFECT | UNDECLARED.keys()


@families
def test_keys_of_no_effect_have_none(kind):
    """A model of random weights has the same logits with another value of each such key of its class."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.24")

    def logits(keys, state=None):
        config = transformers.AutoConfig.for_model(**copy.deepcopy(SMALL[kind] | {"pad_token_id": 0} | keys))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(model.state_dict() if state is None else state)
        with torch.no_grad():
            out = model(torch.arange(1, 20)[None])
        out = out.to_tuple() if hasattr(out, "to_tuple") else out
        return model.state_dict(), next(x for x in out if x.ndim == 3 and x.shape[-1] == 29).numpy()

    state, wanted = logits({})
    for field in dataclasses.fields(class_of(kind)):
        if field.name not in NO_EFFECT - {"return_dict"} - FAMILIES[kind].effective or type(field.default) not in (
            bool,
            int,
            float,
        ):
            continue
        other = not field.default if isinstance(field.default, bool) else field.default / 2 + 0.25
        if type(field.default) is int:
            other = 3  # a token, for instance
        np.testing.assert_allclose(logits({field.name: other}, state)[1], wanted, atol=1e-6, err_msg=field.name)


# What these files read of a config beside the decoder's: classification, images, and how transformers runs a model.
NOT_THE_DECODER = {
    *("classifier_dropout", "hidden_dropout", "summary_last_dropout", "num_labels", "get_text_config"),
    *("image_size", "patch_size", "vision_config", "mm_tokens_per_image", "image_token_id", "layer_norm_eps"),
    *("_attn_implementation", "number_of_conv_states", "standardize", "use_clipped_linears"),
    *("num_channels", "pixel_shuffle_ratio", "projector_dropout"),
    *("projector_input_dim", "projector_output_dim", "vision_output_dim"),
}
# These follow from other keys, or are not read, whatever they say.
FOLLOWS = {
    "deepseek_v2": {"head_dim"},
    "deepseek_v3": {"head_dim", "qk_head_dim"},
    "gpt_oss": {"hidden_act"},
    "granitemoehybrid": {"mamba_chunk_size"},
}
NO_CLASS_OF_TEXT = r"Vision|Audio|Multimodal|ConditionalGeneration|(Gemma4(Unified)?|Qwen3_5(Moe)?)Model$"


def names_read(file):
    """Yields what a file reads of anything that is called a config, by attribute, getattr or hasattr."""

    def is_config(node):
        return getattr(node, "id", getattr(node, "attr", "")).endswith("config")

    # Classes for images and sound are not the decoder's, nor are those that put a decoder beside them.
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = [part for part in tree.body if not re.search(NO_CLASS_OF_TEXT, getattr(part, "name", ""))]
    for node in (node for part in parts for node in ast.walk(part)):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            named = [name for name in node.args[1:2] if isinstance(name, ast.Constant)]
            yield from (name.value for name in named if is_config(node.args[0]))


@families
def test_no_key_that_transformers_reads_is_unknown(kind):
    """Declared by its class or not, a key that the code of a model reads is never passed over with a warning."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    folder, module = Path(transformers.__file__).parent, kind.removesuffix("_text")
    files = [folder / "models" / module / f"modeling_{module}.py", folder / "masking_utils.py"]
    read = {name for file in [*files, folder / "cache_utils.py"] for name in names_read(file)}
    read |= CLASS_KEYS[kind].keys() | UNDECLARED.keys()
    read -= NOT_THE_DECODER | (NO_EFFECT - FAMILIES[kind].effective) | set(dir(transformers.PretrainedConfig))
    assert len(read) > 15
    read -= FOLLOWS.get(kind, set())
    for name in read:
        with pytest.raises(ValueError, match=r"\?\?"):
            decoder_config({**SMALL[kind], name: "??"})


# Models that are not computed.


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("deepseek_v4", ["compressed cache", "nearest that is supported is 'deepseek_v3'"]),
        ("t5", ["an encoder reads the prompt"]),
        ("mamba2", ["recurrent layers without MLPs"]),
        ("lama", ["nearest that is supported is 'llama'"]),
        ("completely_new", ["supported: "]),
    ],
)
def test_a_model_that_is_not_supported_is_told_the_nearest_and_what_is_missing(kind, words):
    with pytest.raises(ValueError) as caught:
        decoder_config({"model_type": kind})
    for word in (f"model_type '{kind}' is not supported", *words, "gemma3_text", "mistral3"):
        assert word in str(caught.value)
    assert ("nearest" in str(caught.value)) == any("nearest" in word for word in words)


def test_the_nearest_model_has_the_most_keys_in_common():
    """Its name is nearest to another one."""
    raw = {**SMALL["qwen3_moe"], "model_type": "qwen2_new", "zero_experts": 3, "use_cache": True, "is_causal": True}
    message = (
        "model_type 'qwen2_new' is not supported: its config has zero_experts, which 'qwen3_moe' does not have; the "
        "nearest that is supported is 'qwen3_moe'"
    )
    with pytest.raises(ValueError, match=message):
        decoder_config({**CLASS_KEYS["qwen3_moe"], **raw})


def test_keys_of_older_configs_are_no_reason():
    """Published configs have keys of transformers 4, and some that change nothing."""
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}, "auto_map": {"AutoConfig": "x.Y"}}
    keys = {key: value for key, value in CLASS_KEYS["llama"].items() if key != "rope_parameters"}
    raw = {**keys, **SMALL["llama"], **old, "quantization_config": {"bits": 4}, "model_type": "novel", "experts_of": 3}
    with pytest.raises(ValueError, match="its config has experts_of, which 'llama' does not have"):
        decoder_config(raw)


# Unknown keys.

UNKNOWN = {
    "_model_name_or_path": "x/y",
    "unsloth_version": "2025.1",
    "qk_norm": True,
    "query_pre_attn_scalar": 7,
    "odd": None,
}


@families
def test_keys_that_the_class_does_not_have_are_named_in_one_warning(kind, caplog):
    unknown = {key: value for key, value in UNKNOWN.items() if key not in CLASS_KEYS[kind]}
    wanted = decoder_config(SMALL[kind])
    assert not warnings_of(caplog)
    assert decoder_config({**SMALL[kind], **unknown}) == wanted
    (message,) = warnings_of(caplog)
    assert message.endswith(": " + ", ".join(map(repr, sorted(unknown))))


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("llama", {"qk_norm": "yes"}),
        ("gpt2", {"n_heads": 4}),
        ("llama", {"query_pre_attn_scalar": 256}),
        ("qwen3", {"num_experts": 8}),
        ("qwen2", {"use_qk_norm": True}),
        ("mistral", {"attention_bias": True}),
        ("gpt2", {"rms_norm_eps": 1e-5}),
    ],
    ids=str,
)
def test_keys_of_other_classes_change_nothing_in_transformers(kind, changed, caplog):
    assert decoder_config({**SMALL[kind], **changed}) == decoder_config(SMALL[kind])
    assert repr(*changed) in warnings_of(caplog)[-1]


def test_unknown_keys_of_both_levels_of_a_multimodal_config_are_in_one_warning(tmp_path, caplog):
    raw = {"model_type": "gemma3", "text_config": {**SMALL["gemma3_text"], "odd": 3}, "stray": [1]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, text = read_config(tmp_path / "config.json")
    assert config == decoder_config(SMALL["gemma3_text"] | {"tie_word_embeddings": True})
    assert text["odd"] == 3 and text["model_type"] == "gemma3_text" and "text_config" not in text
    (message,) = warnings_of(caplog)
    assert str(tmp_path / "config.json") in message and message.endswith(": 'stray', 'odd'")


def test_keys_without_effect_are_silent(caplog):
    decoder_config({**SMALL["llama"], **dict.fromkeys(NO_EFFECT - {"architectures", "model_type"}, "anything")})
    assert not caplog.records


# Keys that may change the model.


@pytest.mark.parametrize("key", UNDECLARED)
def test_keys_that_no_class_declares_and_transformers_reads_are_refused(key, caplog):
    raw = SMALL["llama"]
    assert decoder_config({**raw, key: UNDECLARED[key]}) == decoder_config(raw)
    if not UNDECLARED[key]:
        assert decoder_config({**raw, key: None}) == decoder_config(raw), "null is what is off"
    assert not warnings_of(caplog)
    with pytest.raises(ValueError, match=f"{key}.* is 7;.*ignore_config_keys=.'{key}',.*--ignore-config-key {key}"):
        decoder_config({**raw, key: 7})


def test_a_key_of_the_class_that_no_reader_took_must_have_its_default(monkeypatch):
    """None is left over today. One that a newer class has would be, and a reader that takes a key only now and then."""
    monkeypatch.setitem(CLASS_KEYS, "llama", {**CLASS_KEYS["llama"], "norm_twist": 1, "twisted": False})
    raw = SMALL["llama"]
    assert decoder_config({**raw, "norm_twist": 1, "twisted": None}) == decoder_config(raw)
    for changed in ({"norm_twist": 2}, {"norm_twist": None}, {"norm_twist": True}, {"twisted": True}, {"twisted": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))}.*ignore_config_keys"):
            decoder_config({**raw, **changed})


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("llama", {"layer_types": ["full_attention"] * 2}),
        ("mistral", {"layer_types": ["sliding_attention"] * 2}),
        ("mixtral", {"layer_types": ["full_attention"] * 2, "num_experts": 4}),
        ("gpt2", {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2, "hidden_size": 16}),
        ("deepseek_v3", {"layer_types": ["full_attention"] * 2}),
        ("mistral", {"attention_bias": False, "mlp_bias": None, "tie_word_embeddings": None}),
        ("llama", {"attention_bias": None, "mlp_bias": None, "use_sliding_window": None, "rope_interleaved": None}),
        ("llama", {"rope_scaling": {}, "rope_parameters": None, "partial_rotary_factor": None, "pruned_heads": None}),
        ("llama", {"quantization_config": None, "auto_map": None, "architectures": None, "is_encoder_decoder": None}),
        ("gemma2", {"attention_bias": None, "use_bidirectional_attention": None}),
        ("qwen2", {"use_mrope": None, "use_sliding_window": None}),
        ("qwen3_moe", {"attention_bias": None, "norm_topk_prob": None, "mlp_only_layers": None}),
        ("phi3", {"attention_bias": None, "mlp_bias": None, "lm_head_bias": None, "full_attn_mod": None}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": None, "n_inner": None}),
        ("deepseek_v3", {"scoring_func": None, "topk_method": None, "moe_layer_freq": None}),
        ("granitemoehybrid", {"layer_types": ["linear_attention", "full_attention"], "mamba_d_head": 8}),
        ("granitemoehybrid", {"layers_block_type": ["mamba", "attention"], "position_embedding_type": "nope"}),
        ("granitemoehybrid", {"time_step_limit": [0.0, {"__float__": "Infinity"}]}),
    ],
    ids=str,
)
def test_values_that_say_what_is_computed_anyway_are_accepted(kind, changed):
    assert decoder_config({**SMALL[kind], **changed}) == decoder_config(SMALL[kind])


@pytest.mark.parametrize("key", ["norm_topk_prob", "rope_interleave"])
def test_null_is_false_where_transformers_reads_it_so(key):
    raw = SMALL["deepseek_v3"]
    assert decoder_config({**raw, key: None}) == decoder_config({**raw, key: False}) != decoder_config(raw)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 2}),
        ("mixtral", {"layer_types": ["sliding_attention"] * 2}),
        ("phi3", {"layer_types": ["full_attention"]}),
        ("gpt2", {"layer_types": ["sliding_attention"] * 2}),
        ("gpt2", {"hidden_size": 32}),
        ("gpt2", {"num_hidden_layers": 3}),
        ("gpt2", {"tie_word_embeddings": None}),
        ("mixtral", {"num_experts": 8}),
        ("qwen2", {"use_mrope": True}),
        ("gemma3", {"text_config": {**SMALL["gemma3_text"], "is_causal": False}}),
        ("granitemoehybrid", {"time_step_limit": [0.0, 0.1]}),
        ("granitemoehybrid", {"layers_block_type": ["attention", "mamba"]}),
        ("granitemoehybrid", {"layer_types": ["mamba", "sliding_attention"]}),
        ("granitemoehybrid", {"mamba_n_heads": 3}),
        ("granitemoehybrid", {"mamba_d_head": 4}),
        ("granitemoehybrid", {"mamba_d_head": "8"}),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}),
    ],
    ids=str,
)
def test_values_that_say_something_else_are_refused(kind, changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        decoder_config({**SMALL.get(kind, {"model_type": kind}), **changed})


# Code that a folder brings.

PHI3 = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}


@pytest.mark.parametrize("code", [PHI3, {}, None, {**PHI3, "AutoTokenizer": ["a.B", None]}], ids=str)
def test_code_that_transformers_has_taken_over_is_accepted(code):
    assert decoder_config({**SMALL["phi3"], "auto_map": code}) == decoder_config(SMALL["phi3"])


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("llama", {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}),
        ("llama", {"AutoConfig": "configuration_other.OtherConfig"}),
        ("phi3", {"AutoModelForCausalLM": "modeling_phi3.Phi3SmallForCausalLM"}),
        ("phi3", {"AutoModel": ["modeling_phi3.Phi3Model"]}),
        ("qwen2", "modeling.py"),
    ],
    ids=str,
)
def test_other_code_is_refused_and_the_message_says_why(kind, code):
    with pytest.raises(ValueError, match=r"auto_map is .*code of its own, which is never run.*key auto_map"):
        decoder_config({**SMALL[kind], "auto_map": code})


def test_kimi_k2_is_deepseek_v3_by_another_name():
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model"}
    raw = {**SMALL["deepseek_v3"], "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    config, text, unknown = read_keys({**raw, "auto_map": code})
    assert config == decoder_config(SMALL["deepseek_v3"]) and not unknown
    assert text["model_type"] == "deepseek_v3"
    assert mtp_layout({**raw, "num_nextn_predict_layers": 1}).decoder.latent == config.latent


def test_the_class_of_a_folders_own_code_may_have_another_name():
    code = {"AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"}
    raw = {**SMALL["phimoe"], "architectures": ["PhiMoEForCausalLM"], "auto_map": code}
    assert decoder_config(raw) == decoder_config(SMALL["phimoe"])
    with pytest.raises(ValueError, match=r"architectures.*PhiMoE2ForCausalLM"):
        decoder_config({**raw, "architectures": ["PhiMoE2ForCausalLM"]})


def test_granite_4_without_recurrent_layers_and_experts_is_granite():
    raw = {**SMALL["granite"], "attention_multiplier": 0.25, "logits_scaling": 3.0}
    other = {"model_type": "granitemoehybrid", "num_local_experts": 0, "position_embedding_type": "rope"}
    other |= {"layer_types": ["attention"] * 2, "mamba_n_heads": 4, "shared_intermediate_size": 24}
    assert decoder_config({**raw, **other, "intermediate_size": 7}) == decoder_config(raw)


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_models_with_an_indexer_are_refused_with_the_reason(kind):
    with pytest.raises(ValueError, match=rf"'{kind}' is not supported: .*index_topk.* use a model of full attention"):
        decoder_config({**SMALL["deepseek_v3"], "model_type": kind})


# The switch.

REFUSED = {"is_causal": False, "auto_map": {"AutoModel": "m.M"}, "rope_scaling": {"rope_type": "default", "twist": 2}}
IGNORED = ("is_causal", "auto_map", "rope_scaling.twist")


def test_the_switch_gets_past_every_refusal(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**SMALL["llama"], **REFUSED}))
    for left_out in IGNORED:
        with pytest.raises(ValueError, match=f"--ignore-config-key .*{left_out.split('.')[-1]}"):
            read_config(file, [key for key in IGNORED if key != left_out])
    config, raw = read_config(file, (*IGNORED, "not_there"))
    assert config == decoder_config(SMALL["llama"])
    assert raw == {**SMALL["llama"], "rope_scaling": {"rope_type": "default"}}


def test_the_switch_reaches_into_objects():
    rope = {"rope_type": "default", "twist": 2}
    text = {**SMALL["gemma3_text"], "is_causal": False, "rope_parameters": {"full_attention": rope}}
    raw = {"model_type": "gemma3", "text_config": text, "transformers.js_config": 1, "kept": {"is_causal": 1}}
    before = copy.deepcopy(raw)
    keys = ("is_causal", "rope_parameters.twist", "transformers.js_config")
    small = {**SMALL["gemma3_text"], "rope_parameters": {"full_attention": {"rope_type": "default"}}}
    assert without_keys(raw, keys) == {"model_type": "gemma3", "text_config": small, "kept": {"is_causal": 1}}
    inner = ("text_config.is_causal", "text_config.rope_parameters.twist", "transformers.js_config")
    assert without_keys(raw, inner) == without_keys(raw, keys)
    assert raw == before
    with pytest.raises(TypeError, match="'is_causal'; give a tuple"):
        without_keys(raw, "is_causal")


@pytest.fixture
def refused(tmp_path):
    """A shipped model whose config has keys that are refused and one that is unknown."""
    folder = tmp_path / "refused"
    shutil.copytree(ROOT / "checkpoints" / "py-14m-draft", folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "is_causal": False, "_model_name_or_path": "x"}))
    return folder


def test_folders_are_opened_and_converted_past_a_refusal(refused, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"config\.json.*is_causal.*ignore_config_keys"):
        specjax.load(refused)
    model = specjax.load(refused, ignore_config_keys=("is_causal",))
    assert len(warnings_of(caplog)) == 1 and "'_model_name_or_path'" in warnings_of(caplog)[0]
    drafter = specjax.load_drafter(f"model:{refused}", model, 2, ignore_config_keys=("is_causal",))
    assert drafter.num_draft == 2
    # A Hugging Face folder of the same, there and back.
    config = json.loads((refused / "config.json").read_text())
    (refused / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "is_causal"}))
    specjax.export_hf(refused, tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is_causal"):
        specjax.convert_hf(tmp_path / "theirs", tmp_path / "ours")
    specjax.convert_hf(tmp_path / "theirs", tmp_path / "ours", ignore_config_keys=["is_causal"])
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "is_causal" not in written and written["_model_name_or_path"] == "x"
    specjax.load(tmp_path / "ours")


def test_the_scripts_have_the_switch_and_show_the_warning(refused):
    command = [sys.executable, ROOT / "scripts" / "generate.py", "--target", refused, "--drafter", "none"]
    command += ["--prompt", "x", "--max-new-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--ignore-config-key is_causal" in done.stderr
    done = subprocess.run([*command, "--ignore-config-key", "is_causal"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("'_model_name_or_path'") == 1


# Draft heads.

EAGLE = {"architectures": ["LlamaForCausalLMEagle3"], **SIZES, "num_hidden_layers": 1, "draft_vocab_size": 9}
MTP = {**SMALL["deepseek_v3"], "num_nextn_predict_layers": 1}
HEADS = {
    "eagle": (lambda raw: eagle_fields(speculators_config(raw, 8)), EAGLE),
    "mtp": (mtp_layout, MTP),
    "medusa": (medusa_config, {"medusa_num_heads": 2}),
}


@pytest.mark.parametrize("head", HEADS)
def test_keys_of_heads_that_switch_nothing_on_are_named_in_a_warning(head, caplog):
    read, raw = HEADS[head]
    wanted = read(raw)
    assert not warnings_of(caplog)
    assert read({**raw, "_model_name_or_path": "x", "mtp_twist": False, "medusa_twist": None}) == wanted
    (message,) = warnings_of(caplog)
    assert all(repr(key) in message for key in ("_model_name_or_path", "mtp_twist", "medusa_twist"))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [True, 2, 0.5, [1], {"a": 1}], ids=str)
def test_keys_of_heads_that_switch_something_on_are_refused(head, value):
    read, raw = HEADS[head]
    with pytest.raises(ValueError, match=r"mtp_twist.*unknown.*--ignore-config-key mtp_twist"):
        read({**raw, "mtp_twist": value})


@pytest.mark.parametrize("kind", HEADS)
def test_the_switch_opens_draft_heads(kind, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(ROOT / "checkpoints" / f"py-14m-{kind}", folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "mtp_twist": 2}))
    target = specjax.load(ROOT / "checkpoints" / "py-14m")
    with pytest.raises(ValueError, match=r"config\.json.*mtp_twist.*--ignore-config-key mtp_twist"):
        specjax.load_drafter(f"{kind}:{folder}", target, 2)
    drafter = specjax.load_drafter(f"cascade:ngram,{kind}:{folder}", target, 2, ignore_config_keys=["mtp_twist"])
    wanted = specjax.load_drafter(f"cascade:ngram,{kind}:{ROOT}/checkpoints/py-14m-{kind}", target, 2)
    assert jax.tree.all(jax.tree.map(np.array_equal, drafter, wanted))
