"""Multi-token prediction modules in Hugging Face folders: their tensors, and what their layers compute.

DeepSeek-V3 numbers the modules as layers after the target's layers: module k, counted from 0, has the tensors
``model.layers.{num_hidden_layers + k}.*``. Example: 61 layers are numbered 0 to 60, and module 0 is layer 61. Most
families do the same. MiMo and Qwen3-Next have their own names, and speculators has others for any family.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from specjax.checks import check_integer
from specjax.hf.config import read_keys
from specjax.hf.draft_head import SPECULATORS_KEYS
from specjax.hf.families import FAMILIES
from specjax.hf.keys import Keys, warn_unknown
from specjax.hf.names import LINEAR, SAME, Layout, Table, sources_of
from specjax.hf.safetensors import Tensor, TensorSpec
from specjax.hf.weights import check_tensors, parameters_of, plain_tensors, tensors_of
from specjax.transformer.config import MAX_LAYERS, DecoderConfig

_LAYER = "model.layers.{i}."  # starts the name of a layer's tensor in the families' tables


@dataclasses.dataclass(frozen=True)
class _Naming:
    """How a family names the parts of a module.

    Attributes:
      layer: start of the names of the decoder layer's tensors; ``{i}`` is the module's number.
      parts: start of the names of the other tensors.
      norms: names of the norm of the embedding and the norm of the state.
      projection: name of the projection that joins the two.
      last_norm: name of the norm after the layer.
      after_layers: whether modules are numbered from the target's number of layers on, not from 0.
      hidden_first: whether the projection takes the state before the embedding.
      most: the most modules that the names allow, or None.
      fused_experts: whether one tensor holds the gate and up projections of all experts, as transformers 5 has them.
    """

    layer: str
    parts: str
    norms: tuple[str, str]
    projection: str
    last_norm: str
    after_layers: bool = False
    hidden_first: bool = False
    most: int | None = None
    fused_experts: bool = False

    def table(self, layers: Table) -> dict[str, tuple[str, Any]]:
        """Returns a table as in ``specjax.hf.names``. Its parameter paths start with the module's number.

        ``layers`` is the family's table, which names the parts of a layer.
        """
        parts = {
            "enorm.weight": (self.norms[0], SAME),
            "hnorm.weight": (self.norms[1], SAME),
            "eh_proj.kernel": (self.projection, LINEAR),
            "norm.weight": (self.last_norm, SAME),
            "embed_tokens.weight": ("embed_tokens", SAME),
            "lm_head.kernel": ("shared_head.head", LINEAR),
        }
        rows = {f"{{i}}.{ours}": (f"{self.parts}{name}.weight", layout) for ours, (name, layout) in parts.items()}
        for ours, (theirs, layout) in layers.items():
            if ours.startswith("layers.{i}."):
                name = theirs.removeprefix(_LAYER)
                if self.fused_experts and "experts.{e}." in name:
                    name, layout = _FUSED[ours.rpartition(".")[2]]
                rows["{i}.layer." + ours.removeprefix("layers.{i}.")] = (self.layer + name, layout)
        return rows


# [experts, out, in], with the rows of the gate projection before those of the up projection.
_FUSED = {
    "gate_proj": ("mlp.experts.gate_up_proj", Layout(axis=1, transpose=True)),
    "up_proj": ("mlp.experts.gate_up_proj", Layout(axis=1, transpose=True)),
    "down_proj": ("mlp.experts.down_proj", LINEAR),
}
_DEEPSEEK = _Naming(_LAYER, _LAYER, ("enorm", "hnorm"), "eh_proj", "shared_head.norm", after_layers=True)
_QWEN3_NEXT = _Naming(
    layer="mtp.layers.{i}.",
    parts="mtp.",
    norms=("pre_fc_norm_embedding", "pre_fc_norm_hidden"),
    projection="fc",
    last_norm="norm",
    most=1,
)
_MIMO = _Naming(
    layer="model.mtp_layers.{i}.",
    parts="model.mtp_layers.{i}.",
    norms=("token_layernorm", "hidden_layernorm"),
    projection="input_proj",
    last_norm="final_layernorm",
    hidden_first=True,
)
_SPECULATORS = dataclasses.replace(
    _MIMO, layer="mtp_layers.{i}.", parts="mtp_layers.{i}.", hidden_first=False, most=1, fused_experts=True
)
_NAMINGS = {"mimo": _MIMO, **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _QWEN3_NEXT)}


@dataclasses.dataclass(frozen=True)
class MTPLayout:
    """The modules that a ``config.json`` describes.

    Attributes:
      decoder: config of the modules' layers, with one layer for each module.
      num_hidden_layers: the number of the target's layers.
      hidden_first: whether the projections take the state before the embedding.
      first: number of the first module in the tensors' names.
      table: which tensor makes which parameter.
      raw: the content of ``config.json``, which says how quantised tensors are stored.
      ours: matches the names of the modules' tensors. Group 1 is the number in the name, if there is one.
    """

    decoder: DecoderConfig
    num_hidden_layers: int
    hidden_first: bool
    first: int
    table: Table
    raw: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)
    ours: re.Pattern

    def select(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the modules' tensors of a folder, which may hold the target's tensors too."""
        matches = {name: self.ours.match(name) for name in tensors}
        return {
            name: tensors[name]
            for name, match in matches.items()
            if match and (not match.groups() or int(match[1]) >= self.first)
        }

    def held(self, part: str, tensors: Mapping[str, Tensor]) -> bool:
        """Returns whether any module has its own ``part``: "embed_tokens.weight" or "lm_head.kernel"."""
        name = self.table["{i}." + part][0]
        return any(name.format(i=self.first + k) in tensors for k in range(self.decoder.num_hidden_layers))


