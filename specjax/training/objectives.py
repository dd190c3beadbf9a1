"""From a stage of a recipe to the function that the optimiser minimises."""

from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array

from specjax.training import losses
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import bind
from specjax.types import LanguageModel


class Objective(Protocol):
    """``objective(params, tokens_bt, teacher) -> scalar``, in nats or, for total variation, as a fraction.

    ``params`` are float32, ``tokens_bt`` int32, and the scalar float32. Raises ValueError if it needs a teacher and
    there is none.
    """

    def __call__(self, params: Any, tokens_bt: Array, teacher: LanguageModel | None) -> Array: ...


_IMITATION = {"kl": losses.kl, "total_variation": losses.total_variation}


def make_objective(loss: str, config: DecoderConfig) -> Objective:
    """Returns the objective of a model that is trained on text or to imitate a teacher.

    Args:
      loss: "next_token"; or "kl" or "total_variation", against a teacher of the same vocabulary
        (``specjax.training.losses``).
      config: of the model, whose parameters are those of ``specjax.transformer.init_params``.

    Returns:
      A function whose call raises ValueError where it imitates and there is no teacher.
    """

    def logits(params: Any, tokens_bt: Array) -> Array:
        start_b = jnp.zeros((tokens_bt.shape[0],), jnp.int32)
        return bind(config, params)(tokens_bt, start_b, None)[0]

    def next_token(params: Any, tokens_bt: Array, teacher: LanguageModel | None) -> Array:
        del teacher
        return losses.next_token(logits(params, tokens_bt), tokens_bt)

    def imitate(params: Any, tokens_bt: Array, teacher: LanguageModel | None) -> Array:
        if teacher is None:
            raise ValueError(f"loss {loss!r} needs a teacher; name it as drafts_for in the recipe")
        rows, length = tokens_bt.shape
        start_b = jnp.zeros((rows,), jnp.int32)
        taught = teacher.forward(teacher.params, tokens_bt, teacher.init_cache(rows, length), start_b)
        return _IMITATION[loss](logits(params, tokens_bt), taught.logits_btv)

    return next_token if loss == "next_token" else imitate
