"""The trainees of recipes: a model, or a draft head that reads the states of its target."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tokenizers import Tokenizer

from specjax.checkpoint.block import block_head
from specjax.checkpoint.drafters import save_drafter
from specjax.checkpoint.eagle import eagle_head
from specjax.checkpoint.models import save
from specjax.drafters.block import BlockDrafter
from specjax.drafters.dflash import DFlashHead
from specjax.drafters.eagle import EagleHead
from specjax.drafters.feature import FeatureDrafter, Head
from specjax.drafters.medusa import MedusaDrafter, init_medusa_params
from specjax.drafters.model import ModelDrafter
from specjax.drafters.mtp import MTPConfig, MTPHead, init_mtp_params
from specjax.hf.config import decoder_config
from specjax.hf.medusa import medusa_config
from specjax.hf.mtp import mtp_layout
from specjax.sharding import Rules, shardings
from specjax.training.blocks import block_objective
from specjax.training.data import END_OF_TEXT
from specjax.training.objectives import Objective, head_objective, make_objective, medusa_objective
from specjax.training.recipe import BLOCK_HEADS, Recipe
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import abstract_params, decoder_model, init_params
from specjax.types import Drafter, LanguageModel, whole_feed

_TOLD = 4  # drafts a round that a config suggests to other engines, if the draft head has no limit
_SCALED = 512  # tokens over which states are measured


class Trainee(Protocol):
    """How to train, measure and write the model or draft head that a recipe describes.

    Attributes:
      max_draft: the most tokens that the drafter drafts, or None for any number.
    """

    @property
    def max_draft(self) -> int | None: ...

    def init(self, key: Array, places: Any = None) -> Any:
        """Returns fresh float32 parameters; ``key`` is consumed.

        With ``places`` the parameters are placed there, and each process makes only its own parts.
        """
        ...

    def places(self, mesh: Mesh, rules: Rules) -> Any:
        """Returns the parameters' shardings. Raises what ``specjax.shard`` raises."""
        ...

    def objective(self, loss: str) -> Objective:
        """Returns the function to minimise; ``loss`` is a loss of the recipe."""
        ...

    def drafter(self, params: Any, num_draft: int) -> Drafter:
        """Returns the drafter with these parameters."""
        ...

    def write(self, folder: Path, params: Any, tokenizer: Tokenizer, metrics: dict[str, Any]) -> None:
        """Writes the checkpoint. With several processes, all must call it with a folder that all see."""
        ...


def make_trainee(
    recipe: Recipe, teacher: LanguageModel | None, tokens: np.ndarray, start_token: int | None = None
) -> Trainee:
    """Returns the trainee that the recipe describes.

    Args:
      recipe: the recipe.
      teacher: the target, if the recipe has ``drafts_for``.
      tokens: integers ``[n]``, a text. A reduced draft vocabulary holds its most frequent tokens.
      start_token: the token with which each document of the text begins, None for a text of one document. A block of
        drafts sees its own document alone.

    Raises:
      ValueError: the architecture is wrong or does not fit the teacher; or windows of text are too short for the chains
        that are trained, or too long for the teacher.
    """
    for stage in recipe.stages:
        if teacher is not None and stage.sequence > (teacher.max_positions or stage.sequence):
            raise ValueError(
                f"stage sequence {stage.sequence} exceeds the {teacher.max_positions} positions of the target"
            )
    if recipe.head is None:
        return _model(recipe, teacher)
    assert teacher is not None, "a recipe of a draft head names its target"
    if recipe.head == "mtp":
        return _mtp(recipe, teacher)
    if recipe.head == "eagle":
        return _eagle(recipe, teacher, tokens)
    if recipe.head in BLOCK_HEADS:
        return _block(recipe, teacher, tokens, start_token)
    return _medusa(recipe, teacher)


def _unembedded(teacher: LanguageModel, scale: float) -> Array:
    """Returns the logits of unit vectors times ``scale``: the output head's kernel, unless the logits are capped."""
    assert teacher.unembed is not None
    one_dd = scale * jnp.eye(teacher.embedding_spec.shape[-1], dtype=jnp.float32)[None]
    with jax.default_matmul_precision("highest"):
        return teacher.unembed(teacher.params, one_dd)[0]


