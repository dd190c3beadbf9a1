"""Multimodal models, which open, convert and export as their text part, against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
from parity import TOLERANCE, forward, torch, transformers
from parity_cases import CHUNKS, GEMMA3_ROPE, GEMMA4, SHARING, SMALL, VOCAB, WIDE, WINDOW

import specjax
from specjax.checkpoint.generation import load_stop_tokens
from specjax.commands.convert import verify
from specjax.types import whole_feed

AXES = {"mrope_section": [2, 2, 1], "rope_type": "default", "rope_theta": 50.0}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "patch_size": 4}
SIGLIP = {**VISION, "num_hidden_layers": 1, "image_size": 8}
QWEN_VISION = {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": SMALL["hidden_size"]}
GEMMA3 = {**SMALL, **WIDE, **WINDOW, "tie_word_embeddings": True, "rope_parameters": GEMMA3_ROPE}

# transformers' class, its settings, and the model_type that is exported.
CASES = {
    "gemma3": ("Gemma3", {"text_config": GEMMA3, "vision_config": SIGLIP, "mm_tokens_per_image": 4}, "gemma3_text"),
    "gemma4": (
        "Gemma4",
        {
            "text_config": {**SMALL, **GEMMA4, **SHARING, "model_type": "gemma4_text"},
            "vision_config": {**VISION, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 4},
        },
        "gemma4_text",
    ),
    "llama4": (
        "Llama4",
        {
            "text_config": {**SMALL, **WIDE, **CHUNKS},
            "vision_config": {**SIGLIP, "vision_output_dim": 8, "projector_output_dim": 8},
        },
        "llama4_text",
    ),
    "mistral3": (
        "Mistral3",
        {"text_config": {**SMALL, **WIDE, "model_type": "mistral"}, "vision_config": {**SIGLIP, "head_dim": 4}},
        "mistral",
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**SMALL, "hidden_size": 40, "rope_parameters": AXES, "tie_word_embeddings": True},
            "vision_config": {**QWEN_VISION, "out_hidden_size": 40, "fullatt_block_indexes": [0]},
        },
        "qwen2",
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": {**SMALL, **WIDE, "rope_parameters": {**AXES, "mrope_interleaved": True}},
            "vision_config": {**QWEN_VISION, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
        },
        "qwen3",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_multimodal_model_is_its_text_part_and_exports_as_that(name, tmp_path):
    """Vision tensors are left out; what is exported has no missing and no unexpected tensor."""
    kind, settings, text = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**settings, eos_token_id=[1, 2], attn_implementation="eager")
    theirs = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    theirs.save_pretrained(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(3, VOCAB, (1, 20)).astype(np.int32)
    report = "\n".join(specjax.convert_hf(tmp_path / "hf", tmp_path / "ours"))
    assert "the vision part" in report
    if kind in ("Qwen3VL", "Llama4"):  # the command compares with the whole model's class, as this test does
        assert verify(tmp_path / "hf", tmp_path / "ours") == 0
    specjax.export_hf(tmp_path / "ours", tmp_path / "back")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert back.config.model_type == text
    stop_tokens = load_stop_tokens(tmp_path / "hf")
    assert load_stop_tokens(tmp_path / "back") == stop_tokens and {1, 2} <= {*stop_tokens}
    with torch.no_grad():
        # Llama 4's multimodal class cannot run without images in transformers 5.24.
        oracle = theirs.language_model if kind == "Llama4" else theirs
        expected = oracle(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        exported = back(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(exported, expected, atol=TOLERANCE, rtol=0)
    for folder in ("hf", "ours", "back"):
        model = specjax.load(tmp_path / folder, "float32")
        logits, _ = forward(model, whole_feed(jnp.asarray(tokens)), model.init_cache(1, 32))
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    assert np.std(expected) > 0.1
