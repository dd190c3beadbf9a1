"""Opening any drafter by a text that names its kind and folder, and writing draft heads."""

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

from specjax.checkpoint.assistant import open_assistant
from specjax.checkpoint.block import fill_block, open_block
from specjax.checkpoint.eagle import fill_eagle, open_eagle
from specjax.checkpoint.fetched import model_path
from specjax.checkpoint.folder_kinds import opened_as
from specjax.checkpoint.medusa import fill_medusa, medusa_choices, open_medusa
from specjax.checkpoint.models import (
    check_dtype,
    check_not_quantized,
    default_dtype,
    load,
)
from specjax.checkpoint.mtp import fill_mtp, open_mtp
from specjax.checkpoint.new_folder import new_folder, write_json
from specjax.checkpoint.opened import Opened
from specjax.checkpoint.pard import is_pard, open_pard
from specjax.checkpoint.peagle import fill_peagle, open_peagle
from specjax.checkpoint.shared import read_onto
from specjax.checkpoint.spec import Spec, parse
from specjax.checkpoint.text_parts import open_text_parts
from specjax.checks import check_integer, errors_name
from specjax.drafters.block import BlockDrafter
from specjax.drafters.cascade import Cascade
from specjax.drafters.dflash import DFlashHead
from specjax.drafters.eagle import EagleHead
from specjax.drafters.early_exit import EarlyExitDrafter
from specjax.drafters.feature import FeatureDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.drafters.model import ModelDrafter
from specjax.drafters.mtp import MTPDrafter, MTPHead
from specjax.drafters.ngram import NGramDrafter
from specjax.drafters.peagle import PEagleHead
from specjax.drafters.shared_vocabulary import shared_vocabulary_drafter
from specjax.drafters.suffix import SuffixDrafter
from specjax.drafters.trees import MEDUSA_CHOICES
from specjax.drafters.with_tree import check_tree_of, with_tree
from specjax.hf.keys import key_names, read_json
from specjax.hf.peagle import is_peagle
from specjax.quantized import Kind, check_kind
from specjax.sharding import Rules, gathered, shard
from specjax.text.files import check_characters, read_text
from specjax.text.vocabulary import match_vocabularies
from specjax.types import Drafter, LanguageModel

