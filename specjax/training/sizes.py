"""Recipes that follow from a target: what kind of draft, of which sizes, trained how."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.checkpoint.opened import Opened
from specjax.hf.config import decoder_config
from specjax.training.recipe import BLOCK_HEADS, Recipe, Stage

KINDS = ("eagle", "dflash", "dspark", "mtp", "medusa", "model")
"""The kinds of drafts."""
BLOCK_DRAFTS, MARKOV_RANK = 7, 64
CHAIN_STEPS = 4  # drafts of a chain, as many as a round drafts by default
MEDUSA_HEADS = 4
COVERAGE, VOCAB_STEP, LARGEST_VOCAB = 0.995, 256, 32_768
LAST_STAGE = 400  # steps from which on the last quarter has another loss
LEARNING_RATE = 0.77  # over the width that is trained: 2e-3 for the recipes of 384
LARGEST_RATE = 4e-3


def draft_vocab_size(tokens: np.ndarray, vocab_size: int) -> int:
    """Returns how many of the most frequent tokens an EAGLE head drafts.

    This is the least multiple of 256 whose tokens are 99.5% of the text, at most 32768, and at most the vocabulary. The
    output head is the most of a draft's pass, and a rare token costs one rejected draft.

    Args:
      tokens: integers ``[n]``, the text.
      vocab_size: tokens of the target.
    """
    counts = np.sort(np.bincount(tokens, minlength=vocab_size))[::-1]
    covering = int(np.searchsorted(np.cumsum(counts), COVERAGE * counts.sum())) + 1
    return min(-(-covering // VOCAB_STEP) * VOCAB_STEP, LARGEST_VOCAB, vocab_size)


def layers_to_read(num_layers: int) -> list[int]:
    """Returns the hidden states that an EAGLE-3 head reads: a low, a middle and a high one.

    Number i is the output of layer i counted from 1, and 0 the embedding. Of many layers these are 2, the middle, and
    the third from the end, as in SafeAILab's heads: 2, 16 and 29 of 32. A target of one layer has two states.
    """
    low = min(2, (num_layers - 1) // 2)
    middle = max(num_layers // 2, low + 1)
    return sorted({low, middle, min(max(num_layers - 3, middle + 1), num_layers)})


def architecture(kind: str, opened: Opened, vocab: int) -> dict[str, Any]:
    """Returns the ``config.json`` of a draft for a target.

    - "eagle": an EAGLE-3 head of the target's width, so that it shares the target's embedding: one Llama layer with the
      target's attention heads and MLP width, over ``layers_to_read``. Its output head has ``vocab`` tokens.
    - "dflash" and "dspark": as wide as the target, whose embedding and output head they share; 7 drafts in a block, an
      eighth of the target's layers, with its attention heads and MLP width, over ``layers_to_read`` below the last
      layer. The mask is the last token of the vocabulary.
    - "mtp": one module, a layer like the target's last one. It shares the target's embedding and output head.
    - "medusa": four heads of one block, which start as the target's output head.
    - "model": a Llama model of about two fifths of the target's width and an eighth of its layers, which is about a
      twelfth of its parameters without the embedding. The shipped pair has these proportions.

    Args:
      kind: one of ``KINDS``.
      opened: the target.
      vocab: tokens that an EAGLE head drafts.

    Raises:
      ValueError: the target lacks what this kind of draft reads.
    """
    model, config = opened.model, dict(opened.config)
    if kind != "model":
        model.require("embed", "unembed", "num_layers")
    if kind == "medusa":
        return {"medusa_num_heads": MEDUSA_HEADS, "medusa_num_layers": 1}
    if kind == "mtp":
        counts = ("num_mtp_layers", "mtp_num_hidden_layers", "num_nextn_predict_layers")
        return {name: value for name, value in config.items() if name not in counts} | {"num_nextn_predict_layers": 1}
    decoder = decoder_config(config)
    width, heads = decoder.hidden_size, decoder.num_attention_heads
    head_dim, kv_heads = decoder.head_dim or width // heads, decoder.num_key_value_heads or heads
    layer = {
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_positions or 4096,
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": _rope_theta(config),
    }
    if kind in ("eagle", *BLOCK_HEADS):
        # Compressed or linear attention, and experts, have other sizes than a plain layer.
        plain = decoder.latent is None and decoder.recurrence is None and heads % kv_heads == 0 and head_dim % 2 == 0
        heads, kv_heads, head_dim = (heads, kv_heads, head_dim) if plain else _plain_heads(width)
        sizes = {
            "hidden_size": width,
            "intermediate_size": decoder.intermediate_size if decoder.experts is None else 3 * width,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
        }
        if kind in BLOCK_HEADS:
            return _block_architecture(kind, model.num_layers or 1, layer | sizes)
        return {
            "speculators_model_type": "eagle3",
            "eagle_aux_hidden_state_layer_ids": layers_to_read(model.num_layers or 1),
            "draft_vocab_size": vocab,
            "norm_before_residual": True,
            "transformer_layer_config": layer | sizes,
        }
    head_dim = min(64, 2 * (width // 2))
    heads = max(1, round(0.4 * width / head_dim))
    return layer | {
        "hidden_size": heads * head_dim,
        "intermediate_size": 8 * heads * head_dim // 3 // 8 * 8 or 8,
        "num_hidden_layers": -(-(model.num_layers or 1) // 8),
        "num_attention_heads": heads,
        "num_key_value_heads": 1 if heads % 2 else heads // 2,
        "head_dim": head_dim,
        "tie_word_embeddings": True,
        "eos_token_id": list(opened.stop_tokens),
    }


def _block_architecture(kind: str, num_layers: int, layer: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of a DFlash or DSpark head in speculators' layout; ``layer`` describes its layers."""
    block = {
        "speculators_model_type": kind,
        "aux_hidden_state_layer_ids": [i for i in layers_to_read(num_layers) if i < num_layers],
        "draft_vocab_size": layer["vocab_size"],
        "mask_token_id": layer["vocab_size"] - 1,
        "block_size": BLOCK_DRAFTS + (kind == "dflash"),
        "transformer_layer_config": layer | {"model_type": "qwen3", "num_hidden_layers": -(-num_layers // 8)},
    }
    if kind == "dspark":
        block |= {"sample_from_anchor": True, "markov_rank": MARKOV_RANK, "markov_head_type": "vanilla"}
        block |= {"enable_confidence_head": True, "confidence_head_with_markov": True}
    return block


def _plain_heads(width: int) -> tuple[int, int, int]:
    """Returns attention heads, heads of keys and values, and their width, for a layer that has not the target's."""
    head_dim = min(128, 2 * (width // 2))
    heads = max(1, width // head_dim)
    return heads, heads, head_dim


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Returns the base of the target's rotary positions, or the usual one."""
    for place in (config, config.get("rope_parameters"), config.get("text_config")):
        value = place.get("rope_theta") if isinstance(place, Mapping) else None
        if isinstance(value, int | float) and value > 0:
            return float(value)
    return 10_000.0


def draft_recipe(
    kind: str,
    opened: Opened,
    tokens: np.ndarray,
    *,
    name: str,
    target_name: str,
    steps: int,
    rows: int,
    sequence: int,
    seed: int,
) -> Recipe:
    """Returns the recipe of a draft for a target.

    The learning rate falls with the width that is trained, and is half as high for Medusa heads, which start from
    trained ones. From 400 steps on, the last quarter minimises the total variation distance, one minus the acceptance
    rate, at a quarter of that rate; the others minimise the KL divergence. DSpark heads have DSpark's loss throughout.

    Args:
      kind: one of ``KINDS``.
      opened: the target.
      tokens: integers ``[n]``, the text, whose most frequent tokens an EAGLE head drafts.
      name: the draft's.
      target_name: the target's, for other engines.
      steps: of all stages.
      rows: windows in a batch.
      sequence: tokens in a window.
      seed: of parameters and batches.

    Raises:
      ValueError: as for ``architecture``, ``Stage`` and ``Recipe``.
    """
    sizes = architecture(kind, opened, draft_vocab_size(tokens, opened.model.vocab_size))
    width = sizes["hidden_size"] if kind == "model" else opened.model.embedding_spec.shape[-1]
    rate = min(LEARNING_RATE / width, LARGEST_RATE) / (2 if kind == "medusa" else 1)
    last = steps // 4 if steps >= LAST_STAGE and kind != "dspark" else 0
    shape: dict[str, Any] = {"rows": rows, "sequence": sequence, "text": "samples"}
    first = steps - last
    loss = "dspark" if kind == "dspark" else "kl"
    stages = [Stage(loss, first, peak_learning_rate=rate, warmup_steps=min(50, first // 10), **shape)]
    if last:
        stages.append(Stage("total_variation", last, peak_learning_rate=rate / 4, warmup_steps=last // 10, **shape))
    return Recipe(
        name=name,
        seed=seed,
        architecture=sizes,
        stages=tuple(stages),
        drafts_for=target_name,
        sample_tokens=len(tokens),
        digest="",
        head=None if kind == "model" else kind,
        chain_steps=CHAIN_STEPS if kind in ("eagle", "mtp") else 1,
    )
