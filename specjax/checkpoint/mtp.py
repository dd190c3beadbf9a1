"""Folders of multi-token prediction modules, in the published layouts."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from specjax.checkpoint.models import check_params
from specjax.checkpoint.new_folder import write_json
from specjax.checkpoint.shared import is_targets_embedding, is_targets_head
from specjax.checks import errors_name
from specjax.drafters.feature import FeatureDrafter
from specjax.drafters.mtp import MTPConfig, MTPDrafter, MTPHead, abstract_mtp_params
from specjax.hf.keys import read_json, without_keys
from specjax.hf.mtp import MTPLayout, mtp_layout, mtp_parameters, mtp_tensors
from specjax.hf.safetensors import open_tensors, write_tensors
from specjax.types import LanguageModel


def open_mtp(
    path: Path,
    target: LanguageModel,
    num_draft: int,
    dtype: jnp.dtype,
    chained: bool = False,
    zero_first: bool = False,
    normed_states: bool = True,
    ignore_config_keys: Iterable[str] = (),
) -> tuple[FeatureDrafter | MTPDrafter, Any]:
    """Opens MTP modules as a drafter (DeepSeek-V3, section 2.2).

    DeepSeek-V3's layout is read for any family, and the layouts of GLM-4.5, Qwen3-Next and MiMo. In a whole model's
    folder, only the modules' tensors are read. The modules' own embeddings and output heads are compared with the
    target's, and kept only if they differ.

    Args:
      path: a Hugging Face folder of a model with its modules, or of modules alone.
      target: the model to draft for.
      num_draft: g, tokens proposed per round. Any number if one module is chained, else at most one per module.
      dtype: dtype of parameters and computation.
      chained: only for several modules: the first module drafts all tokens and takes its own states. Otherwise each
        module drafts one token. A single module is always chained.
      zero_first: the embedding at position 0 is zero, as in vLLM. Other engines differ.
      normed_states: as for ``MTPConfig``.
      ignore_config_keys: as for ``specjax.load``.

    Returns:
      The drafter, with shapes and dtypes in place of parameters, and a tree of ``Parameter`` in the same structure.

    Raises:
      ValueError: a file is missing or damaged; the config is of an unknown layout, or has no modules; a tensor is
        missing, unknown, or of another shape; the modules do not fit the target in width, vocabulary or number of
        layers; or ``num_draft`` is too high.
    """
    # 1. The config says how many modules there are, so ``num_draft`` is checked before any tensor.
    raw = without_keys(read_json(path / "config.json"), ignore_config_keys)
    with errors_name(path / "config.json"):
        layout = mtp_layout(raw)
    modules = layout.decoder.num_hidden_layers
    chained = chained or modules == 1
    if not chained and num_draft > modules:
        raise ValueError(
            f"num_draft is {num_draft}, but {path} has {modules} MTP modules of one draft each; give at most "
            f"{modules}, or chained=True to draft all with the first"
        )
    # 2. The tensors say whether the modules embed and unembed by themselves.
    with errors_name(path):
        _check_fits(layout, target)
        tensors = layout.select(open_tensors(path))
        config = MTPConfig(
            layout.decoder,
            hidden_first=layout.hidden_first,
            zero_first=zero_first,
            normed_states=normed_states,
            own_embedding=layout.held("embed_tokens.weight", tensors),
            own_head=layout.held("lm_head.kernel", tensors),
        )
        params = mtp_parameters(layout, tensors, abstract_mtp_params(config))
    # 3. Modules that draft nothing are not read, nor are copies of the target's tables.
    used = 1 if chained else num_draft
    config, params = _without_the_targets(config, {k: params[k] for k in range(used)}, target)
    abstract = abstract_mtp_params(config, dtype)
    if chained:
        return FeatureDrafter(abstract, MTPHead(config), num_draft), params
    return MTPDrafter(abstract, config, num_draft), params


def fill_mtp(folder: Path, config: Mapping[str, Any], params: Any) -> None:
    """Writes MTP modules into a folder, in the layout of the family. Most families have DeepSeek-V3's layout.

    Args:
      folder: an empty folder.
      config: the target's Hugging Face config, or a config of modules with layers of other sizes. The number of modules
        is added to it.
      params: the modules' parameters, as ``specjax.drafters.mtp.init_mtp_params`` returns them.

    Raises:
      ValueError: the config is of a family without a layout, or the parameters are other than the config describes.
    """
    # Two keys may hold the number of modules. One is written, so that they cannot contradict each other.
    config = {key: value for key, value in config.items() if key != "num_mtp_layers"}
    config["num_nextn_predict_layers"] = len(params)
    layout = mtp_layout(config)
    described = MTPConfig(
        layout.decoder, layout.hidden_first, own_embedding="embed_tokens" in params[0], own_head="lm_head" in params[0]
    )
    check_params(params, abstract_mtp_params(described))
    write_json(folder / "config.json", config)
    write_tensors(folder, mtp_tensors(layout, params))


def _check_fits(layout: MTPLayout, target: LanguageModel) -> None:
    """Raises ValueError unless the modules have the target's sizes, and the target has what they share with it."""
    for name in ("embed", "unembed"):
        if getattr(target, name) is None:
            raise ValueError(
                f"MTP modules share the target's {name}, which it does not have; give it LanguageModel.{name}"
            )
    sizes = {
        "hidden_size": (layout.decoder.hidden_size, target.embedding_spec.shape[-1]),
        "vocab_size": (layout.decoder.vocab_size, target.vocab_size),
        "num_hidden_layers": (layout.num_hidden_layers, target.num_layers),
    }
    for name, (given, wanted) in sizes.items():
        if wanted is not None and given != wanted:
            raise ValueError(
                f"the modules were made for a target of {name} {given}, and this one has {wanted}; give them theirs"
            )


def _without_the_targets(config: MTPConfig, params: Any, target: LanguageModel) -> tuple[MTPConfig, Any]:
    """Returns config and parameters without embeddings and output heads that equal the target's.

    The config counts as many modules as ``params`` holds.
    """
    count = len(params)
    decoder = dataclasses.replace(config.decoder, num_hidden_layers=count, layers=config.decoder.each_layer[:count])
    config = dataclasses.replace(config, decoder=decoder)
    # Either all modules use the target's table or none does: the config has one field for all.
    if config.own_embedding and all(is_targets_embedding(params[k]["embed_tokens"]["weight"], target) for k in params):
        config = dataclasses.replace(config, own_embedding=False)
        params = {k: {name: part for name, part in params[k].items() if name != "embed_tokens"} for k in params}
    if config.own_head and all(is_targets_head(params[k]["lm_head"]["kernel"], target) for k in params):
        config = dataclasses.replace(config, own_head=False)
        params = {k: {name: part for name, part in params[k].items() if name != "lm_head"} for k in params}
    return config, params