def mtp_layout(raw: Mapping[str, Any]) -> MTPLayout:
    """Reads the ``config.json`` of a target with MTP modules, or of modules alone.

    The modules' layers are like the target's last layer. They have experts if the target has any.

    Raises:
      ValueError: there are no modules, or more than the family's layout has names for; the family has no layout; or a
        key is missing, is unknown, or has a value that the decoder does not compute.
    """
    # 1. The family: how its layers compute, and how its modules are named.
    outer, naming = raw, None
    if "speculators_model_type" in raw:
        raw, naming = _target_in_speculators(raw), _SPECULATORS
    config, text = _read_config(raw)
    kind = "mimo" if raw.get("model_type") == "mimo" else text["model_type"]
    naming = _NAMINGS.get(kind, _DEEPSEEK) if naming is None else naming
    layers = FAMILIES[text["model_type"]].names
    if not any(theirs.startswith(_LAYER) for theirs, _ in layers.values()):
        raise ValueError(f"model_type {kind!r} has no MTP layout; its layers are not named {_LAYER}*")
    # 2. How many modules there are. Qwen3-Next's configs do not say; published folders have one.
    count = _num_modules({**text, **outer}, 1 if kind == "qwen3_next" or naming is _SPECULATORS else 0)
    if naming.most is not None and count > naming.most:
        raise ValueError(f"there are {count} MTP modules; with model_type {kind!r} at most {naming.most} can be read")
    # 3. Each module has a layer like the last one with attention, so that the decoder's own code computes it.
    attending = [layer for layer in config.each_layer if not layer.recurrent]
    if not attending:
        raise ValueError("the config has no layer with attention, which MTP modules have; give its layer_types")
    last = dataclasses.replace(attending[-1], experts=config.experts is not None)
    prefix = re.escape(naming.parts).replace(re.escape("{i}"), r"(\d+)")
    return MTPLayout(
        decoder=dataclasses.replace(config, num_hidden_layers=count, layers=(last,) * count, recurrence=None),
        num_hidden_layers=config.num_hidden_layers,
        hidden_first=naming.hidden_first,
        first=config.num_hidden_layers if naming.after_layers else 0,
        table=naming.table(layers),
        raw=raw,
        ours=re.compile(prefix),
    )


def _target_in_speculators(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the target's config, which a config of speculators 0.9 has inside."""
    keys = Keys(raw, "config.json")
    kind, target = keys.take("speculators_model_type"), keys.take("transformer_layer_config")
    if kind != "mtp" or not isinstance(target, Mapping):
        raise ValueError(
            f"speculators_model_type is {kind!r} and transformer_layer_config {target!r}; MTP modules have 'mtp' and "
            "their target's config"
        )
    keys.ignore("num_nextn_predict_layers", *SPECULATORS_KEYS)
    warn_unknown("config.json", keys.switched_off())
    return target


_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def _num_modules(raw: Mapping[str, Any], default: int) -> int:
    """Returns the number of modules, at least 1, which any of these keys may hold."""
    given = {key: raw[key] for key in _COUNTS if raw.get(key) is not None}
    if len(set(map(repr, given.values()))) > 1:
        raise ValueError(f"config.json has {given}; give one of them")
    for key, value in given.items():
        check_integer(key, value, 0, MAX_LAYERS)
    count = next(iter(given.values()), default)
    if count < 1:
        raise ValueError("the model has no MTP modules: num_nextn_predict_layers is 0 or missing in config.json")
    return count


def mtp_parameters(layout: MTPLayout, tensors: Mapping[str, Tensor], abstract: Any) -> Any:
    """Returns the modules' parameters, each read by ``Parameter.read``.

    Args:
      layout: what ``mtp_layout`` returned.
      tensors: what ``layout.select`` returned.
      abstract: nested dicts of leaves with the parameters' shapes.

    Returns:
      Nested dicts of ``Parameter``, in the structure of ``abstract``.

    Raises:
      ValueError: a tensor is missing, is unknown, or has another shape or dtype than the config says.
    """
    wanted = sources_of(layout.table, abstract, layout.first)
    plain, form = plain_tensors(layout.raw, tensors, wanted)
    check_tensors(plain, wanted, _why_left_out, form)
    return parameters_of(plain, wanted)


def _why_left_out(name: str) -> str | None:
    """Returns why a tensor is not needed, or None if there is no known reason."""
    return "a buffer, computed anew" if name.endswith(".rotary_emb.inv_freq") else None


def mtp_tensors(layout: MTPLayout, params: Any) -> list[TensorSpec]:
    """Returns the tensors of the modules' parameters, nested dicts of arrays. Each array is made when it is written."""
    return tensors_of(sources_of(layout.table, params, layout.first), params)


def _read_config(raw: Mapping[str, Any]) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns the target's decoder, and the keys that describe it as a model of its family."""
    config, text, unknown = read_keys(raw)
    # transformers ignores the modules in an ordinary model, so its classes do not list the modules' keys.
    both = {**text, **raw}
    Keys({key: both[key] for key in both if _is_modules(key)}, "config.json").switched_off()
    warn_unknown("config.json", unknown)
    return config, text


def _is_modules(key: str) -> bool:
    """Returns whether a key describes the modules and not the target."""
    known = ("mtp_layer_types", "mtp_num_hidden_layers")
    return key == "chain_hidden_post_norm" or (key.startswith("mtp_") and key not in known)
