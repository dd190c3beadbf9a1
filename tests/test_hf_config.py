"""Reading ``config.json``: published models, both spellings of transformers, rotary positions, refusals, a fuzz."""

import contextlib
import copy
import dataclasses
import json
import math

import numpy as np
import pytest

from specjax.hf import decoder_config
from specjax.hf.config import read_config
from specjax.transformer.config import DecoderConfig, ExpertsConfig, LatentConfig

BF16 = {"torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True}
TRAINED = {"attention_dropout": 0.0, "initializer_range": 0.02}
SLIDING, FULL = "sliding_attention", "full_attention"

LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_1 = {
    **TRAINED,
    **BF16,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA_3_2 = {
    **LLAMA_3_1,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**LLAMA_3_1["rope_scaling"], "factor": 32.0},
    "tie_word_embeddings": True,
}
SMOLLM_2 = {
    **TRAINED,
    **BF16,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
    "vocab_size": 49152,
}
MISTRAL_1 = {
    **BF16,
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MISTRAL_3 = {**MISTRAL_1, "attention_dropout": 0.0, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768}
QWEN_2_5 = {
    **TRAINED,
    **BF16,
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_2_5_7B = {
    **QWEN_2_5,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "vocab_size": 152064,
}
QWEN_3 = {
    **TRAINED,
    **BF16,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_2 = {
    **TRAINED,
    **BF16,
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA_2_9B = {
    **GEMMA_2,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "sliding_window_size": 4096,
}
GEMMA_3_1B = {
    **TRAINED,
    **BF16,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
PHI_3_4K = {
    **TRAINED,
    **BF16,
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
SHORT_FACTOR = [1.0] + [1.05 + 0.05 * (j // 2) for j in range(47)]  # of the published kind, not their digits
LONG_FACTOR = [1.118320672**j for j in range(48)]
PHI_3_128K = {
    **PHI_3_4K,
    "_name_or_path": "Phi-3-mini-128k-instruct",
    "max_position_embeddings": 131072,
    "rope_scaling": {"long_factor": LONG_FACTOR, "short_factor": SHORT_FACTOR, "type": "longrope"},
    "sliding_window": 262144,
}
PHI_4_MINI = {
    **PHI_3_128K,
    "_name_or_path": "Phi-4-mini-instruct",
    "auto_map": {**PHI_3_4K["auto_map"], "AutoTokenizer": "Xenova/gpt-4o"},
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": LONG_FACTOR, "short_factor": [1.0] * 48, "type": "longrope"},
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
MIXTRAL = {
    **TRAINED,
    **BF16,
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN_3_MOE = {
    **QWEN_3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3 = {
    **TRAINED,
    **BF16,
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}

PUBLISHED = {
    "Llama-2-7b": LLAMA_2,
    "Llama-3.1-8B": LLAMA_3_1,
    "Llama-3.2-1B": LLAMA_3_2,
    "SmolLM2-135M": SMOLLM_2,
    "Mistral-7B-v0.1": MISTRAL_1,
    "Mistral-7B-v0.3": MISTRAL_3,
    "Qwen2.5-0.5B": QWEN_2_5,
    "Qwen2.5-7B": QWEN_2_5_7B,
    "Qwen3-0.6B": QWEN_3,
    "gemma-2-2b": GEMMA_2,
    "gemma-2-9b": GEMMA_2_9B,
    "gemma-3-1b": GEMMA_3_1B,
    "gemma-3-4b": GEMMA_3_4B,
    "Phi-3-mini-4k": PHI_3_4K,
    "Phi-3-mini-128k": PHI_3_128K,
    "Phi-4-mini": PHI_4_MINI,
    "gpt2": GPT2,
    "Mixtral-8x7B": MIXTRAL,
    "Qwen3-30B-A3B": QWEN_3_MOE,
    "DeepSeek-V3": DEEPSEEK_V3,
}
published = pytest.mark.parametrize("raw", PUBLISHED.values(), ids=PUBLISHED)


# Published models.

RMS = {"norm": "rms", "gated_mlp": True, "learned_positions": False, "activation": "silu"}
GEMMA = {**RMS, "norm": "rms_one_plus", "norm_places": "around", "activation": "gelu_tanh", "attention_scale": 1 / 16}
# Of each model: v, d, f, layers, query heads, key heads, head width, longest text; and what else sets it apart.
SHAPES = {
    "Llama-2-7b": ((32000, 4096, 11008, 32, 32, 32, 128, 4096), RMS | {"norm_eps": 1e-5, "tie_word_embeddings": False}),
    "Llama-3.1-8B": ((128256, 4096, 14336, 32, 32, 8, 128, 131072), RMS | {"attention_bias": False}),
    "Llama-3.2-1B": ((128256, 2048, 8192, 16, 32, 8, 64, 131072), RMS | {"tie_word_embeddings": True}),
    "SmolLM2-135M": ((49152, 576, 1536, 30, 9, 3, 64, 8192), RMS | {"tie_word_embeddings": True}),
    "Mistral-7B-v0.1": ((32000, 4096, 14336, 32, 32, 8, 128, 32768), RMS),
    "Mistral-7B-v0.3": ((32768, 4096, 14336, 32, 32, 8, 128, 32768), RMS),
    "Qwen2.5-0.5B": ((151936, 896, 4864, 24, 14, 2, 64, 32768), RMS | {"attention_bias": True, "output_bias": False}),
    "Qwen2.5-7B": ((152064, 3584, 18944, 28, 28, 4, 128, 131072), RMS | {"attention_bias": True}),
    "Qwen3-0.6B": ((151936, 1024, 3072, 28, 16, 8, 128, 40960), RMS | {"query_key_norm": "heads"}),
    "gemma-2-2b": (
        (256000, 2304, 9216, 26, 8, 4, 256, 8192),
        GEMMA
        | {"embedding_scale": 48.0, "attention_softcap": 50.0, "logit_softcap": 30.0}
        | {"query_key_norm": None, "tie_word_embeddings": True},
    ),
    "gemma-2-9b": ((256000, 3584, 14336, 42, 16, 8, 256, 8192), GEMMA | {"embedding_scale": math.sqrt(3584)}),
    "gemma-3-1b": (
        (262144, 1152, 6912, 26, 4, 1, 256, 32768),
        GEMMA
        | {"query_key_norm": "heads", "tie_word_embeddings": True, "attention_softcap": None, "logit_softcap": None},
    ),
    "gemma-3-4b": ((262208, 2560, 10240, 34, 8, 4, 256, 131072), GEMMA | {"embedding_scale": math.sqrt(2560)}),
    "Phi-3-mini-4k": ((32064, 3072, 8192, 32, 32, 32, 96, 4096), RMS | {"norm_eps": 1e-5}),
    # The texts that the short factors serve: beyond, the model would rotate all that was read before anew.
    "Phi-3-mini-128k": ((32064, 3072, 8192, 32, 32, 32, 96, 4096), RMS),
    "Phi-4-mini": ((200064, 3072, 8192, 32, 24, 8, 128, 4096), RMS | {"tie_word_embeddings": True}),
    "gpt2": (
        (50257, 768, 3072, 12, 12, 12, 64, 1024),
        {"norm": "layer", "gated_mlp": False, "learned_positions": True, "activation": "gelu_tanh", "norm_eps": 1e-5}
        | {"attention_bias": True, "output_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "Mixtral-8x7B": (
        (32000, 4096, 14336, 32, 32, 8, 128, 32768),
        RMS | {"experts": ExpertsConfig(8, 2, 14336, "softmax", renormalize=True)},
    ),
    "Qwen3-30B-A3B": (
        (151936, 2048, 6144, 48, 32, 4, 128, 40960),
        RMS | {"query_key_norm": "heads", "experts": ExpertsConfig(128, 8, 768, "softmax", renormalize=True)},
    ),
    "DeepSeek-V3": (
        (129280, 7168, 18432, 61, 128, 128, 192, 163840),
        RMS
        | {
            "latent": LatentConfig(1536, 512, 128, 64, 128),
            "experts": ExpertsConfig(256, 8, 2048, "sigmoid", True, 2.5, 8, 4, corrected=True, shared_size=2048),
            "attention_scale": pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192), rel=1e-12),
        },
    ),
}
# Windows of the layers, one after the other; layers that are not named see everything.
WINDOWS = {
    "Mistral-7B-v0.1": [4096] * 32,
    "gemma-2-2b": [4096, None] * 13,
    "gemma-2-9b": [4096, None] * 21,
    "gemma-3-1b": ([512] * 5 + [None]) * 4 + [512] * 2,
    "gemma-3-4b": ([1024] * 5 + [None]) * 5 + [1024] * 4,
    "Phi-3-mini-4k": [2047] * 32,
    "Phi-3-mini-128k": [262144] * 32,
    "Phi-4-mini": [262144] * 32,
}
# Of a layer: rotated pairs, the frequency of pair j for some j, and the factor of cosines and sines.
FREQUENCIES = {
    ("Llama-2-7b", 0): (64, {0: 1, 16: 0.1, 32: 0.01, 63: 10000 ** (-126 / 128)}, 1),
    # Pair 32 turns 1 / sqrt(500000) a token, t = 1.8438478 times in 8192, (t - 1) / 3 of the way from scaled to plain.
    ("Llama-3.1-8B", 31): (64, {0: 1, 32: 0.000524846161, 63: 500000 ** (-126 / 128) / 8}, 1),
    ("Llama-3.2-1B", 5): (32, {0: 1, 16: 0.000429556797, 31: 500000 ** (-62 / 64) / 32}, 1),
    ("SmolLM2-135M", 0): (32, {0: 1, 16: 1e5**-0.5}, 1),
    ("Mistral-7B-v0.1", 9): (64, {0: 1, 32: 0.01}, 1),
    ("Mistral-7B-v0.3", 9): (64, {0: 1, 32: 0.001}, 1),
    ("Qwen2.5-0.5B", 23): (32, {0: 1, 16: 0.001}, 1),
    ("Qwen3-0.6B", 0): (64, {0: 1, 32: 0.001}, 1),
    ("gemma-2-2b", 0): (128, {0: 1, 64: 0.01}, 1),
    ("gemma-3-1b", 0): (128, {0: 1, 64: 0.01}, 1),
    ("gemma-3-1b", 5): (128, {0: 1, 64: 0.001}, 1),
    ("gemma-3-4b", 0): (128, {0: 1, 64: 0.01}, 1),
    ("gemma-3-4b", 5): (128, {0: 0.125, 64: 0.000125}, 1),
    ("Phi-3-mini-4k", 0): (48, {0: 1, 24: 0.01}, 1),
    # Factor 131072 / 4096 = 2 ** 5 and original length 2 ** 12.
    ("Phi-3-mini-128k", 0): (48, {0: 1, 24: 0.01 / SHORT_FACTOR[24]}, math.sqrt(17 / 12)),
    ("Phi-4-mini", 0): (48, {0: 1, 24: 0.01}, math.sqrt(17 / 12)),
    ("Mixtral-8x7B", 0): (64, {0: 1, 32: 0.001}, 1),
    ("Qwen3-30B-A3B", 0): (64, {0: 1, 32: 0.001}, 1),
    # YaRN's ramp runs from pair 10 to pair 23: pair 16 is 6/13 of the way from 0.01 to 0.01 / 40.
    ("DeepSeek-V3", 0): (32, {0: 1, 10: 10000 ** (-10 / 32), 16: 0.0055, 23: 10000 ** (-23 / 32) / 40}, 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_published_models_are_read(name, tmp_path):
    sizes, features = SHAPES[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED[name]))
    before = copy.deepcopy(PUBLISHED[name])
    config, _ = read_config(file)
    assert config == decoder_config(PUBLISHED[name]) and hash(config) == hash(decoder_config(PUBLISHED[name]))
    assert PUBLISHED[name] == before, "the caller's mapping was changed"
    assert sizes == (
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.max_position_embeddings,
    )
    for feature, value in features.items():
        assert getattr(config, feature) == value, feature
    assert [layer.window for layer in config.each_layer] == WINDOWS.get(name, [None] * config.num_hidden_layers)


@pytest.mark.parametrize(("name", "layer"), FREQUENCIES, ids=str)
def test_published_models_rotate_by_these_frequencies(name, layer):
    pairs, frequencies, scale = FREQUENCIES[name, layer]
    rope = decoder_config(PUBLISHED[name]).each_layer[layer].rope
    assert len(rope.frequencies) == pairs
    assert {j: rope.frequencies[j] for j in frequencies} == pytest.approx(frequencies, rel=1e-7)
    assert rope.scale == pytest.approx(scale, rel=1e-12)
    assert rope.interleaved == (name == "DeepSeek-V3") and rope.dynamic is None


def test_published_layers_with_experts():
    def sparse(raw):
        return [layer.experts for layer in decoder_config(raw).each_layer]

    assert sparse(MIXTRAL) == [True] * 32
    assert sparse(QWEN_3_MOE) == [True] * 48
    assert sparse(DEEPSEEK_V3) == [False] * 3 + [True] * 58
    assert (
        sparse({**QWEN_3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [1, 4]})
        == [False, False]
        + [
            False,
            True,
        ]
        * 23
    )
    assert sparse(LLAMA_2) == [False] * 32


def test_gpt2_has_no_rotary_positions():
    assert {layer.rope for layer in decoder_config(GPT2).each_layer} == {None}


# Defaults and spellings.

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SMALL = {kind: {"model_type": kind, **SIZES} for kind in ("llama", "qwen3_moe", "gemma2", "gemma3_text", "phi3")}
SMALL |= {
    kind: {"model_type": kind, **SIZES, "num_key_value_heads": 2}
    for kind in (
        *("mistral", "mixtral", "qwen2", "qwen3", "smollm3", "ministral", "olmo2", "olmo3", "granite"),
        *("cohere", "cohere2", "glm", "glm4", "gemma"),
    )
}
SMALL["gemma3"] = {"model_type": "gemma3", "text_config": SMALL["gemma3_text"]}
SMALL["qwen3_vl"] = {"model_type": "qwen3_vl", "text_config": {**SIZES, "num_key_value_heads": 2}}
SMALL["gpt2"] = {"model_type": "gpt2", "vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 4}
SMALL["deepseek_v3"] = {"model_type": "deepseek_v3", **SIZES, "num_key_value_heads": 4, "first_k_dense_replace": 1}


def test_missing_keys_mean_what_hugging_face_means_by_them():
    """The defaults of ``transformers.LlamaConfig``; another epsilon or theta would be another model."""
    config = decoder_config(SIZES)
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (4, 4, 2048)
    assert config.norm_eps == 1e-6
    assert config.each_layer[0].rope.frequencies == pytest.approx((1.0, 0.01))
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (False, False, False)
    assert config == decoder_config(SMALL["llama"]) == DecoderConfig(*SIZES.values())


def test_keys_that_do_not_touch_the_forward_pass_are_read_over():
    raw = {
        **SIZES,
        "_name_or_path": "x",
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": 0.1,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "llama",
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0",
        "use_cache": True,
    }
    assert decoder_config(raw) == decoder_config(SIZES)
    assert raw["rope_scaling"] is None, "the caller's mapping was changed"


def rope_of(**keys):
    return decoder_config({**SIZES, **keys}).each_layer[0].rope


def test_both_spellings_of_rotary_positions_are_read():
    assert rope_of(rope_theta=5e5).frequencies == pytest.approx((1, 5e5**-0.5), rel=1e-12)
    assert rope_of(rope_theta=500000) == rope_of(rope_theta=5e5)
    assert rope_of(rope_parameters={"rope_type": "default", "rope_theta": 5e5}) == rope_of(rope_theta=5e5)
    assert rope_of(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_theta=7.0) == rope_of(
        rope_theta=5e5
    )
    assert rope_of(rope_parameters=None) == rope_of(rope_scaling={}) == rope_of()
    linear = {"factor": 4.0}
    wanted = rope_of(rope_theta=7.0, rope_parameters={"rope_type": "linear", **linear})
    assert wanted.frequencies == pytest.approx((0.25, 0.25 * 7**-0.5), rel=1e-12)
    for scaling in ({"type": "linear"}, {"rope_type": "linear"}, {"type": "linear", "rope_type": "linear"}):
        assert rope_of(rope_theta=7.0, rope_scaling=scaling | linear) == wanted
    both = {"rope_type": "linear", **linear}
    assert rope_of(rope_theta=7.0, rope_scaling=both, rope_parameters=both) == wanted


def test_both_spellings_of_gemma_3_are_read():
    old = {
        **SMALL["gemma3_text"],
        "num_hidden_layers": 4,
        "rope_theta": 500.0,
        "rope_local_base_freq": 70.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "sliding_window_pattern": 3,
    }
    new = {
        **SMALL["gemma3_text"],
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
            SLIDING: {"rope_type": "default", "rope_theta": 70.0},
        },
    }
    config = decoder_config(new)
    assert decoder_config(old) == config
    assert [layer.window for layer in config.each_layer] == [4096, 4096, None, 4096]
    assert config.each_layer[0].rope.frequencies[64] == pytest.approx(70**-0.5)
    assert config.each_layer[2].rope.frequencies[64] == pytest.approx(500**-0.5 / 2)
    sparse = {**new, "rope_theta": 500.0, "rope_parameters": {FULL: {"rope_type": "linear", "factor": 2.0}}}
    assert decoder_config({**sparse, "rope_local_base_freq": 70.0}) == config, "the bases stand beside the kinds"
    assert decoder_config({"model_type": "gemma3", "text_config": new}) == config


@published
def test_transformers_5_writes_the_same_model(raw):
    """Each published config.json, which is of transformers 4, as version 5 writes it."""
    transformers = pytest.importorskip("transformers", minversion="5")
    arguments = {key: value for key, value in copy.deepcopy(raw).items() if key != "model_type"}
    theirs = transformers.AutoConfig.for_model(raw["model_type"], **arguments)
    wanted = decoder_config(raw)
    assert decoder_config(theirs.to_dict()) == wanted
    assert decoder_config(json.loads(theirs.to_json_string())) == wanted
    assert decoder_config(json.loads(theirs.to_json_string(use_diff=False))) == wanted


@pytest.mark.parametrize("kind", SMALL)
def test_defaults_are_those_of_transformers(kind):
    """A config with nothing but its sizes, and what transformers makes of it, which spells out all the others."""
    transformers = pytest.importorskip("transformers", minversion="5")
    raw = copy.deepcopy(SMALL[kind])
    if kind == "phi3":
        raw["pad_token_id"] = 0
    theirs = transformers.AutoConfig.for_model(kind, **{key: raw[key] for key in raw if key != "model_type"})
    assert decoder_config(theirs.to_dict()) == decoder_config(raw)


# Frequencies.

ROPES = {
    "linear": [{"factor": 2.0}, {"factor": 8, "rope_theta": 1e6}, {"factor": 0.5, "rope_theta": 30.0}],
    "dynamic": [{"factor": 4.0}, {"factor": 2, "rope_theta": 5e5}],
    "llama3": [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {"factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 9.0, "original_max_position_embeddings": 100},
        {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "rope_theta": 5e5},
    ],
    "yarn": [
        {"factor": 40.0, "original_max_position_embeddings": 4096},
        {"factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6},
        {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
        {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7},
        {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707},
        {"factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 20.0, "beta_slow": 3.0},
        {"factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False},
        {"factor": 0.5, "original_max_position_embeddings": 4096},
        {"factor": None, "original_max_position_embeddings": 512},
        {"factor": 3.0, "original_max_position_embeddings": 3},
    ],
    "longrope": [
        {"short_factor": [1.0 + 0.1 * j for j in range(8)], "long_factor": [2.0] * 8},
        {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 256},
        {"short_factor": [1.5] * 8, "long_factor": [2] * 8, "factor": 6.0},
        {"short_factor": [1.5] * 8, "long_factor": [2] * 8, "attention_factor": 1.7},
    ],
}


@pytest.mark.parametrize(("kind", "parameters"), [(kind, p) for kind in ROPES for p in ROPES[kind]], ids=str)
def test_frequencies_equal_those_of_transformers(kind, parameters):
    """Computed in float64 here, and there in float32, of which 1e-6 is 8 units in the last place."""
    transformers = pytest.importorskip("transformers", minversion="5")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    raw = {**SIZES, "hidden_size": 64, "max_position_embeddings": 2048}
    raw["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0, **parameters}
    theirs, scale = functions[kind](transformers.LlamaConfig(**copy.deepcopy(raw)), "cpu")
    ours = decoder_config(raw).each_layer[0].rope
    np.testing.assert_allclose(ours.frequencies, theirs.numpy(), rtol=1e-6)
    assert ours.scale == pytest.approx(scale, rel=1e-12)
    if kind == "dynamic":
        assert ours.dynamic == (raw["rope_parameters"]["rope_theta"], parameters["factor"], 2048)


def test_llama3_by_hand():
    """theta 16 and four pairs: 1, 1/2, 1/4, 1/8 radians a token. In 8 pi tokens these turn 4, 2, 1 and 1/2 times."""
    parameters = {"rope_type": "llama3", "factor": 10.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
    original = 10**6  # an integer near 8 pi * 39789
    scaled = {name: parameters[name] * original / (8 * math.pi) for name in ("low_freq_factor", "high_freq_factor")}
    keys = parameters | scaled | {"rope_theta": 16.0, "original_max_position_embeddings": original}
    rope = rope_of(hidden_size=32, rope_parameters=keys)
    # 4 turns: as it is. 2 turns, halfway from 1 to 3: the mean of 1/2 and 1/20. 1 and 1/2 turns: a tenth.
    assert rope.frequencies == pytest.approx((1, 0.275, 0.025, 0.0125), rel=1e-12)


def test_longest_texts():
    def longest(**parameters):
        return decoder_config({**SIZES, "rope_parameters": parameters}).max_position_embeddings

    assert longest(rope_type="default") == 2048
    assert longest(rope_type="linear", factor=4.0) == 2048
    assert longest(rope_type="dynamic", factor=4.0) == 8192
    assert longest(rope_type="yarn", factor=4.0) == 8192
    assert longest(rope_type="yarn", factor=4.0, original_max_position_embeddings=256) == 2048
    factors = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
    assert longest(rope_type="longrope", **factors, original_max_position_embeddings=256) == 256


# Refusals.

DEEP_ROPE = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
LLAMA3_ROPE = LLAMA_3_1["rope_scaling"]
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}

# family, changed keys, what the message must contain: the key and the value
BAD_CONFIGS = {
    "multimodal positions": ("qwen2", {"use_mrope": True}, ["use_mrope", "True"]),
    "another kind of model": ("llama", {"model_type": "bert"}, ["model_type", "'bert'", "llama", "deepseek_v3"]),
    "model_type null": ("llama", {"model_type": None}, ["model_type", "None"]),
    "model_type a list": ("llama", {"model_type": ["llama"]}, ["model_type", "['llama']"]),
    "architecture of another head": (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        ["architectures", "LlamaForSequenceClassification", "LlamaForCausalLM"],
    ),
    "architecture a string": ("gpt2", {"architectures": "GPT2LMHeadModel"}, ["architectures", "GPT2LMHeadModel"]),
    "architecture false": ("gpt2", {"architectures": False}, ["architectures", "False"]),
    "two architectures": (
        "phi3",
        {"architectures": ["Phi3ForCausalLM", "Other"]},
        ["architectures", "Other", "Phi3ForCausalLM"],
    ),
    "encoder and decoder": ("gpt2", {"is_encoder_decoder": True}, ["is_encoder_decoder", "True"]),
    "cross attention": ("gpt2", {"add_cross_attention": True}, ["add_cross_attention", "True"]),
    "pruned heads": ("gpt2", {"pruned_heads": {"0": [1]}}, ["pruned_heads", "{'0': [1]}"]),
    "activation": ("llama", {"hidden_act": "relu"}, ["hidden_act", "'relu'", "silu"]),
    "activation null": ("mistral", {"hidden_act": None}, ["hidden_act", "None"]),
    "activation a list": ("llama", {"hidden_act": ["silu"]}, ["hidden_act", "['silu']"]),
    "activation, Gemma": ("gemma2", {"hidden_activation": "tanh"}, ["hidden_activation", "'tanh'"]),
    "activation, GPT-2": ("gpt2", {"activation_function": "relu"}, ["activation_function", "'relu'"]),
    # Sizes.
    "size a string": ("llama", {"hidden_size": "16"}, ["hidden_size", "'16'"]),
    "size a float": ("llama", {"vocab_size": 29.0}, ["vocab_size", "29.0"]),
    "size a bool": ("qwen2", {"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
    "size null": ("mistral", {"intermediate_size": None}, ["intermediate_size", "None"]),
    "size a list": ("phi3", {"hidden_size": [16]}, ["hidden_size", "[16]"]),
    "size an object": ("mixtral", {"hidden_size": {"a": 1}}, ["hidden_size", "{'a': 1}"]),
    "size zero": ("llama", {"vocab_size": 0}, ["vocab_size", "0", "at least 1"]),
    "size negative": ("gemma2", {"vocab_size": -29}, ["vocab_size", "-29", "at least 1"]),
    "size enormous": ("llama", {"vocab_size": 2**31}, ["vocab_size", str(2**31), "at most"]),
    "layers without end": ("llama", {"num_hidden_layers": 10**12}, ["num_hidden_layers", str(10**12), "at most"]),
    "layers without end, GPT-2": ("gpt2", {"n_layer": 10**12}, ["n_layer", str(10**12), "at most"]),
    "heads without end": ("llama", {"head_dim": 10**12}, ["head_dim", str(10**12), "at most"]),
    "heads as wide as the model": (
        "llama",
        {"hidden_size": 2**30, "num_attention_heads": 1},
        ["hidden_size", str(2**30), "num_attention_heads", "head_dim"],
    ),
    "rotary width without end": (
        "deepseek_v3",
        {"qk_rope_head_dim": 10**12},
        ["qk_rope_head_dim", str(10**12), "at most"],
    ),
    "no heads": ("llama", {"num_attention_heads": 0}, ["num_attention_heads", "0", "at least 1"]),
    "heads a string": ("llama", {"num_attention_heads": "4"}, ["num_attention_heads", "'4'"]),
    "no key heads": ("qwen3", {"num_key_value_heads": 0}, ["num_key_value_heads", "0", "at least 1"]),
    "key heads that do not divide": (
        "llama",
        {"num_key_value_heads": 3},
        ["num_attention_heads", "4", "num_key_value_heads", "3"],
    ),
    "odd heads": ("llama", {"head_dim": 5}, ["rotary", "5", "even"]),
    "head width null, Qwen3": ("qwen3", {"head_dim": None}, ["head_dim", "None"]),
    "heads that do not divide the width": (
        "llama",
        {"num_attention_heads": 3},
        ["hidden_size", "16", "num_attention_heads", "3"],
    ),
    "heads that do not divide the width, GPT-2": ("gpt2", {"n_head": 3}, ["n_embd", "16", "n_head", "3"]),
    "heads a string, GPT-2": ("gpt2", {"n_head": "4"}, ["n_head", "'4'"]),
    "inner width zero, GPT-2": ("gpt2", {"n_inner": 0}, ["n_inner", "0", "at least 1"]),
    "no positions": ("llama", {"max_position_embeddings": 0}, ["max_position_embeddings", "0", "at least 1"]),
    "no positions, GPT-2": ("gpt2", {"n_positions": 0}, ["n_positions", "0", "at least 1"]),
    # Numbers.
    "epsilon a string": ("llama", {"rms_norm_eps": "tiny"}, ["rms_norm_eps", "'tiny'"]),
    "epsilon null": ("llama", {"rms_norm_eps": None}, ["rms_norm_eps", "None"]),
    "epsilon negative": ("llama", {"rms_norm_eps": -1e-5}, ["rms_norm_eps", "-1e-05"]),
    "epsilon true": ("llama", {"rms_norm_eps": True}, ["rms_norm_eps", "True"]),
    "epsilon infinite": ("llama", {"rms_norm_eps": math.inf}, ["rms_norm_eps", "inf"]),
    "epsilon beyond float32": ("llama", {"rms_norm_eps": 10**400}, ["rms_norm_eps", "1000"]),
    "epsilon zero, GPT-2": ("gpt2", {"layer_norm_epsilon": 0}, ["layer_norm_epsilon", "0"]),
    "theta a string": ("llama", {"rope_theta": "10000"}, ["rope_theta", "'10000'"]),
    "theta zero": ("llama", {"rope_theta": 0}, ["rope_theta", "0"]),
    "theta not a number": ("mistral", {"rope_theta": math.nan}, ["rope_theta", "nan"]),
    "theta null": ("qwen2", {"rope_theta": None}, ["rope_theta", "None"]),
    "theta too small": ("llama", {"head_dim": 64, "rope_theta": 1e-45}, ["rope_theta", "1e-45", "float32"]),
    "local base, Gemma 3": ("gemma3_text", {"rope_local_base_freq": -1}, ["rope_local_base_freq", "-1"]),
    "soft cap zero": ("gemma2", {"attn_logit_softcapping": 0}, ["attn_logit_softcapping", "0"]),
    "soft cap a string": ("gemma3_text", {"final_logit_softcapping": "30"}, ["final_logit_softcapping", "'30'"]),
    "attention scale": ("gemma2", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar", "0"]),
    # Flags.
    "tied a string": ("llama", {"tie_word_embeddings": "false"}, ["tie_word_embeddings", "'false'"]),
    "tied null, GPT-2": ("gpt2", {"tie_word_embeddings": None}, ["tie_word_embeddings", "None"]),
    "tied a string, next to the text part": (
        "gemma3",
        {"tie_word_embeddings": "false"},
        ["tie_word_embeddings", "'false'"],
    ),
    "bias a number": ("llama", {"attention_bias": 1}, ["attention_bias", "1"]),
    "bias, Phi-3": ("phi3", {"attention_bias": True}, ["attention_bias", "True"]),
    "bias of the head, Phi-3": ("phi3", {"lm_head_bias": True}, ["lm_head_bias", "True"]),
    "bias of the MLP, Phi-3": ("phi3", {"mlp_bias": True}, ["mlp_bias", "True"]),
    "full attention in some layers, Phi-3": ("phi3", {"full_attn_mod": 2}, ["full_attn_mod", "2"]),
    "interpolation, Phi-3": ("phi3", {"interpolate_factor": 2}, ["interpolate_factor", "2"]),
    "attention in both directions": ("gemma2", {"use_bidirectional_attention": True}, ["bidirectional", "True"]),
    "attention in both directions, Gemma 3": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        ["use_bidirectional_attention", "True"],
    ),
    "unscaled attention, GPT-2": ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights", "False"]),
    "attention scaled by layer, GPT-2": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        ["scale_attn_by_inverse_layer_idx", "True"],
    ),
    # Windows and layers.
    "sliding window, Llama": ("llama", {"sliding_window": 128}, ["sliding_window", "128"]),
    "window of zero": ("mistral", {"sliding_window": 0}, ["sliding_window", "0", "at least 1"]),
    "window of zero, Gemma 2": ("gemma2", {"sliding_window": 0}, ["sliding_window", "0", "at least 1"]),
    "window of zero, Gemma 3": ("gemma3_text", {"sliding_window": 0}, ["sliding_window", "0", "at least 1"]),
    "window of zero, Phi-3": ("phi3", {"sliding_window": 0}, ["sliding_window", "0", "at least 1"]),
    "window of zero, Qwen2": (
        "qwen2",
        {"sliding_window": 0, "use_sliding_window": True, "max_window_layers": 0},
        ["sliding_window", "0"],
    ),
    "window negative": ("mixtral", {"sliding_window": -1}, ["sliding_window", "-1"]),
    "window a string": ("mistral", {"sliding_window": "4096"}, ["sliding_window", "'4096'"]),
    "window a float": ("phi3", {"sliding_window": 2047.0}, ["sliding_window", "2047.0"]),
    "two windows, Gemma 2": ("gemma2", {"sliding_window_size": 17}, ["sliding_window_size", "17", "4096"]),
    "window switch a string": ("qwen2", {"use_sliding_window": "false"}, ["use_sliding_window", "'false'"]),
    "windows from layer -1": ("qwen2", {"max_window_layers": -1}, ["max_window_layers", "-1"]),
    "pattern of zero": ("gemma3_text", {"sliding_window_pattern": 0}, ["sliding_window_pattern", "0"]),
    "layer types too few": ("qwen2", {"layer_types": [FULL]}, ["layer_types", FULL, "2"]),
    "layer types too many": ("gemma2", {"layer_types": [FULL] * 3}, ["layer_types", FULL, "2"]),
    "layer types by another name": (
        "qwen3",
        {"layer_types": [FULL, "linear_attention"]},
        ["layer_types", "'linear_attention'", FULL, SLIDING],
    ),
    "layer types of chunks": (
        "gemma3_text",
        {"layer_types": [FULL, "chunked_attention"]},
        ["layer_types", "'chunked_attention'"],
    ),
    "layer types a string": ("gemma2", {"layer_types": "full_attention"}, ["layer_types", "'full_attention'"]),
    "layer types an object": ("gemma2", {"layer_types": {"0": FULL, "1": FULL}}, ["layer_types", "{'0'"]),
    "layer types of lists": ("gemma2", {"layer_types": [[], {}]}, ["layer_types", "[]"]),
    "sliding layers without a window": ("qwen2", {"layer_types": [FULL, SLIDING]}, ["layer_types", "sliding_window"]),
    "layer types, Llama": ("llama", {"layer_types": [FULL, SLIDING]}, ["layer_types", SLIDING]),
    # Rotary positions.
    "unknown key of transformers 5": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "factor": 8.5}},
        ["rope_parameters", "factor", "8.5"],
    ),
    "unknown rope type": ("llama", {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, ["rope_type", "'ntk'"]),
    "unknown rope type, old spelling": ("llama", {"rope_scaling": {"type": "mrope"}}, ["rope_type", "'mrope'"]),
    "spiral rope": (
        "llama",
        {"rope_parameters": {"rope_type": "spiral", "partial_rotary_factor": 1.0}},
        ["rope_type", "'spiral'"],
    ),
    "rope type empty": ("llama", {"rope_scaling": {"rope_type": ""}}, ["rope_type", "''"]),
    "rope type false": ("llama", {"rope_scaling": {"rope_type": False, "type": "default"}}, ["rope_type", "False"]),
    "rope type a list": ("llama", {"rope_scaling": {"rope_type": ["yarn"]}}, ["rope_type", "['yarn']"]),
    "rope type a list, Phi-3": ("phi3", {"rope_scaling": {"type": ["su"]}}, ["rope_type", "['su']"]),
    "linear rope, Phi-3": ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type", "'linear'"]),
    "rope without a factor": ("llama", {"rope_scaling": {"rope_type": "linear"}}, ["rope_parameters", "factor"]),
    "rope factor null": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": None}}, ["factor", "None"]),
    "rope factor a string": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": "2"}}, ["factor", "'2'"]),
    "rope factor negative": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": -2}}, ["factor", "-2"]),
    "rope factor minute": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 1e-40}}, ["linear", "float32"]),
    "rope factor enormous": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 1e30}},
        ["factor", "1e+30", "2048"],
    ),
    "rope factor that leaves no positions": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 1e-5}},
        ["factor", "1e-05"],
    ),
    "width in the rope": ("llama", {"rope_scaling": {"rope_type": "default", "width": 2}}, ["width", "2"]),
    "llama3 lacks a key": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.5}},
        ["rope_parameters", "low_freq_factor"],
    ),
    "llama3 of no range": (
        "llama",
        {"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 0.5}},
        ["high_freq_factor", "0.5", "low_freq_factor"],
    ),
    "llama3 original length a float": (
        "llama",
        {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192.5}},
        ["original_max_position_embeddings", "8192.5"],
    ),
    "llama3 with keys of yarn": ("llama", {"rope_scaling": {**LLAMA3_ROPE, "beta_fast": 32}}, ["beta_fast", "32"]),
    "yarn with theta 1": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1},
        ["rope_theta", "1", "yarn"],
    ),
    "yarn, mscale a string": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": "1"}},
        ["mscale", "'1'"],
    ),
    "yarn, mscale false": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": False}},
        ["mscale", "False"],
    ),
    "yarn, truncate null": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": None}},
        ["truncate", "None"],
    ),
    "yarn, beta_fast zero": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0}},
        ["beta_fast", "0"],
    ),
    "yarn stretched beyond int32": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 1e9}},
        ["factor", "1000000000.0", "2048"],
    ),
    "yarn of DeepSeek without a factor": (
        "deepseek_v3",
        {"rope_scaling": {**DEEP_ROPE, "factor": None}},
        ["mscale_all_dim", "1.0", "factor"],
    ),
    "longrope without factors": ("llama", {"rope_scaling": {"rope_type": "longrope"}}, ["short_factor"]),
    "longrope, too few factors": (
        "llama",
        {"rope_scaling": {**LONG_ROPE, "short_factor": [1.0]}},
        ["short_factor", "[1.0]", "2"],
    ),
    "longrope, a factor null": (
        "llama",
        {"rope_scaling": {**LONG_ROPE, "long_factor": [1.0, None]}},
        ["long_factor", "None"],
    ),
    "longrope, factors a string": (
        "phi3",
        {"rope_scaling": {**LONG_ROPE, "short_factor": "11"}},
        ["short_factor", "'11'"],
    ),
    "longrope of one token": (
        "llama",
        {"rope_scaling": {**LONG_ROPE, "original_max_position_embeddings": 1}},
        ["original_max_position_embeddings", "1", "longrope"],
    ),
    "longrope of two lengths": (
        "phi3",
        {"rope_scaling": {**LONG_ROPE, "original_max_position_embeddings": 77}},
        ["original_max_position_embeddings", "77", "4096"],
    ),
    "longrope of two minds": (
        "phi3",
        {"rope_scaling": {**LONG_ROPE, "factor": 3.0}, "max_position_embeddings": 8192},
        ["factor", "3.0", "8192", "4096"],
    ),
    "rotated in part": ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    "rotated in part, inside": (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor", "0.5"],
    ),
    "rotated more than all": ("phi3", {"partial_rotary_factor": 1.5}, ["partial_rotary_factor", "1.5", "at most all"]),
    "rotated not at all": ("phi3", {"partial_rotary_factor": 0.1}, ["partial_rotary_factor", "0.1"]),
    "rotated by an odd number": ("phi3", {"partial_rotary_factor": 0.75}, ["partial_rotary_factor", "0.75", "even"]),
    "rotated a list": ("phi3", {"partial_rotary_factor": [0.5]}, ["partial_rotary_factor", "[0.5]"]),
    "interleaved, Llama": ("llama", {"rope_interleaved": True}, ["rope_interleaved", "True"]),
    "interleaved a number": ("deepseek_v3", {"rope_interleave": 1}, ["rope_interleave", "1"]),
    "rope_parameters a list": ("llama", {"rope_parameters": [1]}, ["rope_parameters", "[1]"]),
    "rope_parameters a string": ("llama", {"rope_parameters": "linear"}, ["rope_parameters", "'linear'"]),
    "rope_scaling a number": ("llama", {"rope_scaling": 2.0}, ["rope_scaling", "2.0"]),
    "two ropes": (
        "llama",
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        ["rope_parameters", "rope_scaling", "2.5"],
    ),
    "a rope for another kind of layer": (
        "gemma3_text",
        {"rope_parameters": {FULL: {"rope_type": "default"}, "linear_attention": {}}},
        ["rope_parameters", "linear_attention"],
    ),
    "a rope that is no object": (
        "gemma3_text",
        {"rope_parameters": {FULL: "default"}},
        ["rope_parameters", "'default'", FULL],
    ),
    "ropes by kind where there is one": (
        "gemma2",
        {"rope_parameters": {FULL: {"rope_type": "default"}}},
        ["rope_parameters", FULL],
    ),
    # Experts.
    "more experts per token than there are": (
        "mixtral",
        {"num_local_experts": 2, "num_experts_per_tok": 3},
        ["num_experts_per_tok", "3", "2"],
    ),
    "no experts": ("mixtral", {"num_local_experts": 0}, ["num_local_experts", "0", "at least 1"]),
    "no experts per token": ("qwen3_moe", {"num_experts_per_tok": 0}, ["num_experts_per_tok", "0", "at least 1"]),
    "experts in two numbers": (
        "qwen3_moe",
        {"num_experts": 16, "num_local_experts": 32},
        ["num_experts", "16", "num_local_experts", "32"],
    ),
    "experts a string": ("qwen3_moe", {"num_experts": "16"}, ["num_experts", "'16'"]),
    "experts' width": ("qwen3_moe", {"moe_intermediate_size": 0}, ["moe_intermediate_size", "0"]),
    "weights that sum to 1 a string": ("qwen3_moe", {"norm_topk_prob": "true"}, ["norm_topk_prob", "'true'"]),
    "dense layers a string": ("qwen3_moe", {"mlp_only_layers": "0"}, ["mlp_only_layers", "'0'"]),
    "dense layers a number": ("qwen3_moe", {"mlp_only_layers": 1}, ["mlp_only_layers", "1"]),
    "dense layers by name": ("qwen3_moe", {"mlp_only_layers": ["0"]}, ["mlp_only_layers", "'0'"]),
    "dense layers past the last": ("qwen3_moe", {"mlp_only_layers": [2]}, ["mlp_only_layers", "2", "at most 1"]),
    "sparse layers in steps of zero": ("qwen3_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step", "0"]),
    "scores by softmax": ("deepseek_v3", {"scoring_func": "softmax"}, ["scoring_func", "'softmax'", "'sigmoid'"]),
    "another choice of experts": ("deepseek_v3", {"topk_method": "greedy"}, ["topk_method", "'greedy'"]),
    "experts in some layers": ("deepseek_v3", {"moe_layer_freq": 2}, ["moe_layer_freq", "2"]),
    "groups that do not divide": ("deepseek_v3", {"n_group": 7}, ["n_group", "7", "256"]),
    "more groups than there are": ("deepseek_v3", {"topk_group": 9}, ["topk_group", "9", "8"]),
    "groups null": ("deepseek_v3", {"n_group": None}, ["n_group", "None"]),
    "groups a string": ("deepseek_v3", {"topk_group": "4"}, ["topk_group", "'4'"]),
    "more experts per token than in the groups": (
        "deepseek_v3",
        {"topk_group": 1, "num_experts_per_tok": 33},
        ["num_experts_per_tok", "33", "32"],
    ),
    "experts' scale zero": ("deepseek_v3", {"routed_scaling_factor": 0}, ["routed_scaling_factor", "0"]),
    "experts' scale a string": ("deepseek_v3", {"routed_scaling_factor": "2"}, ["routed_scaling_factor", "'2'"]),
    "shared experts negative": ("deepseek_v3", {"n_shared_experts": -1}, ["n_shared_experts", "-1"]),
    "dense layers negative": ("deepseek_v3", {"first_k_dense_replace": -1}, ["first_k_dense_replace", "-1"]),
    # Latents.
    "key heads beside latents": (
        "deepseek_v3",
        {"num_key_value_heads": 2},
        ["num_key_value_heads", "2", "num_attention_heads", "4"],
    ),
    "latent zero": ("deepseek_v3", {"kv_lora_rank": 0}, ["kv_lora_rank", "0", "at least 1"]),
    "latent null": ("deepseek_v3", {"kv_lora_rank": None}, ["kv_lora_rank", "None"]),
    "query latent a string": ("deepseek_v3", {"q_lora_rank": "14"}, ["q_lora_rank", "'14'"]),
    "rotary width odd": ("deepseek_v3", {"qk_rope_head_dim": 5}, ["rotary", "5", "even"]),
    "positions of too few layers": ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers", "[1]", "2 layers"]),
    "positions that are no flags": ("smollm3", {"no_rope_layers": [1, 2]}, ["no_rope_layers", "[1, 2]"]),
    "a base of two readings": ("olmo3", {"rope_theta": 7.0}, ["rope_theta", "7.0", "rope_parameters"]),
    "norms of heads, Command": ("cohere2", {"use_qk_norm": True}, ["use_qk_norm", "True"]),
    "a width of heads that transformers ignores": ("cohere2", {"head_dim": 7}, ["head_dim", "7"]),
    "residual multiplier zero": ("granite", {"residual_multiplier": 0}, ["residual_multiplier", "0"]),
    # Multimodal models.
    "no text_config": ("gemma3", {"text_config": None}, ["text_config", "None"]),
    "text_config of another model": ("gemma3", {"text_config": {"model_type": "llama"}}, ["text_config", "'llama'"]),
    "what Gemma 3 drops": (
        "gemma3",
        {"text_config": {**SIZES, "final_logit_softcapping": 3.0}},
        ["final_logit", "3.0"],
    ),
    "what Qwen3-VL drops": (
        "qwen3_vl",
        {"text_config": {**SIZES, "use_sliding_window": True}},
        ["use_sliding", "True"],
    ),
}


