"""Speculative decoding in one compiled loop: draft, one target pass, verify, write, repeat.

Rows advance by their own counts and never look at each other's tokens. With ``fixed=True`` what a row emits depends on
its prompt, its sampling parameters and its seed alone; else also on the widths of rounds, which all rows share
(``engine.adapt``).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from specjax import verify as verify_lib
from specjax.engine import round as round_lib
from specjax.engine.arguments import Prompts, check_rule, is_known
from specjax.engine.measuring import costs_of_generate, costs_of_run, with_costs
from specjax.engine.programs import (
    BLOCK,
    classes_key,
    extend_program,
    generate_program,
    prefill_program,
    rounds_program,
    run_rounds,
)
from specjax.engine.request import lay_out, lay_out_more
from specjax.engine.state import State
from specjax.platforms import platform_of
from specjax.sampling import Sampling
from specjax.sharding import ROWS, WHOLE, by_rows, gathered
from specjax.types import Drafter, Generation, LanguageModel, VerifyRule


def generate(
    target: LanguageModel,
    prompts: Prompts,
    lengths: ArrayLike | None = None,
    *,
    drafter: Drafter | None = None,
    verify: VerifyRule = verify_lib.block,
    sampling: Sampling = Sampling(),
    max_new_tokens: ArrayLike,
    stop_tokens: ArrayLike | tuple[int, ...] = (),
    slots: int | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    fixed: bool = False,
    costs: ArrayLike | None = None,
) -> Generation:
    """Continues prompts by speculative decoding; the law of the text is the target's, whatever the drafter.

    Pure, and usable inside the caller's own ``jit``, where it transfers nothing. Called outside of one, it moves its
    arguments to the device and compiles itself, with prompt width, slots and the number of stop tokens rounded up. So
    other prompts, lengths, limits, sampling parameters, seeds and stop tokens in the same buckets compile nothing new.
    Under ``jax.set_mesh`` it runs on the mesh's devices, for models that ``specjax.shard`` has put there.

    Args:
      target: the model whose text is wanted.
      prompts: a sequence of prompts, each a sequence of token ids; or integers ``[rows, width]``, right-padded.
      lengths: integers ``[rows]``, 1 .. width, for padded prompts; None means that no prompt is padded.
      drafter: proposes tokens; None is plain decoding through the same loop.
      verify: a rule of ``specjax.verify``.
      sampling: temperature, top-k and so on, one for all rows or per row.
      max_new_tokens: the most tokens that a row emits, an integer or one per row. Under ``jit`` a traced one needs
        ``slots``.
      stop_tokens: ids that end a row, the same for all rows, or integers ``[rows, k]`` where -1 is none. The one that
        ended a row is part of the text.
      slots: tokens to allocate per row; None fits. At least prompt + max_new_tokens + 1, and num_draft more, or 16 if
        that is more and rounds adapt.
      logprobs: return the log-probabilities of emitted tokens; another program.
      top_logprobs: how many of the likeliest tokens of each place to return, with ``logprobs``.
      fixed: every round takes all drafts. By default rounds take as many as pay, none if none do. Then, at temperatures
        above 0, which of the target's texts a seed gives depends on the other rows and on the machine's speed, unless
        the rule is ``coupled``.
      costs: floats, the time of a round of 0, half and all drafts, over that of a plain round; of 0 and all for a
        drafter that is ``sparse``. For one that ``cuts``: of a plain round, and of rounds that draft all and propose
        none, half and all. For trees: of 0 drafts, of as many as a path has, and of all. None measures them, once for
        each target, drafter and batch; under ``jit`` it takes each draft for a tenth of a plain round.

    Returns:
      Tokens, lengths and statistics of each row.

    Raises:
      ValueError, TypeError: before anything compiles. The message says which argument is wrong, what is allowed, and
        what to do.
    """
    check_rule(verify, drafter)
    prompt_bs, request, static = lay_out(
        target, drafter, prompts, lengths, sampling, max_new_tokens, stop_tokens, slots, logprobs, top_logprobs,
        fixed, costs,
    )  # fmt: skip
    static |= {"classes": classes_key(target, drafter), "verify": verify}
    with platform_of((target, prompt_bs, request)):
        if request.cost_bw is not None and costs is None and is_known((target, prompt_bs, request, drafter)):
            request = with_costs(request, costs_of_generate(target, prompt_bs, request, drafter, static))
        return generate_program(target, prompt_bs, request, drafter, **static)


def prefill(
    target: LanguageModel,
    prompts: Prompts,
    lengths: ArrayLike | None = None,
    *,
    drafter: Drafter | None = None,
    sampling: Sampling = Sampling(),
    max_new_tokens: ArrayLike,
    stop_tokens: ArrayLike | tuple[int, ...] = (),
    slots: int | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    fixed: bool = False,
    costs: ArrayLike | None = None,
) -> State:
    """Reads prompts into the caches, for loops of one's own around ``step`` or ``run``.

    The arguments are ``generate``'s, and so is what is raised.
    """
    prompt_bs, request, static = lay_out(
        target, drafter, prompts, lengths, sampling, max_new_tokens, stop_tokens, slots, logprobs, top_logprobs,
        fixed, costs,
    )  # fmt: skip
    static |= {"classes": classes_key(target, drafter), "assumed": costs is None and request.cost_bw is not None}
    with platform_of((target, prompt_bs, request)):
        return prefill_program(target, prompt_bs, request, drafter, **static)


def step(
    target: LanguageModel, state: State, *, drafter: Drafter | None = None, verify: VerifyRule = verify_lib.block
) -> State:
    """Runs one round and returns the next state. Pure; jit it with ``state`` donated, or call ``run``.

    Args:
      target: the model that ``state`` was made with.
      state: from ``prefill`` or an earlier round.
      drafter: the drafter that ``state`` was made with.
      verify: a rule of ``specjax.verify``.

    Raises:
      ValueError, TypeError: the drafter is not the state's, or a model, drafter or rule breaks its contract.
    """
    check_rule(verify, drafter)

    def one(target: LanguageModel, state: State, drafter: Drafter | None) -> State:
        if state.adapt is None:
            return round_lib.one_round(target, state, drafter, verify)
        return run_rounds(target, state, drafter, jnp.int32(1), verify, False)

    return by_rows(one, (WHOLE, ROWS, WHOLE), ROWS)(target, state, drafter)


def run(
    target: LanguageModel,
    state: State,
    *,
    drafter: Drafter | None = None,
    verify: VerifyRule = verify_lib.block,
    rounds: int | None = None,
) -> State:
    """Runs rounds until every row is done, in one compiled loop; ``state`` is donated and must not be used again.

    Args:
      target, state, drafter, verify: as for ``step``.
      rounds: the most rounds to run; None runs until all rows are done. On a GPU the host waits after each round, or
        after 4 if 4 divides ``rounds`` or it is None.

    Raises:
      ValueError, TypeError: as for ``step``, or ``rounds`` is no integer of at least 1.
    """
    check_rule(verify, drafter)
    if rounds is not None:
        _check_rounds(rounds)
    # The limit is traced: of numbers that 4 divides each has the same program, and of the others; None has a third.
    limit = None if rounds is None else jnp.int32(rounds)
    options = {"classes": classes_key(target, drafter), "verify": verify, "blocks": (rounds or 0) % BLOCK == 0}
    with platform_of((target, state)):
        if state.assumed and is_known((target, state, drafter)):
            cost_w = costs_of_run(target, state, drafter, limit, options)
            state = dataclasses.replace(state, request=with_costs(state.request, cost_w))
        return rounds_program(target, state, drafter, limit, **options)


def _check_rounds(rounds: Any) -> None:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds < 2**31:
        raise ValueError(f"rounds is {rounds!r}; give an integer of at least 1 and below 2**31")


def extend(
    target: LanguageModel,
    state: State,
    tokens: Prompts,
    lengths: ArrayLike | None = None,
    *,
    drafter: Drafter | None = None,
    max_new_tokens: ArrayLike,
) -> State:
    """Adds tokens to rows, such as the next turn of a conversation, and lets these rows go on.

    The history stays in the caches and is not read again. What is there counts as prompt from now on. ``state`` is
    donated and must not be used again.

    Args:
      target: the model that ``state`` was made with.
      state: from ``prefill`` or a round. Rows may be done or still running.
      tokens: what follows each row's end: a sequence of sequences of token ids, some of which may be empty; or integers
        ``[rows, width]``, right-padded.
      lengths: integers ``[rows]``, 0 .. width; a row of 0 stays as it is.
      drafter: the drafter that ``state`` was made with.
      max_new_tokens: the most tokens that an extended row emits from now on, an integer or one per row. Under ``jit``
        nothing checks that all fits: each row, also one of length 0, needs ``width`` free slots.

    Raises:
      ValueError, TypeError: as for ``generate``; or the tokens and ``max_new_tokens`` do not fit into the slots of
        ``state``.
    """
    new_bt, count_b, limit_b, chunk = lay_out_more(target, drafter, state, tokens, lengths, max_new_tokens)
    classes = classes_key(target, drafter)
    with platform_of((target, state)):
        return extend_program(target, state, new_bt, count_b, limit_b, drafter, classes=classes, chunk=chunk)


def stream(
    target: LanguageModel,
    prompts: Prompts,
    lengths: ArrayLike | None = None,
    *,
    rounds: int = 1,
    drafter: Drafter | None = None,
    verify: VerifyRule = verify_lib.block,
    **options: Any,
) -> Iterator[Generation]:
    """Like ``generate``, but yields the generation so far, as NumPy arrays, after every few rounds.

    Args:
      rounds: rounds between two yields, at least 1: one return to the host each.
      options: the other arguments of ``prefill``. The rest is as for ``generate``.

    Yields:
      The generation so far; the last one is what ``generate`` returns with ``fixed=True`` or ``costs``. Else rounds may
      take other widths, since costs are measured after the prompt is read.

    Raises:
      ValueError, TypeError: as for ``generate``, when it is called rather than at the first yield.
    """
    _check_rounds(rounds)
    check_rule(verify, drafter)
    state = prefill(target, prompts, lengths, drafter=drafter, **options)
    return _stream(target, state, drafter, verify, rounds)


def _stream(
    target: LanguageModel, state: State, drafter: Drafter | None, verify: VerifyRule, rounds: int
) -> Iterator[Generation]:
    # Reading done_b waits for the device; it is the one return to the host for each yield.
    while not gathered(state.done_b).all():
        state = run(target, state, drafter=drafter, verify=verify, rounds=rounds)
        yield gathered(state.generation)


def lower(
    target: LanguageModel,
    prompts: Prompts,
    *,
    mesh: Mesh,
    drafter: Drafter | None = None,
    verify: VerifyRule = verify_lib.block,
    sampling: Sampling = Sampling(),
    max_new_tokens: ArrayLike,
    slots: int | None = None,
) -> jax.stages.Lowered:
    """Returns ``generate``'s program with ``fixed=True`` before it is compiled. The devices need not exist.

    Args:
      target, drafter: as for ``generate``. Their arrays may be ``jax.ShapeDtypeStruct`` with a sharding on ``mesh``.
      mesh: the devices to compile for.
      prompts, verify, sampling, max_new_tokens, slots: as for ``generate``.

    Raises:
      ValueError, TypeError: as for ``generate``.
    """
    check_rule(verify, drafter)
    prompt_bs, request, static = lay_out(target, drafter, prompts, None, sampling, max_new_tokens, (), slots)
    place = NamedSharding(mesh, WHOLE)
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    prompt_bs, request = jax.tree.map(abstract, (prompt_bs, request))
    classes = classes_key(target, drafter)
    with jax.set_mesh(mesh):
        return generate_program.lower(target, prompt_bs, request, drafter, classes=classes, verify=verify, **static)
