"""The sizes of a decoder, read from and written to Hugging Face ``config.json`` keys."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Keys of a config.json that say nothing about the forward pass.
_IGNORED = frozenset(
    {
        "_name_or_path",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "model_type",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

# Keys that change the forward pass, with the only value this decoder computes.
_ONLY = {
    "architectures": ["LlamaForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {},
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a Llama-family decoder, under the names of Hugging Face's ``config.json``.

    Hashable, so that it can be a static argument of ``jit``.

    Attributes:
      vocab_size: v.
      hidden_size: d, the model width.
      intermediate_size: f, the MLP width.
      num_hidden_layers: decoder layers.
      num_attention_heads: n, query heads.
      num_key_value_heads: k, key and value heads; divides n. None means n.
      head_dim: h. None means ``hidden_size // num_attention_heads``.
      max_position_embeddings: longest sequence.
      rms_norm_eps: added to the mean square.
      rope_theta: base of the rotary frequencies.
      attention_bias: biases on the query, key, value and output projections.
      mlp_bias: biases on the MLP's projections.
      tie_word_embeddings: the head is the embedding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            for name in ("hidden_size", "num_attention_heads"):
                check_integer(name, getattr(self, name), _LEAST[name])
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name, least in _LEAST.items():
            check_integer(name, getattr(self, name), least)
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.kv_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"head_dim {self.head_width} is odd; rotary embeddings need an even one")

    @property
    def kv_heads(self) -> int:
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_width(self) -> int:
        assert self.head_dim is not None
        return self.head_dim

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the keys of a Hugging Face ``config.json``.

        Raises:
          ValueError: a key is missing, or one that changes the forward pass is unknown or has a value that this
            decoder does not compute.
        """
        raw = dict(raw)
        model_type = raw.get("model_type", "llama")
        if model_type != "llama":
            raise ValueError(f"model_type {model_type!r} is not supported; supported: 'llama'")
        rope = raw.pop("rope_parameters", None)  # the spelling of transformers 5
        if rope is not None:
            if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
                raise ValueError(f"rope_parameters {rope!r} is not supported; supported: rope_type 'default'")
            raw |= {key: value for key, value in rope.items() if key != "rope_type"}
        for key, value in _ONLY.items():
            given = raw.pop(key, value)
            if given != value:
                raise ValueError(f"config key {key!r} is {given!r}; this decoder computes only {value!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = {key: raw[key] for key in sorted(raw.keys() - names - _IGNORED)}
        if unknown:
            raise ValueError(
                f"config keys {unknown} are unknown and might change the model; remove them if they do not"
            )
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        missing = sorted(required - raw.keys())
        if missing:
            raise ValueError(f"config keys {missing} are missing")
        return cls(**{name: raw[name] for name in names & raw.keys()})

    def to_hf(self) -> dict[str, Any]:
        """Returns the config under Hugging Face's keys, loadable as ``LlamaConfig``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **dataclasses.asdict(self),
        }


def check_integer(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless the value is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "max_position_embeddings": 1,
}


def read_config(path: Path) -> DecoderConfig:
    """Reads a ``config.json``.

    Raises:
      ValueError: the file is absent, is not a JSON object, or describes another kind of model.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a checkpoint folder must hold one") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}; it must hold a JSON object")
    try:
        return DecoderConfig.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
