"""Families with mixtures of experts against transformers."""

import json
import shutil

import jax
import numpy as np
import pytest
from parity import assert_generates_the_greedy_text, make_case, make_model
from parity import test_logits_whole_token_by_token_and_in_blocks as test_logits_whole_token_by_token_and_in_blocks
from parity_cases import EXPERTS
from quantised_folders import mxfp4
from safetensors.numpy import load_file, save_file

import specjax


@pytest.fixture(scope="module", params=EXPERTS)
def case(request, tmp_path_factory):
    return make_case(*EXPERTS[request.param], tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("case", ["deepseek-v3", "gpt-oss", "llama 4"], indirect=True)
def test_generate_writes_the_greedy_text(case):
    assert_generates_the_greedy_text(case)


def test_tensors_may_have_the_names_of_transformers_modules(case, tmp_path):
    """As folders have them that were saved without the published names: stacks of experts, other names of routers."""
    case.theirs.save_pretrained(tmp_path, save_original_format=False)
    jax.tree.map(np.testing.assert_array_equal, specjax.load(tmp_path, "float32").params, case.ours.params)


def test_gpt_oss_with_mxfp4_is_the_plain_model(tmp_path):
    """Published folders hold the experts' kernels as blocks of 4 bits; both folders have the same parameters."""
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "hidden_size": 32, "intermediate_size": 64}
    make_model("GptOss", sizes).save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "packed")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    packed, rng = dict(plain), np.random.default_rng(0)
    for name in [name for name in plain if name.endswith("_proj") and "experts" in name]:
        parts, plain[name] = mxfp4(rng, 3, plain[name].shape[2], plain[name].shape[1])
        del packed[name]
        packed |= {name + end: part for end, part in parts.items()}
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    save_file(packed, tmp_path / "packed" / "model.safetensors")
    file = tmp_path / "packed" / "config.json"
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.layers.*.self_attn"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    wanted, found = (specjax.load(tmp_path / name, "float32").params for name in ("plain", "packed"))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert found["layers"][0]["mlp"]["experts"]["gate_proj"].shape == (3, 32, 64)
