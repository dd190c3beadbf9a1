"""Folders of EAGLE heads. All published layouts are read; speculators' layout is written."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from specjax.checkpoint.models import check_params
from specjax.checkpoint.new_folder import write_json
from specjax.checkpoint.shared import check_draft_ids, drop_targets_tables, is_targets_head, speculators_about
from specjax.checks import errors_name
from specjax.drafters.eagle import EagleHead, check_fit
from specjax.drafters.feature import FeatureDrafter
from specjax.hf.config import decoder_config
from specjax.hf.draft_head import draft_vocabulary, head_parameters
from specjax.hf.eagle import eagle_fields, eagle_tensors, speculators_config, tensors_of_eagle
from specjax.hf.keys import read_json, without_keys
from specjax.hf.names import LINEAR, Piece, Source
from specjax.hf.safetensors import Tensor, open_tensors, write_tensors
from specjax.hf.weights import check_tensors, parameters_of
from specjax.quantized import is_quantized
from specjax.transformer.config import DecoderConfig
from specjax.types import LanguageModel

_HEAD = "lm_head.weight"
_LOG = logging.getLogger(__name__)


def open_eagle(
    path: Path,
    target: LanguageModel,
    num_draft: int,
    dtype: jnp.dtype,
    ignore_config_keys: Iterable[str] = (),
    *,
    rope_of: Mapping[str, Any] | None = None,
    norm_output_of_logits: bool = False,
    window_stays: bool = False,
) -> tuple[FeatureDrafter, Any]:
    """Opens an EAGLE-1, EAGLE-2 or EAGLE-3 head as a drafter of chains.

    ``drafter.head.describe()`` says which of the target's states the draft head reads; the log of this module says the
    same. An embedding or output head that equals the target's is dropped, and the target's is used. A folder without an
    output head uses the target's, too; of a reduced draft vocabulary, the logits of its tokens.

    Args:
      path: a folder with ``config.json`` and safetensors, of SafeAILab's EAGLE, SpecForge or speculators.
      target: the model to draft for.
      num_draft: g, tokens proposed per round.
      dtype: dtype of parameters and computation.
      ignore_config_keys: as for ``specjax.load``.
      rope_of: the target's config, whose rotary positions the draft head then has. None: the draft head's config says.
      norm_output_of_logits: the key ``norm_output`` says whether logits come from normed states, as in SpecForge before
        EAGLE-3.1. Otherwise it says whether the next draft reads them, as everywhere else.
      window_stays: as for ``EagleHead``.

    Returns:
      The drafter, with shapes and dtypes in place of parameters, and a tree of ``Parameter`` in the same structure.

    Raises:
      ValueError: a file is missing, damaged or pickled; the config is not of an EAGLE head, or has an unknown key or
        value; a tensor is missing, unknown, or of another shape; the draft vocabulary does not map into the target's;
        or the draft head does not fit the target in width, vocabulary or number of layers.
    """
    raw = without_keys(read_json(path / "config.json"), ignore_config_keys)
    with errors_name(path / "config.json"):
        _, fields = describe_eagle(raw, target)
        fields["window_stays"] = window_stays
        if norm_output_of_logits:
            places = (raw, raw.get("eagle_config"))
            said = any(isinstance(at, Mapping) and at.get("norm_output") is not None for at in places)
            fields |= {"norm_output": False, "norm_logits": fields.get("norm_output", True) or not said}
        if rope_of is not None:
            fields["decoder"] = _with_rope_of(rope_of, fields["decoder"])
    found = open_tensors(path)
    # Which tensors there are decides what the head is: whether it embeds and unembeds by itself, and has its own draft
    # ids.
    with errors_name(path):
        whole = fields.get("draft_vocab_size") == fields["decoder"].vocab_size
        tensors, draft_of_v = eagle_tensors(found, tied=whole and raw.get("tie_word_embeddings") is True), None
        if fields["version"] == 3:
            draft_of_v = draft_vocabulary(tensors, fields["draft_vocab_size"], fields["decoder"].vocab_size)
        targets = tensors.pop(_HEAD, None) if fields["version"] == 1 else None
        own = {"own_embedding": "embed_tokens.weight" in tensors, "own_head": _HEAD in tensors}
        head = fitting_head(fields, target, **own, mapped=draft_of_v is not None)
        params = head_parameters(tensors, draft_of_v, head.abstract_params())
        if targets is not None:
            _check_targets_head(targets, target)
        head = dataclasses.replace(head, **drop_targets_tables(params, own, target))
    _LOG.info("%s: %s", path, head.describe())
    return FeatureDrafter(head.abstract_params(dtype), head, num_draft), params


def _with_rope_of(raw: Mapping[str, Any], decoder: DecoderConfig) -> DecoderConfig:
    """Returns a draft head's decoder with the rotary positions of a target's config."""
    layers = decoder_config(raw).each_layer
    full = {layer.rope for layer in layers if layer.window is None and layer.rope is not None}
    ropes = full or {layer.rope for layer in layers}
    (rope, *others) = ropes
    if rope is None or others or 2 * len(rope.frequencies) > decoder.head_width:
        raise ValueError(
            f"rope=target asks for the target's rotary positions, which do not fit: {len(ropes)} kinds in layers of "
            f"full attention, for attention heads {decoder.head_width} wide; leave the option out"
        )
    # The draft head's layers are Llama's, whichever pairs the target's layers rotate.
    rope = dataclasses.replace(rope, interleaved=False)
    return dataclasses.replace(
        decoder, layers=tuple(dataclasses.replace(layer, rope=rope) for layer in decoder.each_layer)
    )


def _check_targets_head(tensor: Tensor, target: LanguageModel) -> None:
    """Raises ValueError unless a stored output head equals the target's, which an EAGLE-1 head uses."""
    shape = (target.embedding_spec.shape[-1], target.vocab_size)
    wanted = {_HEAD: Source(_HEAD, (Piece(("kernel",), None, shape, LINEAR, 0),))}
    check_tensors({_HEAD: tensor}, wanted, lambda name: None)
    kernel_dv = parameters_of({_HEAD: tensor}, wanted)["kernel"]
    # Rounding would be a difference, so the head of a quantised target is not compared.
    if not is_quantized(target.params) and not is_targets_head(kernel_dv, target):
        raise ValueError(
            f"tensor {_HEAD!r} differs from the target's output head, which an EAGLE-1 head uses; give the target that "
            "the draft head was trained for"
        )


