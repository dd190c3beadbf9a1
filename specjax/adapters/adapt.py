"""``adapt``: a model of the common signature becomes a ``LanguageModel``."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.adapters import ways
from specjax.adapters.called import Bound, Call, Caller, invoked
from specjax.adapters.layout import InitForeign, Layout
from specjax.adapters.same import Same
from specjax.types import Feed, InitCache, LanguageModel, Output, whole_feed

WAYS = MappingProxyType({"mapped": ways.mapped, "scratch": ways.scratch, "indexed": ways.indexed})


def adapt(
    model: Any,
    cache: InitForeign,
    *,
    call: Call | None = None,
    way: str = "mapped",
    index: str | Sequence[str] | None = None,
    max_positions: int | None = None,
    embed: Callable[[Any, Array], Array] | None = None,
    unembed: Callable[[Any, Array], Array] | None = None,
    early_exit: Call | None = None,
) -> LanguageModel:
    """Returns a model of the common signature ``(tokens, positions, cache, attention_mask) -> (logits, cache)``.

    Run ``specjax.check_model`` on the result once: a model can break the contract without an error.

    To adapt a model of the same architecture again, such as after an update of its weights, compiles nothing.
    Functions count as the same if their code, what they close over and the globals that they read are.
    ``with_params`` of the result does the same without a look at the functions.

    Args:
      model: an ``nnx`` module, or a pytree of parameters, whose leaves become ``LanguageModel.params``.
      cache: ``cache(rows, slots)`` returns the model's own empty cache, in the dtypes that a pass writes. Each array
        has an axis of rows and one of slots, anywhere, except write indices. Only shapes are looked at: slots that no
        pass has written are zero.
      call: ``call(model, tokens, positions, cache, attention_mask)``, with the ``nnx`` module or the parameters, for
        models that are not called like this themselves. It returns ``(logits, cache)`` or ``(logits, cache, states)``:
        logits ``[b, t, v]`` of all places; the whole cache; and hidden states ``[b, t, d]`` by index, such as
        ``{0: embedding, 1: first layer, ..., -1: after the final norm}``, for draft heads. States that no drafter
        asks for cost nothing. ``tokens`` and ``positions`` are int32 ``[b, t]``, and ``attention_mask`` is bool
        ``[b, t, slots]``, true at the slots that a place sees, its own included.
      way: how rows at different places go through the model.

        - "mapped": ``jax.vmap`` over rows, if there are several. The model sees one row at a time, whose slots are its
          positions. Right for every model that is right for one row and that ``vmap`` can map.
        - "scratch": all rows write at the same slots, after every row, and the library moves what they wrote. For
          models that ``vmap`` cannot map. The model must follow ``positions`` and ``attention_mask`` alone: a window
          that is computed from slots is wrong.
        - "indexed": the cache has a write index for each row, and the model writes each row at its own. An index of
          shape ``[b]`` is not enough: many models read its first entry alone.
      index: names of the cache's write indices (keys or fields), which are set before each pass. None: all integer
        arrays without an axis of slots.
      max_positions: the longest sequence that the model can represent, or None.
      embed: ``embed(model, tokens) -> [b, t, d]``, and
      unembed: ``unembed(model, states) -> logits``, as in ``LanguageModel``, for draft heads that share them.
      early_exit: ``early_exit(model, tokens, positions, cache, attention_mask, depth) -> (logits, cache)``, a pass
        through the first ``depth`` layers, the final norm and the output head. It returns the whole cache, other layers
        as they are. ``EarlyExitDrafter`` then drafts with the model itself, so that new weights never leave a draft
        behind.

    Raises:
      TypeError: ``model`` holds no arrays, or is a function.
      ValueError: a pass does not return what it should, or changes the model, or the cache has no axis for rows or
        slots. Passes are traced for it, not computed.
    """
    if way not in WAYS:
        raise ValueError(f"way is {way!r}; give {', '.join(map(repr, WAYS))}")
    graph, params = _split(model, call)
    names = (index,) if isinstance(index, str) else index
    layout = Layout.of(cache, names, max_positions)
    if way == "indexed":
        _check_indexed(layout)
    given = (call or invoked, embed, unembed, early_exit)
    functions = _functions(Same(graph), layout, way, *(None if each is None else Same(each) for each in given))
    found = _found(functions, jax.tree.structure(params), tuple(_spec(x) for x in jax.tree.leaves(params)))
    return LanguageModel(
        params=params,
        forward=functions.forward,
        init_cache=_init(layout, way),
        vocab_size=found.vocab_size,
        max_positions=max_positions,
        embed=functions.embed,
        unembed=functions.unembed,
        early_exit=functions.early_exit,
        num_layers=found.num_layers,
    )


def _split(model: Any, call: Call | None) -> tuple[Any, Any]:
    """Returns the structure of an ``nnx`` module, or None, and the parameters."""
    if isinstance(model, nnx.Module):
        graph, params = nnx.split(model)
        held = nnx.to_flat_state(params)
        if caches := [path for path, x in held if isinstance(x, nnx.Cache)]:
            raise ValueError(
                f"the model holds a cache in its own state, at {'.'.join(map(str, caches[0]))}; adapt a model that "
                "takes its cache as an argument and returns it"
            )
        return graph, params
    leaves = jax.tree.leaves(model)
    if not leaves or not all(isinstance(x, jax.Array) or hasattr(x, "__array__") for x in leaves):
        raise TypeError(
            f"model is a {type(model).__name__} without arrays; give an nnx module, or parameters with call=function"
        )
    if call is None and not callable(model):
        raise TypeError(
            "model is a pytree of parameters and call is None; give "
            "call(params, tokens, positions, cache, attention_mask) -> (logits, cache)"
        )
    return None, model


def _check_indexed(layout: Layout) -> None:
    indices = [leaf for leaf in layout.leaves if leaf.index]
    shared = [leaf for leaf in indices if leaf.rows is None]
    if shared or not indices:
        what = f"{shared[0].name} is one for all rows" if shared else "the cache has none"
        raise ValueError(f'way="indexed" needs a write index for each row, and {what}; give way="mapped" or "scratch"')


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _Functions:
    """The functions of an adapted architecture; made once for each, so that they are the same objects."""

    caller: Caller
    way: str
    forward: Any
    embed: Any
    unembed: Any
    early_exit: Any


@functools.lru_cache(maxsize=256)
def _init(layout: Layout, way: str) -> InitCache:
    """Returns ``init_cache`` of a layout."""

    def init_cache(rows: int, slots: int) -> tuple[Array, ...]:
        return layout.init(rows, slots + ways.SCRATCH if way == "scratch" else slots)

    return init_cache


@functools.lru_cache(maxsize=256)
def _functions(
    graph: Same, layout: Layout, way: str, call: Same, embed: Same | None, unembed: Same | None, early: Same | None
) -> _Functions:
    bound, run = Bound(graph.value), WAYS[way]
    caller = Caller(bound, layout, call.value)

    def forward(params: Any, feed: Feed, cache: Any, capture: tuple[int, ...] = ()) -> Output:
        logits_btv, cache, states = run(caller, params, feed, cache)
        if lacking := [i for i in capture if i not in states]:
            raise ValueError(
                f"the drafter wants the hidden states {tuple(capture)}, and the model returns {tuple(states)}: let "
                f"call return state {lacking[0]} too, or give another drafter"
            )
        return Output(logits_btv, tuple(states[i] for i in capture), cache)

    def exit_early(params: Any, feed: Feed, cache: Any, depth: int) -> Output:
        assert early is not None
        function = functools.partial(_at_depth, early.value, depth)
        logits_btv, cache, _ = run(dataclasses.replace(caller, function=function), params, feed, cache)
        return Output(logits_btv, (), cache)

    return _Functions(
        caller,
        way,
        forward,
        None if embed is None else functools.partial(bound, embed.value),
        None if unembed is None else functools.partial(bound, unembed.value),
        None if early is None else exit_early,
    )


def _at_depth(early_exit: Call, depth: int, *args: Any) -> Any:
    return early_exit(*args, depth)


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a trace of a pass says.

    Attributes:
      vocab_size: size of the logits.
      num_layers: the number of layers, if the model returns the states of all.
    """

    vocab_size: int
    num_layers: int | None


