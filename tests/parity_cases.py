"""The checkpoints of the parity tests: for each case, transformers' class and the settings of its config.

``SMALL`` are the sizes of all cases. They are odd, so that no two sizes are equal by chance.
"""

VOCAB = 53
LIMIT = 128  # tokens of the longest text

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
GROUPS = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
LATENT = {
    **GROUPS,
    "kv_lora_rank": 12,
    "q_lora_rank": 14,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 9,
    "num_key_value_heads": 4,
}
LATENT_YARN = rope("yarn", theta=10000.0, factor=8.0, mscale=1.0, mscale_all_dim=0.7, beta_fast=32, beta_slow=1)
LATENT_YARN["rope_parameters"]["original_max_position_embeddings"] = 16
GPT_OSS_ROPE = rope("yarn", theta=10000.0, factor=8.0, original_max_position_embeddings=16, truncate=False)
GPT2 = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": LIMIT}
CHUNKS = {
    "attention_chunk_size": 8,
    "no_rope_layer_interval": 2,
    "interleave_moe_layer_step": 2,
    "floor_scale": 5,
    "attn_scale": 0.7,
    "intermediate_size_mlp": 36,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
}
GEMMA4_UNIFIED = {
    **WINDOW,
    **TIED,
    "head_dim": 10,
    "global_head_dim": 14,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 50.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
}
GEMMA4 = {**GEMMA4_UNIFIED, "hidden_size_per_layer_input": 0}
# Each source of shared keys and values is read by a layer that is not next to it.
SHARED_KEYS = {
    "num_hidden_layers": 5,
    "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "sliding", "full")],
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 5.0,
}
SHARING = {**SHARED_KEYS, "hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": VOCAB + 2}
KEYS_AS_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
MIXED = {
    **KEYS_AS_VALUES,
    "enable_moe_block": True,
    "num_experts": 5,
    "top_k_experts": 2,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "full")],
    "attention_bias": True,
}
PHIMOE_ROPE = rope(
    "longrope",
    short_factor=[1.0, 1.2, 1.5],
    long_factor=[2.0, 3.0, 4.0],
    short_mscale=1.3,
    long_mscale=1.6,
    original_max_position_embeddings=LIMIT,
)
LONGROPE = rope("longrope", short_factor=[1.0, 1.2, 1.5], long_factor=[2.0, 3.0, 4.0])
SMOLLM3 = {**TIED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OLMO3_ROPE = {
    "rope_parameters": {
        "full_attention": YARN["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    }
}
MINISTRAL3 = rope(
    "yarn",
    theta=10000.0,
    factor=8.0,
    original_max_position_embeddings=6,  # so that queries grow several times in a text
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.4,
)
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.21,
    "residual_multiplier": 0.37,
    "logits_scaling": 0.7,
}
COHERE = {"logit_scale": 1.7, "bos_token_id": 1, "eos_token_id": 2}
GLM = {"head_dim": 12, "pad_token_id": 0, "eos_token_id": 1, "partial_rotary_factor": 0.5}

DENSE = {
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
    "gemma 4, shared keys, embeddings per layer": ("Gemma4Text", {**GEMMA4, **SHARING}),
    "gemma 4 unified, shared keys, keys as values": (
        "Gemma4UnifiedText",
        {**GEMMA4_UNIFIED, **SHARED_KEYS, **KEYS_AS_VALUES},
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
    "smollm3, windows without positions": (
        "SmolLM3",
        {**SMOLLM3, **WINDOW, "use_sliding_window": True, "no_rope_layer_interval": 2, "attention_bias": True},
    ),
    "smollm3, listed layers": ("SmolLM3", {**SMOLLM3, **WIDE, "no_rope_layers": [0, 1, 1], "mlp_bias": True}),
    "ministral": ("Ministral", {**WIDE, **WINDOW, "layer_types": ["full_attention", "sliding_attention"]}),
    "ministral 3": ("Ministral3", {**WIDE, **MINISTRAL3}),
    "olmo 2": ("Olmo2", {**rope("default"), "attention_bias": True, "pad_token_id": 1, "eos_token_id": 2}),
    "olmo 3": ("Olmo3", {**WINDOW, **OLMO3_ROPE, "num_hidden_layers": 4, "pad_token_id": 1, "eos_token_id": 2}),
    "granite": ("Granite", {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    "cohere": ("Cohere", {**COHERE, **TIED}),
    "cohere, norms of each head's own": ("Cohere", {**COHERE, **TIED, "attention_bias": True, "use_qk_norm": True}),
    "cohere 2": ("Cohere2", {**COHERE, **WINDOW, "num_hidden_layers": 4}),
    "glm": ("Glm", {**GLM, "attention_bias": False}),
    "glm 4": ("Glm4", GLM),
    "gemma": ("Gemma", {**WIDE, **TIED, **ONE_HEAD}),
    "smollm": ("Llama", {**TIED, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "gpt-2": ("GPT2", GPT2),
    "gpt-2, untied, inner width": ("GPT2", {**GPT2, "n_inner": 31, "tie_word_embeddings": False}),
}
EXPERTS = {
    "gemma 4, keys as values, experts": ("Gemma4Text", {**GEMMA4, **MIXED}),
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
    "gpt-oss": (
        "GptOss",
        {**WIDE, **WINDOW, **GPT_OSS_ROPE, "num_local_experts": 6, "num_experts_per_tok": 3, "swiglu_limit": 1.5},
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            **QWEN_MOE,
            **WINDOW,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "shared_expert_intermediate_size": 28,
        },
    ),
    "deepseek-v2, groups": ("DeepseekV2", {**LATENT, **LATENT_YARN, "topk_method": "group_limited_greedy"}),
    "deepseek-v2, lite": ("DeepseekV2", {**LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    "phi-3.5-moe": (
        "Phimoe",
        {
            **PHIMOE_ROPE,
            "num_local_experts": 5,
            "router_jitter_noise": 0.3,
            "attention_bias": True,
            "lm_head_bias": True,
            "max_position_embeddings": 4 * LIMIT,
        },
    ),
    "llama 4": ("Llama4Text", {**WIDE, **CHUNKS, **LLAMA3}),
    "granite with experts": ("GraniteMoe", {**GRANITE, **MOE, "attention_bias": True}),
    "granite with experts, shared mlp": ("GraniteMoeShared", {**GRANITE, **MOE, "shared_intermediate_size": 28}),
    "glm-4.5": ("Glm4Moe", {**GROUPS, "head_dim": 12, "attention_bias": True, "use_qk_norm": True}),
}
DELTA = {
    "head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 7,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 3,
    "rms_norm_eps": 1e-2,  # a head's output may be near 0; less would make much of its rounding
}
SHARED_EXPERT = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
SHARED_EXPERT["shared_expert_intermediate_size"] = 11
MAMBA = {
    **GRANITE,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 28,
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 7,
    "mamba_d_conv": 3,
    "mamba_chunk_size": 8,
}
HYBRID = {
    "qwen3-next": ("Qwen3Next", {**DELTA, **SHARED_EXPERT, "mlp_only_layers": [1], "attention_bias": True}),
    "qwen3.5": ("Qwen3_5Text", {**DELTA, **rope("default", mrope_section=[1, 0, 0])}),
    "qwen3.5 with experts": ("Qwen3_5MoeText", {**DELTA, **SHARED_EXPERT}),
    "granite 4": ("GraniteMoeHybrid", {**MAMBA, **TIED, "num_local_experts": 0, "mamba_proj_bias": True}),
    "granite 4 with experts, rope": (
        "GraniteMoeHybrid",
        {
            **MAMBA,
            **MOE,
            "position_embedding_type": "rope",
            "mamba_n_groups": 1,
            "mamba_conv_bias": False,
            "attention_bias": True,
        },
    ),
}
CASES = DENSE | EXPERTS | HYBRID