def refusal(raw, file):
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError) as caught:
        read_config(file)
    assert type(caught.value) is ValueError
    assert str(file) in str(caught.value)
    with pytest.raises(ValueError):
        decoder_config(raw)
    return str(caught.value).replace(str(file), "")


@pytest.mark.parametrize(("kind", "changed", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs_name_file_key_and_value(kind, changed, words, tmp_path):
    message = refusal({**SMALL[kind], **changed}, tmp_path / "config.json")
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.mark.parametrize("kind", SMALL)
def test_the_small_configs_themselves_are_sound(kind):
    """Else the refusals above would have another reason."""
    assert decoder_config(SMALL[kind]).num_hidden_layers == 2


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", name) for name in SIZES]
    + [("gpt2", name) for name in SMALL["gpt2"] if name.startswith(("n_", "vocab"))],
)
def test_missing_sizes_are_named(kind, name, tmp_path):
    raw = {key: value for key, value in SMALL[kind].items() if key != name}
    assert f"lacks the key {name!r}" in refusal(raw, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["does not exist"]),
        (b"", ["not valid JSON"]),
        (b'{"vocab_size": 29', ["not valid JSON"]),
        (b"\xff\xfe", ["not valid JSON"]),
        (b"[29]", ["list", "object"]),
        (b"null", ["NoneType", "object"]),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", ["not valid JSON"]),
        (b"[" * 100_000, ["not valid JSON"]),
    ],
    ids=["absent", "empty", "cut short", "not text", "a list", "null", "5000 digits", "nested without end"],
)
def test_bad_config_files_name_the_file(text, words, tmp_path):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(ValueError) as caught:
        read_config(file)
    for word in [str(file), *words]:
        assert word in str(caught.value)