WHOLE_ON_EACH: Rules = MappingProxyType({})
"""Rules that split nothing over devices. Splitting a small draft model costs more in messages between devices than it
saves in memory."""


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
    quantize: Kind | None = None,
    tree: int | None = None,
    siblings: str | None = None,
) -> Drafter:
    """Opens the drafter that a text names, for one target. docs/drafters.md compares the kinds.

    ================== ==================================================================================
    spec               drafter
    ================== ==================================================================================
    model:DIR          a language model, in a folder that ``specjax.load`` opens
    eagle:DIR          an EAGLE-1, EAGLE-2 or EAGLE-3 head
    block:DIR          a DFlash, DFlash2, DSpark or P-EAGLE head or a PARD model: one pass for all drafts
    mtp:DIR            multi-token prediction modules, alone or in the folder of their model
    medusa:DIR         Medusa heads, alone or in the folder of their model
    assistant:DIR      an assistant of Gemma 4, which reads the target's cache
    ngram              copies what followed the row's last tokens earlier in the row
    suffix             copies from remembered text, too (``specjax.remember``); suffix:FILE.txt begins with a corpus
    early-exit:4       the target's own first 4 layers
    cascade:A,B        A, and B in the rows in which A has nothing; cascade:A,B,C is cascade:(A,B),C
    ================== ==================================================================================

    Engines wire some draft heads differently. Options after the folder choose: "mtp:DIR@chain_states=unnormed",
    "mtp:DIR@chained@zero_first". docs/drafters.md lists them (``specjax.checkpoint.spec.OPTIONS``).

    Args:
      spec: kind, folder and options, as above. In a cascade, folders have no comma in their names.
      target: the model to draft for, or the result of ``specjax.open``.
      num_draft: g, tokens proposed per round; with ``tree``, the most on one path.
      dtype: dtype of parameters and computation; None means ``specjax.default_dtype()``.
      tokenizer: the target's tokenizer; None takes the tokenizer of an ``Opened`` target. With a tokenizer, a draft
        model of another vocabulary becomes a ``SharedVocabularyDrafter``. Without a tokenizer, the draft model must
        have the target's vocabulary.
      mesh: where the parameters go, as for ``specjax.load``. Give the target's mesh if the target is on one.
      rules: as for ``specjax.shard``. By default each device holds the whole drafter, which is best for a small one.
        ``specjax.sharding.RULES`` splits the drafter like the target.
      chained: the option of this name, for all MTP modules of the text: the first module drafts all tokens and takes
        its own states. Otherwise each module drafts one token.
      zero_first: likewise: the embedding at position 0 is zero, as in vLLM. Other engines differ.
      ignore_config_keys: as for ``specjax.load``, for the config of a draft model or draft head.
      quantize: as for ``specjax.load``, for the drafter's own parameters. What it uses of the target stays as it is.
      tree: drafts of a tree, for all kinds but assistant, early-exit and cascade. None drafts chains.
      siblings: for trees: "chosen", the likeliest tokens; "distinct", drawn without replacement; or "paths", drawn as
        independent chains. None is "distinct" for draft models, EAGLE and MTP, and else "chosen".

    Returns:
      The drafter, whose parameters are read.

    Raises:
      ValueError: the text names no drafter, or an unknown option; ``num_draft`` is below 1, or is more than the draft
        heads can draft; a file of the folder is missing, damaged or pickled; the folder holds something else than the
        text says; the drafter does not fit the target; it drafts no such tree; or as for ``specjax.load``.
      TypeError: ``spec`` is not a string; or as for ``specjax.shard``.
    """
    # 1. What the text says. An ``Opened`` target knows the tokenizer, so that the caller need not.
    check_integer("num_draft", num_draft, 1)
    if quantize is not None:
        check_kind(quantize)
    named = parse(spec)
    kind, value, opened = named.kind, named.value, target
    if isinstance(target, Opened):
        target, tokenizer = target.model, tokenizer or target.tokenizer
    check_tree_of(kind, tree, siblings)
    # 2. Kinds without a folder of their own.
    if kind == "cascade":
        options = {"chained": chained, "zero_first": zero_first, "ignore_config_keys": key_names(ignore_config_keys)}
        options["quantize"] = quantize
        again = functools.partial(load_drafter, **options)
        parts = [again(part, opened, num_draft, dtype, tokenizer, mesh, rules) for part in value.split(",")]
        return functools.reduce(Cascade, parts)
    if kind == "ngram":
        return with_tree(NGramDrafter(num_draft=num_draft), tree, siblings)
    if kind == "suffix":
        drafter = _suffix_drafter(value, target, num_draft, tokenizer)
        return drafter if mesh is None else shard(drafter, mesh, WHOLE_ON_EACH)
    if kind == "early-exit":
        drafter = EarlyExitDrafter(int(value), num_draft)
        drafter.init(target, 1, 1)  # which checks that the target has so many layers
        return drafter
    # 3. Folders. Of a draft head, only shapes are opened first: whether it fits the target is known before it is read.
    path, dtype = model_path(value).absolute(), check_dtype(default_dtype() if dtype is None else dtype)
    if kind == "model":
        model = load(path, dtype, mesh, rules, ignore_config_keys, quantize)
        return with_tree(_model_drafter(path, model, target, num_draft, tokenizer, mesh, rules), tree, siblings)
    if kind == "block" and is_pard(path):
        _no_windows(named, "a language model")
        if named.flag("cuts"):
            raise ValueError(f"{path} holds a language model, which has no confidence head; leave out @cuts")
        options = (mesh, rules, ignore_config_keys, quantize, named.flag("argmax"))
        return with_tree(open_pard(path, target, num_draft, dtype, *options), tree, siblings)
    with opened_as(kind, path):
        if not path.is_dir():
            raise ValueError(
                f"{spec} names {path}, which is not a folder; give one with config.json and safetensors files"
            )
        if kind == "mtp":
            chained, zero_first = chained or named.flag("chained"), zero_first or named.flag("zero_first")
            normed = named.choice("chain_states") == "normed"
            drafter, params = open_mtp(path, target, num_draft, dtype, chained, zero_first, normed, ignore_config_keys)
        elif kind == "eagle":
            options = _eagle_options(named, opened)
            drafter, params = open_eagle(path, target, num_draft, dtype, ignore_config_keys, **options)
        elif kind == "block":
            drafter, params = _open_block(path, target, num_draft, dtype, ignore_config_keys, named)
        elif kind == "assistant":
            drafter, params = open_assistant(path, target, num_draft, dtype, ignore_config_keys)
        else:
            drafter, params = open_medusa(path, target, num_draft, dtype, ignore_config_keys)
    drafter = with_tree(drafter, tree, siblings, medusa_choices(path) if kind == "medusa" else MEDUSA_CHOICES)
    with errors_name(path):
        return read_onto(mesh, rules, drafter, params, quantize)


