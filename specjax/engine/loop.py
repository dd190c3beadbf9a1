"""Speculative decoding in one compiled loop: draft, one target pass, verify, write, repeat.

Rows advance by their own counts and never look at each other's tokens. With ``fixed=True`` what a row emits depends on
its prompt, its sampling parameters and its seed alone; else also on the widths of rounds, which all rows share
(``engine.adapt``).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from specjax import verify as verify_lib
from specjax.engine import round as round_lib
from specjax.engine.adapt import UNOBSERVED, places_past, widths_of
from specjax.engine.costs import key_of, measured
from specjax.engine.kept import Kept
from specjax.engine.request import Prompts, Request, check_rule, is_known, lay_out, lay_out_more
from specjax.engine.state import State
from specjax.platforms import by_platform, platform_of
from specjax.sampling import Sampling
from specjax.sharding import ROWS, WHOLE, by_rows, gathered
from specjax.types import Drafter, Generation, LanguageModel, VerifyRule


def classes_key(target: LanguageModel, drafter: Drafter | None) -> int:
    """Returns a number that differs where classes do, which keeps programs apart that ``jit`` alone confuses.

    jaxlib compares two trees of dataclasses by their fields, whatever their classes: now and then, where hashes share a
    bucket, ``jit`` hands a drafter the program of another class with equal fields, say of its parent. Hashes do heed
    classes.
    """
    return hash(jax.tree.structure((target, drafter)))


BLOCK = 4
"""Rounds between two looks at whether all rows are done, on a GPU, unless ``run`` is asked for a number in between.

