"""One door to all drafters, by a text that names kind and folder; and the writer of draft heads."""

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tokenizers import Tokenizer

from specjax.checkpoint.eagle import fill_eagle, open_eagle
from specjax.checkpoint.medusa import fill_medusa, open_medusa
from specjax.checkpoint.models import check_dtype, default_dtype, load, load_tokenizer, new_folder, write_json
from specjax.checkpoint.mtp import fill_mtp, open_mtp
from specjax.checkpoint.opened import Opened
from specjax.checkpoint.shared import read_onto
from specjax.checks import check_integer
from specjax.drafters.cascade import Cascade
from specjax.drafters.eagle import EagleHead
from specjax.drafters.early_exit import EarlyExitDrafter
from specjax.drafters.feature import FeatureDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.drafters.model import ModelDrafter
from specjax.drafters.mtp import MTPDrafter, MTPHead
from specjax.drafters.ngram import NGramDrafter
from specjax.drafters.shared_vocabulary import shared_vocabulary_drafter
from specjax.sharding import Rules, gathered, shard
from specjax.text.vocabulary import match_vocabularies
from specjax.types import Drafter, LanguageModel

WHOLE_ON_EACH: Rules = MappingProxyType({})
"""Rules that split nothing. Splitting a small draft costs more messages between devices than it saves memory."""

_FOLDERS = ("model", "eagle", "mtp", "medusa")
_ALLOWED = (
    "model:DIR, eagle:DIR, mtp:DIR, medusa:DIR, ngram, early-exit:LAYERS, or cascade:A,B of these, where B drafts the "
    "rows for which A has nothing"
)


def load_drafter(
    spec: str,
    target: LanguageModel | Opened,
    num_draft: int = 4,
    dtype: jnp.dtype | str | None = None,
    tokenizer: Tokenizer | None = None,
    mesh: Mesh | None = None,
    rules: Rules = WHOLE_ON_EACH,
    *,
    chained: bool = False,
    zero_first: bool = False,
    ignore_config_keys: Iterable[str] = (),
) -> Drafter:
    """Opens the drafter that a text names, for a target.

    ================== ==================================================================================
    spec               drafter
    ================== ==================================================================================
    model:DIR          a language model, in a folder that ``specjax.load`` opens
    eagle:DIR          an EAGLE-1, EAGLE-2 or EAGLE-3 head
    mtp:DIR            multi-token prediction modules, alone or in the folder of their model
    medusa:DIR         Medusa heads, alone or in the folder of their model
    ngram              copies what followed the row's last tokens earlier in the row
    early-exit:4       the target's own first 4 layers
    cascade:A,B        A, and B for the rows in which A has nothing; cascade:A,B,C is cascade:(A,B),C
    ================== ==================================================================================

    Args:
      spec: kind and folder, as in the table. In a cascade, folders have no comma in their names.
      target: the model to draft for, or what ``specjax.open`` returned for it.
      num_draft: g, tokens proposed per round.
      dtype: of parameters and computation; None means ``specjax.default_dtype()``.
      tokenizer: the target's; None takes that of an ``Opened`` target. With a tokenizer, a draft model of another
        vocabulary becomes a ``SharedVocabularyDrafter``. Without one, its tokenizer is taken to be the target's.
      mesh: where the parameters go, as for ``specjax.load``; the target's mesh, if the target is on one.
      rules: as for ``specjax.shard``. By default each device holds the whole draft, which is best for a small one;
        ``specjax.sharding.RULES`` splits it like the target.
      chained: of several MTP modules, feed the first one its own states, instead of one module per token.
      zero_first: MTP modules take the embedding at position 0 for zero, as vLLM does and others do not.
      ignore_config_keys: as for ``specjax.load``, of draft models.

    Raises:
      ValueError: the text names no drafter; ``num_draft`` is below 1, or more than the heads can draft; a file of the
        folder is missing, damaged or pickled; the drafter does not fit the target; or as for ``specjax.load``.
      TypeError: ``spec`` is no string; or as ``specjax.shard``.
    """
    check_integer("num_draft", num_draft, 1)
    kind, value = _parse(spec)
    if isinstance(target, Opened):
        target, tokenizer = target.model, tokenizer or target.tokenizer
    if kind == "cascade":
        options = {"chained": chained, "zero_first": zero_first, "ignore_config_keys": ignore_config_keys}
        again = functools.partial(load_drafter, **options)
        parts = [again(part, target, num_draft, dtype, tokenizer, mesh, rules) for part in value.split(",")]
        return functools.reduce(Cascade, parts)
    if kind == "ngram":
        return NGramDrafter(num_draft=num_draft)
    if kind == "early-exit":
        return EarlyExitDrafter(int(value), num_draft)
    path, dtype = Path(value).absolute(), check_dtype(default_dtype() if dtype is None else dtype)
    if kind == "model":
        model = load(path, dtype, mesh, rules, ignore_config_keys)
        return _model_drafter(path, model, target, num_draft, tokenizer, mesh, rules)
    if kind == "mtp":
        drafter, params = open_mtp(path, target, num_draft, dtype, chained, zero_first, ignore_config_keys)
    else:
        open_head = {"eagle": open_eagle, "medusa": open_medusa}[kind]
        drafter, params = open_head(path, target, num_draft, dtype, ignore_config_keys)
    return read_onto(mesh, rules, drafter, params)