def _open_block(
    path: Path,
    target: LanguageModel,
    num_draft: int,
    dtype: jnp.dtype,
    ignore_config_keys: Iterable[str],
    named: Spec,
) -> tuple[BlockDrafter, Any]:
    """Opens a draft head of blocks by what its config says it is."""
    options = {name: named.flag(name) for name in ("argmax", "cuts")}
    if is_peagle(read_json(path / "config.json")):
        _no_windows(named, "a P-EAGLE head")
        return open_peagle(path, target, num_draft, dtype, ignore_config_keys, **options)
    stays = named.choice("window") == "stays"
    return open_block(path, target, num_draft, dtype, ignore_config_keys, window_stays=stays, **options)


def _no_windows(named: Spec, what: str) -> None:
    """Raises ValueError if the text asks for windows that stay, which only DFlash and DSpark heads may have."""
    if named.choice("window") == "stays":
        raise ValueError(f"{named.value} holds {what}, whose windows always slide; leave out @window=stays")


def _eagle_options(named: Spec, target: LanguageModel | Opened) -> dict[str, Any]:
    """Returns the options of a text as arguments of ``open_eagle``."""
    rope_of = None
    if named.choice("rope") == "target":
        if not isinstance(target, Opened):
            raise ValueError("rope=target needs the target's config; give the result of specjax.open as the target")
        rope_of = target.config
    return {
        "rope_of": rope_of,
        "norm_output_of_logits": named.choice("norm_output") == "logits",
        "window_stays": named.choice("window") == "stays",
    }


def _model_drafter(
    path: Path,
    model: LanguageModel,
    target: LanguageModel,
    num_draft: int,
    tokenizer: Tokenizer | None,
    mesh: Mesh | None,
    rules: Rules,
) -> Drafter:
    """Returns the drafter of a draft model, whose vocabulary may be another if the target's tokenizer is known."""
    # 1. Without the target's tokenizer, vocabularies of one size are taken to be the same.
    same_size = model.vocab_size == target.vocab_size
    if tokenizer is None and not same_size:
        raise ValueError(
            f"{path} has a vocabulary of {model.vocab_size} tokens and the target one of {target.vocab_size}; give the "
            "target's tokenizer to draft the tokens that both have, or a drafter that shares it"
        )
    if tokenizer is None:
        return ModelDrafter(model, num_draft)
    # 2. With it, the same tokens need no translation, whatever else the two tokenizers do.
    own = open_text_parts(path).tokenizer
    if own is None:
        raise ValueError(f"{path} has no tokenizer; add the model's tokenizer.json, or give no tokenizer of the target")
    if same_size and _agree(own.get_vocab(), tokenizer.get_vocab()):
        return ModelDrafter(model, num_draft)
    # 3. Other vocabularies are matched token by token.
    try:
        shared = match_vocabularies(tokenizer, own, target.vocab_size, model.vocab_size)
    except ValueError as error:
        raise ValueError(f"{path} cannot draft for this target: {error}") from None
    drafter = shared_vocabulary_drafter(model, shared, num_draft)
    return drafter if mesh is None else shard(drafter, mesh, rules)  # only its tables move: the model is there


