"""Dense families against transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from parity import TOLERANCE, forward, make_case, make_model, torch, transformers
from parity import test_greedy_text_is_equal as test_greedy_text_is_equal
from parity import test_logits_whole_token_by_token_and_in_blocks as test_logits_whole_token_by_token_and_in_blocks
from parity_cases import DENSE, GEMMA3_ROPE, SMALL, VOCAB, WIDE, WINDOW

import specjax
from specjax.checkpoint.models import load_stop_tokens
from specjax.types import whole_feed


@pytest.fixture(scope="module", params=DENSE)
def case(request, tmp_path_factory):
    return make_case(*DENSE[request.param], tmp_path_factory.mktemp("model"))


def test_multimodal_gemma_3_is_its_text_part_and_exports_as_that(tmp_path):
    """Vision tensors are left out; what is exported has no missing and no unexpected tensor."""
    text = {**SMALL, **WIDE, **WINDOW, "tie_word_embeddings": True, "rope_parameters": GEMMA3_ROPE}
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
    }
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text).to_dict(),
        vision_config={**vision, "patch_size": 4},
        mm_tokens_per_image=4,
        eos_token_id=[1, 2],
        attn_implementation="eager",
    )
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    theirs.save_pretrained(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(3, VOCAB, (1, 20)).astype(np.int32)
    report = "\n".join(specjax.convert_hf(tmp_path / "hf", tmp_path / "ours"))
    assert "the vision part" in report
    specjax.export_hf(tmp_path / "ours", tmp_path / "back")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert load_stop_tokens(tmp_path / "back") == (1, 2)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        exported = back(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(exported, expected, atol=TOLERANCE, rtol=0)
    for folder in ("hf", "ours", "back"):
        model = specjax.load(tmp_path / folder, "float32")
        logits, _ = forward(model, whole_feed(jnp.asarray(tokens)), model.init_cache(1, 32))
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("kind", ["Qwen2", "Gemma2"])
def test_tables_that_differ_are_both_used_though_the_config_ties_them(kind, tmp_path):
    make_model(kind, {"tie_word_embeddings": False}).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    del raw["tie_word_embeddings"]
    file.write_text(json.dumps(raw | ({"tie_word_embeddings": True} if kind == "Qwen2" else {})))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = np.random.default_rng(0).integers(3, VOCAB, (1, 20)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    model = specjax.load(tmp_path, "float32")
    logits, _ = forward(model, whole_feed(jnp.asarray(tokens)), model.init_cache(1, 32))
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
