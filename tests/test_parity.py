"""Every family against transformers, on tiny random checkpoints written by transformers itself."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from jitted import jit

import specjax
from specjax.checkpoint.models import load_stop_tokens
from specjax.types import whole_feed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

VOCAB = 53
LENGTHS = (21, 34)  # tokens of the two rows that are compared
NEW_TOKENS = 64
LIMIT = 128
TOLERANCE = 1e-4

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LIMIT,
    "tie_word_embeddings": False,
}
WIDE = {"head_dim": 10}  # not hidden_size / num_attention_heads
ONE_HEAD, ALL_HEADS = {"num_key_value_heads": 1}, {"num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 7}


def rope(kind, theta=50.0, **more):
    return {"rope_parameters": dict(rope_type=kind, rope_theta=theta, **more)}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_max_position_embeddings=16)
YARN = rope("yarn", theta=10000.0, factor=8.0, original_max_position_embeddings=16)
DYNAMIC = {**rope("dynamic", factor=4.0), "max_position_embeddings": 32}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 5}
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "sliding_window": None}
LATENT = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "kv_lora_rank": 12,
    "q_lora_rank": 14,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 9,
    "num_key_value_heads": 4,
}
LATENT_YARN = rope("yarn", theta=10000.0, factor=8.0, mscale=1.0, mscale_all_dim=0.7, beta_fast=32, beta_slow=1)
LATENT_YARN["rope_parameters"]["original_max_position_embeddings"] = 16
GPT2 = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": LIMIT}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
}
LONGROPE = rope("longrope", short_factor=[1.0, 1.2, 1.5], long_factor=[2.0, 3.0, 4.0])

CASES = {
    "llama": ("Llama", {}),
    "llama, wide heads, one key head, tied": ("Llama", {**WIDE, **ONE_HEAD, **TIED}),
    "llama, all biases, as many key heads": ("Llama", {**ALL_HEADS, "attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": ("Llama", rope("linear", factor=4.0)),
    "llama, dynamic rope": ("Llama", DYNAMIC),
    "llama 3": ("Llama", LLAMA3),
    "llama, yarn": ("Llama", YARN),
    "llama, yarn with attention factor": (
        "Llama",
        rope(
            "yarn", theta=10000.0, factor=8.0, original_max_position_embeddings=16, attention_factor=1.3, truncate=False
        ),
    ),
    "mistral": ("Mistral", {**WIDE, **WINDOW}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", TIED),
    "qwen2 with windows": ("Qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen2, yarn": ("Qwen2", YARN),
    "qwen3": ("Qwen3", {**WIDE, **TIED}),
    "qwen3, biases, one key head": ("Qwen3", {**WIDE, **ONE_HEAD, "attention_bias": True}),
    "gemma 2": ("Gemma2", {**WIDE, **TIED, **WINDOW, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0}),
    "gemma 2, untied, biases": ("Gemma2", {**WIDE, **WINDOW, "attention_bias": True, "final_logit_softcapping": 3.0}),
    "gemma 3": ("Gemma3Text", {**WIDE, **TIED, **WINDOW, "sliding_window_pattern": 2, "rope_parameters": GEMMA3_ROPE}),
    "gemma 3, soft caps": (
        "Gemma3Text",
        {**WIDE, **WINDOW, "query_pre_attn_scalar": 9, "final_logit_softcapping": 5.0},
    ),
    "phi-3": ("Phi3", {**WINDOW, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "phi-3, partial rotary": (
        "Phi3",
        {**rope("default", partial_rotary_factor=0.6), "hidden_size": 40, "pad_token_id": 0},
    ),
    "phi-3, longrope": (
        "Phi3",
        {
            **LONGROPE,
            "original_max_position_embeddings": LIMIT,
            "max_position_embeddings": 4 * LIMIT,
            "pad_token_id": 0,
        },
    ),
    "smollm": ("Llama", {**TIED, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "gpt-2": ("GPT2", GPT2),
    "gpt-2, untied, inner width": ("GPT2", {**GPT2, "n_inner": 31, "tie_word_embeddings": False}),
    "mixtral": ("Mixtral", MOE),
    "mixtral with windows": ("Mixtral", {**MOE, **WINDOW, **WIDE}),
    "qwen3-moe": ("Qwen3Moe", {**QWEN_MOE, **WIDE}),
    "qwen3-moe, dense layers, weights that sum to 1": (
        "Qwen3Moe",
        {**QWEN_MOE, "norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
    ),
    "deepseek-v3": ("DeepseekV3", LATENT),
    "deepseek-v3, yarn, one group": ("DeepseekV3", {**LATENT, **LATENT_YARN, "n_group": 1, "topk_group": 1}),
    "deepseek-v3, whole queries, halves, biases": (
        "DeepseekV3",
        {**LATENT, "q_lora_rank": None, "rope_interleave": False, "attention_bias": True, "norm_topk_prob": False},
    ),
}
MODEL_CLASSES = {
    "Gemma3Text": "Gemma3ForCausalLM",
    "GPT2": "GPT2LMHeadModel",
}


@dataclasses.dataclass
class Case:
    """A checkpoint, both models, and the rows' tokens."""

    folder: object
    theirs: object
    ours: specjax.LanguageModel
    rows: list
    dynamic: bool

    def expected(self, tokens):
        """Logits [t, v] by transformers.

        With dynamic rope they depend on what is fed together, past the original length: transformers rotates all keys
        of a pass by the frequencies of its end. One token at a time is what any split of ours must equal.
        """
        ids = torch.tensor([tokens])
        with torch.no_grad():
            if not self.dynamic:
                return self.theirs(ids).logits[0].numpy()
            logits, cache = [], None
            for i in range(ids.shape[1]):
                out = self.theirs(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                logits.append(out.logits[0, 0].numpy())
                cache = out.past_key_values
            return np.stack(logits)


def make_model(kind, settings, seed=0):
    """A model under whose weights every part matters: norms far from their neutral value, logits of a few units."""
    sizes = {} if kind == "GPT2" else SMALL
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **settings}, attn_implementation="eager")
    model = getattr(transformers, MODEL_CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if "e_score_correction_bias" in name:
            tensor.data = 0.2 * noise
        elif "inv_freq" in name or name.endswith("embed_scale"):
            continue
        elif tensor.ndim == 1 and name.endswith("bias"):
            tensor.data = 0.3 * noise
        elif tensor.ndim == 1:
            tensor.data = 0.3 * noise + (0.0 if kind.startswith("Gemma") else 1.0)
        elif "embed" in name or "wte" in name or "wpe" in name:
            tensor.data = 0.5 * noise
        else:
            fan_in = tensor.shape[-2] if kind == "GPT2" and "lm_head" not in name else tensor.shape[-1]
            tensor.data = noise / fan_in**0.5
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    kind, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp("model")
    theirs = make_model(kind, settings)
    theirs.save_pretrained(folder)
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, VOCAB, size=length).tolist() for length in LENGTHS]
    dynamic = settings.get("rope_parameters", {}).get("rope_type") == "dynamic"
    return Case(folder, theirs, specjax.load(folder, "float32"), rows, dynamic)