def _parse(spec: str) -> tuple[str, str]:
    """Returns the kind that a spec names and what follows its colon."""
    if not isinstance(spec, str):
        raise TypeError(f"spec is {spec!r}; give a string: {_ALLOWED}")
    kind, _, value = spec.partition(":")
    parts = value.split(",") if kind == "cascade" else []
    if _names_one(spec) or (len(parts) > 1 and all(map(_names_one, parts))):
        return kind, value
    if os.path.isdir(spec):
        raise ValueError(
            f"spec is {spec!r}, a folder without its kind; give model:{spec} for a language model, or eagle:, mtp: or "
            "medusa: and the folder for draft heads"
        )
    raise ValueError(f"spec is {spec!r}; give {_ALLOWED}")


def _names_one(spec: str) -> bool:
    """Returns whether a text names a drafter that is no cascade."""
    kind, _, value = spec.partition(":")
    if kind == "early-exit":
        return value.isascii() and value.isdecimal()
    return spec == "ngram" or (kind in _FOLDERS and value != "")


def _model_drafter(
    path: Path,
    model: LanguageModel,
    target: LanguageModel,
    num_draft: int,
    tokenizer: Tokenizer | None,
    mesh: Mesh | None,
    rules: Rules,
) -> Drafter:
    """Returns a drafter of a model: of the target's vocabulary, or of another if the target's tokenizer is known."""
    alike = model.vocab_size == target.vocab_size
    if tokenizer is None and not alike:
        raise ValueError(
            f"{path} has a vocabulary of {model.vocab_size} tokens and the target one of {target.vocab_size}; give the "
            "target's tokenizer to draft the tokens that both have, or a drafter that shares it"
        )
    if tokenizer is None:
        return ModelDrafter(model, num_draft)
    own = load_tokenizer(path)
    if alike and own.get_vocab() == tokenizer.get_vocab():
        return ModelDrafter(model, num_draft)
    try:
        shared = match_vocabularies(tokenizer, own, target.vocab_size, model.vocab_size)
    except ValueError as error:
        raise ValueError(f"{path} cannot draft for this target: {error}") from None
    drafter = shared_vocabulary_drafter(model, shared, num_draft)
    return drafter if mesh is None else shard(drafter, mesh, rules)  # its tables: the model is there already


def folders_of(spec: str) -> list[Path]:
    """Returns the folders that a spec names."""
    parts = (part.partition(":") for part in spec.removeprefix("cascade:").split(","))
    return [Path(value) for kind, _, value in parts if kind in _FOLDERS and value]


def short_name(spec: str) -> str:
    """Returns what figures call the drafter of a spec."""
    kind, _, value = spec.partition(":")
    if kind == "cascade":
        return ", else ".join(map(short_name, value.split(",")))
    return f"first {value} layers" if kind == "early-exit" else Path(value).name or kind


def save_drafter(
    path: str | os.PathLike,
    drafter: FeatureDrafter | MTPDrafter | MedusaDrafter,
    target: LanguageModel | Opened,
    config: Mapping[str, Any] | None = None,
    *,
    target_name: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a draft head in its published layout, for ``load_drafter`` and for other engines.

    EAGLE heads are written in speculators' layout, MTP modules in that of the target's family, Medusa heads in that
    of FasterDecoding/Medusa. A draft model is no head: ``specjax.save`` writes it. Several processes all call this,
    with a folder that all see.

    Args:
      path: the folder to make, or to replace.
      drafter: the head as a drafter: a ``FeatureDrafter``, an ``MTPDrafter`` or a ``MedusaDrafter``.
      target: the model that the head drafts for, or what ``specjax.open`` returned for it.
      config: what describes the head. EAGLE: the keys of any layout that ``load_drafter`` reads. MTP: the target's
        Hugging Face config, or one with layers of other sizes. Medusa: None, since the parameters say all.
      target_name: the target's name or path, for other engines.
      metrics: what ``metrics.json`` is to hold; None writes none.

    Raises:
      TypeError: the drafter is no draft head.
      ValueError: the config is missing, is given for Medusa heads, describes other parameters than the drafter's, or
        does not fit the target.
      OSError: the folder cannot be written; what was there stays.
    """
    head = drafter.head if isinstance(drafter, FeatureDrafter) else drafter
    if not isinstance(head, (EagleHead, MTPHead, MTPDrafter, MedusaDrafter)):
        raise TypeError(
            f"drafter is a {type(drafter).__name__}; give an EAGLE head, MTP modules or Medusa heads (specjax.save "
            "writes a draft model)"
        )
    if (config is None) != isinstance(head, MedusaDrafter):
        wanted = "give None, for Medusa heads" if config is not None else "give the keys of the head's config.json"
        raise ValueError(f"config is {config!r}; {wanted}")
    model = target.model if isinstance(target, Opened) else target
    params = gathered(drafter.params)  # heads are small
    if jax.process_index() != 0:
        return
    with new_folder(path) as folder:
        if isinstance(head, EagleHead):
            fill_eagle(folder, config or {}, params, model, target_name, drafter.num_draft)
        elif isinstance(head, MedusaDrafter):
            fill_medusa(folder, params, target_name)
        else:
            fill_mtp(folder, config or {}, params)
        if metrics is not None:
            write_json(folder / "metrics.json", metrics)
