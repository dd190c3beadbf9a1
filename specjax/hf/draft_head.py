"""What the layouts of several kinds of draft heads share: layers, names of tensors, and the draft vocabulary.

Tensors have the names of the parameters, except the two of the draft vocabulary:

- ``d2t`` ``[u]`` holds *offsets*: draft id i stands for the target's token ``i + d2t[i]``. Example: d2t = [0, 0, 5]
  says that draft ids 0, 1, 2 are the target's tokens 0, 1, 7.
- ``t2d`` ``[v]`` marks the target's tokens that can be drafted.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.hf.config import read_keys
from specjax.hf.names import LINEAR, SAME, ParameterPath, Piece, Source, parameters
from specjax.hf.safetensors import Tensor, TensorSpec
from specjax.hf.weights import check_tensors, parameters_of, whole_parameter
from specjax.transformer.config import DecoderConfig

_LAYERS = ("llama", "qwen3")
SPECULATORS_KEYS = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "has_no_defaults_at_init"),
    *("speculators_version", "speculators_config", "embed_requires_grad", "enable_sp_ulysses"),
    "quantization_config",  # a left-over: only plain floats are read
    # Attributes of the config's class, which some versions of speculators write, too.
    *("base_model_ep_plan", "base_model_pp_plan", "base_model_tp_plan", "keys_to_ignore_at_inference", "sub_configs"),
    *("attribute_map", "base_config_key", "is_composition", "_auto_class"),
    "tie_word_embeddings",  # the tensors say which output head there is
)
"""Keys of speculators' configs that do not describe the draft head: names, training, how an engine runs it."""


def head_layers(raw: Any) -> tuple[DecoderConfig, tuple[str, ...]]:
    """Returns the layers that a config describes, and the names of its unknown keys."""
    kind = raw.get("model_type", "llama") if isinstance(raw, Mapping) else None
    if not isinstance(kind, str) or kind not in _LAYERS:
        raise ValueError(f"the layers are of model_type {kind!r}; supported: {', '.join(_LAYERS)}")
    others = ("architectures", "auto_map", "tie_word_embeddings")  # describe the whole draft head
    layer = {key: value for key, value in raw.items() if key not in others}
    # SpecForge's layers have no windows, but its configs still have the keys of the target's windows.
    layer.pop("max_window_layers", None)
    if layer.get("use_sliding_window") is False:
        layer.pop("sliding_window", None)
    # With text alone, all axes of a multimodal rotation have the same position, so that it is the ordinary one.
    if isinstance(scaling := layer.get("rope_scaling"), Mapping) and "mrope_section" in scaling:
        plain = {key: value for key, value in scaling.items() if key not in ("mrope_section", "mrope_interleaved")}
        ordinary = all(plain.get(key) in (None, "mrope", "default") for key in ("rope_type", "type"))
        layer["rope_scaling"] = None if ordinary else plain
    # Strict, since some layouts have the draft head's own keys among the layer's.
    config, _, unknown = read_keys(layer, strict=True)
    return config, unknown


def head_parameters(tensors: Mapping[str, Tensor], draft_of_v: np.ndarray | None, abstract: Any) -> Any:
    """Returns the parameters of a draft head, each read by ``Parameter.read``.

    Args:
      tensors: the folder's, by the names of the parameters.
      draft_of_v: what ``draft_vocabulary`` returned.
      abstract: nested dicts of leaves with the parameters' shapes.

    Returns:
      Nested dicts of ``Parameter``, in the structure of ``abstract``.

    Raises:
      ValueError: a tensor is missing, is unknown, has another shape than in ``abstract``, or does not hold floats.
    """
    wanted = head_sources(abstract)
    floats = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    check_tensors(floats, wanted, _why_left_out)
    opened = parameters_of(floats, wanted)
    if draft_of_v is not None:
        opened["draft_of_v"] = whole_parameter(draft_of_v)
    return opened


def _why_left_out(name: str) -> str | None:
    """Returns why a tensor is not needed, or None if there is no known reason."""
    if name.endswith(".rotary_emb.inv_freq"):
        return "a buffer, computed anew"
    return "the target's, for training" if name in ("verifier_norm.weight", "verifier_lm_head.weight") else None


