"""Models that cannot be adapted honestly: ``adapt`` or ``check_model`` says in words which clause they break."""

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign import Decoder, empty

import specjax

# What a trace of one pass shows: ``adapt`` refuses.


class HoldsCache(nnx.Module):
    """As flax's own attention with ``decode=True``."""

    def __init__(self):
        self.model, self.cached = Decoder(), nnx.Cache(jnp.zeros((1, 4)))

    def __call__(self, tokens, positions, cache, mask):
        return self.model(tokens, positions, cache, mask)


class Counts(HoldsCache):
    """Holds how many tokens it has read."""

    def __init__(self):
        self.model, self.read = Decoder(), nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, tokens, positions, cache, mask):
        self.read[...] += tokens.shape[1]
        return self.model(tokens, positions, cache, mask)


def changed(change):
    """Returns a call that changes what the model returns."""
    return lambda model, *args: change(*model(*args))


def assigns_to_params(params, tokens, positions, cache, mask):
    params["last"] = tokens[:, 0]
    return jax.nn.one_hot(tokens, 5) + params["bias"], cache


def assigns_to_the_cache_alone(model, tokens, positions, cache, mask):
    logits, cache["layer_0"] = model(tokens, positions, cache, mask)
    return logits


def unmappable(model, *args):
    logits, cache = model(*args)
    shape = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    return jax.pure_callback(lambda x: x, shape, logits), cache


def empty_with(name, array):
    """Returns a function of empty caches with one more array."""
    return lambda rows, slots: {**empty(rows, slots), name: array(rows, slots)}


def with_more(model, tokens, positions, cache, mask):
    layers = {name: layer for name, layer in cache.items() if name.startswith("layer")}
    logits, layers = model(tokens, positions, layers, mask)
    return logits, {**cache, **layers}


def adapt(model=None, cache=empty, call=None, **settings):
    return specjax.adapt(Decoder() if model is None else model, cache, call=call, **settings)