def _suffix_drafter(file: str, target: LanguageModel, num_draft: int, tokenizer: Tokenizer | None) -> SuffixDrafter:
    """Returns a drafter that remembers the text of a file, and has room for all of it; without a file, an empty one."""
    if not file:
        return SuffixDrafter.empty(target.vocab_size, num_draft=num_draft)
    if tokenizer is None:
        raise ValueError(f"suffix:{file} needs the target's tokenizer; give it, or the result of specjax.open")
    text = read_text(Path(file))
    check_characters(file, text)
    tokens = jnp.asarray([tokenizer.encode(text).ids], jnp.int32)
    if tokens.size == 0:
        raise ValueError(f"{file} has no text; give a file with text, or suffix alone")
    count = tokens.shape[1]
    drafter = SuffixDrafter.empty(target.vocab_size, max(2**16, 1 << count.bit_length()), num_draft)
    return drafter.remember(tokens, jnp.asarray([count], jnp.int32))


def _agree(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Returns whether no token has two ids and no id two tokens. One vocabulary may have tokens that the other lacks.

    Two folders of one family differ so if only one of them names an added token.
    """
    tokens = {i: token for token, i in other.items()}
    return all(other.get(token, i) == i and tokens.get(i, token) == token for token, i in one.items())


def save_drafter(
    path: str | os.PathLike,
    drafter: FeatureDrafter | BlockDrafter | MTPDrafter | MedusaDrafter,
    target: LanguageModel | Opened,
    config: Mapping[str, Any] | None = None,
    *,
    target_name: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a draft head in its published layout, for ``load_drafter`` and for other engines.

    EAGLE and P-EAGLE heads are written in speculators' layout, DFlash and DSpark heads in the layout of ``config``, MTP
    modules in the layout of the target's family, and Medusa heads in the layout of FasterDecoding/Medusa. Draft models
    are written by ``specjax.save`` instead. In a job of several processes, all processes call this function, with one
    folder that all see.

    Args:
      path: the folder to make or to replace.
      drafter: the draft head as a drafter: a ``FeatureDrafter``, a ``BlockDrafter``, an ``MTPDrafter`` or a
        ``MedusaDrafter``, whose ``tree`` is written, too.
      target: the model that the head drafts for, or the result of ``specjax.open``.
      config: describes the draft head. EAGLE and heads of blocks: the keys of any layout that ``load_drafter`` reads.
        MTP: the target's Hugging Face config, or a config with layers of other sizes. Medusa: None, since the
        parameters say all.
      target_name: the target's name or path, for other engines.
      metrics: the content of ``metrics.json``; None writes no such file.

    Raises:
      TypeError: the drafter is not a draft head.
      ValueError: the config is missing, is given for Medusa heads, describes other parameters than the drafter's, or
        does not fit the target.
      OSError: the folder cannot be written. A folder that was there before stays.
    """
    # 1. Say what is wrong before anything is gathered or written.
    head = drafter.head if isinstance(drafter, FeatureDrafter | BlockDrafter) else drafter
    if not isinstance(head, (EagleHead, DFlashHead, PEagleHead, MTPHead, MTPDrafter, MedusaDrafter)):
        raise TypeError(
            f"drafter is a {type(drafter).__name__}; give an EAGLE head, a head of blocks, MTP modules or Medusa "
            "heads (specjax.save writes a draft model)"
        )
    if (config is None) != isinstance(head, MedusaDrafter):
        wanted = (
            "give None, for Medusa heads" if config is not None else "give the keys of the draft head's config.json"
        )
        raise ValueError(f"config is {config!r}; {wanted}")
    check_not_quantized(drafter.params)
    # 2. One process writes. All must take part in gathering the parameters, which are small.
    model = target.model if isinstance(target, Opened) else target
    params = gathered(drafter.params)
    if jax.process_index() != 0:
        return
    with new_folder(path) as folder:
        if isinstance(head, EagleHead):
            fill_eagle(folder, config or {}, params, model, target_name, drafter.num_draft, bool(head.own_head))
        elif isinstance(head, PEagleHead):
            fill_peagle(folder, config or {}, head, params, model, target_name, drafter.num_draft)
        elif isinstance(head, DFlashHead):
            fill_block(folder, config or {}, params, model, target_name, drafter.num_draft)
        elif isinstance(head, MedusaDrafter):
            fill_medusa(folder, params, target_name, head.tree)
        else:
            fill_mtp(folder, config or {}, params)
        if metrics is not None:
            write_json(folder / "metrics.json", metrics)