def test_a_folder_in_place_of_the_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize("key", ["vocab_size", "rope_scaling", "hidden_act", "architectures", "unknown"])
def test_values_nested_ever_deeper(key, tmp_path):
    """Up to where JSON itself is refused, and past where a value that was read can no longer be shown."""
    file = tmp_path / "config.json"
    for depth in [*range(2, 30), *range(30, 1100, 7)]:
        file.write_text(json.dumps({**SIZES, key: 0}).replace(f'"{key}": 0', f'"{key}": {"[" * depth + "]" * depth}'))
        with pytest.raises(ValueError) as caught:
            read_config(file)
        assert str(file) in str(caught.value)


# Nothing that changes the model is read over.

# Keys that transformers writes and that change nothing; everything else must make another config, or be refused.
HARMLESS = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "output_hidden_states"),
    *("output_attentions", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp"),
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "auto_map", "cache_implementation"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "num_nextn_predict_layers", "ep_size"),
    *("aux_loss_alpha", "seq_aux", "task_specific_params", "transformers.js_config", "is_llama_config"),
    *("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"),
    # What follows from other keys, or is unused: GPT-2's n_ctx; Gemma's hidden_act, beside hidden_activation.
    *(
        "n_ctx",
        "reorder_and_upcast_attn",
        "_sliding_window_pattern",
        "qk_head_dim",
        "is_decoder",
        "quantization_config",
    ),
}
QWEN_WINDOW = {"sliding_window", "max_window_layers", "use_sliding_window"}  # the one is off, null or past all layers
HARMLESS_IN = {
    "Qwen2.5-0.5B": QWEN_WINDOW,
    "Qwen2.5-7B": QWEN_WINDOW,
    "Qwen3-0.6B": QWEN_WINDOW,
    "Qwen3-30B-A3B": QWEN_WINDOW,
    "gemma-2-2b": {"hidden_act"},
    "gemma-2-9b": {"hidden_act"},
    "gemma-3-1b": {"sliding_window_pattern"},  # beside the layer_types that version 5 makes of it
    "gemma-3-4b": {"tie_word_embeddings"},  # true in text_config, which suffices
    "Phi-3-mini-4k": {"original_max_position_embeddings"},  # there is no longrope
    "Phi-4-mini": {"partial_rotary_factor"},  # which version 5 writes into rope_parameters as well
    "DeepSeek-V3": {"head_dim", "max_position_embeddings"},  # derived; YaRN's factor says more
}


