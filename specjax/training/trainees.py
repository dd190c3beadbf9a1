"""What a recipe trains: a model, or a draft head of the model whose states it reads."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tokenizers import Tokenizer

from specjax.checkpoint.drafters import save_drafter
from specjax.checkpoint.eagle import eagle_head
from specjax.checkpoint.models import save
from specjax.drafters.feature import FeatureDrafter, Head
from specjax.drafters.medusa import MedusaDrafter, init_medusa_params
from specjax.drafters.model import ModelDrafter
from specjax.drafters.mtp import MTPConfig, MTPHead, init_mtp_params
from specjax.hf.config import decoder_config
from specjax.hf.medusa import medusa_config
from specjax.hf.mtp import mtp_layout
from specjax.sharding import Rules, shardings
from specjax.training.data import END_OF_TEXT
from specjax.training.objectives import Objective, head_objective, make_objective, medusa_objective
from specjax.training.recipe import Recipe
from specjax.transformer.decoder import abstract_params, decoder_model, init_params
from specjax.types import Drafter, LanguageModel


@dataclasses.dataclass(frozen=True)
class Trainee:
    """How to train, measure and write what a recipe describes.

    Attributes:
      init: ``init(key, places=None)`` returns fresh float32 parameters, on the ``places`` if they are given, of which
        each process makes only its own; the key is consumed.
      places: ``places(mesh, rules)`` returns the parameters' shardings, and raises what ``specjax.shard`` does.
      objective: ``objective(loss)`` returns what to minimise.
      drafter: ``drafter(params, num_draft)`` returns the drafter that the parameters make.
      max_draft: the most tokens that it drafts, or None for any number.
      write: ``write(folder, params, tokenizer, metrics)`` writes the checkpoint; of several processes all call it, with
        a folder that all see.
    """

    init: Callable[..., Any]
    places: Callable[[Mesh, Rules], Any]
    objective: Callable[[str], Objective]
    drafter: Callable[[Any, int], Drafter]
    max_draft: int | None
    write: Callable[[Path, Any, Tokenizer, dict[str, Any]], None]


def make_trainee(recipe: Recipe, teacher: LanguageModel | None, tokens: np.ndarray) -> Trainee:
    """Returns what the recipe trains.

    Args:
      recipe: describes it.
      teacher: the model that it drafts for, if it does.
      tokens: integers, text on which a reduced draft vocabulary is counted: it is of the most frequent tokens.

    Raises:
      ValueError: the architecture is described wrongly, or does not fit the teacher; or windows of text are too short
        for the chains that are trained, or too long for the teacher.
    """
    for stage in recipe.stages:
        if teacher is not None and stage.sequence > (teacher.max_positions or stage.sequence):
            raise ValueError(
                f"stage sequence {stage.sequence} exceeds the {teacher.max_positions} positions of the target"
            )
    if recipe.head is None:
        return _model(recipe, teacher)
    assert teacher is not None, "a recipe of a head names its target"
    if recipe.head == "eagle":
        return _eagle(recipe, teacher, tokens)
    return {"mtp": _mtp, "medusa": _medusa}[recipe.head](recipe, teacher)


def _model(recipe: Recipe, teacher: LanguageModel | None) -> Trainee:
    config = decoder_config(recipe.architecture)
    if teacher is not None and config.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"vocab_size is {config.vocab_size} and that of {recipe.drafts_for} {teacher.vocab_size}; give it"
        )

    def write(folder: Path, params: Any, tokenizer: Tokenizer, metrics: dict[str, Any]) -> None:
        stop = tokenizer.token_to_id(END_OF_TEXT)
        dtype = str(jax.tree.leaves(params)[0].dtype)
        save(folder, recipe.architecture | {"eos_token_id": stop, "torch_dtype": dtype}, params, tokenizer, metrics)

    return Trainee(
        init=_drawn(functools.partial(init_params, config)),
        places=lambda mesh, rules: shardings(decoder_model(config, abstract_params(config)), mesh, rules).params,
        objective=lambda loss: make_objective(loss, config),
        drafter=lambda params, num_draft: ModelDrafter(decoder_model(config, params), num_draft),
        max_draft=None,
        write=write,
    )


def _drawn(init: Callable[[Array], Any]) -> Callable[..., Any]:
    def placed(key: Array, places: Any = None) -> Any:
        return init(key) if places is None else jax.jit(init, out_shardings=places)(key)

    return placed


def _chained(
    recipe: Recipe, teacher: LanguageModel, head: Head, init: Callable[[Array], Any], config: dict[str, Any]
) -> Trainee:
    _check_sequences(recipe, recipe.chain_steps)

    def places(mesh: Mesh, rules: Rules) -> Any:
        return shardings(FeatureDrafter(jax.eval_shape(init, jax.random.key(0)), head, 1), mesh, rules).params

    return Trainee(
        init=_drawn(init),
        places=places,
        objective=lambda loss: head_objective(loss, head, recipe.chain_steps),
        drafter=lambda params, num_draft: FeatureDrafter(params, head, num_draft),
        max_draft=None,
        write=_head_writer(recipe, teacher, lambda params: FeatureDrafter(params, head), config),
    )


def _head_writer(
    recipe: Recipe,
    teacher: LanguageModel,
    drafter: Callable[[Any], FeatureDrafter | MedusaDrafter],
    config: dict[str, Any] | None = None,
) -> Callable[[Path, Any, Tokenizer, dict[str, Any]], None]:
    def write(folder: Path, params: Any, tokenizer: Tokenizer, metrics: dict[str, Any]) -> None:
        del tokenizer  # the target's
        save_drafter(folder, drafter(params), teacher, config, target_name=recipe.drafts_for, metrics=metrics)

    return write


def _mtp(recipe: Recipe, teacher: LanguageModel) -> Trainee:
    """``[architecture]`` holds the Hugging Face keys of the target, with the module's layer in place of its own."""
    _check_lends(recipe, teacher)
    config = recipe.architecture | {"num_hidden_layers": teacher.num_layers, "num_nextn_predict_layers": 1}
    layout = mtp_layout(config)  # the layer is what ``load_drafter`` will take it for
    head = MTPHead(MTPConfig(layout.decoder, hidden_first=layout.hidden_first))
    _check_width(recipe, teacher, layout.decoder.hidden_size, layout.decoder.vocab_size)
    return _chained(recipe, teacher, head, lambda key: init_mtp_params(head.config, key), config)