RING = "rejected drafts overwrite what"
REFUSED = {
    "no cache returned": (lambda: adapt(call=changed(lambda logits, cache: logits)), r"return \(logits, cache\)"),
    "an Output": (
        lambda: adapt(call=changed(lambda logits, cache: specjax.Output(logits, (), cache))),
        r"a pass returned a Output of 3; return \(logits, cache\)",
    ),
    "assigns to the cache alone": (lambda: adapt(call=assigns_to_the_cache_alone), r"return \(logits, cache\)"),
    "the last position alone": (
        lambda: adapt(call=changed(lambda logits, cache: (logits[:, -1:], cache))),
        r"returned logits of \(1, 1, 13\) and float32; return the logits of every place",
    ),
    "the last position alone, without its axis": (
        lambda: adapt(call=changed(lambda logits, cache: (logits[:, -1], cache)), way="scratch"),
        "not of the last one alone",
    ),
    "states in a list": (
        lambda: adapt(call=changed(lambda logits, cache: (logits, cache, [logits]))),
        "return hidden states by index",
    ),
    "cache of another dtype": (
        lambda: adapt(Decoder(dtype=jnp.bfloat16)),
        r"The model writes bfloat16, and the cache has another dtype: let cache\(rows, slots\) have bfloat16",
    ),
    "cache returned in another dtype": (
        lambda: adapt(call=changed(lambda logits, cache: (logits, jax.tree.map(lambda x: x.astype(jnp.int8), cache)))),
        r"returned a cache with \(1,\) and int8 at \['layer_0'\]\['end_index'\], and was given \(1,\) and int32",
    ),
    "half of the cache": (
        lambda: adapt(call=changed(lambda logits, cache: (logits, {"layer_0": cache["layer_0"]}))),
        "return the whole cache as it was given",
    ),
    "a ring": (lambda: adapt(cache=lambda rows, slots: empty(rows, min(slots, 16))), f"(shorter than the row).*{RING}"),
    "a long ring": (lambda: adapt(cache=lambda rows, slots: empty(rows, min(slots, 1024))), f"for 32768 slots.*{RING}"),
    "a recurrent state": (
        lambda: adapt(cache=empty_with("state", lambda rows, slots: jnp.zeros((rows, 4))), call=with_more),
        "If it is a recurrent state, write the LanguageModel by hand",
    ),
    "slots that all rows share": (
        lambda: adapt(cache=empty_with("shared", lambda rows, slots: jnp.zeros((slots, 4))), call=with_more),
        "which all rows share",
    ),
    "rows in an axis of other things": (
        lambda: adapt(cache=empty_with("flat", lambda rows, slots: jnp.zeros((2 * rows, slots))), call=with_more),
        "give the rows an axis of their own",
    ),
    "index of another name": (
        lambda: adapt(index="cache_index"),
        r"index names 'cache_index', and the cache has \['layer_0'\]\['end_index'\]",
    ),
    "index of floats": (lambda: adapt(index="k"), "which is float32; a write index is an integer"),
    "a cache that is too long": (
        lambda: adapt(cache=lambda rows, slots: empty(rows, [slots][slots // 300])),
        r"cache\(3, 512\) raised IndexError.*max_positions if the model has a limit",
    ),
    "cache in the module": (lambda: adapt(HoldsCache()), "holds a cache in its own state, at cached"),
    "state in the module": (lambda: adapt(Counts()), r"a pass changes the model itself, at \['read'\]"),
    "assigns to its parameters": (
        lambda: adapt({"bias": jnp.zeros((1, 1, 5)), "last": jnp.zeros((1,), jnp.int32)}, call=assigns_to_params),
        r"a pass changes the model itself, at \['last'\]",
    ),
    "cannot be mapped": (
        lambda: adapt(call=unmappable),
        r'cannot be mapped over rows: give way="scratch", and run specjax.check_model',
    ),
    "one index for all rows": (
        lambda: adapt(
            cache=lambda rows, slots: jax.tree.map(lambda x: x[0] if x.ndim == 1 else x, empty(rows, slots)),
            way="indexed",
        ),
        r"needs a write index for each row, and \['layer_0'\]\['end_index'\] is one for all rows",
    ),
    "another way": (lambda: adapt(way="vmap"), "way is 'vmap'; give 'mapped', 'scratch', 'indexed'"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_trace_shows_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda *args: args, "model is a function without arrays; give an nnx module"),
        ({"weight": np.zeros((2,))}, "model is a pytree of parameters and call is None"),
        ({"weight": "w"}, "model is a dict without arrays"),
    ],
)
def test_what_is_no_model_is_refused(model, words):
    with pytest.raises(TypeError, match=words):
        adapt(model)


# What only numbers show: ``check_model`` refuses. All but the last two are faults of real packages.


def at_own_index(layer):
    return layer["end_index"][0]


def called(mask=lambda mask, positions, tokens: mask, positions=lambda positions: positions, start=at_own_index):
    """Returns a pass with another mask, other positions, or another place to write to."""

    def call(model, tokens, position_bt, cache, mask_bts):
        seen = mask(mask_bts, position_bt, tokens)
        at = lambda layer: start(layer) if start is at_own_index else start(layer, tokens)
        states, cache = foreign.run_layers(model, tokens, positions(position_bt), cache, seen, foreign.LAYERS, at)
        return model.head(jnp.tanh(states[-1])), cache

    return call


def whole_block(mask, positions, tokens):
    """Places of a block see each other, later ones included."""
    slots = jnp.arange(mask.shape[-1])[None, None]
    return mask | (slots <= positions[:, -1, None, None])


def window_of_slots(mask, positions, tokens):
    """The window is computed from slots, as if a slot were a position."""
    return mask & (jnp.arange(mask.shape[-1])[None, None] > positions[:, :, None] - 12)


def window_by_shape(mask, positions, tokens):
    """In passes of several places the window is that of a prompt, which starts at slot 0."""
    places = jnp.arange(tokens.shape[1])[None, :, None]
    at = positions[:, :, None] if tokens.shape[1] == 1 else places
    return mask & (jnp.arange(mask.shape[-1])[None, None] > at - 12)


def prompt_at_zero(layer, tokens):
    """Several places are taken for a prompt, which is written at slot 0."""
    return at_own_index(layer) if tokens.shape[1] == 1 else jnp.int32(0)


def ring_of_slots(layer, tokens):
    """Writes at the index modulo a ring that is shorter than the row."""
    return at_own_index(layer) % 24


def own_block(mask, positions, tokens):
    return mask & (jnp.arange(mask.shape[-1])[None, None] >= positions[:, :1, None])


STALE = Decoder(3)
NAMED = {
    "one index for all rows": (lambda: adapt(way="indexed"), "shared index"),
    "blocks that are not causal": (lambda: adapt(call=called(mask=whole_block)), "a block that is not causal"),
    "window by slot, scratch slots": (
        lambda: adapt(call=called(mask=window_of_slots), way="scratch"),
        "a window by slot",
    ),
    "window by shape": (lambda: adapt(call=called(mask=window_by_shape)), "or by the shape of the pass"),
    "prompt by shape": (lambda: adapt(call=called(start=prompt_at_zero)), "prefill by shape"),
    "weights closed over": (
        lambda: adapt(call=lambda model, *args: STALE(*args)),
        "forward must use its argument params",
    ),
    "positions ignored": (
        lambda: adapt(call=called(positions=lambda x: jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape))),
        "positions are ignored or wrong",
    ),
    "positions shifted by the padding": (
        lambda: adapt(call=called(positions=lambda x: x - x[:, :1] // 4)),
        "positions are ignored or wrong",
    ),
    "a ring of slots": (lambda: adapt(call=called(start=ring_of_slots)), "ring overwritten"),
    "the cache is not read": (lambda: adapt(call=called(mask=own_block)), "the cache is not read"),
}


@pytest.mark.parametrize(("make", "words"), NAMED.values(), ids=NAMED)
def test_what_numbers_show_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        specjax.check_model(make(), length=48)