A GPU's host reads the condition of such a loop from the device and waits for it. A loop of known length needs no such
wait. So a GPU runs blocks of rounds, in which rows that are done rest. Up to ``BLOCK - 1`` rounds at the end of all
rows are in vain, which is why a block is short."""


def _rounds(
    target: LanguageModel, state: State, drafter: Drafter | None, limit: Array | None, verify: VerifyRule, blocks: bool
) -> State:
    """Runs rounds until every row is done, or ``limit`` of them. ``blocks``: the limit is None or has whole blocks."""

    def unfinished(carry: _Carry) -> Array:
        count, state = carry
        running = ~jnp.all(state.done_b)
        return running if limit is None else running & (count < limit)

    def rounds(width: int | None) -> Callable[[_Carry], _Carry]:
        # Jitted, so that its two users share one trace. A function of this call alone, so that no other call with equal
        # trees gets it (``classes_key``).
        one_round = jax.jit(lambda state: round_lib.one_round(target, state, drafter, verify, width))

        def one(count: Array, state: State) -> _Carry:
            return count + 1, one_round(state)

        def block(count: Array, state: State) -> _Carry:
            return count + BLOCK, lax.fori_loop(0, BLOCK, lambda _, state: one_round(state), state)

        return lambda carry: by_platform(*carry, cuda=block, rocm=block, default=one) if blocks else one(*carry)

    carry = (jnp.int32(0), state)
    if state.adapt is None or drafter is None:
        return lax.while_loop(unfinished, rounds(None), carry)[1]

    # One loop for each width, which runs while that width is chosen. Loops, since lax.switch would copy all caches in
    # all of its branches.
    def full(state: State) -> Array | bool:
        # Whether the features of further plain rounds would find no place. Tokens alone can wait for the next trial.
        assert state.adapt is not None
        return jnp.max(state.adapt.unobserved_b) > UNOBSERVED - BLOCK if state.adapt.features else False

    def body(carry: _Carry) -> _Carry:
        for number, width in enumerate(widths_of(drafter)):

            def chosen(carry: _Carry, number: int = number) -> Array:
                adapt = carry[1].adapt
                assert adapt is not None
                chosen = unfinished(carry) & (adapt.width == number)
                return chosen if number else chosen & ~jnp.asarray(full(carry[1]))

            carry = lax.while_loop(chosen, rounds(width), carry)
            if number == 0:
                count, state = carry
                assert state.adapt is not None
                due = full(state) | (state.adapt.width > 0)
                carry = count, round_lib.observe_plain(target, state, drafter, due)
        return carry

    return lax.while_loop(unfinished, body, carry)[1]


_MEASURED_PROMPT = 256
"""The most tokens of a prompt that ``generate`` reads when it measures the costs of rounds."""

_Carry = tuple[Array, State]
"""The number of rounds so far, and the state."""


@Kept
@functools.partial(jax.jit, static_argnames=("classes", "verify", "chunk", "logprobs", "top_logprobs"))
def _generate_jit(target, prompt_bs, request, drafter, *, classes, verify, **static):
    del classes  # only a part of the key under which jit keeps the program

    # Prompts and rounds are one program, so nothing returns to the host between them.
    def run(target, prompt_bs, request, drafter):
        state = round_lib.start(target, prompt_bs, request, drafter, **static)
        return _rounds(target, state, drafter, None, verify, True).generation

    return by_rows(run, (WHOLE, ROWS, ROWS, WHOLE), ROWS)(target, prompt_bs, request, drafter)


@Kept
@functools.partial(jax.jit, static_argnames=("classes", "chunk", "logprobs", "top_logprobs", "assumed"))
def _prefill_jit(target, prompt_bs, request, drafter, *, classes, **static):
    del classes
    run = functools.partial(round_lib.start, **static)
    return by_rows(run, (WHOLE, ROWS, ROWS, WHOLE), ROWS)(target, prompt_bs, request, drafter)


@Kept
@functools.partial(jax.jit, static_argnames=("classes", "chunk"), donate_argnames=("state",))
def _extend_jit(target, state, new_bt, count_b, new_limit_b, drafter, *, classes, chunk):
    del classes
    run = functools.partial(round_lib.extend, chunk=chunk)
    specs = (WHOLE, ROWS, ROWS, ROWS, ROWS, WHOLE)
    return by_rows(run, specs, ROWS)(target, state, new_bt, count_b, new_limit_b, drafter)


@Kept
@functools.partial(jax.jit, static_argnames=("classes", "verify", "blocks"), donate_argnames=("state",))
def _rounds_jit(target, state, drafter, limit, *, classes, verify, blocks):
    del classes
    run = functools.partial(_rounds, verify=verify, blocks=blocks)
    return by_rows(run, (WHOLE, ROWS, WHOLE, WHOLE), ROWS)(target, state, drafter, limit)


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
        drafter that is ``sparse``. None measures them, once for each target, drafter and batch; under ``jit`` it takes
        each draft for a tenth of a plain round.

    Returns:
      Tokens, lengths and statistics of each row.

    Raises:
      ValueError, TypeError: before anything compiles. The message says which argument is wrong, what is allowed, and
        what to do.
    """
    check_rule(verify)
    prompt_bs, request, static = lay_out(
        target, drafter, prompts, lengths, sampling, max_new_tokens, stop_tokens, slots, logprobs, top_logprobs,
        fixed, costs,
    )  # fmt: skip
    static |= {"classes": classes_key(target, drafter), "verify": verify}
    with platform_of((target, prompt_bs, request)):
        if request.cost_bw is not None and costs is None and is_known((target, prompt_bs, request, drafter)):
            request = _with_costs(request, _costs_of_generate(target, prompt_bs, request, drafter, static))
        return _generate_jit(target, prompt_bs, request, drafter, **static)


def _with_costs(request: Request, cost_w: np.ndarray) -> Request:
    assert request.cost_bw is not None
    return dataclasses.replace(request, cost_bw=_filled(request.cost_bw, cost_w))


def _filled(array: Array, values: Any) -> Array:
    """Returns the values in the array's shape and at its place: ``jit`` compiles a program for each kind of place."""
    filled = np.broadcast_to(np.asarray(values, array.dtype), array.shape)
    return jax.device_put(filled, array.sharding if array.committed else None)


def _program(classes: int, verify: VerifyRule, rows: int, *models: Any) -> Hashable:
    """Returns what differs where the costs of rounds do, in this process."""
    leaves, structure = jax.tree.flatten(models)
    mesh = jax.sharding.get_abstract_mesh()
    return classes, verify, rows, structure, mesh, tuple((jax.typeof(x), getattr(x, "sharding", None)) for x in leaves)


