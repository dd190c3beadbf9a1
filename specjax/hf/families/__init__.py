"""The families of models: one module for each kin of ``model_type``, with readers of configs and tables of names."""

import re
from collections.abc import Iterable, Mapping

from specjax.hf.families import (
    cohere,
    deepseek,
    gemma,
    gemma4,
    glm,
    gpt2,
    gpt_oss,
    granite,
    llama,
    llama4,
    mixtral,
    olmo,
    phi,
    qwen,
    qwen_next,
)
from specjax.hf.families.shared import Family as Family
from specjax.hf.families.shared import Renamed
from specjax.hf.names import Source, sources_of
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import abstract_params

FAMILIES: Mapping[str, Family] = {
    kind: family
    for module in (
        cohere,
        deepseek,
        gemma,
        gemma4,
        glm,
        gpt2,
        gpt_oss,
        granite,
        llama,
        llama4,
        mixtral,
        olmo,
        phi,
        qwen,
        qwen_next,
    )
    for kind, family in module.FAMILIES.items()
}

# Model types of folders that bring code, and that compute what another one computes.
RENAMED: Mapping[str, Renamed] = {
    "kimi_k2": Renamed("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3"),
    "mimo": Renamed("qwen2", "MiMoForCausalLM", "MiMo", {"attention_bias": True}),
}

# Other model classes put the decoder into a module of their own, which changes the start of tensor names.
_WRAPPERS = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
# Names of the modules that torch wraps around a model or one of its modules. Some training codes save them.
_INNER = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_TORCH_WRAPPERS = re.compile(rf"^(?:module\.|{_INNER})+|\b{_INNER}")


def table_names(model_type: str, names: Iterable[str]) -> dict[str, str]:
    """Returns the name that each tensor has in the family's table, whatever model class it was saved from."""
    found = {}
    for name in names:
        bare = _TORCH_WRAPPERS.sub("", name)
        wrapper = next((wrapper for wrapper in _WRAPPERS if bare.startswith(wrapper)), "")
        found[name] = _WRAPPERS.get(wrapper, "") + bare.removeprefix(wrapper)
        for module, published in FAMILIES[model_type].modules.items():
            found[name] = found[name].replace(module, published)
    prefix = FAMILIES[model_type].names["embed_tokens.weight"][0].split(".")[0] + "."
    # A model that was saved without its output head has no prefix "model." or "transformer.".
    if not any(name.startswith(prefix) for name in found.values()):
        found = {name: known if known.startswith("lm_head.") else prefix + known for name, known in found.items()}
    return found


def sources(model_type: str, config: DecoderConfig) -> dict[str, Source]:
    """Returns the tensors of a model, by their names in the family's table."""
    key_heads = config.recurrence.state_shape[0] if config.recurrence else 1
    return sources_of(FAMILIES[model_type].names, abstract_params(config), key_heads=key_heads)