def other_values(value):
    """Values of the same type that mean something else; of an object, such values of each key in turn."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value, 2] if value != 2 else [4]
    if isinstance(value, float):
        return [2 * value]
    if isinstance(value, list):
        return [other for other in (value[:-1], [*value, 0]) if other != value]
    if isinstance(value, dict):
        read = value.keys() - HARMLESS - ({"type"} if "rope_type" in value else set())
        changed = [{**value, key: other} for key in sorted(read) for other in other_values(value[key])]
        return [*changed, {**value, "other": 1}]
    return {None: [8, 0.25, True], "silu": ["gelu"], "gelu_pytorch_tanh": ["silu"]}.get(value, ["other"])


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("spelling", [4, 5])
def test_no_key_that_changes_the_model_is_read_over(name, spelling):
    """Every key of every published config in turn, and of what transformers 5 makes of it."""
    raw = PUBLISHED[name]
    if spelling == 5:
        transformers = pytest.importorskip("transformers", minversion="5")
        arguments = {key: value for key, value in copy.deepcopy(raw).items() if key != "model_type"}
        raw = transformers.AutoConfig.for_model(raw["model_type"], **arguments).to_dict()
    wanted, harmless = decoder_config(raw), HARMLESS | HARMLESS_IN.get(name, set())
    read_over = set()
    for key, value in raw.items():
        for other in other_values(value):
            if key == "text_config" and "other" in other:  # as at the top level, a warning names it
                continue
            if key == "text_config" and other.get("tie_word_embeddings") is False:  # true at the top level
                continue
            with contextlib.suppress(ValueError):
                if decoder_config({**raw, key: other}) == wanted:
                    read_over.add(key)
    assert read_over <= harmless


# family, keys before, keys after: another model, or none
FLAGS = [
    ("llama", {}, {"attention_bias": True}),
    ("llama", {}, {"mlp_bias": True}),
    ("llama", {}, {"tie_word_embeddings": True}),
    ("llama", {}, {"hidden_act": "gelu"}),
    ("llama", {"hidden_act": "gelu"}, {"hidden_act": "gelu_new"}),
    ("llama", {}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, {"rope_scaling": {"type": "yarn", "factor": 3.0}}),
    (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 3.0}},
    ),
    ("mistral", {}, {"sliding_window": None}),
    ("qwen2", {"max_window_layers": 1}, {"max_window_layers": 1, "use_sliding_window": True}),
    (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 0},
    ),
    ("qwen3", {}, {"attention_bias": True}),
    ("smollm3", {}, {"no_rope_layer_interval": 2}),
    ("smollm3", {}, {"no_rope_layers": [1, 0]}),
    ("ministral", {}, {"layer_types": [FULL, SLIDING]}),
    ("olmo3", {}, {"layer_types": [FULL, SLIDING]}),
    (
        "olmo3",
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    *(("granite", {}, {f"{name}_multiplier": 0.5}) for name in ("embedding", "attention", "residual")),
    ("granite", {}, {"logits_scaling": 2.0}),
    ("cohere", {}, {"logit_scale": 2.0}),
    ("cohere2", {}, {"sliding_window_pattern": 2}),
    ("cohere2", {}, {"layer_norm_eps": 1e-6}),
    ("glm4", {}, {"partial_rotary_factor": 1.0}),
    ("glm", {}, {"attention_bias": False}),
    ("qwen3_moe", {}, {"norm_topk_prob": True}),
    ("qwen3_moe", {}, {"mlp_only_layers": [1]}),
    ("qwen3_moe", {}, {"decoder_sparse_step": 2}),
    ("qwen3_moe", {}, {"use_sliding_window": True}),
    ("gemma2", {}, {"attn_logit_softcapping": None}),
    ("gemma2", {}, {"final_logit_softcapping": None}),
    ("gemma2", {}, {"query_pre_attn_scalar": 128}),
    ("gemma2", {}, {"layer_types": [FULL, SLIDING]}),
    ("gemma3_text", {}, {"sliding_window_pattern": 2}),
    ("gemma3_text", {}, {"rope_local_base_freq": 5.0}),
    ("gemma3_text", {"num_hidden_layers": 6}, {"num_hidden_layers": 6, "rope_theta": 5.0}),
    ("gemma3", {}, {"tie_word_embeddings": False}),
    ("phi3", {}, {"partial_rotary_factor": 0.5}),
    ("phi3", {}, {"sliding_window": 7}),
    ("gpt2", {}, {"scale_attn_weights": False}),
    ("gpt2", {}, {"n_inner": 17}),
    ("mixtral", {}, {"num_experts_per_tok": 1}),
    ("deepseek_v3", {}, {"rope_interleave": False}),
    ("deepseek_v3", {}, {"norm_topk_prob": False}),
    ("deepseek_v3", {}, {"q_lora_rank": None}),
    ("deepseek_v3", {}, {"n_shared_experts": 0}),
    ("deepseek_v3", {}, {"topk_group": 3}),
    (
        "deepseek_v3",
        {"rope_scaling": DEEP_ROPE},
        {"rope_scaling": {**DEEP_ROPE, "mscale": 0.5, "mscale_all_dim": 0.5}},
    ),
]


@pytest.mark.parametrize(("kind", "before", "after"), FLAGS, ids=str)
def test_flags_make_another_model_or_none(kind, before, after):
    wanted = decoder_config({**SMALL[kind], **before})
    with contextlib.suppress(ValueError):
        assert decoder_config({**SMALL[kind], **after}) != wanted


# A fuzz.

CASES_EACH = 400
LIMIT = 2**31
ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 3, 7, 2**31 - 1, 2**31, 2**63, 10**30, 10**400, -(10**30)),
    *(0.0, 0.5, -0.5, 1.0, 1e-320, 1e-40, 1e30, 1e308, math.nan, math.inf, -math.inf),
    *("", "silu", "default", "yarn", "longrope", "4096", "null", "\u0000", "\ud800", "a" * 10_000),
    *([], {}, [None], [[]], [1, 2], [1] * 48, [0.5] * 48, ["full_attention"], ["sliding_attention"] * 26),
    *({"": ""}, {"rope_type": "dynamic", "factor": 2}, {"rope_type": "yarn", "factor": 1e-5}, {"full_attention": 3}),
    *({"full_attention": {"rope_type": "llama3"}}, [{"a": [{"b": None}]}]),
]


def objects(value):
    """The object and those inside it, but for those of parts that are not read."""
    yield value
    for key, inner in value.items():
        if isinstance(inner, dict) and key not in HARMLESS:
            yield from objects(inner)


def mutate(raw, rng):
    """Returns the bytes of a config.json that is not quite the given one, whether it cannot be a model's, and the name
    of an unknown key that it has."""
    raw = copy.deepcopy(raw)
    kind = rng.choice(["drop", "rename", "value", "value", "value", "number", "nest", "swap", "cut", "flip", "several"])
    if kind in ("cut", "flip"):
        text = bytearray(json.dumps(raw).encode())
        if kind == "cut":
            return bytes(text[: rng.integers(len(text))]), True, None
        for _ in range(rng.integers(1, 4)):
            text[rng.integers(len(text))] ^= 1 << rng.integers(8)
        return bytes(text), False, None
    renamed = None
    for _ in range(rng.integers(2, 6) if kind == "several" else 1):
        places = [place for place in objects(raw) if place]
        place = places[rng.integers(len(places))] if rng.random() < 0.5 else raw
        key = list(place)[rng.integers(len(place))]
        what = rng.choice(["drop", "value", "number", "nest", "swap"]) if kind == "several" else kind
        if what == "drop":
            del place[key]
        elif what == "rename":
            renamed = key + str(rng.choice(["_", "s", "2"]))
            place[renamed] = place.pop(key)
        elif what == "value":
            place[key] = copy.deepcopy(ODD_VALUES[rng.integers(len(ODD_VALUES))])
        elif what == "number":
            scale = rng.choice([-1.0, 0.3, 2.0, 1e3, 1e9, 1e20])
            numbers = [name for name, value in place.items() if type(value) in (int, float) and abs(value) < 1e99]
            for name in numbers[: rng.integers(1, 3)]:
                place[name] = type(place[name])(place[name] * scale)
        elif what == "nest":
            place[key] = {"value": place[key]} if rng.random() < 0.5 else [place[key]]
        else:
            other = list(place)[rng.integers(len(place))]
            place[key], place[other] = place[other], place[key]
        if not raw:
            break
    inside = renamed is not None and place is not raw and place is not raw.get("text_config")
    return json.dumps(raw).encode(), inside, renamed


def check_sane(config):
    """Asserts that a decoder of these sizes could be described, if not held."""
    assert isinstance(config, DecoderConfig) and isinstance(hash(config), int)
    sizes = [config.vocab_size, config.hidden_size, config.intermediate_size, config.num_attention_heads]
    sizes += [config.kv_heads, config.head_width, config.max_position_embeddings]
    if config.latent:
        sizes += [size for size in dataclasses.astuple(config.latent) if size is not None]
    if config.experts:
        sizes += [config.experts.num_experts, config.experts.per_token, config.experts.intermediate_size]
        assert config.experts.per_token <= config.experts.num_experts and 0 < config.experts.scale < math.inf
        assert type(config.experts.renormalize) is bool and type(config.experts.shared_size) is int
    assert all(type(size) is int and 0 < size < LIMIT for size in sizes)
    assert len(config.each_layer) == config.num_hidden_layers <= 1000
    assert config.num_attention_heads % config.kv_heads == 0
    for number in (config.norm_eps, config.embedding_scale, config.attention_scale, config.attention_softcap):
        assert number is None or (number > 0 and np.isfinite(np.float32(number)))
    for layer in set(config.each_layer):
        assert layer.window is None or 0 < layer.window < LIMIT
        if layer.rope:
            assert 0 < len(layer.rope.frequencies) <= config.head_width / 2
            assert np.isfinite(np.asarray(layer.rope.frequencies, np.float32)).all()
            assert np.isfinite(np.float32(layer.rope.scale)) and type(layer.rope.interleaved) is bool
            assert layer.rope.dynamic is None or all(0 < number < math.inf for number in layer.rope.dynamic)


@pytest.mark.parametrize("name", PUBLISHED)
def test_mutations_are_read_or_refused(name, tmp_path, caplog):
    """The same ones each time. Whatever the file, a config that makes sense or a ValueError that names the file. A key
    that was renamed is refused, or named in the warning."""
    rng = np.random.default_rng(sorted(PUBLISHED).index(name))
    file, original = tmp_path / "config.json", decoder_config(PUBLISHED[name])
    refused, accepted, other = 0, 0, 0
    for case in range(CASES_EACH):
        text, hopeless, renamed = mutate(PUBLISHED[name], rng)
        file.write_bytes(text)
        try:
            config, _ = read_config(file)
        except ValueError as error:
            assert type(error) is ValueError and str(file) in str(error), f"case {case}: {error!r}"
            refused += 1
        except Exception as error:
            pytest.fail(f"case {case}: {error!r} from {text[:3000]!r}")
        else:
            assert not hopeless, f"case {case}: {text[:3000]!r}"
            assert renamed is None or repr(renamed) in caplog.messages[-1], f"case {case}: {text[:3000]!r}"
            check_sane(config)
            accepted += 1
            other += config != original
    print(f"\n{name}: {CASES_EACH} tried, {refused} refused, {accepted} accepted, {other} of these another model")
    assert refused + accepted == CASES_EACH and refused > CASES_EACH // 4
    assert accepted > CASES_EACH // 20 and 0 < other < accepted
