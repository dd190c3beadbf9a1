"""The keys of ``config.json`` that transformers knows, which say whether an unread key may change the model.

``class_keys.json`` repeats the fields of transformers' config classes, so that transformers need not be installed. A
test compares it with the classes of the installed transformers, and ``python tests/class_keys.py`` writes it.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
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
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise"),
        # GPT-2: output heads for classification; keys of its first configs; one that only reorders sums.
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("summary_first_dropout", "summary_last_dropout", "n_ctx", "n_special", "predict_special_tokens"),
        "reorder_and_upcast_attn",
        # Draft heads in the model's folder: hf/mtp.py and hf/medusa.py read these keys.
        *(
            "num_mtp_layers",
            "num_nextn_predict_layers",
            "mtp_num_hidden_layers",
            "medusa_num_heads",
            "medusa_num_layers",
        ),
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

CLASS_KEYS: Mapping[str, Mapping[str, Any]] = json.loads(
    files("specjax.hf").joinpath("class_keys.json").read_text("utf-8")
)
"""For each ``model_type``, the fields of its class that are not in ``NO_EFFECT``, with their defaults."""