def _eagle(recipe: Recipe, teacher: LanguageModel, tokens: np.ndarray) -> Trainee:
    """``[architecture]`` holds the keys of a published EAGLE config, of any layout."""
    head = eagle_head(recipe.architecture, teacher)
    chained = _chained(recipe, teacher, head, head.init_params, recipe.architecture)
    if head.draft_vocab_size is None:
        return chained
    return _with_constants(chained, {"draft_of_v": most_frequent(tokens, head.draft_vocab_size, head.vocab_size)})


def most_frequent(tokens: np.ndarray, draft_vocab_size: int, vocab_size: int) -> Array:
    """Returns int32 ``[v]``: the draft's id of each of the most frequent tokens, in the target's order, else -1."""
    counts_v = np.bincount(tokens, minlength=vocab_size)
    chosen_u = np.sort(np.argsort(-counts_v, kind="stable")[:draft_vocab_size])
    return jnp.full((vocab_size,), -1, jnp.int32).at[chosen_u].set(jnp.arange(draft_vocab_size, dtype=jnp.int32))


def _with_constants(trainee: Trainee, constants: dict[str, Array]) -> Trainee:
    """Returns the trainee with some of its parameters out of the optimiser's reach: integers have no gradient."""

    def objective(loss: str) -> Objective:
        whole = trainee.objective(loss)
        return lambda params, tokens_bt, teacher: whole(params | constants, tokens_bt, teacher)

    def trained(params: dict[str, Any]) -> dict[str, Any]:
        return {name: leaf for name, leaf in params.items() if name not in constants}

    return dataclasses.replace(
        trainee,
        init=_drawn(lambda key: trained(trainee.init(key))),
        places=lambda mesh, rules: trained(trainee.places(mesh, rules)),
        objective=objective,
        drafter=lambda params, num_draft: trainee.drafter(params | constants, num_draft),
        write=lambda folder, params, tokenizer, metrics: trainee.write(folder, params | constants, tokenizer, metrics),
    )


def _medusa(recipe: Recipe, teacher: LanguageModel) -> Trainee:
    """``[architecture]`` holds ``medusa_num_heads`` and ``medusa_num_layers``; heads begin as the target's own."""
    count, blocks, _, _ = medusa_config(recipe.architecture)
    _check_sequences(recipe, count)
    width = _check_lends(recipe, teacher)

    begun = functools.partial(init_medusa_params, num_heads=count, num_blocks=blocks)

    def init(key: Array, places: Any = None) -> Any:
        del key  # nothing is drawn
        assert teacher.unembed is not None
        one_dd = jnp.eye(width, dtype=jnp.float32)[None]
        with jax.default_matmul_precision("highest"):
            kernel_dv, twice_dv = (teacher.unembed(teacher.params, x)[0] for x in (one_dd, 2 * one_dd))
        if not jnp.allclose(2 * kernel_dv, twice_dv, rtol=1e-3):
            raise ValueError(
                f"the logits of {recipe.drafts_for} are capped; Medusa heads can begin as linear ones only"
            )
        return begun(kernel_dv) if places is None else jax.jit(begun, out_shardings=places)(kernel_dv)

    def places(mesh: Mesh, rules: Rules) -> Any:
        kernel_dv = jax.ShapeDtypeStruct((width, teacher.vocab_size), jnp.float32)
        return shardings(MedusaDrafter(jax.eval_shape(begun, kernel_dv), count), mesh, rules).params

    return Trainee(
        init=init,
        places=places,
        objective=lambda loss: medusa_objective(loss, count),
        drafter=lambda params, num_draft: MedusaDrafter(params, num_draft),
        max_draft=count,
        write=_head_writer(recipe, teacher, lambda params: MedusaDrafter(params, count)),
    )


def _check_sequences(recipe: Recipe, drafts: int) -> None:
    for stage in recipe.stages:
        if stage.sequence < drafts + 2:
            raise ValueError(
                f"stage sequence is {stage.sequence}; for {drafts} drafts give at least {drafts + 2} tokens"
            )


def _check_lends(recipe: Recipe, teacher: LanguageModel) -> int:
    """Returns the width of the teacher's states."""
    if teacher.embed is None or teacher.unembed is None or teacher.num_layers is None:
        raise ValueError(f"{recipe.drafts_for} does not say how it embeds and unembeds, or how many layers it has")
    return teacher.embedding_spec.shape[-1]


def _check_width(recipe: Recipe, teacher: LanguageModel, width: int, vocab: int) -> None:
    own = _check_lends(recipe, teacher)
    if (width, vocab) != (own, teacher.vocab_size):
        raise ValueError(
            f"hidden_size {width} and vocab_size {vocab} are not those of {recipe.drafts_for}, {own} and "
            f"{teacher.vocab_size}; give the target's"
        )