def draft_vocabulary(tensors: Mapping[str, Tensor], draft_vocab_size: int, vocab_size: int) -> np.ndarray | None:
    """Returns int32 ``[v]``: the draft id of each of the target's tokens, -1 for none.

    Args:
      tensors: the folder's, by the names of the parameters.
      draft_vocab_size: u, the number of tokens that can be drafted.
      vocab_size: v, the number of the target's tokens.

    Returns:
      The draft ids, or None if each draft id is the target's id.

    Raises:
      ValueError: ``d2t`` is missing; it does not map draft ids to distinct tokens of the target; or ``t2d`` marks other
        tokens.
    """
    # 1. Which token of the target each draft id stands for.
    same_size = draft_vocab_size == vocab_size
    if "d2t" not in tensors and not same_size:
        raise ValueError(
            f"tensor 'd2t' is missing, which says which {draft_vocab_size} of the {vocab_size} tokens can be drafted; "
            "download the draft head again"
        )
    target_of_u = np.arange(draft_vocab_size)
    if "d2t" in tensors:
        target_of_u += _buffer(tensors["d2t"], (draft_vocab_size,), "iu").astype(np.int64)
    inside = (target_of_u >= 0) & (target_of_u < vocab_size)
    if not inside.all() or len(np.unique(target_of_u)) < draft_vocab_size:
        token = int(np.argmin(inside)) if not inside.all() else None
        what = "two draft ids to one token" if token is None else f"draft id {token} to token {target_of_u[token]}"
        raise ValueError(
            f"tensor 'd2t' leads {what} of the target's {vocab_size}; it must hold offsets, the target's id less the "
            "draft's"
        )
    # 2. The inverse, which drafting needs. ``t2d`` holds the same once more: a difference shows that ``d2t`` does
    # not hold offsets.
    draft_of_v = np.full((vocab_size,), -1, np.int32)
    draft_of_v[target_of_u] = np.arange(draft_vocab_size)
    if "t2d" in tensors:
        drafted_v = _buffer(tensors["t2d"], (vocab_size,), "biu").astype(bool)
        if (other := np.flatnonzero(drafted_v != (draft_of_v >= 0))).size:
            raise ValueError(
                f"tensors 'd2t' and 't2d' differ on {other.size} tokens, such as {other[0]}; 'd2t' must hold offsets, "
                "the target's id less the draft's, and 't2d' mark the same tokens"
            )
    return None if same_size and (target_of_u == np.arange(vocab_size)).all() else draft_of_v


def _buffer(tensor: Tensor, shape: tuple[int, ...], kinds: str) -> np.ndarray:
    """Returns the array of a tensor; raises ValueError unless it has that shape and a dtype of NumPy's ``kinds``."""
    if tensor.shape != shape or tensor.dtype.kind not in kinds:
        wanted = "integers" if kinds == "iu" else "booleans"
        raise ValueError(f"tensor {tensor.name!r} is {tensor.dtype} {tensor.shape}; it must be {wanted} {shape}")
    return tensor.read()


def vocabulary_tensors(draft_of_v: np.ndarray) -> list[TensorSpec]:
    """Returns the tensors of the draft vocabulary; ``draft_of_v`` is what ``draft_vocabulary`` returns."""
    # Sorted by draft id, the tokens that cannot be drafted come first: their id is -1.
    target_of_u = np.argsort(draft_of_v, kind="stable")[np.sum(draft_of_v < 0) :]
    return [_spec("d2t", target_of_u - np.arange(len(target_of_u))), _spec("t2d", draft_of_v >= 0)]


def _spec(name: str, array: np.ndarray) -> TensorSpec:
    return TensorSpec(name, array.dtype, array.shape, lambda: array)


def head_sources(params: Any) -> dict[str, Source]:
    """Returns the tensors of a draft head's weights by their names, which are the names of the parameters."""
    found = {}
    for path, leaf in parameters(params).items():
        if path != ("draft_of_v",):
            name = _name(path)
            layout = LINEAR if path[-1] == "kernel" else SAME
            found[name] = Source(name, (Piece(path, None, tuple(leaf.shape), layout, 0),))
    return found


def _name(path: ParameterPath) -> str:
    """Returns the name of a parameter's tensor: its path, but with ``weight`` for ``kernel``."""
    *module, last = map(str, path)
    return ".".join((*module, "weight" if last == "kernel" else last))
