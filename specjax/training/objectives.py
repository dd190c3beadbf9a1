"""Objectives: the functions that the optimiser minimises."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from specjax.cache import KVCache
from specjax.drafters.feature import Head
from specjax.drafters.medusa import MedusaDrafter, head_logits
from specjax.training import losses
from specjax.training.chains import ChainCache
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import bind
from specjax.types import LanguageModel, Output, whole_feed


class Objective(Protocol):
    """``objective(params, tokens_bt, teacher) -> scalar``, in nats or, for total variation, as a fraction.

    ``params`` are float32, ``tokens_bt`` is int32, and the scalar is float32. An objective that needs a teacher raises
    ValueError without one.
    """

    def __call__(self, params: Any, tokens_bt: Array, teacher: LanguageModel | None) -> Array: ...


class DraftObjective(Objective, Protocol):
    """The objective of a draft, which may be given the tokens that count.

    ``counts_bt``, bool, says whether the loss of a draft of each token counts. Example: the tokens of completions,
    without prompts and padding. None: all of them.
    """

    def __call__(
        self, params: Any, tokens_bt: Array, teacher: LanguageModel | None, counts_bt: Array | None = None
    ) -> Array: ...


def make_objective(loss: str, config: DecoderConfig) -> Objective:
    """Returns the objective of a model that learns from text or imitates a teacher.

    Args:
      loss: one of ``losses.LOSSES``. The losses of ``losses.IMITATIONS`` need a teacher of the same vocabulary.
      config: the model's config. Its parameters are those of ``specjax.transformer.init_params``.
    """

    def logits(params: Any, tokens_bt: Array) -> Array:
        return bind(config, params)(whole_feed(tokens_bt), None)[0]

    def next_token(params: Any, tokens_bt: Array, teacher: LanguageModel | None) -> Array:
        del teacher
        return losses.next_token(logits(params, tokens_bt), tokens_bt)

    def imitate(params: Any, tokens_bt: Array, teacher: LanguageModel | None) -> Array:
        if teacher is None:
            raise ValueError(f"loss {loss!r} needs a teacher; name it as drafts_for in the recipe")
        cache = teacher.init_cache(*tokens_bt.shape)
        taught = teacher.forward(teacher.params, whole_feed(tokens_bt), cache)
        return losses.IMITATIONS[loss](logits(params, tokens_bt), taught.logits_btv)

    return next_token if loss == "next_token" else imitate


def read_by(teacher: LanguageModel | None, tokens_bt: Array, capture: tuple[int, ...]) -> tuple[LanguageModel, Output]:
    """Returns the teacher of a draft head, and its output over the text; raises ValueError if there is no teacher."""
    if teacher is None:
        raise ValueError("a draft head needs the model whose states it reads; name it as drafts_for in the recipe")
    cache = teacher.init_cache(*tokens_bt.shape)
    return teacher, teacher.forward(teacher.params, whole_feed(tokens_bt), cache, capture)


DECAY = 0.8
"""Weight of each draft relative to the draft before it. Later drafts are needed less often."""


def head_objective(loss: str, head: Head, steps: int) -> DraftObjective:
    """Returns the objective of a draft head that drafts a chain.

    The loss is the mean over the steps of the chain, weighted by powers of ``DECAY``. The draft head reads the
    teacher's states, so the objective always needs a teacher.

    Args:
      loss: one of ``losses.LOSSES``. "next_token" with one step is the loss of multi-token prediction (DeepSeek-AI
        2024, DeepSeek-V3, arXiv 2412.19437, section 2.2).
      head: the draft head.
      steps: drafts of a chain that are trained, at least 1. Windows of text must have at least ``steps + 2`` tokens.
    """

    def objective(
        params: Any, tokens_bt: Array, teacher: LanguageModel | None, counts_bt: Array | None = None
    ) -> Array:
        teacher, taught = read_by(teacher, tokens_bt, head.capture)
        drafts = chain_logits(head, params, teacher, tokens_bt, taught.features, steps)
        # In the draft vocabulary, which may be a sixth of the target's: logits of all tokens would take most of a step.
        size = drafts[0].shape[-1]
        counts_bt = None if counts_bt is None else counts_bt[:, 1:]
        wanted = losses.lesson(
            loss, taught.logits_btv[:, :-1], tokens_bt[:, 1:], head.draft_of_v(params), size, counts_bt
        )
        total = jnp.float32(0)
        for j, draft_btu in enumerate(drafts):
            # Slot i predicts token i + 2, like the teacher at position i + 1. Example: slot 3 has read the state at
            # position 3 and token 4, and drafts token 5. No chain of j steps ends at a slot below j.
            total += DECAY**j * losses.draft(loss, draft_btu[:, j:-1], wanted.part(j + 1))
        return total / sum(DECAY**j for j in range(steps))

    return objective


def chain_logits(
    head: Head, params: Any, teacher: LanguageModel, tokens_bt: Array, features: tuple[Array, ...], steps: int
) -> list[Array]:
    """Returns a draft head's logits in each step of chains that start at every slot at once.

    The draft head runs as it does when it drafts (Li et al. 2025, EAGLE-3, arXiv 2503.01840, section 3.2,
    "training-time test"). From the second step on it is fed its own states. It attends to the true entries before its
    chain and to its own entries within the chain.

    Args:
      head: the draft head.
      params: the draft head's parameters.
      teacher: the target.
      tokens_bt: int32, text.
      features: the target's captured states ``[b, t, d]`` over the text.
      steps: length of the chains, at least 1.

    Returns:
      Logits ``[b, t - 1, u]`` over the draft vocabulary for each step j. Slot i holds the logits for token i + 2,
      drafted by the chain that started at slot i - j.
    """
    # Slot i joins the state at position i with token i + 1, so the last state has no partner.
    rows = tokens_bt.shape[0]
    feed = whole_feed(tokens_bt[:, 1:])
    layers = jax.eval_shape(lambda: head.init_cache(params, rows, 1)).layers
    cache = KVCache(tuple(ChainCache() for _ in layers))
    states_btd = head.fuse(params, features)[:, :-1]
    logits = []
    for _ in range(steps):
        states_btd, cache = head.run(params, teacher, feed, states_btd, cache)
        flat = head.draft_logits(params, teacher, states_btd.reshape(-1, states_btd.shape[-1]))
        logits.append(flat.reshape(rows, -1, flat.shape[-1]))
        states_btd = jnp.pad(states_btd[:, :-1], ((0, 0), (1, 0), (0, 0)))  # step j + 1 is one slot later
    return logits


def model_objective(loss: str, model: LanguageModel) -> DraftObjective:
    """Returns the objective of a draft model of any kind: the loss of its first draft after every position.

    Args:
      loss: one of ``losses.LOSSES``.
      model: the draft model. Its functions count, and not its parameters.
    """

    def objective(
        params: Any, tokens_bt: Array, teacher: LanguageModel | None, counts_bt: Array | None = None
    ) -> Array:
        _, taught = read_by(teacher, tokens_bt, ())
        _, draft = read_by(dataclasses.replace(model, params=params), tokens_bt, ())
        counts_bt = None if counts_bt is None else counts_bt[:, 1:]
        wanted = losses.lesson(loss, taught.logits_btv[:, :-1], tokens_bt[:, 1:], counts_bt=counts_bt)
        return losses.draft(loss, draft.logits_btv[:, :-1], wanted)

    return objective


def medusa_objective(loss: str, num_heads: int) -> DraftObjective:
    """Returns the objective of Medusa heads (Cai et al. 2024, arXiv 2401.10774, section 2.2.1).

    The loss is the mean over the heads, weighted by powers of ``DECAY``. The heads read the teacher's states, so the
    objective always needs a teacher.

    Args:
      loss: one of ``losses.LOSSES``.
      num_heads: how many Medusa heads. Windows of text must have at least ``num_heads + 2`` tokens.
    """

    def objective(
        params: Any, tokens_bt: Array, teacher: LanguageModel | None, counts_bt: Array | None = None
    ) -> Array:
        length = tokens_bt.shape[1]
        _, taught = read_by(teacher, tokens_bt, MedusaDrafter.capture)
        total = jnp.float32(0)
        for i in range(num_heads):
            # Head i at position s predicts token s + 2 + i, like the teacher at position s + 1 + i. Example: head 0 at
            # position 3 drafts token 5; token 4 is the target's own.
            draft_btv = head_logits(params[i], taught.features[0][:, : length - 2 - i])
            counted_bt = None if counts_bt is None else counts_bt[:, i + 2 :]
            wanted = losses.lesson(loss, taught.logits_btv[:, i + 1 : -1], tokens_bt[:, i + 2 :], counts_bt=counted_bt)
            total += DECAY**i * losses.draft(loss, draft_btv, wanted)
        return total / sum(DECAY**i for i in range(num_heads))

    return objective