@functools.lru_cache(maxsize=256)
def _found(functions: _Functions, tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> _Found:
    """Traces a pass of 3 places over 2 rows.

    Raises:
      ValueError: the pass failed, or returns what it should not.
    """
    caller, params = functions.caller, jax.tree.unflatten(tree, leaves)
    feed = whole_feed(jnp.zeros((2, 3), jnp.int32))
    init = _init(caller.layout, functions.way)

    def traced(way: str, dtype: Any = None) -> Any:
        cache = jax.eval_shape(lambda: init(2, 16))
        if dtype is not None:
            cache = tuple(
                jax.ShapeDtypeStruct(x.shape, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in cache
            )
        return jax.eval_shape(functools.partial(WAYS[way], caller), params, feed, cache)

    try:
        logits, _, states = traced(functions.way)
    except Exception as error:
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"the model cannot be adapted: {said}{_cure(functions.way, traced, leaves, error)}") from error
    layers = max(states, default=-1)
    whole = -1 in states and layers > 0 and all(i in states for i in range(layers + 1))
    return _Found(logits.shape[-1], layers if whole else None)


def _cure(way: str, traced: Callable[..., Any], leaves: Sequence[Any], error: Exception) -> str:
    """Returns what to do about a pass that failed, if another one does not."""

    def works(*args: Any) -> bool:
        try:
            traced(*args)
        except Exception:
            return False
        return True

    floating = {str(x.dtype) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}
    for dtype in sorted(floating | {"bfloat16", "float32"}):
        if works(way, dtype):
            return f". The model writes {dtype}, and the cache has another dtype: let cache(rows, slots) have {dtype}"
    if way == "mapped" and works("scratch"):
        return '. The model cannot be mapped over rows: give way="scratch", and run specjax.check_model'
    return ""