def fill_eagle(
    folder: Path,
    config: Mapping[str, Any],
    params: Any,
    target: LanguageModel,
    target_name: str | None,
    num_draft: int,
    own_head: bool,
) -> None:
    """Writes an EAGLE head in speculators' layout into a folder.

    Args:
      folder: an empty folder.
      config: describes the draft head, with the keys of any layout that ``open_eagle`` reads.
      params: the parameters, in the structure that ``EagleHead.init_params`` returns.
      target: the model that the head drafts for.
      target_name: the target's name or path, for other engines. None keeps the target that ``config`` names.
      num_draft: tokens per round, a hint for other engines. Used only if ``config`` has no ``speculators_config``, or
        with ``target_name``.
      own_head: whether the draft head has its own output head.

    Raises:
      ValueError: as for ``open_eagle``; or the parameters are other than the config describes.
    """
    # 1. Check that the config describes these parameters: other engines trust it.
    config, fields = describe_eagle(config, target)
    own = {"own_embedding": "embed_tokens" in params, "own_head": own_head}
    head = fitting_head(fields, target, **own, mapped="draft_of_v" in params)
    check_params(params, head.abstract_params())
    check_draft_ids(params, head.draft_vocab_size)
    # 2. What speculators asks for beyond the draft head itself: the target, and how to draft.
    kind = config["speculators_model_type"]
    about = {
        "architectures": ["EagleSpeculator" if kind == "eagle" else "Eagle3Speculator"],
        "torch_dtype": str(params["fc"]["kernel"].dtype),
        "tie_word_embeddings": False,
    }
    if target_name is not None or "speculators_config" not in config:
        about["speculators_config"] = speculators_about(kind, num_draft, target_name)
    write_json(folder / "config.json", config | about)
    write_tensors(folder, tensors_of_eagle(kind, params))


def eagle_head(config: Mapping[str, Any], target: LanguageModel) -> EagleHead:
    """Returns the draft head that a config of any layout describes.

    The head uses the target's embedding, unless the target's states have another width than the head's. Only EAGLE-3
    heads have their own output heads.

    Args:
      config: describes the draft head.
      target: the model that the head drafts for.

    Raises:
      ValueError: the config is not of an EAGLE head, has an unknown key or value, or does not fit the target.
    """
    _, fields = describe_eagle(config, target)
    other_width = fields.get("target_hidden_size") not in (None, fields["decoder"].hidden_size)
    return fitting_head(fields, target, own_embedding=other_width, own_head=fields["version"] == 3, mapped=False)


def describe_eagle(raw: Mapping[str, Any], target: LanguageModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a config in speculators' layout, and the arguments of ``EagleHead`` that it describes."""
    if target.num_layers is None:
        raise ValueError("the target does not say how many layers it has; set LanguageModel.num_layers")
    try:
        config = speculators_config(raw, target.num_layers)
        return config, eagle_fields(config)
    except RecursionError:  # in the repr of a value for a message
        raise ValueError("a value is nested too deeply to be a draft head's; write the file again") from None


def fitting_head(
    fields: Mapping[str, Any], target: LanguageModel, own_embedding: bool, own_head: bool, mapped: bool
) -> EagleHead:
    """Returns the head of the arguments that ``describe_eagle`` returned, after checking that it fits the target.

    ``mapped``: draft ids differ from the target's ids.
    """
    # Draft ids that are the target's need no table.
    if not mapped and fields.get("draft_vocab_size") == fields["decoder"].vocab_size:
        fields = {**fields, "draft_vocab_size": None}
    head = EagleHead(**fields, own_embedding=own_embedding, own_head=own_head)
    check_fit(head, target)
    return head