def _costs_of_generate(target, prompt_bs, request, drafter, static) -> np.ndarray:
    """Returns the costs of rounds, measured by runs of the very program that is asked for, so nothing else compiles."""
    slots, widths = prompt_bs.shape[1], widths_of(drafter)
    # Of a long prompt a part is enough: the program reads as many chunks as there are.
    length_b = np.minimum(gathered(request.prompt_length_b), _MEASURED_PROMPT)
    same_bs = _filled(prompt_bs, 1)  # n-grams find a copy in each round

    def run(cost_w: np.ndarray, new: int) -> tuple[float, int]:
        asked = dataclasses.replace(
            _with_costs(request, cost_w),
            prompt_length_b=_filled(request.prompt_length_b, length_b),
            limit_b=_filled(request.limit_b, length_b + new),
            stop_tokens_bk=_filled(request.stop_tokens_bk, -1),
        )
        start = time.perf_counter()
        stats = gathered(_generate_jit(target, same_bs, asked, drafter, **static).stats)
        return time.perf_counter() - start, int(stats.rounds.max())

    room = slots - int(length_b.max()) - places_past(widths[-1], True) - 1
    trees = target, drafter, request.prompt_length_b  # times hardly depend on the slots
    program = _program(static["classes"], static["verify"], prompt_bs.shape[0], target, drafter)
    return measured(program, lambda: key_of(widths, *trees), widths, lambda: room, run)


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
        return _prefill_jit(target, prompt_bs, request, drafter, **static)


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
    check_rule(verify)

    def one(target: LanguageModel, state: State, drafter: Drafter | None) -> State:
        if state.adapt is None:
            return round_lib.one_round(target, state, drafter, verify)
        return _rounds(target, state, drafter, jnp.int32(1), verify, False)

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
    check_rule(verify)
    if rounds is not None:
        _check_rounds(rounds)
    # The limit is traced: of numbers that 4 divides each has the same program, and of the others; None has a third.
    limit = None if rounds is None else jnp.int32(rounds)
    options = {"classes": classes_key(target, drafter), "verify": verify, "blocks": (rounds or 0) % BLOCK == 0}
    with platform_of((target, state)):
        if state.assumed and is_known((target, state, drafter)):
            cost_w = _costs_of_run(target, state, drafter, limit, options)
            state = dataclasses.replace(state, request=_with_costs(state.request, cost_w))
        return _rounds_jit(target, state, drafter, limit, **options)


def _costs_of_run(target, state, drafter, limit, options) -> np.ndarray:
    """Returns the costs of rounds, measured by the program that is asked for, on a copy of the state."""
    widths = widths_of(drafter)

    def find_room() -> int:
        slots, longest = state.tokens_bs.shape[1], int(gathered(state.length_b).max())
        return slots - longest - places_past(widths[-1], True) - 1

    def run(cost_w: np.ndarray, new: int) -> tuple[float, int]:
        copy = _restarted(state)
        assert copy.adapt is not None
        request = dataclasses.replace(
            _with_costs(copy.request, cost_w),
            limit_b=_filled(copy.request.limit_b, gathered(state.length_b) + new),
            stop_tokens_bk=_filled(copy.request.stop_tokens_bk, -1),
        )
        width_b = _filled(copy.adapt.width_b, int(np.argmin(cost_w)))
        adapt = dataclasses.replace(copy.adapt, width_b=width_b, rest_b=_filled(copy.adapt.rest_b, 0))
        copy = dataclasses.replace(copy, request=request, adapt=adapt)
        before = gathered(jax.block_until_ready(copy).stats.rounds)
        start = time.perf_counter()
        no_limit = None if limit is None else jnp.int32(2**30)
        after = gathered(_rounds_jit(target, copy, drafter, no_limit, **options).stats.rounds)
        return time.perf_counter() - start, int((after - before).max())

    trees = target, drafter, state.length_b
    program = _program(options["classes"], options["verify"], state.length_b.shape[0], target, drafter)
    return measured(program, lambda: key_of(widths, *trees), widths, find_room, run)


@jax.jit
def _restarted(state: State) -> State:
    """Returns a copy of the state in which all rows run, with tokens that are all alike: n-grams find a copy."""
    # Computed from the state's own arrays. Others could be placed otherwise, and ``run`` would compile once more.
    copy = jax.tree.map(jnp.copy, state)
    return dataclasses.replace(copy, tokens_bs=0 * state.tokens_bs + 1, done_b=state.done_b & False)


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
        return _extend_jit(target, state, new_bt, count_b, limit_b, drafter, classes=classes, chunk=chunk)


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
    check_rule(verify)
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
    check_rule(verify)
    prompt_bs, request, static = lay_out(target, drafter, prompts, None, sampling, max_new_tokens, (), slots)
    place = NamedSharding(mesh, WHOLE)
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    prompt_bs, request = jax.tree.map(abstract, (prompt_bs, request))
    classes = classes_key(target, drafter)
    with jax.set_mesh(mesh):
        return _generate_jit.lower(target, prompt_bs, request, drafter, classes=classes, verify=verify, **static)