def _init_at(places: Any, init: Callable[[Array], Any], source: Array) -> Any:
    return init(source) if places is None else jax.jit(init, out_shardings=places)(source)


@dataclasses.dataclass(frozen=True)
class _Model:
    """A whole model, which may draft for a larger one."""

    recipe: Recipe
    config: DecoderConfig
    max_draft: None = None

    def init(self, key: Array, places: Any = None) -> Any:
        return _init_at(places, functools.partial(init_params, self.config), key)

    def places(self, mesh: Mesh, rules: Rules) -> Any:
        return shardings(decoder_model(self.config, abstract_params(self.config)), mesh, rules).params

    def objective(self, loss: str) -> Objective:
        return make_objective(loss, self.config)

    def drafter(self, params: Any, num_draft: int) -> ModelDrafter:
        return ModelDrafter(decoder_model(self.config, params), num_draft)

    def write(self, folder: Path, params: Any, tokenizer: Tokenizer, metrics: dict[str, Any]) -> None:
        stop, dtype = tokenizer.token_to_id(END_OF_TEXT), str(jax.tree.leaves(params)[0].dtype)
        config = {"eos_token_id": stop} | self.recipe.architecture | {"torch_dtype": dtype}
        save(folder, config, params, tokenizer, metrics)


@dataclasses.dataclass(frozen=True)
class _DraftHead:
    """A draft head with a config.

    Attributes:
      draw: ``draw(key)`` returns fresh parameters, ``constants`` included.
      config: the content of ``config.json``.
      constants: parameters that the optimiser must not see, since integers have no gradient.
    """

    recipe: Recipe
    teacher: LanguageModel
    head: Any
    draw: Callable[[Array], Any]
    config: dict[str, Any]
    constants: dict[str, Array] = dataclasses.field(default_factory=dict)
    max_draft: int | None = None

    def _trained(self, params: dict[str, Any]) -> dict[str, Any]:
        return {name: leaf for name, leaf in params.items() if name not in self.constants}

    def init(self, key: Array, places: Any = None) -> Any:
        return _init_at(places, lambda key: self._trained(self.draw(key)), key)

    def places(self, mesh: Mesh, rules: Rules) -> Any:
        whole = self.drafter(jax.eval_shape(self.draw, jax.random.key(0)), 1)
        return self._trained(shardings(whole, mesh, rules).params)

    def objective(self, loss: str) -> Objective:
        whole = self._objective(loss)
        return lambda params, tokens_bt, teacher: whole(params | self.constants, tokens_bt, teacher)

    def _objective(self, loss: str) -> Objective:
        raise NotImplementedError

    def drafter(self, params: Any, num_draft: int) -> FeatureDrafter | BlockDrafter:
        raise NotImplementedError

    def write(self, folder: Path, params: Any, tokenizer: Tokenizer, metrics: dict[str, Any]) -> None:
        del tokenizer  # the target's
        drafter, name = self.drafter(params, self.max_draft or _TOLD), self.recipe.drafts_for
        save_drafter(folder, drafter, self.teacher, self.config, target_name=name, metrics=metrics)


@dataclasses.dataclass(frozen=True)
class _ChainHead(_DraftHead):
    """A draft head that drafts a chain."""

    head: Head

    def _objective(self, loss: str) -> Objective:
        return head_objective(loss, self.head, self.recipe.chain_steps)

    def drafter(self, params: Any, num_draft: int) -> FeatureDrafter:
        return FeatureDrafter(params | self.constants, self.head, num_draft)


@dataclasses.dataclass(frozen=True)
class _BlockHead(_DraftHead):
    """A draft head that drafts a block; ``start_token`` is as for ``make_trainee``."""

    head: DFlashHead
    start_token: int | None = None

    def _objective(self, loss: str) -> Objective:
        return block_objective(loss, self.head, self.start_token)

    def drafter(self, params: Any, num_draft: int) -> BlockDrafter:
        return BlockDrafter(params | self.constants, self.head, num_draft)