@jit
def forward(model, feed, cache):
    output = model.forward(model.params, feed, cache)
    return output.logits_btv, output.cache


def test_logits_whole_token_by_token_and_in_blocks(case):
    """Largest difference over prefill, single tokens and blocks of g + 1 at offsets of each row's own."""
    expected = [case.expected(tokens) for tokens in case.rows]
    worst = {}
    for width in (max(LENGTHS), 1, 5):
        cache, got = case.ours.init_cache(2, LIMIT), [[], []]
        for step in range(-(-max(LENGTHS) // width)):
            start = [min(step * width, length) for length in LENGTHS]  # a finished row rests
            count = [min(width, length - at) for at, length in zip(start, LENGTHS, strict=True)]
            block = [(tokens + [0] * width)[at : at + width] for tokens, at in zip(case.rows, start, strict=True)]
            block = [(tokens + [0] * width)[:width] for tokens in block]
            feed = specjax.Feed(*(jnp.asarray(x, jnp.int32) for x in (block, start, count)))
            logits, cache = forward(case.ours, feed, cache)
            for row in range(2):
                got[row].extend(np.asarray(logits[row, : count[row]]))
        worst[width] = max(np.abs(np.stack(rows) - wanted).max() for rows, wanted in zip(got, expected, strict=True))
    spread = np.std(expected[0])
    print(f"largest difference by width {worst}, logits' deviation {spread:.2f}")
    assert 0.1 < spread < 30
    assert max(worst.values()) <= TOLERANCE


def test_greedy_text_is_equal(case):
    """64 tokens, drafted by n-grams, against transformers one token at a time."""
    tokens = list(case.rows[0])
    with torch.no_grad():
        fed, cache = 0, None
        while len(tokens) < LENGTHS[0] + NEW_TOKENS:
            end = fed + 1 if case.dynamic else len(tokens)
            out = case.theirs(torch.tensor([tokens[fed:end]]), past_key_values=cache, use_cache=True)
            fed, cache = end, out.past_key_values
            if fed == len(tokens):
                tokens.append(int(out.logits[0, -1].argmax()))
    generation = specjax.generate(
        case.ours,
        np.asarray([case.rows[0]], np.int32),
        drafter=specjax.NGramDrafter(num_draft=3, min_n=1),
        fixed=True,
        sampling=specjax.Sampling(temperature=0.0),
        max_new_tokens=NEW_TOKENS,
    )
    assert np.asarray(generation.tokens)[0, : int(generation.lengths[0])].tolist() == tokens


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
