"""A small decoder as others write them: one write index for all rows, and faults that one may ask for."""

import jax.numpy as jnp
from flax import nnx
from jax import lax, nn

VOCAB, WIDTH, HEADS, LAYERS = 13, 8, 2, 2


def rotated(x_btnh, position_bt):
    x_btnh, half = x_btnh.astype(jnp.float32), x_btnh.shape[-1] // 2
    rate_h = 1.0 / 30.0 ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_bt[:, :, None, None].astype(jnp.float32) * rate_h[None, None, None]
    x, y = x_btnh[..., :half], x_btnh[..., half:]
    return jnp.concatenate([x * jnp.cos(angle) - y * jnp.sin(angle), x * jnp.sin(angle) + y * jnp.cos(angle)], axis=-1)


class Layer(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs, param_dtype=dtype, dtype=dtype)
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs, param_dtype=dtype, dtype=dtype)

    def __call__(self, x, positions, cache, mask, start):
        rows, places, _ = x.shape
        query, key, value = jnp.split(self.qkv(x).reshape(rows, places, HEADS, -1), 3, axis=-1)
        query, key = rotated(query, positions).astype(x.dtype), rotated(key, positions).astype(x.dtype)
        keys = lax.dynamic_update_slice(cache["k"], key, (0, start, 0, 0))
        values = lax.dynamic_update_slice(cache["v"], value, (0, start, 0, 0))
        score = jnp.einsum("btnh,bsnh->bnts", query, keys)
        score = jnp.where(mask[:, None], score, jnp.asarray(-1e30, score.dtype))
        mixed = jnp.einsum("bnts,bsnh->btnh", nn.softmax(score, axis=-1), values).reshape(rows, places, WIDTH)
        return 0.5 * x + 2 * jnp.tanh(self.out(mixed)), {
            "k": keys,
            "v": values,
            "end_index": cache["end_index"] + places,
        }


class Decoder(nnx.Module):
    """``(tokens, positions, cache, attention_mask) -> (logits, cache)``; ``end_index`` is one for all rows."""

    def __init__(self, seed=1, dtype=jnp.float32):
        rngs = nnx.Rngs(seed)
        self.embedder = nnx.Embed(VOCAB, WIDTH, rngs=rngs, param_dtype=dtype, dtype=dtype)
        self.embedder.embedding[...] *= 6  # so that texts depend on all that came before
        self.layers = nnx.List([Layer(rngs, dtype) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs, param_dtype=dtype, dtype=dtype)
        self.head.kernel[...] *= 3

    def __call__(self, tokens, positions, cache, attention_mask):
        logits, cache, _ = states_of(self, tokens, positions, cache, attention_mask)
        return logits, cache


def run_layers(model, tokens, positions, cache, mask, depth, start=lambda layer: layer["end_index"][0]):
    """Returns the states of the first layers, and the cache, other layers' as they are."""
    states, cache = [model.embedder(tokens)], dict(cache)
    for i, layer in enumerate(list(model.layers)[:depth]):
        x, cache[f"layer_{i}"] = layer(states[-1], positions, cache[f"layer_{i}"], mask, start(cache[f"layer_{i}"]))
        states.append(x)
    return states, cache


def states_of(model, tokens, positions, cache, mask):
    """Returns hidden states, too."""
    states, cache = run_layers(model, tokens, positions, cache, mask, LAYERS)
    final = jnp.tanh(states[-1])
    return model.head(final), cache, {**dict(enumerate(states)), -1: final}


def early_exit(model, tokens, positions, cache, mask, depth):
    states, cache = run_layers(model, tokens, positions, cache, mask, depth)
    return model.head(jnp.tanh(states[-1])), cache


def empty(rows, slots, dtype=jnp.float32):
    """Returns an empty cache whose index has the rows' shape, and whose first entry counts."""
    shape = (rows, slots, HEADS, WIDTH // HEADS)
    layer = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "end_index": jnp.zeros((rows,), jnp.int32)}
    return {f"layer_{i}": dict(layer) for i in range(LAYERS)}


def without_cache(model, tokens_bt):
    """Returns the logits of one pass over whole texts."""
    rows, width = tokens_bt.shape
    place = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
    mask = place[:, None, :] <= place[:, :, None]
    return model(jnp.asarray(tokens_bt), place, empty(rows, width), mask)[0]