@dataclasses.dataclass(frozen=True)
class _MedusaHeads:
    """Medusa heads. They start as the target's own output head.

    Attributes:
      max_draft: how many heads.
      blocks: residual blocks of a head.
    """

    recipe: Recipe
    teacher: LanguageModel
    max_draft: int
    blocks: int

    def _start(self, kernel_dv: Array) -> Any:
        return init_medusa_params(kernel_dv, num_heads=self.max_draft, num_blocks=self.blocks)

    def init(self, key: Array, places: Any = None) -> Any:
        del key  # nothing is drawn
        kernel_dv, twice_dv = (_unembedded(self.teacher, scale) for scale in (1, 2))
        if not jnp.allclose(2 * kernel_dv, twice_dv, rtol=1e-3):
            raise ValueError(
                f"the logits of {self.recipe.drafts_for} are capped, but Medusa heads start as linear ones; train "
                "another kind of draft head"
            )
        return _init_at(places, self._start, kernel_dv)

    def places(self, mesh: Mesh, rules: Rules) -> Any:
        shape = (self.teacher.embedding_spec.shape[-1], self.teacher.vocab_size)
        params = jax.eval_shape(self._start, jax.ShapeDtypeStruct(shape, jnp.float32))
        return shardings(MedusaDrafter(params, self.max_draft), mesh, rules).params

    def objective(self, loss: str) -> Objective:
        return medusa_objective(loss, self.max_draft)

    def drafter(self, params: Any, num_draft: int) -> MedusaDrafter:
        return MedusaDrafter(params, num_draft)

    def write(self, folder: Path, params: Any, tokenizer: Tokenizer, metrics: dict[str, Any]) -> None:
        del tokenizer  # the target's
        drafter, name = MedusaDrafter(params, self.max_draft), self.recipe.drafts_for
        save_drafter(folder, drafter, self.teacher, target_name=name, metrics=metrics)


def _model(recipe: Recipe, teacher: LanguageModel | None) -> _Model:
    config = decoder_config(recipe.architecture)
    if teacher is not None and config.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"vocab_size is {config.vocab_size} and that of {recipe.drafts_for} {teacher.vocab_size}; give "
            f"{teacher.vocab_size}"
        )
    return _Model(recipe, config)


def _mtp(recipe: Recipe, teacher: LanguageModel) -> _ChainHead:
    """Returns an MTP module.

    ``[architecture]`` holds the target's Hugging Face keys, with the module's layer in place of the target's layers.
    """
    teacher.require("embed", "unembed", "num_layers")
    _check_sequences(recipe, recipe.chain_steps)
    config = recipe.architecture | {"num_hidden_layers": teacher.num_layers, "num_nextn_predict_layers": 1}
    layout = mtp_layout(config)  # ``load_drafter`` reads the layer by the same function
    own = layout.decoder.hidden_size, layout.decoder.vocab_size
    target = teacher.embedding_spec.shape[-1], teacher.vocab_size
    if own != target:
        raise ValueError(
            f"hidden_size {own[0]} and vocab_size {own[1]} are not those of {recipe.drafts_for}, {target[0]} and "
            f"{target[1]}; give the target's"
        )
    head = MTPHead(MTPConfig(layout.decoder, hidden_first=layout.hidden_first))
    return _ChainHead(recipe, teacher, head, lambda key: init_mtp_params(head.config, key), config)


def _eagle(recipe: Recipe, teacher: LanguageModel, tokens: np.ndarray) -> _ChainHead:
    """Returns an EAGLE head. ``[architecture]`` holds the keys of a published EAGLE config, of any layout."""
    head = eagle_head(recipe.architecture, teacher)
    _check_sequences(recipe, recipe.chain_steps)
    constants = _draft_ids(head, tokens)
    return _ChainHead(recipe, teacher, head, head.init_params, recipe.architecture, constants)


