"""The keys of ``config.json`` that transformers knows, which say whether an unread key may change the model.

The tables repeat the fields of transformers' config classes, so that transformers need not be installed. A test
compares the tables with the classes of the installed transformers.
"""

from collections.abc import Mapping
from typing import Any

# Keys of any model that do not change logits: names, training, generation, how transformers runs the model. A test
# gives other values to those that a class has, and compares the logits.
NO_EFFECT = frozenset(
    (
        # The base class of transformers 5.
        *("_name_or_path", "name_or_path", "_commit_hash", "model_type", "architectures", "transformers_version"),
        *("dtype", "torch_dtype", "output_hidden_states", "output_attentions", "return_dict", "use_cache"),
        *("chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type", "tie_last_hidden_states"),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_output_attentions"),
        *("_experts_implementation", "experts_implementation", "_experts_implementation_internal"),
        # The base class of transformers 4 and before.
        *("torchscript", "use_bfloat16", "tf_legacy_loss", "tie_encoder_decoder", "task_specific_params", "prefix"),
        *("finetuning_task", "tokenizer_class", "sep_token_id", "decoder_start_token_id", "unk_token_id"),
        *("is_decoder", "gradient_checkpointing", "_attn_implementation_autoset", "_num_labels", "output_past"),
        # Tokens and training, in most families.
        *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "initializer_factor", "pretraining_tp"),
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        # GPT-2: output heads for classification; keys of its first configs; one that only reorders sums.
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("summary_first_dropout", "summary_last_dropout", "n_ctx", "n_special", "predict_special_tokens"),
        "reorder_and_upcast_attn",
        # Draft heads in the model's folder: hf/mtp.py and hf/medusa.py read these keys.
        *("num_mtp_layers", "num_nextn_predict_layers", "medusa_num_heads", "medusa_num_layers"),
        # Defaults of generation, which transformers 4 wrote into config.json.
        *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "num_return_sequences"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
        *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
        *("exponential_decay_length_penalty", "return_dict_in_generate", "output_scores", "cache_implementation"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind"),
    )
)

# Keys that transformers' code reads although no class declares them, each with the value that changes nothing. The
# reader of a family may understand other values.
UNDECLARED: Mapping[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "is_causal": True,
    "sliding_window": None,
    "attention_chunk_size": None,
    "layer_types": None,
    "kv_sharing_modes": None,
    "per_layer_config": None,
    "text_config": None,
    "text_encoder": None,
    "decoder": None,
    "generator": None,
    "fusion_config": None,
    "transformers_weights": None,
}

# The fields of each class that are not in NO_EFFECT, with their defaults.
_SIZES = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
_SILU = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_parameters": None}
_MISTRAL = {
    **{**_SIZES, "num_key_value_heads": 8},
    **_SILU,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2 = {
    **_SIZES,
    **_SILU,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA2 = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": None,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}
_DEEPSEEK_V3 = {
    **_SILU,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rope_interleave": True,
    "attention_bias": False,
}

CLASS_KEYS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        **_SIZES,
        **_SILU,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": None,
    },
    "mistral": _MISTRAL,
    "mixtral": {
        **_MISTRAL,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    "qwen2": _QWEN2,
    "qwen3": {**_QWEN2, "head_dim": 128, "attention_bias": False},
    "qwen3_moe": {
        **{key: _QWEN2[key] for key in _QWEN2 if key not in ("max_window_layers", "layer_types")},
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
    },
    "gemma2": _GEMMA2,
    "gemma3_text": {
        **_GEMMA2,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    "gemma3": {
        "text_config": None,
        "vision_config": None,
        "mm_tokens_per_image": 256,
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "tie_word_embeddings": True,
    },
    "phi3": {
        **_SIZES,
        **_SILU,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "deepseek_v3": _DEEPSEEK_V3,
    # Families whose multi-token prediction modules can be read, but not their models.
    "glm4_moe": {
        **{
            key: _DEEPSEEK_V3[key]
            for key in _DEEPSEEK_V3
            if key not in ("kv_lora_rank", "q_lora_rank", "rope_interleave") and "head_dim" not in key
        },
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "use_qk_norm": False,
    },
    "qwen3_next": {
        **_SILU,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
        "mlp_only_layers": None,
        "layer_types": None,
    },
}
