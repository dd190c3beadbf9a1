"""Multimodal models, of which specjax opens the text part: a table of ``model_type``, and its text part's config.

Such a model's ``config.json`` holds the text part's config under ``text_config``. On text alone, the model computes
what its text part computes. So the folder opens, converts and exports as a model of the text part's family.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from specjax.hf.keys import ROPES, Keys, switch
from specjax.hf.rope import without_axes


@dataclasses.dataclass(frozen=True)
class Text:
    """A ``model_type`` that the ``text_config`` of a multimodal model may have.

    Attributes:
      family: the ``model_type`` in ``FAMILIES`` that computes the same on text alone.
      defaults: keys whose defaults in the text part's class are not the family's.
      dropped: keys of the family that the multimodal class does not apply. They must be null or false.
    """

    family: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Multimodal:
    """A ``model_type`` whose config holds that of a text model.

    Attributes:
      architecture: the class of transformers that computes the multimodal model.
      texts: the text parts by their ``model_type``. The first is meant if ``text_config`` names none.
      flat: without a ``text_config``, the keys of the text part are at the top level.
      code: as for ``Family.code``.
    """

    architecture: str
    texts: Mapping[str, Text]
    flat: bool = False
    code: str | None = None


_QWEN2_VL = Text("qwen2", {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_window_layers": 80})
_QWEN3_VL = Text(
    "qwen3",
    {"rope_theta": 500_000.0, "max_position_embeddings": 128_000},
    dropped=("use_sliding_window", "layer_types"),
)

MULTIMODAL: Mapping[str, Multimodal] = {
    "gemma3": Multimodal(
        "Gemma3ForConditionalGeneration",
        {"gemma3_text": Text("gemma3_text", dropped=("final_logit_softcapping",))},
    ),
    "gemma4": Multimodal("Gemma4ForConditionalGeneration", {"gemma4_text": Text("gemma4_text")}),
    "gemma4_unified": Multimodal(
        "Gemma4UnifiedForConditionalGeneration", {"gemma4_unified_text": Text("gemma4_unified_text")}
    ),
    "llama4": Multimodal("Llama4ForConditionalGeneration", {"llama4_text": Text("llama4_text")}),
    "mistral3": Multimodal(
        "Mistral3ForConditionalGeneration", {kind: Text(kind) for kind in ("mistral", "ministral3")}
    ),
    "qwen2_vl": Multimodal("Qwen2VLForConditionalGeneration", {"qwen2_vl_text": _QWEN2_VL}, flat=True),
    "qwen2_5_vl": Multimodal("Qwen2_5_VLForConditionalGeneration", {"qwen2_5_vl_text": _QWEN2_VL}, flat=True),
    "qwen3_vl": Multimodal(
        "Qwen3VLForConditionalGeneration",
        {"qwen3_vl_text": _QWEN3_VL},
    ),
    "qwen3_5": Multimodal("Qwen3_5ForConditionalGeneration", {"qwen3_5_text": Text("qwen3_5_text")}),
    "qwen3_5_moe": Multimodal("Qwen3_5MoeForConditionalGeneration", {"qwen3_5_moe_text": Text("qwen3_5_moe_text")}),
}

# Keys next to the text part that do not change it: of images, video and sound, and of the tokens that stand for them.
_OF_OTHER_PARTS = (
    *("vision_config", "audio_config", "mm_tokens_per_image", "spatial_merge_size", "downsample_factor"),
    *("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "multimodal_projector_bias"),
    *("image_token_id", "video_token_id", "audio_token_id", "image_token_index"),
    *("vision_start_token_id", "vision_end_token_id", "vision_token_id"),
    *("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id"),
    *("boi_token_index", "eoi_token_index", "eoa_token_index"),
    *("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id"),
)
# Starts of the names of tensors that text does not need. The names may start with "model.", too.
_PARTS = {
    "vision": (
        *("vision_tower.", "vision_model.", "visual.", "embed_vision.", "vision_embedder."),
        *("multi_modal_projector.", "mm_projector."),
    ),
    "audio": ("audio_tower.", "embed_audio."),
}


def other_part(name: str) -> str | None:
    """Returns why a tensor of a multimodal model is left out, or None if it may belong to the text part.

    ``name`` is the tensor's name in the text part's table, or in the folder.
    """
    name = name.removeprefix("model.")
    for part, starts in _PARTS.items():
        if name.startswith(starts):
            return f"the {part} part, which text does not need"
    return None


def take_text(keys: Keys, raw: Mapping[str, Any], kind: Multimodal) -> dict[str, Any]:
    """Takes the text part of a multimodal model and the keys of its other parts.

    Args:
      keys: the keys of ``raw``. Those that are left are unknown.
      raw: the content of ``config.json``.
      kind: the entry of ``MULTIMODAL``.

    Returns:
      The text part's config, as the config of a model of its own.

    Raises:
      ValueError: there is no text part, it is of an unsupported family, or the multimodal model would compute it in
        another way than its config says.
    """
    # 1. The text part: an object of its own, or in older files of some models the keys at the top level.
    keys.ignore(*_OF_OTHER_PARTS)
    tied = [raw.get("tie_word_embeddings")]
    keys.ignore("tie_word_embeddings")
    default = next(iter(kind.texts))
    if kind.flat and raw.get("text_config") is None:
        text = {key: raw[key] for key in raw if key in keys} | {"model_type": default}
        keys.ignore(*text)
    else:
        text = keys.take("text_config", None)
    own = text.get("model_type", default) if isinstance(text, Mapping) else None
    if not isinstance(own, str) or own not in kind.texts:
        choices = " or ".join(map(repr, kind.texts))
        raise ValueError(f"text_config is {text!r}; it must be the config of a model of model_type {choices}")
    part = kind.texts[own]
    # 2. The multimodal class must compute all that the text part's config says.
    for key in part.dropped:
        if text.get(key) not in (None, False):
            raise ValueError(
                f"{key} is {text[key]!r} in text_config, where transformers does not apply it; remove it{switch(key)}"
            )
    # 3. Either level may say that the output head is the embedding. Which it is, the tensors decide (``hf.weights``).
    tied = [value for value in (*tied, text.get("tie_word_embeddings")) if value is not None]
    for value in tied:
        if not isinstance(value, bool):
            raise ValueError(f"tie_word_embeddings must be true or false, got {value!r}")
    ties = {"tie_word_embeddings": any(tied)} if tied else {}
    # 4. What the text part needs of the other keys to stand alone. ``architectures`` may name either class.
    outer = {key: raw[key] for key in ("eos_token_id", "quantization_config") if raw.get(key) is not None}
    inner = {key: value for key, value in text.items() if key != "architectures"}
    if None not in (outer.get("eos_token_id"), inner.get("eos_token_id")):
        ids = [each if isinstance(each, list) else [each] for each in (outer["eos_token_id"], inner["eos_token_id"])]
        outer["eos_token_id"] = ids[0] + [token for token in ids[1] if token not in ids[0]]
    if own != part.family:
        inner |= {key: without_axes(inner[key]) for key in ROPES if key in inner}
    return {**part.defaults, **inner, **outer, **ties, "model_type": part.family}