def _block(recipe: Recipe, teacher: LanguageModel, tokens: np.ndarray, start_token: int | None) -> _BlockHead:
    """Returns a DFlash or DSpark head. ``[architecture]`` holds the keys of a published config, of any layout."""
    head = block_head(recipe.architecture, teacher)
    if head.name.lower() != recipe.head:
        raise ValueError(
            f"head is {recipe.head!r} and [architecture] that of a {head.name} head; give the keys of a {recipe.head} "
            "head"
        )
    _check_sequences(recipe, head.most_drafts)
    constants, most = _draft_ids(head, tokens), head.most_drafts
    return _BlockHead(
        recipe, teacher, head, head.init_params, recipe.architecture, constants, most, start_token=start_token
    )


def _draft_ids(head: EagleHead | DFlashHead, tokens: np.ndarray) -> dict[str, Array]:
    """Returns the reduced draft vocabulary, if there is one, by the name of its parameter."""
    if head.draft_vocab_size is None:
        return {}
    return {"draft_of_v": most_frequent(tokens, head.draft_vocab_size, head.vocab_size)}


def with_targets_head(params: dict[str, Any], teacher: LanguageModel, tokens: np.ndarray) -> dict[str, Any]:
    """Returns fresh parameters of an EAGLE head as wide as its target, with the target's output head.

    The draft head's own norm has other weights than the target's. So the output head is scaled by the size of each
    dimension of the target's last states. What all tokens have in common is subtracted, which changes no law. The norm
    starts so low that the logits of untrained states have a standard deviation of 1: larger ones are confident errors,
    which take longer to unlearn than random parameters.

    Args:
      params: of an EAGLE head with an output head.
      teacher: the target, on one device.
      tokens: integers ``[n]``, the text that the draft vocabulary was made of.
    """
    size = params["lm_head"]["kernel"].shape[1]
    chosen_u = np.flatnonzero(np.asarray(most_frequent(tokens, size, teacher.vocab_size)) >= 0)
    text_bt = jnp.asarray(tokens[None, : min(_SCALED, teacher.max_positions or _SCALED)], jnp.int32)
    cache = teacher.init_cache(*text_bt.shape)
    (state_btd,) = teacher.forward(teacher.params, whole_feed(text_bt), cache, (-1,)).features
    size_d = jnp.sqrt(jnp.mean(jnp.square(state_btd.astype(jnp.float32)), axis=(0, 1)))
    kernel_du = size_d[:, None] * _unembedded(teacher, 1).astype(jnp.float32)[:, chosen_u]
    kernel_du = kernel_du - jnp.mean(kernel_du, axis=1, keepdims=True)
    spread = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(kernel_du), axis=0)))
    norm = jax.tree.map(lambda weight: weight / jnp.maximum(spread, 1), params["norm"])
    return params | {"lm_head": {"kernel": kernel_du}, "norm": norm}


def _medusa(recipe: Recipe, teacher: LanguageModel) -> _MedusaHeads:
    """Returns Medusa heads. ``[architecture]`` holds ``medusa_num_heads`` and ``medusa_num_layers``."""
    config = medusa_config(recipe.architecture)
    _check_sequences(recipe, config.heads)
    teacher.require("embed", "unembed", "num_layers")
    return _MedusaHeads(recipe, teacher, config.heads, config.blocks)


def most_frequent(tokens: np.ndarray, draft_vocab_size: int, vocab_size: int) -> Array:
    """Returns a draft vocabulary of the most frequent tokens, in the order of the target's ids.

    Args:
      tokens: integers ``[n]``, a text.
      draft_vocab_size: u, tokens of the draft vocabulary.
      vocab_size: v, tokens of the target.

    Returns:
      int32 ``[v]``, the draft's id of each token, or -1 for tokens that are never drafted.
    """
    counts_v = np.bincount(tokens, minlength=vocab_size)
    chosen_u = np.sort(np.argsort(-counts_v, kind="stable")[:draft_vocab_size])
    return jnp.full((vocab_size,), -1, jnp.int32).at[chosen_u].set(jnp.arange(draft_vocab_size, dtype=jnp.int32))


def _check_sequences(recipe: Recipe, drafts: int) -> None:
    for stage in recipe.stages:
        if stage.sequence < drafts + 2:
            raise ValueError(
                f"stage sequence is {stage.sequence}; for {drafts} drafts give at least {drafts + 2} tokens"
            )
