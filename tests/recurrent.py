"""A small recurrent language model, with and without attention layers beside its recurrent ones.

A recurrent layer has one state per row, not one entry per token. So a pass keeps the state after each place, and
``commit`` picks the state after the places that stay.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from specjax.types import LanguageModel, Output

TAPS = 3  # a short convolution over the last three places


def draw(key, *shape):
    return 1.5 * jax.random.normal(key, shape) / shape[0] ** 0.5


def init_params(kinds, vocab, width, seed=0):
    """Returns parameters; ``kinds`` has an "r" per recurrent layer and an "a" per attention layer."""
    key, layers = jax.random.key(seed), []
    names = {"r": ("decay", "input", "gate", "out"), "a": ("query", "keys", "values", "out")}
    for i, kind in enumerate(kinds):
        keys = jax.random.split(jax.random.fold_in(key, i), 7)
        layer = {name: draw(k, width, width) for name, k in zip(names[kind], keys[:4], strict=True)}
        if kind == "r":
            layer["taps"] = draw(keys[4], TAPS, width)
        layers.append(layer | {"up": draw(keys[5], width, 2 * width), "down": draw(keys[6], 2 * width, width)})
    table, head = jax.random.split(jax.random.fold_in(key, len(kinds)))
    return {"table": jax.random.normal(table, (vocab, width)), "layers": layers, "head": draw(head, width, vocab)}


def norm(x):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def recurrence(layer, x_btd, stored):
    """Returns the layer's output, and the states before the first place and after each: ``[b, t+1, ..]``.

    h_t = a_t h_{t-1} + (1 - a_t) tanh(convolution of the inputs), where a_t depends on the input.
    """
    state_bd, window_bkd = stored
    new_btd, decay_btd = x_btd @ layer["input"], jax.nn.sigmoid(x_btd @ layer["decay"])

    def advance(carry, inputs):
        state_bd, window_bkd = carry
        new_bd, decay_bd = inputs
        window_bkd = jnp.concatenate([window_bkd[:, 1:], new_bd[:, None]], axis=1)
        mixed_bd = jnp.tanh((window_bkd * layer["taps"][None]).sum(axis=1))
        state_bd = decay_bd * state_bd + (1 - decay_bd) * mixed_bd
        return (state_bd, window_bkd), (state_bd, window_bkd)

    inputs = jax.tree.map(lambda x: x.swapaxes(0, 1), (new_btd, decay_btd))
    _, after = lax.scan(advance, (state_bd, window_bkd), inputs)
    states = jax.tree.map(lambda first, x: jnp.concatenate([first[None], x]).swapaxes(0, 1), stored, after)
    return (states[0][:, 1:] * jax.nn.silu(x_btd @ layer["gate"])) @ layer["out"], states


def attention(layer, x_btd, stored, feed):
    """One attention head over all slots up to each place."""

    def write(old_bsd, new_btd):
        return jax.vmap(lambda old, new, at: lax.dynamic_update_slice(old, new, (at, 0)))(
            old_bsd, new_btd, feed.start_b
        )

    keys_bsd, values_bsd = write(stored[0], x_btd @ layer["keys"]), write(stored[1], x_btd @ layer["values"])
    scores_bts = jnp.einsum("btd,bsd->bts", x_btd @ layer["query"], keys_bsd) / x_btd.shape[-1] ** 0.5
    seen_bts = jnp.arange(keys_bsd.shape[1])[None, None] <= feed.position_bt[..., None]
    weights_bts = jax.nn.softmax(jnp.where(seen_bts, scores_bts, -jnp.inf), axis=-1)
    return jnp.einsum("bts,bsd->btd", weights_bts, values_bsd) @ layer["out"], (keys_bsd, values_bsd)


def embed(params, tokens_bt):
    return params["table"][tokens_bt]


def unembed(params, x_btd):
    return x_btd @ params["head"]


@functools.cache
def functions(kinds, width):
    """Returns ``forward``, ``init_cache`` and ``commit``, the same objects for the same architecture."""

    def init_cache(rows, slots):
        return tuple(
            (jnp.zeros((rows, width)), jnp.zeros((rows, TAPS, width)))
            if kind == "r"
            else (jnp.zeros((rows, slots, width)), jnp.zeros((rows, slots, width)))
            for kind in kinds
        )

    def forward(params, feed, cache, capture=()):
        x_btd, kept = embed(params, feed.tokens_bt), []
        states = [x_btd]
        for kind, layer, stored in zip(kinds, params["layers"], cache, strict=True):
            if kind == "r":
                y_btd, stored = recurrence(layer, norm(x_btd), stored)
            else:
                y_btd, stored = attention(layer, norm(x_btd), stored, feed)
            x_btd = x_btd + y_btd
            x_btd = x_btd + jax.nn.silu(norm(x_btd) @ layer["up"]) @ layer["down"]
            kept.append(stored)
            states.append(x_btd)
        states.append(norm(x_btd))
        return Output(unembed(params, states[-1]), tuple(states[i] for i in capture), tuple(kept))

    def commit(cache, feed, kept_b):
        del feed
        return tuple(
            jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), kept_b], stored) if kind == "r" else stored
            for kind, stored in zip(kinds, cache, strict=True)
        )

    return forward, init_cache, commit


def recurrent_model(kinds, params):
    """Returns the model as a ``LanguageModel``."""
    vocab, width = params["table"].shape
    forward, init_cache, commit = functions(kinds, width)
    return LanguageModel(
        params=params,
        forward=forward,
        init_cache=init_cache,
        vocab_size=vocab,
        commit=commit if "r" in kinds else None,
        embed=embed,
        unembed=unembed,
        num_layers=len(kinds),
    )


def keeps_all(cache, feed, kept_b):
    """A wrong ``commit`` of recurrent layers: the state after all places that were fed."""
    del kept_b
    return jax.tree.map(lambda x: x[:, feed.tokens_bt.shape[1]], cache)
