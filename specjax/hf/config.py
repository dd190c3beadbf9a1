"""``config.json`` of a Hugging Face folder -> ``DecoderConfig``, through the reader of its family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specjax.checks import check_integer
from specjax.hf.families import ARCHITECTURES, FAMILIES
from specjax.hf.keys import Keys, read_json
from specjax.transformer.config import DecoderConfig

# Keys that say nothing about the forward pass: names, training, and how Hugging Face's own code runs the model.
IGNORED = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "unk_token_id"),
    *(
        "initializer_range",
        "initializer_factor",
        "use_cache",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
    ),
    *(
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "chunk_size_feed_forward",
        "task_specific_params",
    ),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "tokenizer_class", "prefix"),
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout", "classifier_dropout"),
    *("summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "router_jitter_noise"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "cache_implementation", "ep_size"),
    *("num_mtp_layers", "num_nextn_predict_layers", "pretraining_tp", "transformers.js_config", "unsloth_fixed"),
    # Defaults of generation, which transformers 4 kept here.
    *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "typical_p", "length_penalty", "no_repeat_ngram_size", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "suppress_tokens"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "begin_suppress_tokens"),
    # What published checkpoints carry along.
    *("n_special", "predict_special_tokens", "_num_labels", "gradient_checkpointing", "unsloth_version"),
    *("max_sequence_length", "output_past", "medusa_num_heads", "medusa_num_layers"),
)


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the keys of a Hugging Face ``config.json``.

    Raises:
      ValueError: the ``model_type`` is not supported; a key is missing, or one that might change the forward pass is
        unknown or has a value that the decoder does not compute.
    """
    if raw.get("model_type") == "gemma3":
        text = text_config(raw)
        try:
            return decoder_config(text)
        except ValueError as error:
            raise ValueError(f"text_config: {error}") from None
    kind = raw.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = ", ".join(sorted([*FAMILIES, "gemma3"]))
        raise ValueError(f"model_type {kind!r} is not supported; supported: {supported}")
    keys = _all_keys(raw, ARCHITECTURES[kind])
    quantization_block(raw)
    config = FAMILIES[kind](keys)
    keys.finish()
    return config


def _all_keys(raw: Mapping[str, Any], architecture: str) -> Keys:
    """Returns the keys of a config without those that do not matter."""
    if raw.get("architectures") not in (None, [], [architecture]):
        raise ValueError(
            f"architectures is {raw['architectures']!r}; supported for model_type {raw.get('model_type')!r}: "
            f"[{architecture!r}]"
        )
    keys = Keys(raw, "config.json")
    keys.only("is_encoder_decoder", False)
    keys.only("add_cross_attention", False)
    keys.only("cross_attention_hidden_size", None)
    keys.only("pruned_heads", {}, None)
    keys.only("is_decoder", False, True)
    keys.ignore("quantization_config", *IGNORED)
    return keys


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of the text part of multimodal Gemma 3, as a model of its own; other configs as they are.

    Raises:
      ValueError: the wrapper has no text part, or one that it would compute otherwise.
    """
    if raw.get("model_type") != "gemma3":
        return dict(raw)
    keys = _all_keys(raw, "Gemma3ForConditionalGeneration")
    text = keys.take("text_config")
    keys.ignore(*("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"))
    tied = keys.flag("tie_word_embeddings", True)
    keys.finish()
    if not isinstance(text, Mapping) or text.get("model_type", "gemma3_text") != "gemma3_text":
        raise ValueError(f"text_config is {text!r}; it must be the config of a 'gemma3_text' model")
    if text.get("tie_word_embeddings", tied) != tied:
        raise ValueError(
            f"tie_word_embeddings is {tied}, but {text['tie_word_embeddings']!r} in text_config; give one of them"
        )
    if text.get("final_logit_softcapping") is not None:
        raise ValueError(
            f"final_logit_softcapping is {text['final_logit_softcapping']!r} in text_config, where transformers does "
            "not apply it; remove it"
        )
    kept = {key: raw[key] for key in ("eos_token_id", "quantization_config") if raw.get(key) is not None}
    own = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": tied}
    return {**text, **kept, **own}


def read_config(path: Path) -> DecoderConfig:
    """Reads a ``config.json``.

    Raises:
      ValueError: the file is absent, is not a JSON object, or describes a model that ``decoder_config`` refuses.
    """
    raw = read_json(path)
    if "model_type" not in raw:
        raise ValueError(f'{path} has no model_type; add that of the model, such as "llama"')
    try:
        return decoder_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except RecursionError:  # in the repr of a value for a message
        raise ValueError(f"{path}: a value is nested too deeply to be a model's; write the file again") from None


def quantization_block(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the rows and columns that share a scale in block-scaled FP8 weights, or None for plain weights.

    Raises:
      ValueError: the weights are quantised in another way.
    """
    quantization = raw.get("quantization_config")
    if quantization is None:
        return None
    keys = Keys(quantization if isinstance(quantization, Mapping) else {}, "quantization_config")
    method = keys.take("quant_method", quantization)
    block = keys.take("weight_block_size", None)
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise ValueError(
            f"quantization_config has quant_method {method!r} and weight_block_size {block!r}; supported: 'fp8' with "
            "two block sizes. Load the model with transformers, dequantise it and save it again"
        )
    for size in block:
        check_integer("weight_block_size", size, 1)
    keys.only("fmt", "e4m3")
    keys.ignore("activation_scheme", "scale_fmt", "modules_to_not_convert", "dequantize")
    keys.finish()
    return block[0], block[1]
